// sampler.h: logits -> id.
#pragma once

#include <cstdint>
#include <vector>

struct SamplerOptions {
  float temperature = 0;  // 0: greedy
  int top_k = 0;          // keep the k largest; 0: all
  float top_p = 1;        // keep the smallest set whose probability reaches p
  float min_p = 0;        // keep those of at least p times the largest probability
  float repeat_penalty = 1;
  uint64_t seed = 0;
};

// The state of one sequence: the same seed gives the same text, whatever else runs.
class Sampler {
 public:
  Sampler() = default;
  explicit Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}
  // logits [vocab_size] may be overwritten. history: the sequence's last ids, for the repeat penalty. Ties: lowest id.
  int sample(float* logits, int vocab_size, const int* history, int n_history);
  const SamplerOptions& options() const { return options_; }

 private:
  SamplerOptions options_;
  uint64_t state_ = 0;
  std::vector<int> order_;  // scratch: candidates
};
