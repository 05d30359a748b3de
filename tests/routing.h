// routing.h: which experts a token takes, by the papers' definitions, written out with a full sort in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "model.h"

struct Choice {
  std::vector<int> experts;
  std::vector<double> weights;
};

// Indices of values, largest first; ties to the lower index.
inline std::vector<int> ranking(const std::vector<double>& values) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)]; });
  return order;
}

inline Choice reference(const Config& c, const float* bias, const std::vector<float>& logits) {
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
