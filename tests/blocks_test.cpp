// The block pool against a plain model of it: linear searches, whole token lists, one list of unreferenced blocks.
#include "host/blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace {

uint64_t one_bit_hash(uint64_t prefix, const int* tokens, int n) {
  return block_hash(prefix, tokens, n) & 1;
}

TEST(BlockPool, GivesEveryBlockOnce) {
  BlockPool pool(3, 4);
  std::vector<int> blocks = {pool.allocate(), pool.allocate(), pool.allocate()};
  EXPECT_EQ(pool.allocate(), -1);
  std::sort(blocks.begin(), blocks.end());
  EXPECT_EQ(blocks, (std::vector<int>{0, 1, 2}));
  pool.share(1);
  EXPECT_EQ(pool.shared(), 1);
  pool.release(1);
  EXPECT_EQ(pool.allocate(), -1);
  pool.release(1);
  EXPECT_EQ(pool.allocate(), 1);
}

TEST(BlockPool, SameTokensAfterAnotherPrefixAreNotFound) {
  for (BlockHash hash : {block_hash, one_bit_hash}) {
    BlockPool pool(4, 2, hash);
    int a[] = {1, 2}, b[] = {3, 4}, c[] = {5, 6};
    Prefix after_a, after_b, end;
    pool.publish(pool.allocate(), &after_a, a);
    pool.publish(pool.allocate(), &after_b, b);
    end = after_a;
    int block = pool.allocate();
    pool.publish(block, &end, c);
    Prefix p = after_b;
    EXPECT_EQ(pool.find(&p, c), -1);
    p = {};
    EXPECT_EQ(pool.find(&p, c), -1);
    p = after_a;
    EXPECT_EQ(pool.find(&p, c), block);
    EXPECT_EQ(p.id, end.id);
    EXPECT_EQ(pool.references(block), 2);
  }
}

TEST(BlockPool, EvictsTheLeastRecentlyUsed) {
  BlockPool pool(3, 1);
  int tokens[] = {0, 1, 2};
  for (int t = 0; t < 3; ++t) {
    Prefix p;
    int block = pool.allocate();
    pool.publish(block, &p, tokens + t);
  }
  for (int block : {0, 1, 2}) pool.release(block);
  Prefix p;
  EXPECT_EQ(pool.find(&p, tokens + 0), 0);  // used again: the last to go
  pool.release(0);
  EXPECT_EQ(pool.allocate(), 1);
  EXPECT_EQ(pool.allocate(), 2);
  EXPECT_EQ(pool.allocate(), 0);
  EXPECT_EQ(pool.evicted(), 3);
}

TEST(BlockPool, PartFilledBlockHasOneOwner) {
  BlockPool pool(2, 4);
  int tokens[] = {1, 2, 3}, other[] = {1, 2, 9};
  int block = pool.allocate(), matched;
  pool.keep_part(block, {}, tokens, 3);
  pool.release(block);
  EXPECT_EQ(pool.find_part({}, other + 2, 1, &matched), -1);
  EXPECT_EQ(pool.find_part({}, other, 3, &matched), block);
  EXPECT_EQ(matched, 2);
  EXPECT_EQ(pool.find_part({}, tokens, 3, &matched), -1);  // taken
}

TEST(BlockPool, FullBlockIsNotKeptAsPart) {
  BlockPool pool(1, 4);
  int tokens[] = {1, 2, 3, 4}, block = pool.allocate(), matched;
  Prefix p;
  pool.publish(block, &p, tokens);
  pool.keep_part(block, {}, tokens, 3);  // its last token was to be computed again
  pool.release(block);
  EXPECT_EQ(pool.find_part({}, tokens, 3, &matched), -1);
  p = {};
  EXPECT_EQ(pool.find(&p, tokens), block);
}

// ---- the model

struct ModelBlock {
  enum { none, full, part } kind = none;
  int references = 0;
  int before = 0, id = 0;  // numbers of prefixes, as in the pool but counted here
  std::vector<int> tokens;
};

class Model {
 public:
  Model(int n_blocks, int block_size) : size_(block_size), blocks(static_cast<size_t>(n_blocks)) {
    for (int b = 0; b < n_blocks; ++b) unreferenced.push_back(b);
  }
  ModelBlock& at(int b) { return blocks[static_cast<size_t>(b)]; }

