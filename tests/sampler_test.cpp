// The sampler against plain float64 arithmetic on fully sorted probabilities, and its draws against those
// probabilities.
#include "host/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "host/error.h"
#include "kernels/device.h"

namespace {

// One token from logits [vocab_size].
int draw(Sampler& sampler, const std::vector<float>& logits, const std::vector<int>& history = {}) {
  static SamplerScratch scratch(1 << 18);
  return sampler.sample(logits.data(), static_cast<int>(logits.size()), history.data(),
                        static_cast<int>(history.size()), scratch);
}

std::vector<float> random_logits(int n, float spread, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(static_cast<size_t>(n));
  for (float& l : logits) l = normal(generator);
  return logits;
}

// The chain as its definition reads: sort everything, cut the list after each filter, renormalise.
std::map<int, double> reference(std::vector<float> logits, const SamplerOptions& o, std::vector<int> history = {}) {
  if (history.size() > REPEAT_LAST_N) history.erase(history.begin(), history.end() - REPEAT_LAST_N);
  std::sort(history.begin(), history.end());
  history.erase(std::unique(history.begin(), history.end()), history.end());
  for (const int id : history) {
    float& l = logits[static_cast<size_t>(id)];
    l = l > 0 ? l / o.repeat_penalty : l * o.repeat_penalty;
  }
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto logit = [&](int id) { return static_cast<double>(logits[static_cast<size_t>(id)]); };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logit(a) > logit(b); });
  if (o.top_k > 0 && static_cast<size_t>(o.top_k) < order.size()) order.resize(static_cast<size_t>(o.top_k));
  const double largest = logit(order[0]);
  if (o.temperature == 0) return {{order[0], 1.0}};
  double mass = 0, reached = 0;
  for (const int id : order) mass += std::exp(logit(id) - largest);
  if (o.top_p < 1) {
    size_t kept = 0;
    while (kept < order.size() && reached < static_cast<double>(o.top_p) * mass)
      reached += std::exp(logit(order[kept++]) - largest);
    order.resize(kept);
  }
  std::erase_if(order, [&](int id) { return std::exp(logit(id) - largest) < static_cast<double>(o.min_p); });
  std::map<int, double> p;
  mass = 0;
  for (const int id : order) mass += p[id] = std::exp((logit(id) - largest) / static_cast<double>(o.temperature));
  for (auto& [id, value] : p) value /= mass;
  return p;
}

// Draws many ids; checks that only ids of the reference come and that their counts fit it: Pearson's
// chi-square with the bins below 5 expected counts put together. A right sampler passes the bound, mean + 5
// standard deviations, but for one seed in many thousands, and the seeds are fixed.
void check_distribution(const std::vector<float>& logits, SamplerOptions options, const std::vector<int>& history = {},
                        int draws = 20000) {
  const std::map<int, double> expected = reference(logits, options, history);
  options.seed = 12345;
  Sampler sampler(options);
  std::map<int, int> counts;
  for (int i = 0; i < draws; i++) {
    const int id = draw(sampler, logits, history);
    ASSERT_TRUE(expected.count(id)) << "id " << id << " should have been filtered";
    counts[id]++;
  }
  double chi = 0, rest_expected = 0, rest_count = 0;
  int bins = 0;
  for (const auto& [id, p] : expected) {
    const double e = p * draws;
    if (e < 5) {
      rest_expected += e;
      rest_count += counts[id];
      continue;
    }
    chi += (counts[id] - e) * (counts[id] - e) / e;
    bins++;
  }
  if (rest_expected >= 5) {
    chi += (rest_count - rest_expected) * (rest_count - rest_expected) / rest_expected;
    bins++;
  }
  const double freedom = std::max(1, bins - 1);
  EXPECT_LT(chi, freedom + 5 * std::sqrt(2 * freedom)) << bins << " bins";
}

SamplerOptions at(float temperature) {
  SamplerOptions o;
  o.temperature = temperature;
  return o;
}

int sample_once(const std::vector<float>& logits, const SamplerOptions& options, const std::vector<int>& history = {}) {
  Sampler sampler(options);
  return draw(sampler, logits, history);
}

TEST(Sampler, DrawsFromTheSoftmaxAtEveryTemperature) {
  for (const float t : {0.3f, 0.8f, 1.0f, 2.5f}) {
    SCOPED_TRACE(t);
    check_distribution(random_logits(50, 2, 1), at(t));
  }
}

TEST(Sampler, EveryFilterAgreesWithItsDefinition) {
  const std::vector<float> logits = random_logits(150, 2, 2);
  for (const int top_k : {0, 1, 2, 7, 40, 149, 150, 1000})
    for (const float top_p : {1.0f, 0.95f, 0.5f, 0.01f})
      for (const float min_p : {0.0f, 0.05f, 0.4f, 1.0f}) {
        SCOPED_TRACE(testing::Message() << "top_k " << top_k << " top_p " << top_p << " min_p " << min_p);
        SamplerOptions o = at(1.5f);  // flattens what is left, so that the smallest kept id is drawn too
        o.top_k = top_k, o.top_p = top_p, o.min_p = min_p;
        check_distribution(logits, o, {}, 5000);
      }
}

