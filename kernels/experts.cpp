// experts.cpp: routing of a mixture of experts on the CPU.
#include "kernels/experts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

void softmax(float* x, int n) {
  const float m = *std::max_element(x, x + n);
  float total = 0;
  for (int i = 0; i < n; i++) total += x[i] = std::exp(x[i] - m);
  for (int i = 0; i < n; i++) x[i] /= total;
}

// What a group is worth: its best score, or the sum of its two best.
float group_worth(GroupScore kind, const float* scores, int n) {
  float best = NEVER, second = NEVER;
  for (int i = 0; i < n; i++) {
    second = std::max(second, std::min(best, scores[i]));
    best = std::max(best, scores[i]);
  }
  return kind == GroupScore::max ? best : best + second;
}

// The k largest of values [n], largest first; the chosen become NEVER.
void take_largest(float* values, int n, int k, int* chosen) {
  for (int j = 0; j < k; j++) {
    chosen[j] = static_cast<int>(std::max_element(values, values + n) - values);
    values[chosen[j]] = NEVER;
  }
}

// Scores of experts outside the topk_group best groups become NEVER; worth [n_group] is scratch.
void limit_groups(const Config& c, float* scores, float* worth) {
  const int size = c.n_routed_experts / c.n_group;
  for (int g = 0; g < c.n_group; g++) worth[g] = group_worth(c.group_score, scores + g * size, size);
  for (int g = 0; g < c.n_group; g++) {
    int better = 0;
    for (int other = 0; other < c.n_group; other++)
      better += worth[other] > worth[g] || (worth[other] == worth[g] && other < g);
    if (better >= c.topk_group) std::fill_n(scores + g * size, size, NEVER);
  }
}

// choice [n_routed_experts] and worth [n_group] are scratch.
void route_token(const Config& c, const float* bias, float* scores, int* chosen, float* weights, float* choice,
                 float* worth) {
  const int E = c.n_routed_experts, k = c.num_experts_per_tok;
  if (c.scoring_func == Scoring::softmax)
    softmax(scores, E);
  else
    for (int e = 0; e < E; e++) scores[e] = 1 / (1 + std::exp(-scores[e]));
  for (int e = 0; e < E; e++) choice[e] = scores[e] + (bias ? bias[e] : 0);
  // Compared, NaN is never the largest: its expert would be passed over in silence instead of reaching the logits.
  if (std::any_of(choice, choice + E, [](float score) { return std::isnan(score); })) {
    std::iota(chosen, chosen + k, 0);
    std::fill_n(weights, k, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  if (c.topk_group < c.n_group) limit_groups(c, choice, worth);
  take_largest(choice, E, k, chosen);
  float total = 0;
  for (int j = 0; j < k; j++) total += weights[j] = scores[chosen[j]];
  const float factor = c.routed_scaling_factor / (c.norm_topk_prob ? total + 1e-20f : 1);
  for (int j = 0; j < k; j++) weights[j] *= factor;
}

}  // namespace

void route(const Team& team, const Config& config, const float* bias, int T, float* scores, int* chosen, float* weights,
           float* scratch) {
  const ptrdiff_t E = config.n_routed_experts, k = config.num_experts_per_tok, width = E + config.n_group;
  team.for_each(T, [&](int t) {
    float* choice = scratch + t * width;
    route_token(config, bias, scores + t * E, chosen + t * k, weights + t * k, choice, choice + E);
  });
}

void sort_by_expert(const Team& team, const int* chosen, int T, int k, int n_experts, int* row_start, int* token_of_row,
                    int* row_of_choice) {
  if (team.rank == 0) {
    std::fill_n(row_start, n_experts + 1, 0);
    for (int i = 0; i < T * k; i++) row_start[chosen[i] + 1]++;
    for (int e = 0; e < n_experts; e++) row_start[e + 1] += row_start[e];
    for (int i = 0; i < T * k; i++) {  // until all are placed, row_start[e] is the next row of expert e
      const int row = row_start[chosen[i]]++;
      row_of_choice[i] = row;
      token_of_row[row] = i / k;
    }
    for (int e = n_experts; e > 0; e--) row_start[e] = row_start[e - 1];
    row_start[0] = 0;
  }
  team.barrier();
}

void add_experts(const Team& team, const float* rows, const int* row_of_choice, const float* weights, int T, int k,
                 int dim, float* y) {
  team.for_each(T, [&](int t) {
    float* out = y + static_cast<ptrdiff_t>(t) * dim;
    std::fill_n(out, dim, 0.0f);
    for (int choice = t * k; choice < (t + 1) * k; choice++) {
      const float* row = rows + static_cast<ptrdiff_t>(row_of_choice[choice]) * dim;
      for (int i = 0; i < dim; i++) out[i] += weights[choice] * row[i];
    }
  });
}
