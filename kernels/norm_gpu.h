// norm_gpu.h: a norm, for the kernels that begin or end with one. A block has a row.
#pragma once

#include "kernels/gpu.h"
#include "model.h"

constexpr int MOST_NORM_WARPS = 32;  // of a block
constexpr size_t NORM_SHARED_BYTES = MOST_NORM_WARPS * sizeof(float);

// The sum over the block's threads, to each of them. memory: a float a warp, where there are several.
__device__ inline float block_sum(float x, float* memory) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, by);
  if (warps == 1) return x;
  if (lane_id() == 0) memory[warp_id()] = x;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < warps; w++) sum += memory[w];
  __syncthreads();  // before anybody writes there again
  return sum;
}

// What a row's elements become, by the mean and the mean of squares of all; where there are no weights, the elements.
// Thread i reads elements i, i + threads, ..
class Normed {
 public:
  __device__ Normed(NormKind kind, float eps, const Norm& weights, const float* row, int dim, float* memory)
      : weights_(weights) {
    if (!weights_.weight) return;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (kind == NormKind::layer) {
      for (int i = thread; i < dim; i += threads) shift_ += row[i];
      shift_ = block_sum(shift_, memory) / static_cast<float>(dim);
    }
    float squares = 0;
    for (int i = thread; i < dim; i += threads) squares = fmaf(row[i] - shift_, row[i] - shift_, squares);
    factor_ = 1 / sqrtf(block_sum(squares, memory) / static_cast<float>(dim) + eps);
  }
  __device__ float operator()(const float* row, int i) const {
    if (!weights_.weight) return row[i];
    const float value = (row[i] - shift_) * factor_ * weights_.weight[i];
    return weights_.bias ? value + weights_.bias[i] : value;
  }

 private:
  const Norm& weights_;
  float shift_ = 0, factor_ = 0;
};
