// blocks.h: which block of the cache holds which tokens: a pool with reference counts, whose contents are
// found again.
//
// A block that nobody references keeps its tokens as a cache until the pool needs it, the least recently used
// first. Full blocks are found by a chained hash of all tokens up to their end, and shared; a part-filled one
// (a contiguous slot is one) is found by the prefix before it and handed to one owner, who goes on writing
// it. A hash is only a hint: on a hit the tokens are compared, and so is the identity of the prefix, which by
// induction compares all tokens before.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>
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

  // A block of the caller's alone, contents undefined; evicts cached contents if it must. -1: all are
  // referenced.
  int allocate();
  void share(int block);  // one reference more
  // One reference less. The last one leaves contents that were published or kept as cache.
  void release(int block);
  // The block to write in place of `block`, of which the caller holds a reference: itself, withdrawn from the
  // cache, where the caller is alone; otherwise a new one, into which the caller must copy it before he
  // releases it. -1: none left.
  int own(int block);

  // The block holding tokens [block_size] right after `prefix`, one reference taken, and prefix moved past
  // it. -1: none.
  int find(Prefix* prefix, const int* tokens);
  // An unreferenced part-filled block right after `prefix` that begins with the most of tokens [n]: how many,
  // *matched >= 1. The caller's alone from now on. -1: none.
  int find_part(const Prefix& prefix, const int* tokens, int n, int* matched);

  // The block, full, holds tokens [block_size] after *prefix, which moves past it: others may find it from
  // now on, and nobody may write it.
  void publish(int block, Prefix* prefix, const int* tokens);
  // The caller's block holds tokens [n], n < block_size, after prefix, and its only reference is about to be
  // released.
  void keep_part(int block, const Prefix& prefix, const int* tokens, int n);

  int n_blocks() const { return static_cast<int>(blocks_.size()); }
  int block_size() const { return block_size_; }
  int available() const { return static_cast<int>(unused_.size()); }  // unreferenced: what allocate can give
  int shared() const { return n_shared_; }                            // referenced more than once
  int64_t evicted() const { return n_evicted_; }                      // cached contents that had to go
  int references(int block) const { return blocks_[static_cast<size_t>(block)].references; }

 private:
  struct Block {
    int references = 0;
    bool cached = false;  // found in index_
    Prefix before;        // the prefix its tokens follow
    Prefix after;         // full blocks: the prefix it ends
    std::vector<int> tokens;
    std::list<int>::iterator place;  // in used_ or unused_
  };
  using Index = std::unordered_multimap<uint64_t, int>;  // hash -> block

  Block& at(int block) { return blocks_[static_cast<size_t>(block)]; }
  int lookup(const Prefix& prefix, uint64_t hash, const int* tokens);
  void forget(int block);
  void reference(int block);
  void insert(Index* index, uint64_t key, int block, const Prefix& prefix, const int* tokens, int n);

  int block_size_;
  BlockHash hash_;
  std::vector<Block> blocks_;
  std::list<int> used_,
      unused_;  // unused_: in the order allocate takes them: without contents first, then oldest first
  Index full_, parts_;  // full blocks by the hash of their end, part-filled ones by the hash before them
  int64_t next_id_ = 1;
  int64_t n_evicted_ = 0;
  int n_shared_ = 0;
};
