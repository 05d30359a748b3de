// mlp.h: the stage after attention: one gated (or plain) MLP, or a mixture of experts.
//
// Experts are data: a router scores them for every token, the best num_experts_per_tok run, and their outputs are
// summed by weight. Only the experts that the batch hits are read; their rows are gathered, so that a prompt is one
// product for each hit expert.
#pragma once

#include "kernels/step.h"

class MlpStage {
 public:
  MlpStage(Arena& arena, Workspace& workspace, const Config& config, const Limits& limits);

  // y = mlp(h)
  void forward(int layer, const Layer& weights, const Step& step) const;

 private:
  // act(gate(in)) * up(in) of the T tokens: [T, hidden], valid until the next call.
  const float* expand(const Mlp& mlp, const float* in, const Step& step) const;
  // y = the weighted sum of the chosen experts, and the shared experts.
  void run_experts(const Layer& weights, const Step& step) const;

  float *gate_, *up_;   // [T, hidden_dim], or [T k, moe_intermediate_size] for k = num_experts_per_tok
  float* scores_;       // [T, n_routed_experts]
  float* scratch_;      // [T, n_routed_experts + n_group]
  float* weights_;      // [T, k]
  int* chosen_;         // [T, k] experts
  int* row_start_;      // [n_routed_experts + 1]
  int* token_of_row_;   // [T k]
  int* row_of_choice_;  // [T, k]
  float* expert_out_;   // [T k, dim]
};
