// step.h: what every stage of a layer works on during one step, and how every stage ends.
#pragma once

#include <vector>

#include "kernels/batch.h"
#include "kernels/gather.h"
#include "kernels/layers.h"
#include "kernels/matmul.h"
#include "model.h"

// cos and sin of the step's tokens for one RoPE table.
struct Angles {
  int n;             // pairs of elements that rotate
  float *cos, *sin;  // [max_tokens, n]
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

struct Step {
  const Team& team;
  const Config& config;               // with the heads of this rank alone
  const Batch& batch;                 // in device memory
  const Batch& host;                  // the same on the host
  const std::vector<Angles>& angles;  // one for each RoPE table
  float* x;                           // [T, dim] the residual stream
  float* h;                           // [T, dim] its norm: the stage's input
  float* y;                           // [T, dim] what a stage adds to x
  const Workspace& workspace;         // of matmul
  const Gather& gather;               // makes whole what the ranks have in parts

  // h = norm(x); x itself where the model has no such norm
  void norm_x(const Norm& weights) const {
    const int T = batch.n_tokens, dim = config.dim;
    if (!weights) return copy_rows(team, x, dim, T, dim, 1, h, dim);
    norm(team, config.norm, config.norm_eps, weights, x, dim, T, dim, h, dim);
  }

  // x += residual_scale * post_norm(y); then h = norm(x), the next stage's input.
  void add_y(const Norm& post_norm, const Norm& next) const {
    add_and_norm(team, config.norm, config.norm_eps, post_norm, next, config.residual_scale, x, y, batch.n_tokens,
                 config.dim, h);
  }

  // What happens to a layer's queries and keys, with its RoPE table's angles.
  Turn turn(int layer, float eps, const Heads& q, const Heads& k) const {
    Turn t{q, k, config.norm, eps};
    const int table = config.rope[static_cast<size_t>(layer)];
    if (table < 0) return t;
    const Angles& a = angles[static_cast<size_t>(table)];
    t.n_angles = a.n, t.cos = a.cos, t.sin = a.sin;
    return t;
  }

  // out [T, dim] = linear(in), in [T, linear.k], added to it where `add`: each rank its columns, then all of all.
  void compute(const Linear& linear, const float* in, bool add, float* out) const {
    Product p = columns(linear, in, batch.n_tokens, out, config.dim);
    p.add = add;
    matmul(team, &p, 1, workspace);
    gather.columns(team, out, batch.n_tokens, config.dim);
  }

  // This rank's columns of y [rows, width] = linear(in).
  Product columns(const Linear& linear, const float* in, int rows, float* out, int width) const {
    Product p = product(linear, in, rows, out + gather.part().first(width));
    p.y_stride = width;
    return p;
  }
};
