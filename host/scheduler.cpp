#include "host/scheduler.h"

#include <algorithm>
#include <bit>

namespace {

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

void insert_by_age(std::vector<Sequence*>* line, Sequence* s) {
  auto older = [](const Sequence* a, const Sequence* b) { return a->older(*b); };
  line->insert(std::upper_bound(line->begin(), line->end(), s, older), s);
}

}  // namespace

Scheduler::Scheduler(const Limits& limits, int block_size, int window, BlockHash hash)
    : limits_(limits), block_size_(block_size), window_(window), pool_(limits.n_blocks, block_size, hash) {
  for (auto* list : {&running_, &scheduled_}) list->reserve(static_cast<size_t>(limits.max_sequences));
  for (auto* array : {&query_start_, &context_len_, &copied_, &copy_from_, &copy_to_})
    array->reserve(static_cast<size_t>(limits.max_sequences) + 1);
  for (auto* array : {&tokens_, &positions_, &slot_mapping_}) array->reserve(static_cast<size_t>(limits.max_tokens));
  logit_rows_.reserve(static_cast<size_t>(limits.max_logits));
}

// Blocks that `tokens` more tokens of a sequence need at once.
int Scheduler::blocks_for(int tokens) const {
  int blocks = ceil_div(tokens, block_size_);
  return window_ ? std::min(blocks, ceil_div(window_ - 1, block_size_) + 1) : blocks;
}

int Scheduler::max_tokens() const {
  return blocks_for(limits_.context) <= limits_.n_blocks ? limits_.context : limits_.n_blocks * block_size_;
}

void Scheduler::add(Sequence* s) {
  s->table.reserve(static_cast<size_t>(ceil_div(limits_.context, block_size_) + 1));
  const size_t most = waiting_.size() + 1 + running_.capacity();  // once all that run are preempted
  if (waiting_.capacity() < most) waiting_.reserve(2 * most);
  insert_by_age(&waiting_, s);
}

void Scheduler::remove(Sequence* s) {
  give_back(s);
  std::erase(waiting_, s);
  std::erase(running_, s);
}

// ---- Filling the batch.

const Batch& Scheduler::next() {
  scheduled_.clear();
  for (auto* array : {&tokens_, &positions_, &query_start_, &context_len_, &block_table_, &slot_mapping_, &logit_rows_,
                      &copy_from_, &copy_to_}) {
    array->clear();
  }
  for (size_t i = 0; i < running_.size() && schedule(running_[i]);) ++i;
  while (static_cast<int>(tokens_.size()) < limits_.max_tokens) {
    Sequence* s = admit();
    if (!s || !schedule(s)) break;
  }
  stats_.peak_sequences = std::max(stats_.peak_sequences, static_cast<int>(running_.size()));
  finish_batch();
  return batch_;
}

// As many tokens of s as the budgets and the cache allow. False: nothing is left for those behind it either.
bool Scheduler::schedule(Sequence* s) {
  int n = std::min(s->left(), limits_.max_tokens - static_cast<int>(tokens_.size()));
  if (n == 0) return false;
  int rows = s->computed + n - std::max(s->next_logits, s->computed);
  n -= std::max(0, rows - (limits_.max_logits - static_cast<int>(logit_rows_.size())));
  if (n == 0) return true;
  release_behind_window(s);
  n = reserve(s, n);
  if (n == 0) {
    preempt_last();  // s itself
    return false;
  }
  add_to_batch(s, n);
  return true;
}

// Blocks for the next n tokens of s, that nobody else writes or reads there; for how many of the tokens there are.
int Scheduler::reserve(Sequence* s, int n) {
  auto first = static_cast<size_t>(s->computed / block_size_);
  if (first < s->table.size()) {
    int from = s->table[first];
    for (auto held = std::erase(copied_, from); held > 0; --held) pool_.release(from);  // s holds it as well
    int to = take(s, from);
    if (to < 0) return 0;
    if (to != from) {
      copy_from_.push_back(from);
      copy_to_.push_back(to);
      copied_.push_back(from);
      s->table[first] = to;
    }
  }
  while (static_cast<int>(s->table.size()) * block_size_ < s->computed + n) {
    int block = take(s, -1);
    if (block < 0) break;
    s->table.push_back(block);
  }
  return std::min(n, static_cast<int>(s->table.size()) * block_size_ - s->computed);
}

