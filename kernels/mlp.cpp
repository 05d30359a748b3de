// mlp.cpp: the MLP and the experts as products; no line here knows the device.
#include "kernels/mlp.h"

#include <algorithm>

#include "kernels/experts.h"

MlpStage::MlpStage(Arena& arena, Workspace& workspace, const Config& c, const Limits& limits) {
  const int T = limits.max_tokens, k = c.num_experts_per_tok, E = c.n_routed_experts;
  // Of the dense MLP, the shared experts, or all experts of a token together.
  const int widest =
      std::max({c.hidden_dim, c.n_shared_experts * c.moe_intermediate_size, k * c.moe_intermediate_size});
  gate_ = arena.take<float>(area(T, widest));
  up_ = arena.take<float>(area(T, widest));
  for (const int width : {c.dim, c.hidden_dim, c.n_shared_experts * c.moe_intermediate_size})
    workspace.plan(matmul_workspace_bytes(T, width));
  if (E == 0) return;
  scores_ = arena.take<float>(area(T, E));
  scratch_ = arena.take<float>(area(T, E + c.n_group));
  weights_ = arena.take<float>(area(T, k));
  chosen_ = arena.take<int>(area(T, k));
  row_start_ = arena.take<int>(area(E + 1, 1));
  token_of_row_ = arena.take<int>(area(T, k));
  row_of_choice_ = arena.take<int>(area(T, k));
  expert_out_ = arena.take<float>(area(T * k, c.dim));
  workspace.plan(matmul_workspace_bytes(T * k, c.moe_intermediate_size));
}

void MlpStage::forward(int layer, const Layer& w, const Step& step) const {
  if (step.config.is_moe(layer)) return run_experts(w, step);
  step.compute(w.mlp.down, expand(w.mlp, step.h, step), false, step.y);
}

const float* MlpStage::expand(const Mlp& mlp, const float* in, const Step& step) const {
  const int T = step.batch.n_tokens;
  const bool gated = static_cast<bool>(mlp.gate);
  const Product gate = gated ? product(mlp.gate, in, T, gate_) : Product{};
  matmul_activated(step.team, gate, product(mlp.up, in, T, up_), step.config.activation, step.config.swiglu_limit,
                   step.workspace);
  return step.gather.whole(step.team, up_, T, mlp.down.weight.k);
}

void MlpStage::run_experts(const Layer& w, const Step& step) const {
  const Team& team = step.team;
  const Config& c = step.config;
  const int T = step.batch.n_tokens, k = c.num_experts_per_tok;
  const Product router = product(w.router, step.h, T, scores_);
  matmul(team, &router, 1, step.workspace);
  route(team, c, w.router_bias, T, scores_, chosen_, weights_, scratch_);
  sort_by_expert(team, chosen_, T, k, c.n_routed_experts, row_start_, token_of_row_, row_of_choice_);

  const int* row_start = row_start_ + step.gather.part().first(c.n_routed_experts);  // of this rank's experts
  Product gate = product(w.experts.gate, step.h, T * k, gate_), up = product(w.experts.up, step.h, T * k, up_);
  for (Product* p : {&gate, &up}) p->x_rows = T, p->gather = token_of_row_, p->row_start = row_start;
  matmul_activated(team, gate, up, c.activation, c.swiglu_limit, step.workspace);
  Product down = product(w.experts.down, up_, T * k, expert_out_);
  down.row_start = row_start;
  matmul(team, &down, 1, step.workspace);
  step.gather.rows(team, expert_out_, row_start_, c.n_routed_experts, c.dim);
  add_experts(team, expert_out_, row_of_choice_, weights_, T, k, c.dim, step.y);

  if (w.shared.up) step.compute(w.shared.down, expand(w.shared, step.h, step), true, step.y);
}
