// batches.h: how the tests make a Batch: pieces of sequences, whose blocks were dealt in a shuffled order.
#pragma once

#include <algorithm>
#include <climits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/batch.h"

// Tokens first .. first + n - 1 of a sequence.
struct Piece {
  int sequence, first, n;
};

// A pool of blocks that some sequences share, and the batches over it.
class Batches {
 public:
  // block_size 0: one block holds the whole context, as in a contiguous cache. `spare` blocks belong to nobody.
  Batches(int n_sequences, int context, int block_size, int spare = 0)
      : block_size_(block_size ? block_size : context),
        blocks_each_((context + block_size_ - 1) / block_size_),
        blocks_(static_cast<size_t>(n_sequences * blocks_each_ + spare)) {
    std::iota(blocks_.begin(), blocks_.end(), 0);
    std::shuffle(blocks_.begin(), blocks_.end(), std::mt19937(1));
  }

  int block_size() const { return block_size_; }
  int n_blocks() const { return static_cast<int>(blocks_.size()); }
  int block(int sequence, int i) const { return blocks_[static_cast<size_t>(sequence * blocks_each_ + i)]; }
  int slot(int sequence, int position) const {
    return block(sequence, position / block_size_) * block_size_ + position % block_size_;
  }

  // A step over these pieces, valid until the next call. ids: the tokens of each sequence, whose logits are all wanted;
  // none where the stage under test does not look at them. Table entries that nobody may read, behind the window or
  // after the context, lead far out of any cache.
  const Batch& batch(const std::vector<Piece>& pieces, const std::vector<std::vector<int>>& ids = {}, int window = 0) {
    tokens_.clear(), positions_.clear(), slots_.clear(), lengths_.clear(), table_.clear();
    starts_ = {0};
    for (const Piece& piece : pieces) add(piece, ids, window);
    logit_rows_.resize(tokens_.size());
    std::iota(logit_rows_.begin(), logit_rows_.end(), 0);
    batch_ = {};
    batch_.n_tokens = static_cast<int>(positions_.size()), batch_.n_sequences = static_cast<int>(pieces.size());
    batch_.tokens = tokens_.data(), batch_.positions = positions_.data(), batch_.query_start = starts_.data();
    batch_.context_len = lengths_.data(), batch_.slot_mapping = slots_.data();
    batch_.block_table = table_.data(), batch_.max_blocks = row_length();
    batch_.n_logits = static_cast<int>(logit_rows_.size()), batch_.logit_rows = logit_rows_.data();
    return batch_;
  }

 private:
  int row_length() const { return blocks_each_ + 2; }  // longer than any sequence needs

  void add(const Piece& piece, const std::vector<std::vector<int>>& ids, int window) {
    const int context = piece.first + piece.n, seen = window > 0 ? std::max(0, piece.first - window + 1) : 0;
    for (int t = piece.first; t < context; t++) {
      if (!ids.empty()) tokens_.push_back(ids[static_cast<size_t>(piece.sequence)][static_cast<size_t>(t)]);
      positions_.push_back(t);
      slots_.push_back(slot(piece.sequence, t));
    }
    for (int i = 0; i < row_length(); i++) {
      const bool read = i >= seen / block_size_ && i * block_size_ < context;
      table_.push_back(read ? block(piece.sequence, i) : i % 2 ? INT_MAX : INT_MIN);
    }
    starts_.push_back(static_cast<int>(positions_.size()));
    lengths_.push_back(context);
  }

  int block_size_, blocks_each_;
  std::vector<int> blocks_;  // a sequence's after the other's, then the spare ones
  std::vector<int> tokens_, positions_, starts_, lengths_, table_, slots_, logit_rows_;
  Batch batch_;
};
