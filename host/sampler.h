// sampler.h: logits -> id.
//
// The order of llama.cpp's default chain: repeat penalty, top-k, top-p, min-p, temperature, draw. So top-p
// and min-p look at the probabilities at temperature 1.
#pragma once

#include <cstdint>
#include <vector>

struct SamplerOptions {
  float temperature = 0;     // 0: greedy; else finite, > 0
  int top_k = 0;             // keep the k largest; 0: all
  float top_p = 1;           // in (0, 1]: keep the smallest set whose probability reaches p
  float min_p = 0;           // in [0, 1]: keep those of at least p times the largest probability
  float repeat_penalty = 1;  // > 0: a logit of a recent id is divided by it where positive, multiplied where negative
  uint64_t seed = 0;
};

constexpr int REPEAT_LAST_N = 64;  // ids of the history that the repeat penalty looks at (llama.cpp's default)

// The state of one sequence: the same seed and logits give the same ids on any machine, whatever else runs.
class Sampler {
 public:
  Sampler() = default;
  explicit Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}
  // logits [vocab_size] may be overwritten. history: the sequence's last ids, for the repeat penalty. Ties:
  // lowest id. Throws Error where a logit is NaN or +infinity, or all are -infinity.
  int sample(float* logits, int vocab_size, const int* history, int n_history);
  const SamplerOptions& options() const { return options_; }

 private:
  struct Candidate {
    float logit;
    int id;
    // A total order, so that equal logits have one order everywhere.
    bool before(const Candidate& other) const { return logit > other.logit || (logit == other.logit && id < other.id); }
  };
  void keep_top_k(const float* logits, int vocab_size);
  void keep_top_p_and_min_p(float largest);
  int draw(float largest);
  double uniform();

  SamplerOptions options_;
  uint64_t state_ = 0;
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;  // [candidates] e^(logit - largest), not normalised
};
