// ranks.cpp: what the ranks of a run tell each other.
#include "cli/ranks.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <fstream>

#include "host/error.h"
#include "kernels/device.h"

namespace {

enum class Kind : int { batch, overflowed, end };

// 64-bit FNV-1a.
void add_bytes(uint64_t& hash, const void* bytes, size_t n) {
  for (size_t i = 0; i < n; i++) hash = (hash ^ static_cast<const unsigned char*>(bytes)[i]) * 0x100000001b3u;
}

constexpr uint64_t NOTHING = 0xcbf29ce484222325u;

uint64_t hash_of_text(const std::string& text) {
  uint64_t hash = NOTHING;
  add_bytes(hash, text.data(), text.size());
  return hash;
}

std::string text_of(const char* path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Of a model file: its size, its header, and 64 places of the weights, so that a large one need not be read for it.
uint64_t hash_of_model(const std::string& path) {
  constexpr uint64_t PLACES = 64, MOST = 1 << 20;
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  const auto size = static_cast<uint64_t>(std::max<std::streamoff>(0, in.tellg()));
  uint64_t hash = hash_of_text(std::to_string(size));
  const auto add = [&](uint64_t at, uint64_t n) {
    std::string bytes(std::min({n, MOST, size - std::min(size, at)}), '\0');
    in.seekg(static_cast<std::streamoff>(at));
    in.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    add_bytes(hash, bytes.data(), bytes.size());
  };
  uint64_t header = 0;
  in.seekg(0);
  in.read(reinterpret_cast<char*>(&header), sizeof header);
  add(0, 8 + std::min(header, MOST));
  for (uint64_t i = 0; i < PLACES; i++) add(size / PLACES * i, 64);
  return hash;
}

std::string host_name() {
  char name[64] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

uint64_t hash_of_machine() {
  return hash_of_text(text_of("/proc/sys/kernel/random/boot_id"));
}

uint64_t hash_of_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof allowed, &allowed);
  uint64_t hash = hash_of_machine();
  add_bytes(hash, &allowed, sizeof allowed);
  return hash;
}

// What each rank has of it, in their order.
template <class T>
std::vector<T> all_of(Ranks& ranks, const T& own) {
  const auto size = static_cast<size_t>(ranks.part().size);
  std::vector<T> all(size);
  all[static_cast<size_t>(ranks.part().rank)] = own;
  ranks.gather(all.data(), std::vector<size_t>(size, sizeof(T)));
  return all;
}

struct Introduction {
  uint64_t order = 0x0102030405060708, build = 0, cores = 0;
  char host[64] = {};
};

template <class T>
[[noreturn]] void refuse(const std::vector<T>& all, const T& other, const char* what) {
  fail("rank %d on %s %s", static_cast<int>(&other - all.data()), other.host, what);
}

}  // namespace

void introduce(Ranks& ranks, Options& options) {
  if (ranks.part().size == 1) return;
  Introduction own;
  own.build = hash_of_text(text_of("/proc/self/exe"));
  own.cores = hash_of_cores();
  std::strcpy(own.host, host_name().c_str());
  const std::vector<Introduction> all = all_of(ranks, own);
  for (const Introduction& other : all) {
    if (ranks.part().rank > 0) break;
    if (other.order != own.order)
      refuse(all, other, "is a machine of another byte order than rank 0's: use machines of one kind");
    if (other.build != own.build)
      refuse(all, other, "runs another build than rank 0: copy the same ./run to all machines");
  }
  const auto sharers = std::count_if(all.begin(), all.end(), [&](const auto& o) { return o.cores == own.cores; });
  if (options.choose_threads) options.threads = std::max(1, options.threads / static_cast<int>(sharers));
}

