// weights_gpu.h: the weight types of matmul on a GPU, one struct each: what the file holds, how it is packed, how a
// warp multiplies it.
//
// A panel is 16 output rows, the rows of a tensor core's tile; it is a stream of steps of STEP inputs, in which each
// lane finds its own elements with aligned loads of 8 or 16 bytes. A warp multiplies a panel by R tiles of 8 rows of
// activations. Lane 4 g + t holds of each product the outputs g, g + 8 and the rows 2 t, 2 t + 1:
//
//     d[r][c]      output g + c / 2 * 8, row 8 r + 2 t + c % 2
//
// A type's struct:
//
//   NAME, QUANT_GROUP, PARTS     as in the CPU's weight_types.h
//   STEP, STEP_BYTES             inputs of a step; its bytes
//   Input                        the activations it multiplies: Float32Rows, Bf16Rows or Int8Rows
//   pack(source, at, out, row)   one row of a step: the inputs from at(0) on
//   element(step, row, k)        element k of a step's row, as float
//   multiply<R>(step, x, i, d)   d += one step, x being the activations from input i on
#pragma once

#include <cstring>
#include <tuple>

#include "kernels/gpu.h"
#include "kernels/matmul.h"

constexpr int PANEL = 16;
constexpr int TILE_ROWS = 8;
constexpr int INT8_GROUP = 32;  // activations that share a scale

// --- activations, in the arithmetic of the weights
// --------------------------------------------------------------------

// Rows that a call has converted, each filled up to whole steps with zeros.
struct Float32Rows {
  static constexpr int STEP = 8;
  float* rows;  // [n, stride]
  int stride;
};
struct Bf16Rows {
  static constexpr int STEP = 32;
  uint16_t* rows;  // [n, stride]
  int stride;
};
// x = scale * q, scale = largest magnitude of the group / 127
struct Int8Rows {
  static constexpr int STEP = INT8_GROUP;
  int8_t* rows;  // [n, stride]
  int stride;
  float* scale;  // [n, stride / INT8_GROUP]
  float* sum;    // [n, stride / INT8_GROUP] scale * sum of q
};

// The rows that a lane multiplies: of tile r, row g as a fragment's column, and rows 2 t, 2 t + 1 as its own results.
template <class Input, int R>
struct LaneRows {
  const Input& input;
  int column[R];  // place in input
  int own[R][2];
  int t;
};

// --- types -----------------------------------------------------------------------------------------------------------

template <class T>
const T* part(const TensorView& source, int i) {
  return static_cast<const T*>(source.parts[i]);
}

// d += w x of N inputs, in order of k.
template <int N>
__device__ void multiply_add(const float (&w)[2][N], const float* const (&x)[2], float (&d)[4]) {
#pragma unroll
  for (int k = 0; k < N; k += 4) {
    const float4 x0 = load_vector<float4>(x[0] + k), x1 = load_vector<float4>(x[1] + k);
    const float x_at[2][4] = {{x0.x, x0.y, x0.z, x0.w}, {x1.x, x1.y, x1.z, x1.w}};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) d[c] = fmaf(w[c / 2][k + i], x_at[c % 2][i], d[c]);
  }
}

// A step is [16 rows][STEP]. CUDA cores multiply in float32, as on the CPU.
struct WeightsF32 {
  static constexpr const char* NAME = "f32";
  static constexpr int QUANT_GROUP = 1;
  static constexpr WeightPart PARTS[] = {{"weight", "F32", 1}};
  static constexpr int STEP = 8, STEP_BYTES = PANEL * STEP * 4;
  using Input = Float32Rows;

