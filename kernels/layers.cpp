#include "kernels/layers.h"

#include <algorithm>
#include <cmath>

#include "kernels/simd.h"

using namespace simd;

void embed(const Team& team, const Matrix& embed_tokens, const float* position_embedding, const Batch& batch,
           float scale, float* x) {
  const int dim = embed_tokens.k;
  team.for_each(batch.n_tokens, [&](int t) {
    float* row = x + area(t, dim);
    unpack_row(embed_tokens, batch.tokens[t], row);
    for (int i = 0; i < dim; i++) row[i] *= scale;
    if (!position_embedding) return;
    const float* position = position_embedding + area(batch.positions[t], dim);
    for (int i = 0; i < dim; i++) row[i] += position[i];
  });
}

// Sums over n elements, lane by lane and then across: a fixed order.
static float sum_of_squares(const float* x, int n, float shift) {  // of (x - shift)^2
  F32 total = zero();
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    const F32 d = load(x + i) - shift;
    total = fma(d, d, total);
  }
  float rest = 0;
  for (; i < n; i++) rest += (x[i] - shift) * (x[i] - shift);
  return sum(total) + rest;
}

static float mean(const float* x, int n) {
  F32 total = zero();
  int i = 0;
  for (; i + LANES <= n; i += LANES) total += load(x + i);
  float rest = 0;
  for (; i < n; i++) rest += x[i];
  return (sum(total) + rest) / static_cast<float>(n);
}

static void norm_row(NormKind kind, float eps, const Norm& weights, const float* in, int dim, float* to) {
  const float shift = kind == NormKind::layer ? mean(in, dim) : 0;
  const float factor = 1 / std::sqrt(sum_of_squares(in, dim, shift) / static_cast<float>(dim) + eps);
  if (weights.bias)
    for (int i = 0; i < dim; i++) to[i] = (in[i] - shift) * factor * weights.weight[i] + weights.bias[i];
  else
    for (int i = 0; i < dim; i++) to[i] = (in[i] - shift) * factor * weights.weight[i];
}

void norm(const Team& team, NormKind kind, float eps, const Norm& weights, const float* x, int x_stride, int rows,
          int dim, float* out, int out_stride) {
  team.for_each(rows,
                [&](int r) { norm_row(kind, eps, weights, x + area(r, x_stride), dim, out + area(r, out_stride)); });
}

void add_and_norm(const Team& team, NormKind kind, float eps, const Norm& post_norm, const Norm& next, float scale,
                  float* x, float* y, int T, int dim, float* out) {
  team.for_each(T, [&](int t) {
    float *x_row = x + area(t, dim), *y_row = y + area(t, dim), *out_row = out + area(t, dim);
    if (post_norm) norm_row(kind, eps, post_norm, y_row, dim, y_row);
    for (int i = 0; i < dim; i++) x_row[i] += scale * y_row[i];
    if (next)
      norm_row(kind, eps, next, x_row, dim, out_row);
    else
      std::copy_n(x_row, dim, out_row);
  });
}

void rope_angles(const Team& team, const Batch& batch, const float* inv_freq, int n, float scale, float* cos,
                 float* sin) {
  team.for_each(batch.n_tokens, [&](int t) {
    float *c = cos + area(t, n), *s = sin + area(t, n);
    for (int i = 0; i < n; i++) {
      // The product is rounded to float32 as every framework does: at position 100,000 that is what a model
      // was trained on.
      const float angle = static_cast<float>(batch.positions[t]) * inv_freq[i];
      c[i] = scale * std::cos(angle);
      s[i] = scale * std::sin(angle);
    }
  });
}

// tanh x = 1 - 2 / (e^2x + 1), clamped where it is 1 to float32's last bit.
static F32 tanh(F32 x) {
  const F32 bounded = simd::min(simd::max(x, set(-10)), set(10));
  const F32 e = simd::exp(bounded + bounded);
  return (e - 1.0f) / (e + 1.0f);
}

static F32 silu(F32 x) {
  return x / (simd::exp(simd::min(-x, set(87))) + 1.0f);
}

// GELU's tanh form (arXiv 1606.08415, section 2)
static F32 gelu_tanh(F32 x) {
  return 0.5f * x * (1.0f + tanh(0.7978845608f * fma(set(0.044715f), x * x * x, x)));
}

static F32 gelu(F32 x) {
  for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1 + std::erf(x[i] * 0.70710678f));
  return x;
}

static void swiglu_oai_row(const float* gate, const float* up, int n, float limit, float* out) {
  constexpr float STEEPNESS = 1.702f;
  for (int i = 0; i < n; i += LANES) {
    const int lanes = std::min(n - i, LANES);
    const F32 g = simd::min(set(limit), load_first(gate + i, lanes));  // in this order a NaN passes
    const F32 u = simd::max(set(-limit), simd::min(set(limit), load_first(up + i, lanes)));
    const F32 swish = silu(g * STEEPNESS) * (1 / STEEPNESS);
    store_first(out + i, (u + 1.0f) * swish, lanes);
  }
}

template <F32 (*act)(F32)>
static void activate_row(const float* gate, const float* up, int n, float /*limit*/, float* out) {
  for (int i = 0; i < n; i += LANES) {
    const int lanes = std::min(n - i, LANES);
    const F32 u = load_first(up + i, lanes);
    store_first(out + i, gate ? act(load_first(gate + i, lanes)) * u : act(u), lanes);
  }
}

void activate(const Team& team, Activation activation, float limit, const float* gate, const float* up, int T, int n,
              float* out) {
  const auto row = activation == Activation::silu        ? activate_row<silu>
                   : activation == Activation::gelu      ? activate_row<gelu>
                   : activation == Activation::gelu_tanh ? activate_row<gelu_tanh>
                                                         : swiglu_oai_row;
  // Rows are cut so that one row of a decode step occupies every thread.
  constexpr int CUT = 256;
  const int cuts = (n + CUT - 1) / CUT;
  team.for_each(T * cuts, [&](int i) {
    const int first = i % cuts * CUT;
    const size_t at = area(i / cuts, n) + static_cast<size_t>(first);
    row(gate ? gate + at : nullptr, up + at, std::min(n - first, CUT), limit, out + at);
  });
}

void scale_and_cap(const Team& team, float* x, size_t n, float scale, float cap) {
  const auto [first, last] = team.share(n);
  for (size_t i = first; i < last; i++) {
    x[i] *= scale;
    if (cap > 0) x[i] = cap * std::tanh(x[i] / cap);
  }
  team.barrier();
}

void copy_rows(const Team& team, const float* x, int x_stride, int rows, int n, int copies, float* out,
               int out_stride) {
  team.for_each(rows * copies,
                [&](int r) { std::copy_n(x + area(r / copies, x_stride), n, out + area(r, out_stride)); });
}
