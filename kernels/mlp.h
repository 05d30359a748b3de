// mlp.h: the block after attention: one gated (or plain) MLP, or a mixture of experts.
//
// Experts are data: a router scores them for every token, the best num_experts_per_tok run, and their outputs
// are summed by weight. Only the experts that the batch hits are read; their rows are gathered, so that a
// prompt is one product for each hit expert. Device-neutral but for the routing itself.
#pragma once

#include <vector>

#include "kernels/step.h"

class MlpBlock {
 public:
  MlpBlock(const Config& config, int max_tokens);
  static size_t floats_per_token(const Config& config);
  // Rows x width of the inputs that one call of matmul converts for T tokens.
  static size_t workspace_bytes(const Config& config, int max_tokens);

  // x += mlp(h). Called by every thread of the team.
  void forward(int layer, const Layer& weights, const Step& step);

 private:
  // out [T, dim] = mlp(in [T, dim])
  void run_dense(const Mlp& mlp, const Config& config, const float* in, int T, MatmulWorkspace& workspace);
  void run_experts(const Layer& weights, const Step& step);
  void gather(const Layer& weights, const Step& step);

  Buffer<float> gate_, up_;      // [T, hidden] or [T * num_experts_per_tok, moe_intermediate_size]
  Buffer<float> scores_;         // [T, n_routed_experts]
  Buffer<float> weights_;        // [T, num_experts_per_tok]
  Buffer<int> chosen_;           // [T, num_experts_per_tok] experts
  Buffer<int> rows_;             // [T * num_experts_per_tok] the token of each gathered row, sorted by expert
  Buffer<int> slots_;            // [T, num_experts_per_tok] the gathered row of each choice
  Buffer<float> expert_out_;     // [T * num_experts_per_tok, dim]
  std::vector<Product> first_;   // gate and up of every hit expert
  std::vector<Product> second_;  // down of every hit expert
};

// Chooses experts for T tokens: scores [T, n_routed_experts] hold the router's logits and are overwritten;
// chosen and weights [T, num_experts_per_tok]. Softmax or sigmoid scores; bias (may be null) counts for the
// choice alone; groups as in DeepSeek V2 (arXiv 2405.04434, 2.1.2: best expert) and V3 (arXiv
// 2412.19437, 2.1.2: sum of the two best). Ties go to the lower index; a NaN score makes all weights NaN. Called by
// every thread of the team.
void route(const Config& config, const float* bias, int T, float* scores, int* chosen, float* weights);