  static void pack(const TensorView& source, ptrdiff_t first, ptrdiff_t k_step, int n, std::byte* step, int row) {
    float* to = reinterpret_cast<float*>(step) + row * STEP;
    for (int i = 0; i < n; i++) std::memcpy(to + i, part<std::byte>(source, 0) + (first + i * k_step) * 4, 4);
  }
  static __device__ float element(const std::byte* step, int row, int k) {
    return reinterpret_cast<const float*>(step)[row * STEP + k];
  }
  template <int R>
  static __device__ void multiply(const std::byte* step, const LaneRows<Input, R>& x, int i, float (&d)[R][4]) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
    float w[2][STEP];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int k = 0; k < STEP; k += 4) {
        const float4 v = load_vector<float4>(step + ((g + half * 8) * STEP + k) * 4);
        w[half][k] = v.x, w[half][k + 1] = v.y, w[half][k + 2] = v.z, w[half][k + 3] = v.w;
      }
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float* const rows[2] = {x.input.rows + static_cast<ptrdiff_t>(x.own[r][0]) * x.input.stride + i,
                                    x.input.rows + static_cast<ptrdiff_t>(x.own[r][1]) * x.input.stride + i};
      multiply_add<STEP>(w, rows, d[r]);
    }
  }
};

// As f32: float16 activations would overflow, and there is no tensor core of float16 times float32.
struct WeightsF16 {
  static constexpr const char* NAME = "f16";
  static constexpr int QUANT_GROUP = 1;
  static constexpr WeightPart PARTS[] = {{"weight", "F16", 1}};
  static constexpr int STEP = 8, STEP_BYTES = PANEL * STEP * 2;
  using Input = Float32Rows;

  static void pack(const TensorView& source, ptrdiff_t first, ptrdiff_t k_step, int n, std::byte* step, int row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(step) + row * STEP;
    for (int i = 0; i < n; i++) std::memcpy(to + i, part<std::byte>(source, 0) + (first + i * k_step) * 2, 2);
  }
  static __device__ float element(const std::byte* step, int row, int k) {
    return f16_to_float(reinterpret_cast<const uint16_t*>(step)[row * STEP + k]);
  }
  template <int R>
  static __device__ void multiply(const std::byte* step, const LaneRows<Input, R>& x, int i, float (&d)[R][4]) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
    float w[2][STEP];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 v = load_vector<uint4>(step + (g + half * 8) * STEP * 2);
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < STEP; k++) w[half][k] = f16_to_float(static_cast<uint16_t>(pairs[k / 2] >> k % 2 * 16));
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float* const rows[2] = {x.input.rows + static_cast<ptrdiff_t>(x.own[r][0]) * x.input.stride + i,
                                    x.input.rows + static_cast<ptrdiff_t>(x.own[r][1]) * x.input.stride + i};
      multiply_add<STEP>(w, rows, d[r]);
    }
  }
};

// Tensor cores: activations are rounded to bfloat16. A step is two mma's of 16 inputs; which 16 does not matter as long
// as weights and activations agree, so lane t has inputs 8 t .. 8 t + 7, four for each: a single load.
struct WeightsBF16 {
  static constexpr const char* NAME = "bf16";
  static constexpr int QUANT_GROUP = 1;
  static constexpr WeightPart PARTS[] = {{"weight", "BF16", 1}};
  static constexpr int STEP = 32, STEP_BYTES = PANEL * STEP * 2;
  using Input = Bf16Rows;

