#include "engine.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <exception>
#include <numeric>
#include <utility>

#include "device.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// One sample of a request.
struct Sequence {
  std::shared_ptr<const Request> request;
  Result result;
  Sampler sampler;
  std::vector<int> tokens;  // the prompt's and the generated
  int computed = 0;         // of tokens: those whose keys and values are in the cache
  std::vector<int> table;   // blocks; -1: given back, no layer sees it any more
  int published = 0;        // full blocks of the table that others can find (or find the twins of)
  Prefix prefix;            // ... and the tokens in them
  int next_logits = 0;      // the first position whose logits nobody has seen yet
  bool cancelled = false;
  Clock::time_point submitted, last_token;

  int size() const { return static_cast<int>(tokens.size()); }
  int left() const { return size() - computed; }
  bool begun() const { return !result.ids.empty(); }
  bool generates() const { return begun() && left() == 1; }
  bool older(const Sequence& other) const {
    return std::pair(result.request, result.sample) < std::pair(other.result.request, other.result.sample);
  }
};
using Owned = std::unique_ptr<Sequence>;

// The arrays that a Batch points to.
struct BatchArrays {
  std::vector<int> tokens, positions, query_start, context_len, block_table, slot_mapping, logit_rows;
  std::vector<int> copy_from, copy_to;
  std::vector<Sequence*> sequences;  // [S]
  int max_blocks = 0;

  void clear() { *this = BatchArrays{}; }

  int n_tokens() const { return static_cast<int>(tokens.size()); }
  int n_logits() const { return static_cast<int>(logit_rows.size()); }

  // The next n tokens of s, for which its table has blocks.
  void add(Sequence* s, int n, int block_size) {
    sequences.push_back(s);
    query_start.push_back(n_tokens());
    context_len.push_back(s->computed + n);
    max_blocks = std::max(max_blocks, ceil_div(s->computed + n, block_size));
    for (int p = s->computed; p < s->computed + n; ++p) {
      int block = s->table[static_cast<size_t>(p / block_size)];
      if (p >= s->next_logits) logit_rows.push_back(n_tokens());
      tokens.push_back(s->tokens[static_cast<size_t>(p)]);
      positions.push_back(p);
      slot_mapping.push_back(block * block_size + p % block_size);
    }
  }

  Batch batch() {
    query_start.push_back(n_tokens());
    for (const Sequence* s : sequences) {
      size_t row = block_table.size();
      block_table.resize(row + static_cast<size_t>(max_blocks), -1);
      std::copy_n(s->table.begin(), std::min(s->table.size(), static_cast<size_t>(max_blocks)),
                  block_table.begin() + static_cast<std::ptrdiff_t>(row));
    }
    Batch b;
    b.n_tokens = n_tokens();
    b.n_sequences = static_cast<int>(sequences.size());
    b.tokens = tokens.data();
    b.positions = positions.data();
    b.query_start = query_start.data();
    b.context_len = context_len.data();
    b.block_table = block_table.data();
    b.max_blocks = max_blocks;
    b.slot_mapping = slot_mapping.data();
    b.n_logits = n_logits();
    b.logit_rows = logit_rows.data();
    b.n_copies = static_cast<int>(copy_from.size());
    b.copy_from = copy_from.data();
    b.copy_to = copy_to.data();
    return b;
  }
};

}  // namespace

const char* name(Finish finish) {
  switch (finish) {
    case Finish::length:
      return "length";
    case Finish::stop:
      return "stop";
    case Finish::callback:
      return "callback";
    case Finish::cancelled:
      return "cancelled";
  }
  return "";
}