  int allocate() {
    if (unreferenced.empty()) return -1;
    int b = unreferenced.front();
    at(b).kind = ModelBlock::none;
    take(b);
    return b;
  }
  void take(int b) {
    if (at(b).references++ == 0) unreferenced.erase(std::find(unreferenced.begin(), unreferenced.end(), b));
  }
  void release(int b) {
    if (--at(b).references > 0) return;
    unreferenced.insert(at(b).kind == ModelBlock::none ? unreferenced.begin() : unreferenced.end(), b);
  }
  int find(int before, const int* tokens) {
    for (int b = 0; b < static_cast<int>(blocks.size()); ++b) {
      const ModelBlock& m = at(b);
      if (m.kind == ModelBlock::full && m.before == before && std::equal(m.tokens.begin(), m.tokens.end(), tokens)) {
        return b;
      }
    }
    return -1;
  }
  int longest_part(int before, const int* tokens, int n) {
    int best = 0;
    for (const ModelBlock& m : blocks) {
      if (m.kind == ModelBlock::part && m.before == before) best = std::max(best, common(m, tokens, n));
    }
    return best;
  }
  static int common(const ModelBlock& m, const int* tokens, int n) {
    int same = 0;
    while (same < std::min(n, static_cast<int>(m.tokens.size())) &&
           m.tokens[static_cast<size_t>(same)] == tokens[same]) {
      ++same;
    }
    return same;
  }

  int size_;
  std::vector<ModelBlock> blocks;
  std::vector<int> unreferenced;  // in the order of their reuse
  int next_id = 1;
};

// Sequences that grow, fork, end and begin again at random, on the pool and the model at once. Memory holds a token a
// slot.
class Life {
 public:
  Life(unsigned seed, int n_blocks, int block_size, BlockHash hash)
      : random_(seed),
        size_(block_size),
        pool_(n_blocks, block_size, hash),
        model_(n_blocks, block_size),
        memory_(static_cast<size_t>(n_blocks * block_size), -1) {}

  void run(int requests) {
    while (requests_ < requests && !testing::Test::HasFailure()) {
      int what = pick(10);
      if (sequences_.empty() || what == 0)
        begin();
      else if (what == 1 && sequences_.size() < 12)
        fork();
      else if (what == 2)
        end(pick(static_cast<int>(sequences_.size())));
      else
        append(pick(static_cast<int>(sequences_.size())));
      if (requests_ % 8 == 0) check();
    }
    while (!sequences_.empty()) end(0);
    check();
    EXPECT_EQ(pool_.available(), pool_.n_blocks()) << "blocks leaked";
    EXPECT_EQ(pool_.shared(), 0);
  }
  int hits = 0, part_hits = 0, copies = 0, exhausted = 0;

 private:
  struct Sequence {
    std::vector<int> tokens, table;
    Prefix prefix;
    int model_prefix = 0;
  };

  int pick(int n) { return static_cast<int>(random_() % static_cast<unsigned>(n)); }
  int& slot(int block, int offset) { return memory_[static_cast<size_t>(block * size_ + offset)]; }
  static int length(const Sequence& s) { return static_cast<int>(s.tokens.size()); }
  int full(const Sequence& s) const { return length(s) / size_; }

  void begin() {
    Sequence s;
    std::vector<int> prompt;
    for (int n = 1 + pick(4 * size_); n > 0; --n) prompt.push_back(pick(2));
    int at = 0, n = static_cast<int>(prompt.size());
    for (; at + size_ <= n; at += size_) {
      ++requests_;
      int expected = model_.find(s.model_prefix, prompt.data() + at);
      int block = pool_.find(&s.prefix, prompt.data() + at);
      ASSERT_EQ(block, expected);
      if (block < 0) break;
      ++hits;
      model_.take(block);
      s.model_prefix = model_.at(block).id;
      s.table.push_back(block);
    }
    int room = std::min(size_, n - at), matched = 0;
    ++requests_;
    int longest = model_.longest_part(s.model_prefix, prompt.data() + at, room);
    int part = pool_.find_part(s.prefix, prompt.data() + at, room, &matched);
    ASSERT_EQ(matched, longest);
    ASSERT_EQ(part >= 0, longest > 0);
    if (part >= 0) {
      ++part_hits;
      ASSERT_EQ(model_.at(part).kind, ModelBlock::part);
      ASSERT_EQ(model_.at(part).references, 0);
      ASSERT_EQ(model_.at(part).before, s.model_prefix);
      ASSERT_EQ(Model::common(model_.at(part), prompt.data() + at, room), longest);
      model_.take(part);
      model_.at(part).kind = ModelBlock::none;
      s.table.push_back(part);
    }
    s.tokens.assign(prompt.begin(), prompt.begin() + at + matched);
    sequences_.push_back(s);
    read(sequences_.back());
  }