  // Input k of a row lies, of [2 mma][32 lanes][4 registers][2], at
  static constexpr int place(int row, int k) {
    const int lane = row % 8 * 4 + k / 8, mma = k % 8 / 4, word = k % 4 / 2 * 2 + row / 8;
    return ((mma * 32 + lane) * 4 + word) * 2 + k % 2;
  }
  static void pack(const TensorView& source, ptrdiff_t first, ptrdiff_t k_step, int n, std::byte* step, int row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(step);
    for (int i = 0; i < n; i++)
      std::memcpy(to + place(row, i), part<std::byte>(source, 0) + (first + i * k_step) * 2, 2);
  }
  static __device__ float element(const std::byte* step, int row, int k) {
    return bf16_to_float(reinterpret_cast<const uint16_t*>(step)[place(row, k)]);
  }
  template <int R>
  static __device__ void multiply(const std::byte* step, const LaneRows<Input, R>& x, int i, float (&d)[R][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint4 w0 = load_vector<uint4>(step + lane * 16), w1 = load_vector<uint4>(step + (32 + lane) * 16);
    const uint32_t a[2][4] = {{w0.x, w0.y, w0.z, w0.w}, {w1.x, w1.y, w1.z, w1.w}};
#pragma unroll
    for (int r = 0; r < R; r++) {
      const uint4 b =
          load_vector<uint4>(x.input.rows + static_cast<ptrdiff_t>(x.column[r]) * x.input.stride + i + x.t * 8);
      mma_bf16(d[r], a[0], b.x, b.y);
      mma_bf16(d[r], a[1], b.z, b.w);
    }
  }
};

// d += products of a group * weight scale * activation scale
__device__ inline void scale_add(const int (&products)[4], const uint16_t* scales, const Int8Rows& x,
                                 const int (&rows)[2], int i, float (&d)[4]) {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
  for (int c = 0; c < 4; c++) {
    const float x_scale = x.scale[(static_cast<ptrdiff_t>(rows[c % 2]) * x.stride + i) / INT8_GROUP];
    const float scale = f16_to_float(scales[g + c / 2 * 8]) * x_scale;
    d[c] = fmaf(static_cast<float>(products[c]), scale, d[c]);
  }
}

// A step is a group of 32: [32 lanes][4 registers][4], scale [16]. Lane t has inputs 8 t .. 8 t + 7.
struct WeightsQ8 {
  static constexpr const char* NAME = "q8";
  static constexpr int QUANT_GROUP = 32;
  static constexpr WeightPart PARTS[] = {{"weight", "I8", 32}, {"scale", "F16", 1}};
  static constexpr int STEP = QUANT_GROUP, STEP_BYTES = PANEL * (QUANT_GROUP + 2);
  using Input = Int8Rows;

  static constexpr int place(int row, int k) {
    return ((row % 8 * 4 + k / 8) * 4 + k % 8 / 4 * 2 + row / 8) * 4 + k % 4;
  }
  static void pack(const TensorView& source, ptrdiff_t first, ptrdiff_t, int, std::byte* step, int row) {
    for (int k = 0; k < STEP; k++) step[place(row, k)] = part<std::byte>(source, 0)[first + k];
    std::memcpy(step + PANEL * STEP + row * 2, part<uint16_t>(source, 1) + first / STEP, 2);
  }
  static __device__ const uint16_t* scales(const std::byte* step) {
    return reinterpret_cast<const uint16_t*>(step + PANEL * STEP);
  }
  static __device__ float element(const std::byte* step, int row, int k) {
    return f16_to_float(scales(step)[row]) * static_cast<float>(reinterpret_cast<const int8_t*>(step)[place(row, k)]);
  }
  template <int R>
  static __device__ void multiply(const std::byte* step, const LaneRows<Input, R>& x, int i, float (&d)[R][4]) {
    const uint4 w = load_vector<uint4>(step + threadIdx.x % 32 * 16);
    const uint32_t a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int r = 0; r < R; r++) {
      const uint2 b =
          load_vector<uint2>(x.input.rows + static_cast<ptrdiff_t>(x.column[r]) * x.input.stride + i + x.t * 8);
      int products[4] = {0, 0, 0, 0};
      mma_s8(products, a, b.x, b.y);
      scale_add(products, scales(step), x.input, x.own[r], i, d[r]);
    }
  }
};

// A step is a group of 32: [32 lanes][2 outputs][4 bytes: an input and the one 4 later], scale [16], min [16].
struct WeightsQ4 {
  static constexpr const char* NAME = "q4";
  static constexpr int QUANT_GROUP = 32;
  static constexpr WeightPart PARTS[] = {{"weight", "U8", 16}, {"scale", "F16", 1}, {"min", "F16", 1}};
  static constexpr int STEP = QUANT_GROUP, STEP_BYTES = PANEL * (QUANT_GROUP / 2 + 4);
  using Input = Int8Rows;

