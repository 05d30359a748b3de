// Attention alone, one case a call, as JSON: how long a layer takes, what it reads of the cache (f16), what it
// multiplies. The layers run as a step of the program does: decode as one graph. lab/gpu.py calls it on a GPU; it knows
// no device.
//
//     attention_case N_HEADS N_KV_HEADS K_DIM V_DIM contiguous|paged|shuffled SEQUENCES CONTEXT NEW
//
// V_DIM 512 of K_DIM 576 is MLA's absorbed form, whose values are a part of the keys. NEW: tokens of each sequence that
// attend, the last of its CONTEXT.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "host/error.h"
#include "kernels/threads.h"
#include "tests/device_memory.h"

namespace {

constexpr size_t NOT_CACHED = size_t{256} << 20;  // bytes: more than any cache holds, spread over layers
// So much is read or called at a time that its start and its end do not count.
constexpr size_t LONG = size_t{4} << 30;  // bytes
constexpr int REPEATS = 7, MANY = 1024;

struct Case {
  AttentionShape shape;
  std::string layout;
  int n_sequences, context, n_new;
};

// The last tokens of all sequences.
struct Step {
  std::vector<int> positions, query_start{0}, context_len, table;

  Step(const Case& c, int blocks_each) : table(static_cast<size_t>(c.n_sequences * blocks_each)) {
    for (int s = 0; s < c.n_sequences; s++) {
      for (int i = 0; i < c.n_new; i++) positions.push_back(c.context - c.n_new + i);
      query_start.push_back((s + 1) * c.n_new);
      context_len.push_back(c.context);
    }
    std::iota(table.begin(), table.end(), 0);
    if (c.layout == "shuffled") std::shuffle(table.begin(), table.end(), std::mt19937(1));
  }

  Batch batch(int blocks_each) const {
    Batch b;
    b.n_tokens = query_start.back(), b.n_sequences = static_cast<int>(context_len.size()), b.max_blocks = blocks_each;
    b.positions = positions.data(), b.query_start = query_start.data(), b.context_len = context_len.data();
    b.block_table = table.data();
    return b;
  }
};

// Halves of about 0.1, of either sign.
void fill_with_noise(std::byte* memory, size_t bytes) {
  std::vector<uint16_t> noise(size_t{8} << 20);
  std::mt19937 random(1);
  for (uint16_t& x : noise) x = static_cast<uint16_t>((random() & 0x83ff) | 0x2c00);
  const size_t piece = noise.size() * sizeof(uint16_t);
  for (size_t at = 0; at < bytes; at += piece) upload(memory + at, noise.data(), std::min(piece, bytes - at));
}

template <int Block>
void measure(const Case& c) {
  const AttentionShape& s = c.shape;
  const int block_size = Block ? Block : c.context, blocks_each = (c.context + block_size - 1) / block_size;
  CacheShape cache_shape{1, s.n_kv_heads, s.k_dim, s.v_is_k ? 0 : s.v_dim, c.n_sequences * blocks_each, block_size};
  const size_t layer_bytes = KVCache<KvF16, Block>::bytes_per_token(cache_shape) * area(c.n_sequences, c.context);
  cache_shape.n_layers = static_cast<int>(std::max<size_t>(NOT_CACHED / layer_bytes, 1));
  Arena memory(bytes_of([&](Arena& arena) { KVCache<KvF16, Block>(arena, cache_shape); }));
  KVCache<KvF16, Block> cache(memory, cache_shape);
  fill_with_noise(cache.memory(), cache.size());

  const Step step(c, blocks_each);
  DeviceBatch arrays, graph;
  const Batch batch = arrays.upload(step.batch(blocks_each));  // once: the table of long contexts is large
  Batch sizes;
  sizes.n_tokens = batch.n_tokens, sizes.n_sequences = batch.n_sequences;
  const Buffer<float> q = device_copy(std::vector<float>(area(batch.n_tokens, s.n_heads * s.k_dim), 0.1f));
  Buffer<float> out(area(batch.n_tokens, s.n_heads * s.v_dim));
  Threads threads(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  Limits limits;
  limits.max_tokens = batch.n_tokens, limits.context = c.context, limits.max_threads = threads.most();
  Workspace workspace;
  workspace.plan(Flash::workspace_bytes(s, limits));
  Arena scratch(bytes_of([&](Arena& arena) { workspace.allocate(arena); }));
  workspace.allocate(scratch);

  const int calls = std::max(cache_shape.n_layers, static_cast<int>(std::min<size_t>(LONG / layer_bytes, MANY)));
  double best = 1e9;
  for (int repeat = 0; repeat < REPEATS; repeat++) {  // the first loads the kernels, the second captures their graph
    synchronize();
    const auto began = std::chrono::steady_clock::now();
    graph.run(sizes, threads, threads.most(), [&](const Team& team, const Batch&) {
      for (int i = 0; i < calls; i++)
        Flash::attend(team, q.data(), cache, i % cache_shape.n_layers, batch, s, out.data(), workspace);
    });
    synchronize();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  const double pairs = double(c.n_sequences) * c.n_new * (c.context - (c.n_new - 1) / 2.0);
  std::printf("{\"seconds\": %.9f, \"bytes\": %zu, \"flop\": %.0f}\n", best / calls, layer_bytes,
              2 * pairs * s.n_heads * (s.k_dim + s.v_dim));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 9)
    return std::fprintf(stderr,
                        "usage: attention_case N_HEADS N_KV_HEADS K_DIM V_DIM contiguous|paged|shuffled SEQUENCES "
                        "CONTEXT NEW\n"),
           2;
  const auto number = [&](int i) { return std::atoi(argv[i]); };
  Case c{{}, argv[5], number(6), number(7), number(8)};
  c.shape.n_heads = number(1), c.shape.n_kv_heads = number(2), c.shape.k_dim = number(3), c.shape.v_dim = number(4);
  c.shape.v_is_k = c.shape.k_dim == 576 && c.shape.v_dim == 512;
  c.shape.scale = 0.1f;
  c.layout == "contiguous" ? measure<0>(c) : measure<16>(c);
} catch (const std::exception& e) {
  return std::fprintf(stderr, "attention_case: %s\n", e.what()), 1;
}
