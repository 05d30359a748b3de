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

// cos, sin [T, n] of positions[t] * inv_freq[i], times scale (RoFormer, arXiv 2104.09864, equation 34).
void rope_angles(const Team& team, const Batch& batch, const float* inv_freq, int n, float scale, float* cos,
                 float* sin);

// Rotates the first 2n elements of each of n_heads heads, element i with i + n; token t of x starts at x + t
// * x_stride, its heads are head_stride apart (the halves convention of Hugging Face; export.py permutes
// interleaved checkpoints).
void rope(const Team& team, float* x, int x_stride, int T, int n_heads, int head_stride, int n, const float* cos,
          const float* sin);

// out [T, n] = act(gate) * up; gate null: act(up). out may be gate or up. swiglu_oai has a gate always, and a limit:
// g sigmoid(1.702 g) (u + 1), of g = min(gate, limit) and u = up clamped to -limit .. limit (gpt-oss).
void activate(const Team& team, Activation activation, float limit, const float* gate, const float* up, int T, int n,
              float* out);

// x += scale * y, n elements.
void add(const Team& team, float* x, const float* y, size_t n, float scale);

// x = scale * x, then cap * tanh(x / cap) where cap > 0; n elements.
void scale_and_cap(const Team& team, float* x, size_t n, float scale, float cap);

// Row r of x, n elements, goes to rows r * copies .. (r + 1) * copies - 1 of out.
void copy_rows(const Team& team, const float* x, int x_stride, int rows, int n, int copies, float* out, int out_stride);