  void fork() {
    Sequence s = sequences_[static_cast<size_t>(pick(static_cast<int>(sequences_.size())))];
    for (int block : s.table) {
      ++requests_;
      pool_.share(block);
      model_.take(block);
    }
    sequences_.push_back(s);
  }

  void append(int which) {
    Sequence& s = sequences_[static_cast<size_t>(which)];
    auto at = static_cast<size_t>(full(s));
    ++requests_;
    bool alone = at < s.table.size() && model_.at(s.table[at]).references == 1;
    int expected = alone ? s.table[at] : model_.allocate();
    int block = at < s.table.size() ? pool_.own(s.table[at]) : pool_.allocate();
    ASSERT_EQ(block, expected);
    if (block < 0) {
      ++exhausted;
      return end(which);
    }
    if (alone) model_.at(block).kind = ModelBlock::none;
    if (at == s.table.size()) {
      s.table.push_back(block);
    } else if (block != s.table[at]) {
      ++copies;
      for (int o = 0; o < size_; ++o) slot(block, o) = slot(s.table[at], o);
      pool_.release(s.table[at]);
      model_.release(s.table[at]);
      s.table[at] = block;
    }
    int holders = 0;
    for (const Sequence& other : sequences_)
      holders += static_cast<int>(std::count(other.table.begin(), other.table.end(), block));
    ASSERT_EQ(holders, 1) << "written while shared";
    slot(block, length(s) % size_) = pick(2);
    s.tokens.push_back(slot(block, length(s) % size_));
    if (length(s) % size_ == 0) publish(&s, block);
  }

  void publish(Sequence* s, int block) {
    ++requests_;
    const int* tokens = s->tokens.data() + length(*s) - size_;
    pool_.publish(block, &s->prefix, tokens);
    int twin = model_.find(s->model_prefix, tokens);
    if (twin < 0) {
      ModelBlock& m = model_.at(block);
      m.kind = ModelBlock::full;
      m.before = s->model_prefix;
      m.id = model_.next_id++;
      m.tokens.assign(tokens, tokens + size_);
      twin = block;
    }
    s->model_prefix = model_.at(twin).id;
  }

  void end(int which) {
    Sequence s = sequences_[static_cast<size_t>(which)];
    sequences_.erase(sequences_.begin() + which);
    read(s);
    int n = length(s) % size_;
    const int* tokens = s.tokens.data() + length(s) - n;
    if (n > 0) {
      int block = s.table.back();
      pool_.keep_part(block, s.prefix, tokens, n);
      ModelBlock& m = model_.at(block);
      if (m.references == 1) {
        m.kind = ModelBlock::part;
        m.before = s.model_prefix;
        m.tokens.assign(tokens, tokens + n);
      }
    }
    for (auto block = s.table.rbegin(); block != s.table.rend(); ++block) {
      ++requests_;
      pool_.release(*block);
      model_.release(*block);
    }
  }

  // What the sequence's blocks hold is what it wrote.
  void read(const Sequence& s) {
    for (int i = 0; i < length(s); ++i) {
      ASSERT_EQ(slot(s.table[static_cast<size_t>(i / size_)], i % size_), s.tokens[static_cast<size_t>(i)]);
    }
  }

  void check() {
    std::vector<int> references(static_cast<size_t>(pool_.n_blocks()));
    for (const Sequence& s : sequences_) {
      read(s);
      for (int block : s.table) ++references[static_cast<size_t>(block)];
    }
    for (int b = 0; b < pool_.n_blocks(); ++b) ASSERT_EQ(pool_.references(b), references[static_cast<size_t>(b)]);
    ASSERT_EQ(pool_.available(), static_cast<int>(model_.unreferenced.size()));
    ASSERT_EQ(pool_.shared(), std::count_if(references.begin(), references.end(), [](int r) { return r > 1; }));
  }

  std::mt19937 random_;
  int size_, requests_ = 0;
  BlockPool pool_;
  Model model_;
  std::vector<int> memory_;  // [n_blocks, block_size]
  std::vector<Sequence> sequences_;
};

TEST(BlockPool, HundredThousandRandomRequests) {
  for (BlockHash hash : {block_hash, one_bit_hash}) {
    Life life(1, 24, 3, hash);
    life.run(100000);
    EXPECT_GT(life.hits, 1000);
    EXPECT_GT(life.part_hits, 100);
    EXPECT_GT(life.copies, 1000);
    EXPECT_GT(life.exhausted, 100);
  }
  Life(2, 1, 4, block_hash).run(20000);   // a pool of one block
  Life(3, 40, 1, block_hash).run(20000);  // blocks of one token: no part-filled ones
}

}  // namespace