// A block that s may write: new, or in place of the one given. Preempts those behind s for it. -1: s is the last.
int Scheduler::take(Sequence* s, int shared_block) {
  for (;;) {
    int block = shared_block < 0 ? pool_.allocate() : pool_.own(shared_block);
    if (block >= 0 || running_.back() == s) return block;
    preempt_last();
  }
}

void Scheduler::add_to_batch(Sequence* s, int n) {
  scheduled_.push_back(s);
  query_start_.push_back(static_cast<int>(tokens_.size()));
  context_len_.push_back(s->computed + n);
  for (int p = s->computed; p < s->computed + n; ++p) {
    int block = s->table[static_cast<size_t>(p / block_size_)];
    if (p >= s->next_logits) logit_rows_.push_back(static_cast<int>(tokens_.size()));
    tokens_.push_back(s->tokens[static_cast<size_t>(p)]);
    positions_.push_back(p);
    slot_mapping_.push_back(block * block_size_ + p % block_size_);
  }
}

void Scheduler::finish_batch() {
  batch_ = {};
  batch_.n_tokens = static_cast<int>(tokens_.size());
  batch_.n_sequences = static_cast<int>(scheduled_.size());
  query_start_.push_back(batch_.n_tokens);
  size_t longest = 0;
  for (const Sequence* s : scheduled_) longest = std::max(longest, s->table.size());
  // Doubled, it seldom changes while texts grow: steps of the same sizes are cheaper on some devices.
  batch_.max_blocks = std::min(static_cast<int>(std::bit_ceil(longest)), ceil_div(limits_.context, block_size_));
  for (const Sequence* s : scheduled_) {  // a row each, filled up with -1
    auto row = static_cast<std::ptrdiff_t>(block_table_.size());
    block_table_.resize(block_table_.size() + static_cast<size_t>(batch_.max_blocks), -1);
    std::copy(s->table.begin(), s->table.end(), block_table_.begin() + row);
  }
  batch_.tokens = tokens_.data();
  batch_.positions = positions_.data();
  batch_.query_start = query_start_.data();
  batch_.context_len = context_len_.data();
  batch_.block_table = block_table_.data();
  batch_.slot_mapping = slot_mapping_.data();
  batch_.n_logits = static_cast<int>(logit_rows_.size());
  batch_.logit_rows = logit_rows_.data();
  batch_.n_copies = static_cast<int>(copy_from_.size());
  batch_.copy_from = copy_from_.data();
  batch_.copy_to = copy_to_.data();
}

void Scheduler::advance() {
  for (size_t i = 0; i < scheduled_.size(); ++i) {
    Sequence* s = scheduled_[i];
    s->computed = context_len_[i];
    for (; (s->published + 1) * block_size_ <= s->computed; ++s->published) {
      pool_.publish(s->table[static_cast<size_t>(s->published)], &s->prefix,
                    s->tokens.data() + s->published * block_size_);
    }
  }
  for (int block : copied_) pool_.release(block);
  copied_.clear();
  stats_.copies += batch_.n_copies;
  count_blocks();
}

// ---- Who is in the cache.

// Lets the first that waits in, if its tokens fit. Null: nobody.
Sequence* Scheduler::admit() {
  if (waiting_.empty() || static_cast<int>(running_.size()) == limits_.max_sequences) return nullptr;
  Sequence* s = waiting_.front();
  if (should_wait(*s)) return nullptr;
  match(s);
  release_behind_window(s);
  int full = s->published * block_size_;
  bool copies_last = s->computed > full && pool_.references(s->table.back()) > 1;
  int missing = blocks_for(s->size() - static_cast<int>(s->table.size()) * block_size_) + copies_last;
  if (!running_.empty() && missing > pool_.available()) {  // alone it always fits
    give_back(s);
    return nullptr;
  }
  if (s->computed == full) {
    int n = std::min(block_size_, s->next_logits - full), matched = 0;
    int part = n > 0 ? pool_.find_part(s->prefix, s->tokens.data() + full, n, &matched) : -1;
    if (part >= 0) s->table.push_back(part);
    s->computed += matched;
  }
  stats_.cached_tokens += s->computed;
  if (!s->begun) s->n_cached = s->computed;
  insert_by_age(&running_, s);
  waiting_.erase(waiting_.begin());
  return s;
}