std::vector<RankMemory> compare_models(Ranks& ranks, const Options& options, const Model& model) {
  if (ranks.part().size > model.config.n_heads && ranks.part().rank == 0)
    fail("%d ranks are more than the %d heads of %s: start at most %d", ranks.part().size, model.config.n_heads,
         model.path.c_str(), model.config.n_heads);
  RankMemory own;
  std::strcpy(own.host, host_name().c_str());
  own.machine = hash_of_machine();
  own.file = ranks.part().size > 1 ? hash_of_model(model.path) : 0;
  own.free_bytes = device_memory_available();
  own.weight_bytes = model.weight_bytes;
  own.threads = options.threads;
  std::vector<RankMemory> all = all_of(ranks, own);
  std::vector<RankMemory> shares = all;
  for (RankMemory& other : shares) {
    if (ranks.part().rank == 0 && other.file != own.file)
      refuse(shares, other, "has another model file than rank 0: copy the same one to all machines");
    other.free_bytes /= static_cast<uint64_t>(
        std::count_if(all.begin(), all.end(), [&](const auto& o) { return o.machine == other.machine; }));
  }
  return shares;
}

// ---- Messages from rank 0.

void send_plan(Ranks& ranks, const Limits& l) {
  if (ranks.part().size == 1) return;
  ranks.send({l.max_tokens, l.max_sequences, l.max_logits, l.context, l.n_blocks, static_cast<int>(l.mla_form)});
}

Limits receive_plan(Ranks& ranks, int threads) {
  const std::vector<int> message = ranks.receive();
  Limits l;
  const int* at = message.data();
  for (int* limit : {&l.max_tokens, &l.max_sequences, &l.max_logits, &l.context, &l.n_blocks}) *limit = *at++;
  l.mla_form = static_cast<MlaForm>(*at);
  l.max_threads = threads;
  return l;
}

void send_batch(Ranks& ranks, const Batch& b) {
  if (ranks.part().size == 1) return;
  std::vector<int> message = {
      static_cast<int>(Kind::batch), b.n_tokens, b.n_sequences, b.max_blocks, b.n_logits, b.n_copies};
  const auto add = [&](const int* numbers, size_t n) { message.insert(message.end(), numbers, numbers + n); };
  const auto T = static_cast<size_t>(b.n_tokens), S = static_cast<size_t>(b.n_sequences);
  add(b.tokens, T);
  add(b.positions, T);
  add(b.query_start, S + 1);
  add(b.context_len, S);
  add(b.block_table, S * static_cast<size_t>(b.max_blocks));
  add(b.slot_mapping, T);
  add(b.logit_rows, static_cast<size_t>(b.n_logits));
  add(b.copy_from, static_cast<size_t>(b.n_copies));
  add(b.copy_to, static_cast<size_t>(b.n_copies));
  ranks.send(message);
}

// The batch that send_batch made a message of; it lies in there.
static Batch batch_of(const std::vector<int>& message) {
  Batch b;
  const int* at = message.data() + 1;
  for (int* size : {&b.n_tokens, &b.n_sequences, &b.max_blocks, &b.n_logits, &b.n_copies}) *size = *at++;
  const auto take = [&](int n) { return std::exchange(at, at + n); };
  b.tokens = take(b.n_tokens);
  b.positions = take(b.n_tokens);
  b.query_start = take(b.n_sequences + 1);
  b.context_len = take(b.n_sequences);
  b.block_table = take(b.n_sequences * b.max_blocks);
  b.slot_mapping = take(b.n_tokens);
  b.logit_rows = take(b.n_logits);
  b.copy_from = take(b.n_copies);
  b.copy_to = take(b.n_copies);
  return b;
}

bool any_overflowed(Ranks& ranks, bool own) {
  if (ranks.part().size > 1 && ranks.part().rank == 0) ranks.send({static_cast<int>(Kind::overflowed)});
  const std::vector<uint8_t> all = all_of(ranks, static_cast<uint8_t>(own));
  return std::count(all.begin(), all.end(), uint8_t{1}) > 0;
}

void send_end(Ranks& ranks) {
  if (ranks.part().size > 1) ranks.send({static_cast<int>(Kind::end)});
}

void follow(Ranks& ranks, const std::function<void(const Batch&)>& forward, const std::function<bool()>& overflowed) {
  for (;;) {
    const std::vector<int> message = ranks.receive();
    switch (static_cast<Kind>(message[0])) {
      case Kind::batch:
        forward(batch_of(message));
        break;
      case Kind::overflowed:
        any_overflowed(ranks, overflowed());
        break;
      case Kind::end:
        return;
    }
  }
}
