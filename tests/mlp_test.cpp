// Expert routing against the papers' definitions, written out with a full sort in float64.
#include "mlp.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace {

struct Choice {
  std::vector<int> experts;
  std::vector<double> weights;
};

// Indices of values, largest first; ties to the lower index.
std::vector<int> ranking(const std::vector<double>& values) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)]; });
  return order;
}

Choice reference(const Config& c, const float* bias, const std::vector<float>& logits) {
  const auto E = static_cast<size_t>(c.n_routed_experts), size = E / static_cast<size_t>(c.n_group);
  std::vector<double> scores, choice;
  double total = 0;
  for (float l : logits) total += std::exp(static_cast<double>(l));
  for (float l : logits) {
    const double e = std::exp(static_cast<double>(l));
    scores.push_back(c.scoring_func == Scoring::softmax ? e / total : e / (1 + e));
  }
  choice = scores;
  for (size_t e = 0; bias && e < E; e++) choice[e] += static_cast<double>(bias[e]);
  std::vector<double> worth;
  for (size_t g = 0; g < E / size; g++) {
    std::vector<double> group(choice.begin() + static_cast<long>(g * size),
                              choice.begin() + static_cast<long>((g + 1) * size));
    std::sort(group.rbegin(), group.rend());
    worth.push_back(c.group_score == GroupScore::max ? group[0] : group[0] + group[1]);
  }
  std::vector<int> groups = ranking(worth);
  groups.resize(static_cast<size_t>(c.topk_group));
  Choice out;
  for (const int e : ranking(choice)) {
    const bool eligible = std::find(groups.begin(), groups.end(), e / static_cast<int>(size)) != groups.end();
    if (eligible && out.experts.size() < static_cast<size_t>(c.num_experts_per_tok)) out.experts.push_back(e);
  }
  double sum = 0;
  for (const int e : out.experts) sum += scores[static_cast<size_t>(e)];
  for (const int e : out.experts)
    out.weights.push_back(scores[static_cast<size_t>(e)] / (c.norm_topk_prob ? sum : 1) *
                          static_cast<double>(c.routed_scaling_factor));
  return out;
}

TEST(Route, EveryKindOfSelection) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Config c;
  c.n_routed_experts = 16;
  c.num_experts_per_tok = 4;
  c.routed_scaling_factor = 2.5f;
  for (int kind = 0; kind < 32; kind++) {
    c.scoring_func = kind & 1 ? Scoring::sigmoid : Scoring::softmax;
    c.norm_topk_prob = kind & 2;
    c.n_group = kind & 4 ? 4 : 1;
    c.topk_group = kind & 4 ? 2 : 1;
    c.group_score = kind & 8 ? GroupScore::top2_sum : GroupScore::max;
    const int T = 25;
    std::vector<float> logits, bias;
    for (int i = 0; i < T * 16; i++) logits.push_back(2 * normal(random));
    for (int i = 0; i < 16; i++) bias.push_back(normal(random) / 4 - 1);  // -1: all biased scores may be negative
    auto scores = logits;
    std::vector<int> chosen(T * 4);
    std::vector<float> weights(T * 4);
    const float* used = kind & 16 ? bias.data() : nullptr;
    route(c, used, T, scores.data(), chosen.data(), weights.data());
    for (int t = 0; t < T; t++) {
      const Choice expected = reference(c, used, {logits.begin() + t * 16, logits.begin() + (t + 1) * 16});
      EXPECT_EQ(std::vector<int>(chosen.begin() + t * 4, chosen.begin() + (t + 1) * 4), expected.experts)
          << "kind " << kind;
      for (size_t j = 0; j < 4; j++)  // exp, a sum of 16 and two divisions: under 32 roundings
        EXPECT_NEAR(static_cast<double>(weights[static_cast<size_t>(t) * 4 + j]), expected.weights[j],
                    32 * 0x1p-24 * expected.weights[j]);
    }
  }
}

TEST(Route, TiesGoToTheLowerIndex) {
  Config c;
  c.n_routed_experts = 6;
  c.num_experts_per_tok = 3;
  std::vector<float> scores(6, 1.0f), weights(3);
  std::vector<int> chosen(3);
  route(c, nullptr, 1, scores.data(), chosen.data(), weights.data());
  EXPECT_EQ(chosen, (std::vector<int>{0, 1, 2}));
}

}  // namespace
