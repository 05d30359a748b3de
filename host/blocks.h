// blocks.h: which block of the cache holds which tokens: a pool with reference counts, whose contents are
// found again.
//
// A block that nobody references keeps its tokens as a cache until the pool needs it, the least recently used
// first. Full blocks are found by a chained hash of all tokens up to their end, and shared. A part-filled one (a
// contiguous cache's slot is one) is found by the prefix before it and handed to one owner, who writes on. A hash
// is only a hint: on a hit the tokens are compared, and so is the identity of the prefix, which by induction
// compares all tokens before.
//
// All memory is taken when the pool is made: nothing else here can fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <vector>

// All tokens up to the end of a full block. `id` is unique to the contents (never given to other contents,
// even once they were evicted); `hash` is where to look. The default is the empty prefix.
struct Prefix {
  uint64_t hash = 0;
  int64_t id = 0;
};

using BlockHash = uint64_t (*)(uint64_t prefix_hash, const int* tokens, int n);
uint64_t block_hash(uint64_t prefix_hash, const int* tokens, int n);

class BlockPool {
 public:
  // hash: the tests force collisions.
  BlockPool(int n_blocks, int block_size, BlockHash hash = block_hash);

  // A block of the caller's alone, contents undefined; evicts cached contents if it must. -1: none is left.
  int allocate();
  void share(int block);    // one reference more
  void release(int block);  // one less; the last leaves what was published or kept as cache
  // The block to write in place of `block`, which the caller references: itself, withdrawn from the cache, where he
  // is alone; otherwise a new one, into which he must copy it before he releases it. -1: none is left.
  int own(int block);

  // The block of tokens [block_size] right after *prefix, referenced once more; moves *prefix past it. -1: none.
  int find(Prefix* prefix, const int* tokens);
  // The unreferenced part-filled block right after `prefix` that begins with the most of tokens [n]: *matched >= 1
  // of them. It is the caller's alone. -1: none.
  int find_part(const Prefix& prefix, const int* tokens, int n, int* matched);

  // `block` is full and holds tokens [block_size] after *prefix, which moves past it: from now on others may find
  // it, and nobody may write it without asking own.
  void publish(int block, Prefix* prefix, const int* tokens);
  // `block` holds tokens [n], n < block_size, after `prefix`: find_part may find it once the caller has released
  // it. No effect where others reference it too.
  void keep_part(int block, const Prefix& prefix, const int* tokens, int n);

  int n_blocks() const { return static_cast<int>(blocks_.size()); }
  int block_size() const { return block_size_; }
  int available() const { return static_cast<int>(unused_.size()); }  // unreferenced: what allocate can give
  int shared() const { return n_shared_; }                            // referenced more than once
  int64_t evicted() const { return n_evicted_; }                      // cached contents that had to go
  int references(int block) const { return blocks_[static_cast<size_t>(block)].references; }

 private:
  using Index = std::multimap<uint64_t, int>;  // hash -> block
  struct Block {
    int references = 0;
    Index* index = nullptr;          // the one that finds it; null: its contents are nobody's or its owner's alone
    Index::iterator entry;           // ... there
    Index::node_type spare;          // the entry while no index has it
    int64_t before = 0;              // id of the prefix that its tokens follow
    int64_t id = 0;                  // of the prefix that a full block ends
    std::vector<int> tokens;         // while an index finds it
    std::list<int>::iterator place;  // in used_ or unused_
  };

  Block& at(int block) { return blocks_[static_cast<size_t>(block)]; }
  int lookup(const Prefix& prefix, uint64_t hash, const int* tokens) const;
  void insert(Index* index, uint64_t key, int block, const Prefix& prefix, const int* tokens, int n);
  void forget(int block);

  int block_size_;
  BlockHash hash_;
  std::vector<Block> blocks_;
  std::list<int> used_;
  std::list<int> unused_;  // as allocate takes them: first those without contents, then the least recently used
  Index full_, parts_;     // full blocks by the hash of their end, part-filled ones by that of their beginning
  int64_t next_id_ = 1;    // 0: the empty prefix
  int64_t n_evicted_ = 0;
  int n_shared_ = 0;
};
