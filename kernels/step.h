// step.h: what every block of a layer works on during one step, and how every block ends.
#pragma once

#include <vector>

#include "kvcache.h"
#include "kernels/layers.h"
#include "model.h"

// Which form MLA takes: by the count of FLOP of each, or always the same one.
enum class MlaForm { automatic, absorbed, expanded };

// Capacities, fixed when the transformer is made: everything is allocated then, nothing during a step.
struct Limits {
  int max_tokens = 0;     // of a batch
  int max_sequences = 0;  // of a batch
  int max_logits = 0;     // rows of logits of a batch
  int context = 0;        // longest context_len of any sequence; contiguous: also the block size
  int n_blocks = 0;       // of the cache: blocks of Block tokens (paged), or sequences (contiguous)
  MlaForm mla_form = MlaForm::automatic;
};

// Elements of an array [n, width].
inline size_t area(int n, int width) {
  return static_cast<size_t>(n) * static_cast<size_t>(width);
}

// cos and sin of the step's tokens for one RoPE table.
struct Angles {
  int n = 0;
  Buffer<float> cos, sin;  // [max_tokens, n]
};

struct Step {
  const Config& config;
  const Batch& batch;
  const std::vector<Angles>& angles;  // one for each RoPE table
  float* x;                           // [T, dim] the residual stream
  float* h;                           // [T, dim] its norm: the block's input
  float* y;                           // [T, dim] what a block adds, where it is not added at once
  MatmulWorkspace& workspace;

  // x += residual_scale * post_norm(linear(in)), in [T, linear.k]
  void add_product(const Linear& linear, const float* in, const Norm& post_norm) const;
  // x += residual_scale * post_norm(y)
  void add_y(const Norm& post_norm) const;
  // out [T, dim] = norm(x); x itself where the model has no such norm
  void norm_x(const Norm& weights, float* out) const;
};

// y [rows, n] = linear(x [rows, k]), rows without gaps.
inline Product product(const Linear& linear, const float* x, int rows, float* y) {
  Product p;
  p.weight = &linear.weight;
  p.bias = linear.bias;
  p.x = x;
  p.x_rows = p.rows = rows;
  p.x_stride = linear.weight.k;
  p.y = y;
  p.y_stride = linear.weight.n;
  return p;
}

inline void Step::norm_x(const Norm& weights, float* out) const {
  if (!weights) return copy_rows(x, config.dim, batch.n_tokens, config.dim, 1, out, config.dim);
  norm(config.norm, config.norm_eps, weights, x, config.dim, batch.n_tokens, config.dim, out, config.dim);
}

inline void Step::add_y(const Norm& post_norm) const {
  const int dim = config.dim;
  if (post_norm) norm(config.norm, config.norm_eps, post_norm, y, dim, batch.n_tokens, dim, y, dim);
  add(x, y, static_cast<size_t>(batch.n_tokens) * static_cast<size_t>(dim), config.residual_scale);
}

inline void Step::add_product(const Linear& linear, const float* in, const Norm& post_norm) const {
  const bool direct = !post_norm && config.residual_scale == 1.0f;
  Product p = product(linear, in, batch.n_tokens, direct ? x : y);
  p.add = direct;
  matmul(&p, 1, workspace);
  if (!direct) add_y(post_norm);
}