double percentile(std::vector<double> values, double p) {
  if (values.empty()) return 0;
  auto rank = static_cast<std::ptrdiff_t>(std::ceil(p * static_cast<double>(values.size()))) - 1;
  auto place = values.begin() + std::max<std::ptrdiff_t>(rank, 0);
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

struct Engine::Impl {
  Forward forward;
  Limits limits;
  int block_size, vocab_size, window;
  BlockPool pool;
  std::deque<Owned> waiting = {};   // by age
  std::vector<Owned> running = {};  // in line: the last is preempted first
  BatchArrays arrays = {};
  bool preempted = false;  // in this step
  // References to blocks of which the step makes copies; were they released at once, another copy might land there.
  std::vector<int> copied = {};
  int n_requests = 0;
  Stats stats = {};
  double waste_sum = 0;

  struct Draw {
    Sequence* sequence;
    float* logits;  // [vocab_size]
  };
  std::vector<std::vector<float>> forked_logits = {};

  // Scheduling: what goes into the next batch.
  void schedule();
  bool schedule(Sequence* s);
  int reserve(Sequence* s, int n);
  int take(Sequence* s, int shared_block);
  bool admit();
  bool should_wait(const Sequence& s) const;
  void match(Sequence* s);
  void release_behind_window(Sequence* s);
  void preempt_last();
  void give_back(Sequence* s);

  // After the forward pass.
  void advance(Sequence* s, int n);
  std::vector<Draw> collect(float* logits);
  void fork(Draw first, std::vector<Draw>* draws);
  void draw(const std::vector<Draw>& draws);
  void accept(Sequence* s, int id);
  void finish(Sequence* s, Finish reason);
  void drop_cancelled();
  bool count_step(const Batch& batch);
  void count_blocks();

  // Blocks that `tokens` more tokens of a sequence need at once.
  int blocks_for(int tokens) const {
    int blocks = ceil_div(tokens, block_size);
    return window ? std::min(blocks, ceil_div(window - 1, block_size) + 1) : blocks;
  }
};

// ---- scheduling

void Engine::Impl::schedule() {
  arrays.clear();
  preempted = false;
  std::sort(running.begin(), running.end(), [](const Owned& a, const Owned& b) {
    return a->generates() != b->generates() ? a->generates() : a->older(*b);
  });
  for (size_t i = 0; i < running.size(); ++i) {
    if (!schedule(running[i].get())) break;
  }
  while (!preempted && arrays.n_tokens() < limits.max_tokens && admit()) schedule(running.back().get());
  stats.peak_sequences = std::max(stats.peak_sequences, static_cast<int>(running.size()));
}

// As many tokens of s as the budgets and the cache allow. False: nothing is left for those behind it either.
bool Engine::Impl::schedule(Sequence* s) {
  int n = std::min(s->left(), limits.max_tokens - arrays.n_tokens());
  if (n == 0) return false;
  int rows = s->computed + n - std::max(s->next_logits, s->computed);
  n -= std::max(0, rows - (limits.max_logits - arrays.n_logits()));
  if (n == 0) return true;
  release_behind_window(s);
  n = reserve(s, n);
  if (n == 0) {
    preempt_last();  // s itself
    return false;
  }
  arrays.add(s, n, block_size);
  return true;
}

// Blocks for the next n tokens of s, that nobody else references; for how many tokens there are.
int Engine::Impl::reserve(Sequence* s, int n) {
  auto first = static_cast<size_t>(s->computed / block_size);
  if (first < s->table.size()) {
    int from = s->table[first];
    for (auto held = std::erase(copied, from); held > 0; --held) pool.release(from);  // s holds it as well
    int to = take(s, from);
    if (to < 0) return 0;
    if (to != from) {
      arrays.copy_from.push_back(from);
      arrays.copy_to.push_back(to);
      copied.push_back(from);
      s->table[first] = to;
    }
  }
  while (static_cast<int>(s->table.size()) * block_size < s->computed + n) {
    int block = take(s, -1);
    if (block < 0) break;
    s->table.push_back(block);
  }
  return std::min(n, static_cast<int>(s->table.size()) * block_size - s->computed);
}

// A block that s may write: new, or in place of the one given. Preempts those behind s for it. -1: s is the last.
int Engine::Impl::take(Sequence* s, int shared_block) {
  for (;;) {
    int block = shared_block < 0 ? pool.allocate() : pool.own(shared_block);
    if (block >= 0 || running.back().get() == s) return block;
    preempt_last();
  }
}

// Lets the first that waits into the cache, if its prompt fits.
bool Engine::Impl::admit() {
  if (waiting.empty() || static_cast<int>(running.size()) == limits.max_sequences) return false;
  Sequence* s = waiting.front().get();
  if (should_wait(*s)) return false;
  match(s);
  release_behind_window(s);
  int full = s->published * block_size;
  bool part_is_shared = s->computed > full && pool.references(s->table.back()) > 1;
  int missing = blocks_for(s->size() - static_cast<int>(s->table.size()) * block_size) + part_is_shared;
  if (!running.empty() && missing > pool.available()) {  // alone it always fits
    give_back(s);
    return false;
  }
  if (s->computed == full) {
    int n = std::min(block_size, s->next_logits - full), matched = 0;
    int part = n > 0 ? pool.find_part(s->prefix, s->tokens.data() + full, n, &matched) : -1;
    if (part >= 0) s->table.push_back(part);
    s->computed += matched;
  }
  stats.cached_tokens += s->computed;
  if (!s->begun()) s->result.n_cached = s->computed;
  running.push_back(std::move(waiting.front()));
  waiting.pop_front();
  return true;
}

// Whether another is just computing what s could share: full blocks, or its very prompt.
bool Engine::Impl::should_wait(const Sequence& s) const {
  for (const Owned& r : running) {
    if (r->left() <= 1 && r->begun()) continue;
    if (r->result.request == s.result.request && !r->begun() && !s.begun()) return true;
    auto end = s.tokens.begin() + s.next_logits;
    auto differs = std::mismatch(s.tokens.begin(), end, r->tokens.begin(), r->tokens.end()).first;
    if (static_cast<int>(differs - s.tokens.begin()) / block_size > r->published) return true;
  }
  return false;
}

// References the full blocks that hold the beginning of s. What it wants logits of is computed all the same.
void Engine::Impl::match(Sequence* s) {
  while (s->computed < s->next_logits && s->computed + block_size <= s->size()) {
    Prefix prefix = s->prefix;
    int block = pool.find(&prefix, s->tokens.data() + s->computed);
    if (block < 0) return;
    s->table.push_back(block);
    if (s->computed + block_size > s->next_logits) {  // part of it will be written again: a copy
      s->computed = s->next_logits;
      return;
    }
    s->computed += block_size;
    s->prefix = prefix;
    ++s->published;
  }
}

void Engine::Impl::release_behind_window(Sequence* s) {
  if (window == 0) return;
  int first_seen = s->computed - window + 1;  // by the next token
  for (int b = first_seen / block_size - 1; b >= 0 && s->table[static_cast<size_t>(b)] >= 0; --b) {
    pool.release(s->table[static_cast<size_t>(b)]);
    s->table[static_cast<size_t>(b)] = -1;
  }
}

void Engine::Impl::preempt_last() {
  Owned s = std::move(running.back());
  running.pop_back();
  give_back(s.get());
  auto place = std::find_if(waiting.begin(), waiting.end(), [&](const Owned& w) { return s->older(*w); });
  waiting.insert(place, std::move(s));
  preempted = true;
  ++stats.preemptions;
}

// All blocks of s, the last first, so that a prefix is evicted after what follows it.
void Engine::Impl::give_back(Sequence* s) {
  int full = s->published * block_size;
  if (s->computed > full) {
    pool.keep_part(s->table[static_cast<size_t>(s->published)], s->prefix, s->tokens.data() + full, s->computed - full);
  }
  for (auto block = s->table.rbegin(); block != s->table.rend(); ++block) {
    if (*block >= 0) pool.release(*block);
  }
  s->table.clear();
  s->computed = s->published = 0;
  s->prefix = {};
}

// ---- after the forward pass

void Engine::Impl::advance(Sequence* s, int n) {
  s->computed += n;
  while ((s->published + 1) * block_size <= s->computed) {
    auto b = static_cast<size_t>(s->published);
    pool.publish(s->table[b], &s->prefix, s->tokens.data() + s->published * block_size);
    ++s->published;
  }
}

// Hands out the logits [n_logits, vocab_size]; returns the rows from which a token is to be drawn.
std::vector<Engine::Impl::Draw> Engine::Impl::collect(float* logits) {
  std::vector<Draw> draws;
  size_t row = 0;
  for (Sequence* s : arrays.sequences) {
    for (; s->next_logits < s->computed; ++s->next_logits, ++row) {
      float* of_row = logits + row * static_cast<size_t>(vocab_size);
      if (s->request->on_logits) s->request->on_logits(s->result.sample, s->next_logits, of_row);
      if (s->next_logits == s->size() - 1) draws.push_back({s, of_row});
    }
  }
  forked_logits.clear();
  for (size_t i = 0, n = draws.size(); i < n; ++i) {
    if (!draws[i].sequence->begun()) fork(draws[i], &draws);
  }
  return draws;
}

// The other samples of a request whose prompt has just been computed: they share its blocks and its last logits.
void Engine::Impl::fork(Draw first, std::vector<Draw>* draws) {
  const Sequence& s = *first.sequence;
  for (auto w = waiting.begin(); w != waiting.end() && static_cast<int>(running.size()) < limits.max_sequences;) {
    Sequence* sibling = w->get();
    if (sibling->result.request != s.result.request || sibling->begun() || sibling->cancelled) {
      ++w;
      continue;
    }
    sibling->table = s.table;
    sibling->computed = s.computed;
    sibling->published = s.published;
    sibling->prefix = s.prefix;
    sibling->next_logits = s.next_logits;
    sibling->result.n_cached = s.computed;
    stats.cached_tokens += s.computed;
    for (int block : s.table) {
      if (block >= 0) pool.share(block);
    }
    forked_logits.emplace_back(first.logits, first.logits + vocab_size);
    draws->push_back({sibling, forked_logits.back().data()});
    if (s.request->on_logits) s.request->on_logits(sibling->result.sample, s.size() - 1, first.logits);
    running.push_back(std::move(*w));
    w = waiting.erase(w);
  }
}

void Engine::Impl::draw(const std::vector<Draw>& draws) {
  std::vector<int> ids(draws.size());
  std::exception_ptr error;
  size_t work = draws.size() * static_cast<size_t>(vocab_size);
#pragma omp parallel for schedule(dynamic) if (work > 100000)  // below, waking the team takes longer
  for (size_t i = 0; i < draws.size(); ++i) {
    Sequence* s = draws[i].sequence;
    if (s->request->n == 0) continue;
    try {
      ids[i] = s->sampler.sample(draws[i].logits, vocab_size, s->tokens.data(), s->size());
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
  for (size_t i = 0; i < draws.size(); ++i) accept(draws[i].sequence, ids[i]);
}

void Engine::Impl::accept(Sequence* s, int id) {
  const Request& request = *s->request;
  Result& result = s->result;
  if (request.n == 0) return finish(s, Finish::length);
  double between = seconds_since(s->last_token);
  s->last_token = Clock::now();
  if (!s->begun()) {
    result.first_token = between;
    stats.first_token.push_back(between);
  } else {
    stats.between_tokens.push_back(between);
  }
  if (std::find(request.stop.begin(), request.stop.end(), id) != request.stop.end()) {
    return finish(s, Finish::stop);
  }
  s->tokens.push_back(id);
  result.ids.push_back(id);
  ++stats.generated_tokens;
  if (request.on_token && !request.on_token(result.sample, id)) return finish(s, Finish::callback);
  if (static_cast<int>(result.ids.size()) == request.n) finish(s, Finish::length);
}

void Engine::Impl::finish(Sequence* s, Finish reason) {
  give_back(s);
  s->result.finish = reason;
  s->result.seconds = seconds_since(s->submitted);
  if (s->request->on_finish) s->request->on_finish(s->result);
  std::erase_if(running, [&](const Owned& r) { return r.get() == s; });
  std::erase_if(waiting, [&](const Owned& w) { return w.get() == s; });
}

void Engine::Impl::drop_cancelled() {
  std::vector<Sequence*> cancelled;
  for (const Owned& s : running)
    if (s->cancelled) cancelled.push_back(s.get());
  for (const Owned& s : waiting)
    if (s->cancelled) cancelled.push_back(s.get());
  for (Sequence* s : cancelled) finish(s, Finish::cancelled);
}

// Before the sequences advance. True: a step without any prompt's tokens.
bool Engine::Impl::count_step(const Batch& batch) {
  int generating = 0;
  for (const Sequence* s : arrays.sequences) generating += s->generates();
  bool decode = generating == batch.n_sequences;
  ++stats.steps;
  stats.copies += batch.n_copies;
  stats.prompt_tokens += batch.n_tokens - generating;
  if (decode) {
    ++stats.decode_steps;
    stats.decode_context += std::accumulate(batch.context_len, batch.context_len + batch.n_sequences, int64_t{0});
  }
  return decode;
}

void Engine::Impl::count_blocks() {
  int used = pool.n_blocks() - pool.available();
  double empty = 0;  // slots
  for (const Owned& s : running) {
    for (int b = s->computed / block_size; b < static_cast<int>(s->table.size()); ++b) {
      int filled = std::max(0, s->computed - b * block_size);
      empty += static_cast<double>(block_size - filled) / pool.references(s->table[static_cast<size_t>(b)]);
    }
  }
  if (used > 0) waste_sum += empty / (static_cast<double>(used) * block_size);
  stats.peak_used = std::max(stats.peak_used, used);
  stats.peak_shared = std::max(stats.peak_shared, pool.shared());
}

// ---- the interface

Engine::Engine(Forward forward, const Limits& limits, int block_size, int vocab_size, int window, BlockHash hash)
    : impl_(new Impl{.forward = std::move(forward),
                     .limits = limits,
                     .block_size = block_size,
                     .vocab_size = vocab_size,
                     .window = window,
                     .pool = BlockPool(limits.n_blocks, block_size, hash)}) {}

Engine::~Engine() = default;

int Engine::max_request_tokens() const {
  const Impl& e = *impl_;
  if (e.blocks_for(e.limits.context) <= e.limits.n_blocks) return e.limits.context;
  return e.limits.n_blocks * e.block_size;
}

int Engine::submit(Request request) {
  Impl& e = *impl_;
  auto size = static_cast<int>(request.prompt.size());
  if (size == 0) fail("the prompt is empty: a request needs at least one token");
  for (int id : request.prompt) {
    if (id < 0 || id >= e.vocab_size) fail("token %d of the prompt is not in [0, %d)", id, e.vocab_size);
  }
  if (request.n < 0 || request.samples < 1) {
    fail("n %d, samples %d: n must be at least 0, samples at least 1", request.n, request.samples);
  }
  if (request.n > max_request_tokens() - size) {
    fail(
        "a prompt of %d tokens and n %d do not fit: the cache takes %d tokens of one sequence; shorten the prompt, "
        "lower n or enlarge the context or the cache",
        size, request.n, max_request_tokens());
  }
  auto shared = std::make_shared<const Request>(std::move(request));
  int number = e.n_requests++;
  for (int i = 0; i < shared->samples; ++i) {
    auto s = std::make_unique<Sequence>();
    s->request = shared;
    s->result.request = number;
    s->result.sample = i;
    s->result.n_prompt = size;
    SamplerOptions options = shared->sampler;
    options.seed += static_cast<uint64_t>(i);
    s->sampler = Sampler(options);
    s->tokens = shared->prompt;
    s->next_logits = shared->logits_from < 0 ? size - 1 : std::min(shared->logits_from, size - 1);
    s->submitted = s->last_token = Clock::now();
    e.waiting.push_back(std::move(s));
  }
  return number;
}

void Engine::cancel(int request) {
  for (const Owned& s : impl_->running) s->cancelled |= s->result.request == request;
  for (const Owned& s : impl_->waiting) s->cancelled |= s->result.request == request;
}

void Engine::cancel_all() {
  for (const Owned& s : impl_->running) s->cancelled = true;
  for (const Owned& s : impl_->waiting) s->cancelled = true;
}

int Engine::unfinished() const {
  return static_cast<int>(impl_->running.size() + impl_->waiting.size());
}

bool Engine::step() {
  Impl& e = *impl_;
  auto start = Clock::now();
  e.drop_cancelled();
  if (unfinished() == 0) return false;
  e.schedule();
  const Batch batch = e.arrays.batch();
  float* logits = e.forward(batch);
  bool decode = e.count_step(batch);
  for (int i = 0; i < batch.n_sequences; ++i) {
    e.advance(e.arrays.sequences[static_cast<size_t>(i)], batch.query_start[i + 1] - batch.query_start[i]);
  }
  for (int block : e.copied) e.pool.release(block);
  e.copied.clear();
  std::vector<Impl::Draw> draws = e.collect(logits);
  e.count_blocks();
  e.draw(draws);
  (decode ? e.stats.decode_seconds : e.stats.prompt_seconds) += seconds_since(start);
  return true;
}

Stats Engine::stats() const {
  Stats stats = impl_->stats;
  stats.blocks = impl_->pool.n_blocks();
  stats.used = stats.blocks - impl_->pool.available();
  stats.evicted = impl_->pool.evicted();
  if (stats.steps > 0) stats.waste = impl_->waste_sum / static_cast<double>(stats.steps);
  return stats;
}
