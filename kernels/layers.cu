// layers.cu: the small stages on a GPU. A block has a row where a row is summed; elsewhere a thread has a number.
#include "kernels/layers.h"

#include <algorithm>

#include "kernels/weights_gpu.h"

namespace {

constexpr int WARP = 32;
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

// The sum over the block's threads, to each of them. memory: a float a warp.
__device__ float block_sum(float x, float* memory) {
  const int warps = static_cast<int>(blockDim.x) / WARP;
  for (int by = WARP / 2; by > 0; by /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, by);
  if (warps == 1) return x;
  if (threadIdx.x % WARP == 0) memory[threadIdx.x / WARP] = x;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < warps; w++) sum += memory[w];
  __syncthreads();  // before anybody writes there again
  return sum;
}

// grid: rows. The number of threads depends on dim alone, so a row's sums do.
__global__ void norm_rows(NormKind kind, float eps, Norm weights, const float* x, int x_stride, int dim, float* out,
                          int out_stride) {
  float* memory = dynamic_shared<float>();
  const float* in = x + static_cast<ptrdiff_t>(blockIdx.x) * x_stride;
  float* to = out + static_cast<ptrdiff_t>(blockIdx.x) * out_stride;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float shift = 0;
  if (kind == NormKind::layer) {
    for (int i = thread; i < dim; i += threads) shift += in[i];
    shift = block_sum(shift, memory) / static_cast<float>(dim);
  }
  float squares = 0;
  for (int i = thread; i < dim; i += threads) squares = fmaf(in[i] - shift, in[i] - shift, squares);
  const float factor = 1 / sqrtf(block_sum(squares, memory) / static_cast<float>(dim) + eps);
  for (int i = thread; i < dim; i += threads) {
    const float value = (in[i] - shift) * factor * weights.weight[i];
    to[i] = weights.bias ? value + weights.bias[i] : value;
  }
}

// --- RoPE ------------------------------------------------------------------------------------------------------------

__global__ void angles_of_tokens(const int* positions, const float* inv_freq, size_t total, int n, float scale,
                                 float* cos, float* sin) {
  const size_t i = own_index();
  if (i >= total) return;
  // The product is rounded to float32 as every framework does: at position 100,000 that is what a model was trained on.
  const float angle = static_cast<float>(positions[i / static_cast<size_t>(n)]) * inv_freq[i % static_cast<size_t>(n)];
  cos[i] = scale * cosf(angle);
  sin[i] = scale * sinf(angle);
}

// A thread has a pair of elements.
__global__ void rotate(float* x, int x_stride, size_t total, int n_heads, int head_stride, int n, const float* cos,
                       const float* sin) {
  const size_t index = own_index();
  if (index >= total) return;
  const size_t pairs = static_cast<size_t>(n), heads = static_cast<size_t>(n_heads);
  const size_t i = index % pairs, head = index / pairs % heads, token = index / pairs / heads;
  float* a = x + token * static_cast<size_t>(x_stride) + head * static_cast<size_t>(head_stride) + i;
  float* b = a + n;
  const float c = cos[token * pairs + i], s = sin[token * pairs + i];
  const float rotated = *a * c - *b * s;
  *b = *b * c + *a * s;
  *a = rotated;
}

// --- activations -----------------------------------------------------------------------------------------------------

__device__ float silu(float x) {
  return x / (1 + expf(-x));
}

__device__ float act(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * x * (1 + erff(x * 0.70710678f));
    case Activation::gelu_tanh:  // arXiv 1606.08415, section 2
      return 0.5f * x * (1 + tanhf(0.7978845608f * fmaf(0.044715f, x * x * x, x)));
    default:
      return silu(x);
  }
}

__device__ float swiglu_oai(float gate, float up, float limit) {
  constexpr float STEEPNESS = 1.702f;
  const float g = gate > limit ? limit : gate;  // fminf would pass over a NaN
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  return (u + 1) * (silu(g * STEEPNESS) * (1 / STEEPNESS));
}

__global__ void activate_numbers(Activation activation, float limit, const float* gate, const float* up, size_t total,
                                 float* out) {
  const size_t i = own_index();
  if (i >= total) return;
  if (activation == Activation::swiglu_oai)
    out[i] = swiglu_oai(gate[i], up[i], limit);
  else
    out[i] = gate ? act(activation, gate[i]) * up[i] : act(activation, up[i]);
}

// --- numbers ---------------------------------------------------------------------------------------------------------

__global__ void add_numbers(float* x, const float* y, size_t total, float scale) {
  const size_t i = own_index();
  if (i < total) x[i] += scale * y[i];
}

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

void norm(const Team& team, NormKind kind, float eps, const Norm& weights, const float* x, int x_stride, int rows,
          int dim, float* out, int out_stride) {
  constexpr int NUMBERS_A_THREAD = 4, MOST = 1024;
  const int warps = std::clamp(dim / (NUMBERS_A_THREAD * WARP), 1, MOST / WARP);
  launch(team, norm_rows, static_cast<unsigned>(rows), static_cast<unsigned>(warps * WARP), MOST / WARP * sizeof(float),
         kind, eps, weights, x, x_stride, dim, out, out_stride);
}

void rope_angles(const Team& team, const Batch& batch, const float* inv_freq, int n, float scale, float* cos,
                 float* sin) {
  const size_t total = area(batch.n_tokens, n);
  launch(team, angles_of_tokens, blocks_for(total), THREADS, 0, batch.positions, inv_freq, total, n, scale, cos, sin);
}

void rope(const Team& team, float* x, int x_stride, int T, int n_heads, int head_stride, int n, const float* cos,
          const float* sin) {
  const size_t total = area(T, n_heads) * static_cast<size_t>(n);
  launch(team, rotate, blocks_for(total), THREADS, 0, x, x_stride, total, n_heads, head_stride, n, cos, sin);
}

void activate(const Team& team, Activation activation, float limit, const float* gate, const float* up, int T, int n,
              float* out) {
  const size_t total = area(T, n);
  launch(team, activate_numbers, blocks_for(total), THREADS, 0, activation, limit, gate, up, total, out);
}

void add(const Team& team, float* x, const float* y, size_t n, float scale) {
  launch(team, add_numbers, blocks_for(n), THREADS, 0, x, y, n, scale);
}

void scale_and_cap(const Team& team, float* x, size_t n, float scale, float cap) {
  launch(team, scale_and_cap_numbers, blocks_for(n), THREADS, 0, x, n, scale, cap);
}

void copy_rows(const Team& team, const float* x, int x_stride, int rows, int n, int copies, float* out,
               int out_stride) {
  const size_t total = area(rows * copies, n);
  launch(team, copy_numbers, blocks_for(total), THREADS, 0, x, x_stride, total, n, copies, out, out_stride);
}
