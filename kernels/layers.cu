// layers.cu: the small stages on a GPU. A block has a row where a row is summed; elsewhere a thread has a number.
#include "kernels/layers.h"

#include <algorithm>

#include "kernels/activate_gpu.h"
#include "kernels/norm_gpu.h"
#include "kernels/weights_gpu.h"

namespace {

constexpr int THREADS = 256;  // of a block whose threads do not meet

// The number that this thread has, of n.
__device__ size_t own_index() {
  return static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

unsigned blocks_for(size_t n) {
  return static_cast<unsigned>((n + THREADS - 1) / THREADS);
}

// --- embedding -------------------------------------------------------------------------------------------------------

// grid: tokens
template <class Type>
__global__ void embed_tokens(const std::byte* weight, int dim, const float* position_embedding, const int* tokens,
                             const int* positions, float scale, float* x) {
  const int token = tokens[blockIdx.x];
  const float* position =
      position_embedding ? position_embedding + static_cast<size_t>(positions[blockIdx.x]) * static_cast<size_t>(dim)
                         : nullptr;
  float* row = x + static_cast<size_t>(blockIdx.x) * static_cast<size_t>(dim);
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += static_cast<int>(blockDim.x)) {
    const float value = scale * weight_element<Type>(weight, dim, token, i);
    row[i] = position ? value + position[i] : value;
  }
}

// --- norms -----------------------------------------------------------------------------------------------------------

// grid: rows. The number of threads depends on dim alone, so a row's sums do.
__global__ void norm_rows(NormKind kind, float eps, Norm weights, const float* x, int x_stride, int dim, float* out,
                          int out_stride) {
  const float* in = x + static_cast<ptrdiff_t>(blockIdx.x) * x_stride;
  float* to = out + static_cast<ptrdiff_t>(blockIdx.x) * out_stride;
  const Normed normed(kind, eps, weights, in, dim, dynamic_shared<float>());
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += static_cast<int>(blockDim.x)) to[i] = normed(in, i);
}

// grid: rows. A thread sees its own elements alone, but for the sums.
__global__ void add_and_norm_rows(NormKind kind, float eps, Norm post_norm, Norm next, float scale, float* x,
                                  const float* y, int dim, float* out) {
  float* memory = dynamic_shared<float>();
  const size_t row = static_cast<size_t>(blockIdx.x) * static_cast<size_t>(dim);
  x += row, y += row, out += row;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Normed post(kind, eps, post_norm, y, dim, memory);
  for (int i = thread; i < dim; i += threads) x[i] += scale * post(y, i);
  const Normed normed(kind, eps, next, x, dim, memory);
  for (int i = thread; i < dim; i += threads) out[i] = normed(x, i);
}

// --- angles ----------------------------------------------------------------------------------------------------------

__global__ void angles_of_tokens(const int* positions, const float* inv_freq, size_t total, int n, float scale,
                                 float* cos, float* sin) {
  const size_t i = own_index();
  if (i >= total) return;
  // The product is rounded to float32 as every framework does: at position 100,000 that is what a model was trained on.
  const float angle = static_cast<float>(positions[i / static_cast<size_t>(n)]) * inv_freq[i % static_cast<size_t>(n)];
  cos[i] = scale * cosf(angle);
  sin[i] = scale * sinf(angle);
}

// --- activations -----------------------------------------------------------------------------------------------------

__global__ void activate_numbers(Activation activation, float limit, const float* gate, const float* up, size_t total,
                                 float* out) {
  const size_t i = own_index();
  if (i >= total) return;
  out[i] = activated(activation, limit, gate ? gate + i : nullptr, up[i]);
}

// --- numbers ---------------------------------------------------------------------------------------------------------

__global__ void scale_and_cap_numbers(float* x, size_t total, float scale, float cap) {
  const size_t i = own_index();
  if (i >= total) return;
  const float value = x[i] * scale;
  x[i] = cap > 0 ? cap * tanhf(value / cap) : value;
}

__global__ void copy_numbers(const float* x, int x_stride, size_t total, int n, int copies, float* out,
                             int out_stride) {
  const size_t i = own_index();
  if (i >= total) return;
  const size_t row = i / static_cast<size_t>(n), column = i % static_cast<size_t>(n);
  out[row * static_cast<size_t>(out_stride) + column] =
      x[row / static_cast<size_t>(copies) * static_cast<size_t>(x_stride) + column];
}

}  // namespace

void embed(const Team& team, const Matrix& weight, const float* position_embedding, const Batch& batch, float scale,
           float* x) {
  with_type(weight.type, [&]<class T>(std::type_identity<T>) {
    launch(team, embed_tokens<T>, static_cast<unsigned>(batch.n_tokens), THREADS, 0, weight.data, weight.k,
           position_embedding, batch.tokens, batch.positions, scale, x);
  });
}

// For a row of dim elements.
static unsigned norm_threads(int dim) {
  constexpr int NUMBERS_A_THREAD = 4;
  return static_cast<unsigned>(std::clamp(dim / (NUMBERS_A_THREAD * 32), 1, MOST_NORM_WARPS) * 32);
}

void norm(const Team& team, NormKind kind, float eps, const Norm& weights, const float* x, int x_stride, int rows,
          int dim, float* out, int out_stride) {
  launch(team, norm_rows, static_cast<unsigned>(rows), norm_threads(dim), NORM_SHARED_BYTES, kind, eps, weights, x,
         x_stride, dim, out, out_stride);
}

void add_and_norm(const Team& team, NormKind kind, float eps, const Norm& post_norm, const Norm& next, float scale,
                  float* x, float* y, int T, int dim, float* out) {
  launch(team, add_and_norm_rows, static_cast<unsigned>(T), norm_threads(dim), NORM_SHARED_BYTES, kind, eps, post_norm,
         next, scale, x, y, dim, out);
}

void rope_angles(const Team& team, const Batch& batch, const float* inv_freq, int n, float scale, float* cos,
                 float* sin) {
  const size_t total = area(batch.n_tokens, n);
  launch(team, angles_of_tokens, blocks_for(total), THREADS, 0, batch.positions, inv_freq, total, n, scale, cos, sin);
}

void activate(const Team& team, Activation activation, float limit, const float* gate, const float* up, int T, int n,
              float* out) {
  const size_t total = area(T, n);
  launch(team, activate_numbers, blocks_for(total), THREADS, 0, activation, limit, gate, up, total, out);
}

void scale_and_cap(const Team& team, float* x, size_t n, float scale, float cap) {
  launch(team, scale_and_cap_numbers, blocks_for(n), THREADS, 0, x, n, scale, cap);
}

void copy_rows(const Team& team, const float* x, int x_stride, int rows, int n, int copies, float* out,
               int out_stride) {
  const size_t total = area(rows * copies, n);
  launch(team, copy_numbers, blocks_for(total), THREADS, 0, x, x_stride, total, n, copies, out, out_stride);
}