// Whether another is just computing what s could share: full blocks, or its very prompt, to fork from.
bool Scheduler::should_wait(const Sequence& s) const {
  for (const Sequence* r : running_) {
    if (r->generates()) continue;
    if (r->request == s.request && !r->begun && !s.begun) return true;
    int n = (r->published + 1) * block_size_;  // to the end of the block that r fills now
    if (n <= std::min(s.next_logits, r->size()) &&
        std::equal(s.tokens.begin(), s.tokens.begin() + n, r->tokens.begin()))
      return true;
  }
  return false;
}

// References the full blocks that hold the beginning of s. What it wants logits of is computed all the same.
void Scheduler::match(Sequence* s) {
  while (s->computed < s->next_logits && s->computed + block_size_ <= s->size()) {
    Prefix prefix = s->prefix;
    int block = pool_.find(&prefix, s->tokens.data() + s->computed);
    if (block < 0) return;
    s->table.push_back(block);
    if (s->computed + block_size_ > s->next_logits) {  // its end will be written again, in a copy
      s->computed = s->next_logits;
      return;
    }
    s->computed += block_size_;
    s->prefix = prefix;
    ++s->published;
  }
}

std::vector<Sequence*> Scheduler::fork(const Sequence& s) {
  std::vector<Sequence*> forked;
  forked.reserve(static_cast<size_t>(limits_.max_sequences) - running_.size());
  auto can = [&](const Sequence* w) { return w->request == s.request && !w->begun; };
  for (;;) {
    auto place = std::find_if(waiting_.begin(), waiting_.end(), can);
    if (place == waiting_.end() || static_cast<int>(running_.size()) == limits_.max_sequences) return forked;
    Sequence* w = *place;
    waiting_.erase(place);
    insert_by_age(&running_, w);
    forked.push_back(w);
    w->table = s.table;
    w->computed = w->n_cached = s.computed;
    w->published = s.published;
    w->prefix = s.prefix;
    w->next_logits = s.next_logits;
    stats_.cached_tokens += s.computed;
    for (int block : w->table) {
      if (block >= 0) pool_.share(block);
    }
    stats_.peak_shared = std::max(stats_.peak_shared, pool_.shared());
  }
}

void Scheduler::preempt_last() {
  Sequence* s = running_.back();
  running_.pop_back();
  give_back(s);
  insert_by_age(&waiting_, s);
  ++stats_.preemptions;
}

void Scheduler::release_behind_window(Sequence* s) {
  if (window_ == 0) return;
  int first_seen = s->computed - window_ + 1;  // by the next token
  for (int b = first_seen / block_size_ - 1; b >= 0 && s->table[static_cast<size_t>(b)] >= 0; --b) {
    pool_.release(s->table[static_cast<size_t>(b)]);
    s->table[static_cast<size_t>(b)] = -1;
  }
}

// All blocks of s, the last first, so that a prefix is evicted after what follows it.
void Scheduler::give_back(Sequence* s) {
  int full = s->published * block_size_;
  if (s->computed > full) {
    pool_.keep_part(s->table[static_cast<size_t>(s->published)], s->prefix, s->tokens.data() + full,
                    s->computed - full);
  }
  for (auto block = s->table.rbegin(); block != s->table.rend(); ++block) {
    if (*block >= 0) pool_.release(*block);
  }
  s->table.clear();
  s->computed = s->published = 0;
  s->prefix = {};
}

void Scheduler::count_blocks() {
  ++steps_;
  int used = pool_.n_blocks() - pool_.available();
  double empty = 0;  // slots
  for (const Sequence* s : running_) {
    for (int b = s->computed / block_size_; b < static_cast<int>(s->table.size()); ++b) {
      int filled = std::max(0, s->computed - b * block_size_);
      empty += static_cast<double>(block_size_ - filled) / pool_.references(s->table[static_cast<size_t>(b)]);
    }
  }
  if (used > 0) waste_sum_ += empty / (static_cast<double>(used) * block_size_);
  stats_.peak_used = std::max(stats_.peak_used, used);
  stats_.peak_shared = std::max(stats_.peak_shared, pool_.shared());
}

CacheStats Scheduler::stats() const {
  CacheStats stats = stats_;
  stats.blocks = pool_.n_blocks();
  stats.used = stats.blocks - pool_.available();
  stats.evicted = pool_.evicted();
  if (steps_ > 0) stats.waste = waste_sum_ / static_cast<double>(steps_);
  return stats;
}
