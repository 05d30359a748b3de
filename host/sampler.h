// sampler.h: logits -> id.
//
// The order of llama.cpp's default chain: repeat penalty, top-k, top-p, min-p, temperature, draw. So top-p
// and min-p look at the probabilities at temperature 1.
#pragma once

#include <cstddef>
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

// Memory to draw one token: one a thread, for vocabularies of up to vocab_size.
struct SamplerScratch {
  struct Candidate {
    float logit;
    int id;
    // A total order, so that equal logits have one order everywhere.
    bool before(const Candidate& other) const { return logit > other.logit || (logit == other.logit && id < other.id); }
  };
  std::vector<Candidate> candidates;
  std::vector<double> weights;   // [candidates] e^(logit - largest), not normalised
  std::vector<float> penalised;  // [vocab_size]

  explicit SamplerScratch(int vocab_size);
  static size_t bytes(int vocab_size);
};

// The state of one sequence: the same seed and logits give the same ids on any machine, whatever else runs.
class Sampler {
 public:
  Sampler() = default;
  explicit Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}
  // logits [vocab_size]. history: the sequence's last ids, for the repeat penalty. Ties: lowest id. Throws Error where
  // a logit is NaN or +infinity, or all are -infinity.
  int sample(const float* logits, int vocab_size, const int* history, int n_history, SamplerScratch& scratch);
  const SamplerOptions& options() const { return options_; }

 private:
  void keep_top_k(const float* logits, int vocab_size, SamplerScratch& s) const;
  void keep_top_p_and_min_p(float largest, SamplerScratch& s) const;
  int draw(float largest, SamplerScratch& s);
  double uniform();

  SamplerOptions options_;
  uint64_t state_ = 0;
};