  static constexpr int place(int row, int k) { return ((row % 8 * 4 + k / 8) * 2 + row / 8) * 4 + k % 4; }
  static constexpr int shift(int k) { return k % 8 / 4 * 4; }
  static void pack(const TensorView& source, ptrdiff_t first, ptrdiff_t, int, std::byte* step, int row) {
    for (int k = 0; k < STEP; k++) {
      const auto two = static_cast<unsigned>(part<std::byte>(source, 0)[(first + k) / 2]);
      step[place(row, k)] |= static_cast<std::byte>((two >> k % 2 * 4 & 15) << shift(k));
    }
    std::byte* scale = step + PANEL * STEP / 2;
    std::memcpy(scale + row * 2, part<uint16_t>(source, 1) + first / STEP, 2);
    std::memcpy(scale + (PANEL + row) * 2, part<uint16_t>(source, 2) + first / STEP, 2);
  }
  static __device__ const uint16_t* scales(const std::byte* step) {
    return reinterpret_cast<const uint16_t*>(step + PANEL * STEP / 2);
  }
  static __device__ float element(const std::byte* step, int row, int k) {
    const int q = static_cast<int>(step[place(row, k)]) >> shift(k) & 15;
    return f16_to_float(scales(step)[row]) * static_cast<float>(q) + f16_to_float(scales(step)[PANEL + row]);
  }
  template <int R>
  static __device__ void multiply(const std::byte* step, const LaneRows<Input, R>& x, int i, float (&d)[R][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint2 w = load_vector<uint2>(step + lane * 8);
    const uint32_t a[4] = {w.x & 0x0f0f0f0f, w.y & 0x0f0f0f0f, w.x >> 4 & 0x0f0f0f0f, w.y >> 4 & 0x0f0f0f0f};
#pragma unroll
    for (int r = 0; r < R; r++) {
      const uint2 b =
          load_vector<uint2>(x.input.rows + static_cast<ptrdiff_t>(x.column[r]) * x.input.stride + i + x.t * 8);
      int products[4] = {0, 0, 0, 0};
      mma_s8(products, a, b.x, b.y);
      scale_add(products, scales(step), x.input, x.own[r], i, d[r]);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float sum = x.input.sum[(static_cast<ptrdiff_t>(x.own[r][c % 2]) * x.input.stride + i) / INT8_GROUP];
        d[r][c] = fmaf(f16_to_float(scales(step)[PANEL + lane / 4 + c / 2 * 8]), sum, d[r][c]);
      }
    }
  }
};

// --- the table -------------------------------------------------------------------------------------------------------

using WeightTypes = std::tuple<WeightsF32, WeightsBF16, WeightsF16, WeightsQ8, WeightsQ4>;

// Bytes of a panel with k inputs.
template <class Type>
constexpr size_t panel_bytes(int k) {
  const int steps = (k + Type::STEP - 1) / Type::STEP;
  return (static_cast<size_t>(steps) * Type::STEP_BYTES + 63) / 64 * 64;
}

// Element (row, k) of a packed matrix with `width` inputs.
template <class Type>
__device__ float weight_element(const std::byte* data, int width, int row, int k) {
  const std::byte* panel = data + static_cast<size_t>(row / PANEL) * panel_bytes<Type>(width);
  return Type::element(panel + static_cast<size_t>(k / Type::STEP) * Type::STEP_BYTES, row % PANEL, k % Type::STEP);
}

// f(std::type_identity<T>) for the type's struct T.
template <class F>
void with_type(WeightType type, F f) {
  const auto try_each = [&]<class... T>(std::type_identity<std::tuple<T...>>) {
    int index = 0;
    static_cast<void>(((index++ == static_cast<int>(type) && (f(std::type_identity<T>()), true)) || ...));
  };
  try_each(std::type_identity<WeightTypes>());
}
