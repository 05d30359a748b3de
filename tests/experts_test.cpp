// Expert routing against the papers' definitions, the sorting and the sum of the experts by hand.
#include "kernels/experts.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "device_memory.h"
#include "kernels/step.h"
#include "kernels/threads.h"
#include "routing.h"

namespace {

// route by a team of two, or one.
void route_all(const Config& c, const float* bias, int T, float* scores, int* chosen, float* weights) {
  Threads threads(2);
  const size_t E = static_cast<size_t>(c.n_routed_experts), choices = area(T, c.num_experts_per_tok);
  Buffer<float> scratch(area(T, c.n_routed_experts + c.n_group)), device_weights(choices);
  Buffer<float> device_scores = device_copy(std::vector<float>(scores, scores + static_cast<size_t>(T) * E));
  const Buffer<float> device_bias = device_copy(bias ? std::vector<float>(bias, bias + E) : std::vector<float>());
  Buffer<int> device_chosen(choices);
  threads.run(1 + T % 2, [&](const Team& team) {
    route(team, c, device_bias.data(), T, device_scores.data(), device_chosen.data(), device_weights.data(),
          scratch.data());
  });
  download(chosen, device_chosen.data(), choices * sizeof(int));
  download(weights, device_weights.data(), choices * sizeof(float));
}

struct Shape {
  int E, k, n_group, topk_group;
};
// All experts; groups of one and of two; as many experts as the chosen groups hold.
constexpr Shape SHAPES[] = {{16, 4, 1, 1}, {16, 4, 4, 2},  {16, 8, 4, 2}, {16, 16, 1, 1},
                            {1, 1, 1, 1},  {16, 3, 16, 3}, {6, 2, 3, 1},  {6, 6, 3, 3}};

void check_selection(const Config& c, const float* bias, const std::vector<float>& logits) {
  const int E = c.n_routed_experts, k = c.num_experts_per_tok, T = static_cast<int>(logits.size()) / E;
  auto scores = logits;
  std::vector<int> chosen(area(T, k));
  std::vector<float> weights(area(T, k));
  route_all(c, bias, T, scores.data(), chosen.data(), weights.data());
  for (int t = 0; t < T; t++) {
    const Choice expected = reference(c, bias, {logits.begin() + t * E, logits.begin() + (t + 1) * E});
    EXPECT_EQ(std::vector<int>(chosen.begin() + t * k, chosen.begin() + (t + 1) * k), expected.experts);
    for (int j = 0; j < k; j++) {  // exp, a sum of 16 and two divisions: under 32 roundings
      const double weight = expected.weights[static_cast<size_t>(j)];
      EXPECT_NEAR(static_cast<double>(weights[area(t, k) + static_cast<size_t>(j)]), weight, 32 * 0x1p-24 * weight);
    }
  }
}

TEST(Route, EveryKindOfSelection) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const Shape& shape : SHAPES) {
    for (int kind = 0; kind < 16; kind++) {
      SCOPED_TRACE(testing::Message() << shape.E << " experts, best " << shape.k << ", groups " << shape.n_group
                                      << ", kind " << kind);
      Config c;
      c.n_routed_experts = shape.E;
      c.num_experts_per_tok = shape.k;
      c.n_group = shape.n_group;
      c.topk_group = shape.topk_group;
      c.routed_scaling_factor = 2.5f;
      c.scoring_func = kind & 1 ? Scoring::sigmoid : Scoring::softmax;
      c.norm_topk_prob = kind & 2;
      c.group_score = kind & 4 && shape.E / shape.n_group > 1 ? GroupScore::top2_sum : GroupScore::max;
      std::vector<float> logits, bias;
      for (int i = 0; i < 25 * shape.E; i++) logits.push_back(2 * normal(random));
      for (int i = 0; i < shape.E; i++) bias.push_back(normal(random) / 4 - 1);  // all biased scores may be negative
      check_selection(c, kind & 8 ? bias.data() : nullptr, logits);
    }
  }
}

TEST(Route, TiesGoToTheLowerIndex) {
  Config c;
  c.n_routed_experts = 6;
  c.num_experts_per_tok = 3;
  std::vector<float> scores(6, 1.0f), weights(3);
  std::vector<int> chosen(3);
  route_all(c, nullptr, 1, scores.data(), chosen.data(), weights.data());
  EXPECT_EQ(chosen, (std::vector<int>{0, 1, 2}));
}

// A NaN anywhere, also of an expert or a group that would lose: the weights are NaN, the experts exist.
TEST(Route, NotANumberReachesTheWeights) {
  for (const Scoring scoring : {Scoring::softmax, Scoring::sigmoid}) {
    for (const bool in_bias : {false, true}) {
      for (size_t e = 0; e < 8; e++) {
        Config c;
        c.n_routed_experts = 8;
        c.num_experts_per_tok = 2;
        c.n_group = 4;
        c.topk_group = 1;
        c.scoring_func = scoring;
        c.group_score = GroupScore::top2_sum;
        std::vector<float> scores = {1, 2, 3, 4, 5, 6, 7, 8}, bias(8, 0), weights(2);
        (in_bias ? bias : scores)[e] = std::numeric_limits<float>::quiet_NaN();
        std::vector<int> chosen(2);
        route_all(c, bias.data(), 1, scores.data(), chosen.data(), weights.data());
        for (size_t j = 0; j < 2; j++) {
          EXPECT_TRUE(std::isnan(weights[j]));
          EXPECT_TRUE(chosen[j] >= 0 && chosen[j] < 8);
        }
      }
    }
  }
}

// Each expert's tokens in order, and the sum of a token's rows by weight; an expert without tokens, tokens that share
// one.
TEST(Experts, AreSortedAndSummed) {
  constexpr int T = 5, k = 2, E = 4, dim = 3;
  const std::vector<int> chosen = {3, 0, 0, 1, 3, 1, 0, 3, 1, 3};
  std::vector<float> rows, weights;
  for (int i = 0; i < T * k * dim; i++) rows.push_back(static_cast<float>(i * i % 17));
  for (int i = 0; i < T * k; i++) weights.push_back(static_cast<float>(i + 1));
  const Buffer<int> device_chosen = device_copy(chosen);
  const Buffer<float> device_rows = device_copy(rows), device_weights = device_copy(weights);
  Buffer<int> row_start(E + 1), token_of_row(T * k), row_of_choice(T * k);
  Buffer<float> y(T * dim);
  Threads(2).run(2, [&](const Team& team) {
    sort_by_expert(team, device_chosen.data(), T, k, E, row_start.data(), token_of_row.data(), row_of_choice.data());
    add_experts(team, device_rows.data(), row_of_choice.data(), device_weights.data(), T, k, dim, y.data());
  });
  EXPECT_EQ(host_copy(row_start), (std::vector<int>{0, 3, 6, 6, 10}));
  EXPECT_EQ(host_copy(token_of_row), (std::vector<int>{0, 1, 3, 1, 2, 4, 0, 2, 3, 4}));
  const std::vector<int> place = {6, 0, 1, 3, 7, 4, 2, 8, 5, 9};
  EXPECT_EQ(host_copy(row_of_choice), place);
  const std::vector<float> sums = host_copy(y);
  for (size_t t = 0; t < T; t++)
    for (size_t i = 0; i < dim; i++) {
      float sum = 0;  // of whole numbers: exact
      for (size_t c = t * k; c < (t + 1) * k; c++) sum += weights[c] * rows[static_cast<size_t>(place[c]) * dim + i];
      EXPECT_EQ(sums[t * dim + i], sum);
    }
}

}  // namespace
