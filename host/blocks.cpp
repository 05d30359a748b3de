#include "host/blocks.h"

#include <algorithm>

uint64_t block_hash(uint64_t prefix_hash, const int* tokens, int n) {
  uint64_t h = prefix_hash;
  for (int i = 0; i < n; ++i) {  // the mixing step of splitmix64, once a token
    h = (h ^ static_cast<uint64_t>(tokens[i])) + 0x9e3779b97f4a7c15u;
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9u;
    h = (h ^ (h >> 27)) * 0x94d049bb133111ebu;
    h ^= h >> 31;
  }
  return h;
}

BlockPool::BlockPool(int n_blocks, int block_size, BlockHash hash)
    : block_size_(block_size), hash_(hash), blocks_(static_cast<size_t>(n_blocks)) {
  for (int b = 0; b < n_blocks; ++b) {
    at(b).place = unused_.insert(unused_.end(), b);
    at(b).tokens.reserve(static_cast<size_t>(block_size));
    at(b).spare = full_.extract(full_.emplace(0, b));
  }
}

int BlockPool::allocate() {
  if (unused_.empty()) return -1;
  int block = unused_.front();
  if (at(block).index) ++n_evicted_;
  forget(block);
  share(block);
  return block;
}

void BlockPool::share(int block) {
  int references = ++at(block).references;
  if (references == 1) used_.splice(used_.end(), unused_, at(block).place);
  if (references == 2) ++n_shared_;
}

void BlockPool::release(int block) {
  int references = --at(block).references;
  if (references == 1) --n_shared_;
  // Without contents: the next to be taken; a cached one: the last.
  if (references == 0) {
    unused_.splice(at(block).index ? unused_.end() : unused_.begin(), used_, at(block).place);
  }
}

int BlockPool::own(int block) {
  if (at(block).references > 1) return allocate();
  forget(block);
  return block;
}

int BlockPool::lookup(const Prefix& prefix, uint64_t hash, const int* tokens) const {
  auto [begin, end] = full_.equal_range(hash);
  for (auto hit = begin; hit != end; ++hit) {
    const Block& b = blocks_[static_cast<size_t>(hit->second)];
    if (b.before == prefix.id && std::equal(b.tokens.begin(), b.tokens.end(), tokens)) return hit->second;
  }
  return -1;
}

int BlockPool::find(Prefix* prefix, const int* tokens) {
  int block = lookup(*prefix, hash_(prefix->hash, tokens, block_size_), tokens);
  if (block < 0) return -1;
  share(block);
  *prefix = {at(block).entry->first, at(block).id};
  return block;
}

int BlockPool::find_part(const Prefix& prefix, const int* tokens, int n, int* matched) {
  int best = -1;
  *matched = 0;
  auto [begin, end] = parts_.equal_range(prefix.hash);
  for (auto hit = begin; hit != end; ++hit) {
    const Block& b = at(hit->second);
    if (b.before != prefix.id) continue;
    auto differs = std::mismatch(b.tokens.begin(), b.tokens.end(), tokens, tokens + n).first;
    int same = static_cast<int>(differs - b.tokens.begin());
    if (same > *matched) {
      best = hit->second;
      *matched = same;
    }
  }
  if (best < 0) return -1;
  forget(best);
  share(best);
  return best;
}

void BlockPool::publish(int block, Prefix* prefix, const int* tokens) {
  uint64_t hash = hash_(prefix->hash, tokens, block_size_);
  int twin = lookup(*prefix, hash, tokens);  // two computed the same at once: the second stays unpublished
  if (twin < 0) insert(&full_, hash, block, *prefix, tokens, block_size_);
  *prefix = {hash, twin < 0 ? at(block).id : at(twin).id};
}

void BlockPool::keep_part(int block, const Prefix& prefix, const int* tokens, int n) {
  bool free = at(block).references == 1 && !at(block).index;
  if (n > 0 && free) insert(&parts_, prefix.hash, block, prefix, tokens, n);
}

void BlockPool::insert(Index* index, uint64_t key, int block, const Prefix& prefix, const int* tokens, int n) {
  Block& b = at(block);
  b.index = index;
  b.spare.key() = key;
  b.entry = index->insert(std::move(b.spare));
  b.before = prefix.id;
  b.id = next_id_++;
  b.tokens.assign(tokens, tokens + n);
}

void BlockPool::forget(int block) {
  Block& b = at(block);
  if (b.index) b.spare = b.index->extract(b.entry);
  b.index = nullptr;
}
