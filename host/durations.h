// durations.h: the percentiles of any number of durations, in bounded memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// Counts them by their logarithm, in steps of 1 %: a percentile is right to 0.5 %, from 0.1 us to more than a day.
class Durations {
 public:
  void add(double seconds) noexcept {
    const double step = std::log(std::max(seconds, SHORTEST) / SHORTEST) / std::log(STEP);
    counts_[static_cast<size_t>(std::min(step, STEPS - 1.0))]++;
    n_++;
  }

  int64_t count() const { return n_; }

  // The smallest duration that at least p of them (0 < p <= 1) do not exceed; 0 where there are none.
  double percentile(double p) const {
    if (n_ == 0) return 0;
    const auto rank = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(p * static_cast<double>(n_))));
    int64_t reached = 0;
    size_t i = 0;
    while ((reached += counts_[i]) < rank) i++;
    return SHORTEST * std::pow(STEP, static_cast<double>(i) + 0.5);  // the step's middle
  }

 private:
  static constexpr double SHORTEST = 1e-7, STEP = 1.01;
  static constexpr int STEPS = 2800;
  std::vector<int64_t> counts_ = std::vector<int64_t>(STEPS);  // all at once: a step that is over needs no memory
  int64_t n_ = 0;
};
