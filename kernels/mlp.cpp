#include "kernels/mlp.h"

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
    if (scores[i] > best) {
      second = best;
      best = scores[i];
    } else if (scores[i] > second) {
      second = scores[i];
    }
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

// Scores of experts outside the topk_group best groups become NEVER.
void limit_groups(const Config& c, float* scores) {
  const int size = c.n_routed_experts / c.n_group;
  std::vector<float> worth(static_cast<size_t>(c.n_group));
  std::vector<int> best(static_cast<size_t>(c.topk_group));
  for (int g = 0; g < c.n_group; g++)
    worth[static_cast<size_t>(g)] = group_worth(c.group_score, scores + g * size, size);
  take_largest(worth.data(), c.n_group, c.topk_group, best.data());
  for (int g = 0; g < c.n_group; g++)
    if (std::find(best.begin(), best.end(), g) == best.end()) std::fill_n(scores + g * size, size, NEVER);
}

void route_token(const Config& c, const float* bias, float* scores, int* chosen, float* weights) {
  const int E = c.n_routed_experts, k = c.num_experts_per_tok;
  if (c.scoring_func == Scoring::softmax)
    softmax(scores, E);
  else
    for (int e = 0; e < E; e++) scores[e] = 1 / (1 + std::exp(-scores[e]));
  std::vector<float> choice(scores, scores + E);
  if (bias)
    for (int e = 0; e < E; e++) choice[static_cast<size_t>(e)] += bias[e];
  // Compared, NaN is never the largest: its expert would be passed over in silence instead of reaching the logits.
  if (std::any_of(choice.begin(), choice.end(), [](float score) { return std::isnan(score); })) {
    std::iota(chosen, chosen + k, 0);
    std::fill_n(weights, k, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  if (c.topk_group < c.n_group) limit_groups(c, choice.data());
  take_largest(choice.data(), E, k, chosen);
  float total = 0;
  for (int j = 0; j < k; j++) total += weights[j] = scores[chosen[j]];
  const float factor = c.routed_scaling_factor / (c.norm_topk_prob ? total + 1e-20f : 1);
  for (int j = 0; j < k; j++) weights[j] *= factor;
}

// The widest hidden row a token needs: of the dense MLP, the shared experts, or all its experts together.
int hidden_per_token(const Config& c) {
  if (!c.n_routed_experts) return c.hidden_dim;
  return std::max(
      {c.hidden_dim, c.n_shared_experts * c.moe_intermediate_size, c.num_experts_per_tok * c.moe_intermediate_size});
}

}  // namespace

void route(const Config& config, const float* bias, int T, float* scores, int* chosen, float* weights) {
  const int E = config.n_routed_experts, k = config.num_experts_per_tok;
#pragma omp for schedule(static)
  for (int t = 0; t < T; t++) route_token(config, bias, scores + area(t, E), chosen + area(t, k), weights + area(t, k));
}

MlpBlock::MlpBlock(const Config& c, int max_tokens)
    : gate_(area(max_tokens, hidden_per_token(c))),
      up_(area(max_tokens, hidden_per_token(c))),
      scores_(area(max_tokens, c.n_routed_experts)),
      weights_(area(max_tokens, c.num_experts_per_tok)),
      chosen_(area(max_tokens, c.num_experts_per_tok)),
      rows_(area(max_tokens, c.num_experts_per_tok)),
      slots_(area(max_tokens, c.num_experts_per_tok)),
      expert_out_(area(max_tokens, c.num_experts_per_tok) * static_cast<size_t>(c.dim)) {
  first_.reserve(2 * static_cast<size_t>(c.n_routed_experts));
  second_.reserve(static_cast<size_t>(c.n_routed_experts));
}

size_t MlpBlock::floats_per_token(const Config& c) {
  const auto k = static_cast<size_t>(c.num_experts_per_tok);
  return 2 * static_cast<size_t>(hidden_per_token(c)) + static_cast<size_t>(c.n_routed_experts) +
         k * (4 + static_cast<size_t>(c.dim));
}

size_t MlpBlock::workspace_bytes(const Config& c, int max_tokens) {
  size_t bytes = std::max(matmul_workspace_bytes(max_tokens, c.dim), matmul_workspace_bytes(max_tokens, c.hidden_dim));
  if (!c.n_routed_experts) return bytes;
  const int hits = std::min(c.n_routed_experts, max_tokens * c.num_experts_per_tok);
  // Each hit expert's rows are an input of their own.
  bytes = std::max(bytes, matmul_workspace_bytes(max_tokens * c.num_experts_per_tok, c.moe_intermediate_size) +
                              static_cast<size_t>(hits) * matmul_workspace_bytes(1, c.moe_intermediate_size));
  return std::max(bytes, matmul_workspace_bytes(max_tokens, c.n_shared_experts * c.moe_intermediate_size));
}

void MlpBlock::run_dense(const Mlp& mlp, const Config& config, const float* in, int T, MatmulWorkspace& workspace) {
  const bool gated = static_cast<bool>(mlp.gate);
  const Product both[] = {product(mlp.up, in, T, up_.data()),
                          gated ? product(mlp.gate, in, T, gate_.data()) : Product{}};
  matmul(both, gated ? 2 : 1, workspace);
  activate(config.activation, gated ? gate_.data() : nullptr, up_.data(), T, mlp.up.weight.n, up_.data());
}

void MlpBlock::forward(int layer, const Layer& w, const Step& step) {
  const int T = step.batch.n_tokens;
  if (step.config.is_moe(layer)) {
    run_experts(w, step);
    step.add_y(w.mlp_post_norm);
    return;
  }
  run_dense(w.mlp, step.config, step.h, T, step.workspace);
  step.add_product(w.mlp.down, up_.data(), w.mlp_post_norm);
}

// Sorts the choices by expert and writes down the products of every expert that is hit. One thread.
void MlpBlock::gather(const Layer& w, const Step& step) {
  const Config& c = step.config;
  const int n = step.batch.n_tokens * c.num_experts_per_tok, hidden = c.moe_intermediate_size;
  std::vector<int> start(static_cast<size_t>(c.n_routed_experts) + 1, 0);
  for (int i = 0; i < n; i++) start[static_cast<size_t>(chosen_[static_cast<size_t>(i)]) + 1]++;
  for (size_t e = 1; e < start.size(); e++) start[e] += start[e - 1];
  first_.clear();
  second_.clear();
  for (size_t e = 0; e < w.experts.size(); e++) {
    const int at = start[e], rows = start[e + 1] - at;
    if (rows == 0) continue;
    const auto add = [&](std::vector<Product>& list, const Linear& linear, const float* x, float* y) {
      list.push_back(product(linear, x, rows, y));
      return &list.back();
    };
    for (const auto& [linear, out] : {std::pair(&w.experts[e].gate, &gate_), std::pair(&w.experts[e].up, &up_)}) {
      Product* p = add(first_, *linear, step.h, out->data() + area(at, hidden));
      p->x_rows = step.batch.n_tokens;
      p->gather = rows_.data() + at;
    }
    add(second_, w.experts[e].down, up_.data() + area(at, hidden), expert_out_.data() + area(at, c.dim));
  }
  for (int i = 0; i < n; i++) {
    const int slot = start[static_cast<size_t>(chosen_[static_cast<size_t>(i)])]++;
    slots_[static_cast<size_t>(i)] = slot;
    rows_[static_cast<size_t>(slot)] = i / c.num_experts_per_tok;
  }
}

// y = the weighted sum of the chosen experts, in the order of choice, and the shared experts.
void MlpBlock::run_experts(const Layer& w, const Step& step) {
  const Config& c = step.config;
  const int T = step.batch.n_tokens, k = c.num_experts_per_tok, dim = c.dim;
  const Product router = product(w.router, step.h, T, scores_.data());
  matmul(&router, 1, step.workspace);
  route(c, w.router_bias, T, scores_.data(), chosen_.data(), weights_.data());
#pragma omp single
  gather(w, step);
  matmul(first_.data(), static_cast<int>(first_.size()), step.workspace);
  activate(c.activation, gate_.data(), up_.data(), T * k, c.moe_intermediate_size, up_.data());
  matmul(second_.data(), static_cast<int>(second_.size()), step.workspace);
#pragma omp for schedule(static)
  for (int t = 0; t < T; t++) {
    float* y = step.y + area(t, dim);
    std::fill_n(y, dim, 0.0f);
    for (int j = 0; j < k; j++) {
      const size_t choice = area(t, k) + static_cast<size_t>(j);
      const float* row = expert_out_.data() + area(slots_[choice], dim);
      for (int i = 0; i < dim; i++) y[i] += weights_[choice] * row[i];
    }
  }
  if (!w.shared.up) return;
  run_dense(w.shared, c, step.h, T, step.workspace);
  Product down = product(w.shared.down, up_.data(), T, step.y);
  down.add = true;
  matmul(&down, 1, step.workspace);
}
