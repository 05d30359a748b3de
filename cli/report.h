// report.h: what a run tells of itself: on stderr, and as JSON (--stats).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "host/engine.h"
#include "host/roofline.h"
#include "kernels/ranks.h"
#include "model.h"

// What a rank of several takes.
struct RankSetup {
  std::string host;
  int64_t threads = 0;
  size_t weight_bytes = 0, kv_bytes = 0, activation_bytes = 0, free_bytes = 0;
};

// What the run is made of: known before the weights, the cache and the activations are allocated.
struct Setup {
  const char *cache = "", *kernel = "", *kv = "", *device = "";
  int block_size = 0;  // contiguous: the context
  int threads = 0;
  uint64_t seed = 0;
  Limits limits;
  size_t kv_bytes_per_token = 0, kv_bytes = 0, activation_bytes = 0;
  size_t free_bytes = 0;              // before anything of it is allocated
  std::vector<RankSetup> ranks = {};  // what is above is of one with the most
};

// 64-bit FNV-1a, a float's bits at a time, over eight interleaved streams (one would be bound by the latency of a
// multiplication) that are folded into one.
class LogitsHash {
 public:
  void add(const float* row, int n);
  uint64_t value() const;

 private:
  static constexpr uint64_t OFFSET = 0xcbf29ce484222325u, PRIME = 0x100000001b3u;
  static constexpr int STREAMS = 8;
  uint64_t streams_[STREAMS] = {OFFSET, OFFSET, OFFSET, OFFSET, OFFSET, OFFSET, OFFSET, OFFSET};
};

// Of one sequence its own hash, of several theirs, in order, folded into one.
class HashOfAll {
 public:
  void add(uint64_t hash);
  uint64_t value() const { return n_ == 1 ? first_ : folded_; }

 private:
  uint64_t first_ = 0, folded_ = 0;
  int64_t n_ = 0;
};

// What came of it.
struct Measured {
  Stats stats;
  HashOfAll closed;                   // of the logits used
  std::map<size_t, LogitsHash> open;  // ... by the sequences that may go on, or wait for one before them
  int64_t logit_rows = 0;
  double first_token = 0;  // seconds from the start of the process
  std::optional<double> perplexity;
  Ranks::Traffic traffic;
  std::optional<Machine> machine;  // probed after the run, for the prediction beside what was measured

  // The logits [n] of a sequence were used.
  void use_logits(size_t sequence, const float* logits, int n);
  uint64_t hash_of(size_t sequence) const;  // of one that is open
  void close(size_t sequence);              // it has ended; to be called in the order of the sequences
};

uint64_t logits_hash(const Measured& measured);
// What a step of decode read and multiplied, of the mean number of sequences and context.
Work decode_work(const Model& model, const Setup& setup, const Measured& measured);

void print_setup(const Model& model, const Setup& setup);
void print_measured(const Model& model, const Setup& setup, const Measured& measured);
std::string stats_json(const Model& model, const Setup& setup, const Measured& measured);