// With a temperature this high every id that a filter left is drawn: the kept sets themselves must be equal.
TEST(Sampler, KeepsExactlyTheRightSet) {
  const std::vector<float> logits = random_logits(60, 1, 3);
  for (const auto& [top_k, top_p, min_p] : std::vector<std::tuple<int, float, float>>{
           {13, 1.0f, 0.0f}, {0, 0.6f, 0.0f}, {0, 1.0f, 0.1f}, {30, 0.8f, 0.05f}}) {
    SamplerOptions o = at(1000);
    o.top_k = top_k, o.top_p = top_p, o.min_p = min_p;
    Sampler sampler(o);
    std::map<int, int> seen;
    for (int i = 0; i < 4000; i++) seen[draw(sampler, logits)]++;
    EXPECT_EQ(seen.size(), reference(logits, o).size());
  }
}

TEST(Sampler, RepeatPenaltyCountsAnIdOnceAndLooksAtTheLast64) {
  std::vector<float> logits = random_logits(100, 2, 4);
  SamplerOptions o = at(1);
  o.repeat_penalty = 1.7f;
  check_distribution(logits, o, {1, 5, 5, 5, 9, 99, 0});
  std::vector<int> history(200, 3);  // ids 10 .. 73 fill the last 64 places, so 3 is forgotten
  for (int i = 0; i < 64; i++) history[static_cast<size_t>(136 + i)] = 10 + i;
  check_distribution(logits, o, history);

  EXPECT_EQ(sample_once({2.0f, 1.5f, -1.0f}, at(0), {0}), 0);
  SamplerOptions greedy = at(0);
  greedy.repeat_penalty = 2;
  EXPECT_EQ(sample_once({2.0f, 1.5f, -1.0f}, greedy, {0}), 1);       // 1.0 against 1.5
  EXPECT_EQ(sample_once({-1.0f, -1.5f, -3.0f}, greedy, {0, 0}), 1);  // -2 against -1.5
}

TEST(Sampler, TiesGoToTheLowestId) {
  EXPECT_EQ(sample_once({1, 3, 3, 2, 3}, at(0)), 1);
  SamplerOptions o = at(1);
  o.top_k = 2;
  std::map<int, int> seen;
  for (uint64_t seed = 0; seed < 100; seed++) {
    o.seed = seed;
    seen[sample_once({1, 3, 3, 2, 3}, o)]++;
  }
  EXPECT_EQ(seen.size(), 2u);
  EXPECT_TRUE(seen.count(1) && seen.count(2));
  // All equal, with more of them than the short list holds.
  const std::vector<float> flat(1000, 0.5f);
  for (uint64_t seed = 0; seed < 50; seed++) {
    o.seed = seed, o.top_k = 3;
    EXPECT_LT(sample_once(flat, o), 3);
  }
  check_distribution(std::vector<float>(40, 0.5f), at(1));
}

TEST(Sampler, ShortListFindsTheLargestInAnyOrder) {
  std::vector<float> ascending(5000), descending(5000);
  for (size_t i = 0; i < 5000; i++) ascending[i] = static_cast<float>(i), descending[4999 - i] = static_cast<float>(i);
  SamplerOptions o = at(1e6f);
  o.top_k = 4;
  for (uint64_t seed = 0; seed < 50; seed++) {
    o.seed = seed;
    EXPECT_GE(sample_once(ascending, o), 4996);
    EXPECT_LT(sample_once(descending, o), 4);
  }
}

TEST(Sampler, OneSeedIsOneSequence) {
  const std::vector<float> logits = random_logits(1000, 2, 5);
  SamplerOptions o = at(1);
  const auto ids = [&](uint64_t seed) {
    o.seed = seed;
    Sampler sampler(o);
    std::vector<int> result;
    for (int i = 0; i < 50; i++) result.push_back(draw(sampler, logits));
    return result;
  };
  EXPECT_EQ(ids(7), ids(7));
  EXPECT_NE(ids(7), ids(8));
  EXPECT_NE(ids(0), ids(1));
}

TEST(Sampler, ExtremesStayExact) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(sample_once({-inf, -inf, -3e38f}, at(1)), 2);      // minus infinity: never
  EXPECT_EQ(sample_once({-inf, 3e38f, -3e38f}, at(0.8f)), 1);  // the difference overflows
  EXPECT_EQ(sample_once({1, 1.001f, 0}, at(1e-30f)), 1);       // as good as greedy
  EXPECT_EQ(sample_once({42}, at(1)), 0);
  SamplerOptions tiny = at(1);
  tiny.top_p = 1e-30f;
  EXPECT_EQ(sample_once({1, 5, 2}, tiny), 1);
  check_distribution({88, -88, 87, 0}, at(1));
}

TEST(Sampler, NotANumberIsReportedNotDrawn) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  for (const float t : {0.0f, 1.0f})
    for (const size_t at_id : {0u, 17u, 39u, 40u}) {
      std::vector<float> logits = random_logits(41, 1, 6);
      logits[at_id] = nan;
      EXPECT_THROW(sample_once(logits, at(t)), Error);
      logits[at_id] = inf;
      EXPECT_THROW(sample_once(logits, at(t)), Error);
    }
  EXPECT_THROW(sample_once({-inf, -inf}, at(1)), Error);
  try {
    sample_once({0, nan}, at(0));
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("token 1"), std::string::npos) << e.what();
  }
}

// The largest vocabulary there is, flat enough that the nucleus is large.
TEST(Sampler, LargeVocabulary) {
  const std::vector<float> logits = random_logits(262144, 3, 7);
  SamplerOptions o = at(1);
  o.top_p = 0.9f;
  o.seed = 99;
  const std::map<int, double> expected = reference(logits, o);
  Sampler sampler(o);
  for (int i = 0; i < 20; i++) EXPECT_TRUE(expected.count(draw(sampler, logits)));
}

}  // namespace
