// sampler.cpp: logits -> id.
//
// A vocabulary has up to 262144 entries and is never sorted: top-k keeps a short list behind a rising
// threshold, top-p first drops what cannot belong to the nucleus and takes the rest from a heap, largest
// first, until the mass is reached.
#include "host/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "host/error.h"

namespace {

// e^x for x <= 0; 0 below -700. The C library's exp rounds differently from one version to the next; these
// are plain products and sums of doubles, the same on every machine, which the compiler turns into vectors. x
// = n ln 2 + r, |r| <= ln 2 / 2, and Taylor's series in r up to r^11 / 11!: the first missing term is below
// 1e-14 of the result.
inline double exponential(double x) {
  const double inside = x < -700 ? -700 : x;
  const double shifted = inside * 1.4426950408889634 + 0x1.8p52;  // the nearest whole number is in the low bits
  const double n = shifted - 0x1.8p52;
  const double r = (inside - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;  // ln 2 in two parts
  double p = 1.0 / 39916800;
  for (double coefficient :
       {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    p = p * r + coefficient;
  const double power = std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) + 1023) << 52);  // 2^n
  return x < -700 ? 0 : p * power;
}

void penalise(float* logits, float penalty, const int* history, int n_history) {
  const int* first = history + std::max(0, n_history - REPEAT_LAST_N);
  for (const int* id = first; id < history + n_history; id++) {
    if (std::find(first, id, *id) != id) continue;  // once, however often it occurred
    float& logit = logits[*id];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
}

// Sixteen maxima side by side: one would wait for the one before it.
float largest_of(const float* logits, int n) {
  constexpr int LANES = 16;
  constexpr float lowest = -std::numeric_limits<float>::infinity(), top = std::numeric_limits<float>::max();
  float largest[LANES];
  int bad[LANES] = {};
  std::fill_n(largest, LANES, lowest);
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) {
      const float x = logits[i + j];
      largest[j] = x > largest[j] ? x : largest[j];
      bad[j] |= !(x <= top);
    }
  for (; i < n; i++) {
    largest[0] = std::max(largest[0], logits[i]);
    bad[0] |= !(logits[i] <= top);
  }
  const float result = *std::max_element(largest, largest + LANES);
  if (std::any_of(bad, bad + LANES, [](int b) { return b != 0; }) || result == lowest) {
    const float* at = std::find_if(logits, logits + n, [](float x) { return !(x <= top); });
    if (at == logits + n) at = logits;
    fail(
        "the logits are not finite numbers (token %d has %g): the model file or its arithmetic is broken; "
        "export the model again",
        static_cast<int>(at - logits), static_cast<double>(*at));
  }
  return result;
}

}  // namespace

SamplerScratch::SamplerScratch(int vocab_size) {
  const auto n = static_cast<size_t>(vocab_size);
  candidates.reserve(n);
  weights.reserve(n);
  penalised.reserve(n);
}

size_t SamplerScratch::bytes(int vocab_size) {
  return static_cast<size_t>(vocab_size) * (sizeof(Candidate) + sizeof(double) + sizeof(float));
}

int Sampler::sample(const float* logits, int vocab_size, const int* history, int n_history, SamplerScratch& s) {
  if (options_.repeat_penalty != 1) {
    s.penalised.assign(logits, logits + vocab_size);
    penalise(s.penalised.data(), options_.repeat_penalty, history, n_history);
    logits = s.penalised.data();
  }
  const float largest = largest_of(logits, vocab_size);
  if (options_.temperature == 0) return static_cast<int>(std::find(logits, logits + vocab_size, largest) - logits);
  keep_top_k(logits, vocab_size, s);
  if (options_.top_p < 1 || options_.min_p > 0) keep_top_p_and_min_p(largest, s);
  return draw(largest, s);
}

// s.candidates = the k largest, in order of id. Ids come in ascending order, so one that only equals the worst
// of k kept loses to it.
void Sampler::keep_top_k(const float* logits, int vocab_size, SamplerScratch& s) const {
  const bool all = options_.top_k == 0 || options_.top_k >= vocab_size;
  const size_t k = static_cast<size_t>(all ? vocab_size : options_.top_k),
               room = all ? k : std::min(2 * k + 64, static_cast<size_t>(vocab_size));
  const auto before = [](const SamplerScratch::Candidate& a, const SamplerScratch::Candidate& b) {
    return a.before(b);
  };
  const auto shorten = [&] {
    std::nth_element(s.candidates.begin(), s.candidates.begin() + static_cast<ptrdiff_t>(k) - 1, s.candidates.end(),
                     before);
    s.candidates.resize(k);
  };
  s.candidates.clear();
  float floor = -std::numeric_limits<float>::infinity();
  for (int id = 0; id < vocab_size; id++) {
    if (!(logits[id] > floor)) continue;
    s.candidates.push_back({logits[id], id});
    if (all || s.candidates.size() < room) continue;
    shorten();
    floor = s.candidates[k - 1].logit;
  }
  if (all) return;
  if (s.candidates.size() > k) shorten();
  std::sort(s.candidates.begin(), s.candidates.end(),
            [](const SamplerScratch::Candidate& a, const SamplerScratch::Candidate& b) { return a.id < b.id; });
}

// Both keep the first few in descending order. n candidates each below (1 - p) / n of the mass are less than
// 1 - p of it together, so none of them is needed to reach p.
void Sampler::keep_top_p_and_min_p(float largest, SamplerScratch& s) const {
  const size_t n = s.candidates.size();
  s.weights.resize(n);
  for (size_t i = 0; i < n; i++) s.weights[i] = exponential(static_cast<double>(s.candidates[i].logit - largest));
  double mass = 0;
  for (const double w : s.weights) mass += w;
  const double p = static_cast<double>(options_.top_p);
  const double floor = std::max(static_cast<double>(options_.min_p), (1 - p) * mass / static_cast<double>(n));
  size_t kept = 0;
  for (size_t i = 0; i < n; i++)
    if (s.weights[i] >= floor || s.candidates[i].logit == largest) s.candidates[kept++] = s.candidates[i];
  s.candidates.resize(kept);
  if (p == 1) return;
  const auto after = [](const SamplerScratch::Candidate& a, const SamplerScratch::Candidate& b) { return b.before(a); };
  std::make_heap(s.candidates.begin(), s.candidates.end(), after);
  auto heap_end = s.candidates.end();
  for (double reached = 0; reached < p * mass && heap_end != s.candidates.begin();) {
    std::pop_heap(s.candidates.begin(), heap_end, after);
    reached += exponential(static_cast<double>((--heap_end)->logit - largest));
  }
  s.candidates.erase(s.candidates.begin(), heap_end);
}

int Sampler::draw(float largest, SamplerScratch& s) {
  const size_t n = s.candidates.size();
  const double temperature = static_cast<double>(options_.temperature);
  s.weights.resize(n);
  for (size_t i = 0; i < n; i++)
    s.weights[i] = exponential(static_cast<double>(s.candidates[i].logit - largest) / temperature);
  double mass = 0;
  for (const double w : s.weights) mass += w;
  double left = uniform() * mass;
  size_t chosen = 0;
  for (size_t i = 0; i < n; i++) {
    if (s.weights[i] == 0) continue;
    chosen = i;  // where rounding leaves a rest after the last, it is the last
    if (left < s.weights[i]) break;
    left -= s.weights[i];
  }
  return s.candidates[chosen].id;
}

// SplitMix64 (Steele, Lea and Flood 2014): one 64-bit word of state, any seed is good, the same on every
// machine.
double Sampler::uniform() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;  // in [0, 1)
}
