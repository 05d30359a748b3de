// layers.h: the small stages between the products: embedding, norms, RoPE, activations.
//
// Every function works row by row, in a fixed order within the row; every thread of the team calls it, and it ends with
// a barrier.
#pragma once

#include "kernels/batch.h"
#include "kernels/matmul.h"
#include "kernels/team.h"
#include "model.h"

// x [T, dim] = scale * row tokens[t] of the embedding (+ row positions[t] of position_embedding where not null).
void embed(const Team& team, const Matrix& embed_tokens, const float* position_embedding, const Batch& batch,
           float scale, float* x);

// out = norm(x) over rows of `dim` elements. RMSNorm: x / sqrt(mean(x^2) + eps) * weight; LayerNorm: also -
// mean, + bias. Row r starts at x + r * x_stride, out + r * out_stride; out may be x.
void norm(const Team& team, NormKind kind, float eps, const Norm& weights, const float* x, int x_stride, int rows,
          int dim, float* out, int out_stride);

// x += scale * y, y normed before where post_norm is there; then out = norm(x), or x where `next` is not. All [T, dim];
// y is scratch afterwards.
void add_and_norm(const Team& team, NormKind kind, float eps, const Norm& post_norm, const Norm& next, float scale,
                  float* x, float* y, int T, int dim, float* out);

// cos, sin [T, n] of positions[t] * inv_freq[i], times scale (RoFormer, arXiv 2104.09864, equation 34).
void rope_angles(const Team& team, const Batch& batch, const float* inv_freq, int n, float scale, float* cos,
                 float* sin);

// What happens to the queries and keys of a step before the keys enter the cache (kvcache.h: append), in place: norms
// and RoPE, in this order.
struct Heads {
  float* x = nullptr;  // head h of token t begins at x + t * x_stride + h * head_stride
  int x_stride = 0, n = 0, head_stride = 0;
  Norm norm;        // over the first norm.n elements of each head; absent: none
  int rotated = 0;  // the first element that rotates
};
struct Turn {
  Heads q, k;
  NormKind kind = NormKind::rms;
  float eps = 0;
  // Element i of those that rotate is turned with i + n_angles, by angle i of the token (the halves convention of
  // Hugging Face; export.py permutes interleaved checkpoints).
  int n_angles = 0;
  const float *cos = nullptr, *sin = nullptr;  // [T, n_angles]
};

// out [T, n] = act(gate) * up; gate null: act(up). out may be gate or up. swiglu_oai has a gate always, and a limit:
// g sigmoid(1.702 g) (u + 1), of g = min(gate, limit) and u = up clamped to -limit .. limit (gpt-oss).
void activate(const Team& team, Activation activation, float limit, const float* gate, const float* up, int T, int n,
              float* out);

// x = scale * x, then cap * tanh(x / cap) where cap > 0; n elements.
void scale_and_cap(const Team& team, float* x, size_t n, float scale, float cap);

// Row r of x, n elements, goes to rows r * copies .. (r + 1) * copies - 1 of out.
void copy_rows(const Team& team, const float* x, int x_stride, int rows, int n, int copies, float* out, int out_stride);
