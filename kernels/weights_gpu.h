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
//   NAME, DTYPE, BLOCK, BLOCK_ELEMENTS   as in the CPU's weight_types.h
//   STEP, STEP_BYTES                     inputs of a step; its bytes
//   Input                                the activations it multiplies: Float32Rows, Bf16Rows or Int8Rows
//   pack(source, first, k_step, n, step, row)   a step's row: n inputs, k_step apart from the source's element `first`
//                                        on; false: a scale is no finite number
//   element(step, row, k)                element k of a step's row, as float
//   multiply<R>(step, x, i, d)           d += one step, x being the activations from input i on
#pragma once

#include <cstring>
#include <tuple>

#include "kernels/ggml_blocks.h"
#include "kernels/gpu.h"
#include "kernels/matmul.h"

constexpr int PANEL = 16;
constexpr int TILE_ROWS = 8;
constexpr int INT8_GROUP = 32;  // activations that share a scale

// --- activations, in the arithmetic of the weights -------------------------------------------------------------------

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
const T* elements(const TensorView& source) {
  return static_cast<const T*>(source.data);
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

// A step is [16 rows][STEP]. CUDA cores multiply in float32, as on the CPU: float16 activations would overflow, and
// there is no tensor core of float16 times float32. Number: float, or uint16_t, the bits of a float16.
template <class Number>
struct WeightsInOrder {
  static constexpr bool IS_F32 = std::is_same_v<Number, float>;
  static constexpr const char* NAME = IS_F32 ? "f32" : "f16";
  static constexpr const char* DTYPE = IS_F32 ? "F32" : "F16";
  static constexpr int BLOCK = 1, BLOCK_ELEMENTS = 1;
  static constexpr int STEP = 8, STEP_BYTES = PANEL * STEP * int{sizeof(Number)};
  using Input = Float32Rows;

  static bool pack(const TensorView& source, ptrdiff_t first, ptrdiff_t k_step, int n, std::byte* step, int row) {
    constexpr ptrdiff_t BYTES = sizeof(Number);
    for (int i = 0; i < n; i++)
      std::memcpy(step + (row * STEP + i) * BYTES, elements<std::byte>(source) + (first + i * k_step) * BYTES, BYTES);
    return true;
  }
  static __device__ float element(const std::byte* step, int row, int k) {
    const Number x = reinterpret_cast<const Number*>(step)[row * STEP + k];
    if constexpr (IS_F32)
      return x;
    else
      return f16_to_float(x);
  }
  static __device__ void load_row(const std::byte* row, float (&w)[STEP]) {
    constexpr int IN_WORD = 4 / int{sizeof(Number)}, IN_VECTOR = 4 * IN_WORD;
#pragma unroll
    for (int k = 0; k < STEP; k += IN_VECTOR) {
      const uint4 v = load_vector<uint4>(row + k * int{sizeof(Number)});
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < IN_VECTOR; i++) {
        if constexpr (IS_F32)
          w[k + i] = bits_to_float(words[i]);
        else
          w[k + i] = f16_to_float(static_cast<uint16_t>(words[i / IN_WORD] >> i % IN_WORD * 16));
      }
    }
  }
  template <int R>
  static __device__ void multiply(const std::byte* step, const LaneRows<Input, R>& x, int i, float (&d)[R][4]) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
    float w[2][STEP];
#pragma unroll
    for (int half = 0; half < 2; half++) load_row(step + (g + half * 8) * STEP * int{sizeof(Number)}, w[half]);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float* const rows[2] = {x.input.rows + static_cast<ptrdiff_t>(x.own[r][0]) * x.input.stride + i,
                                    x.input.rows + static_cast<ptrdiff_t>(x.own[r][1]) * x.input.stride + i};
      multiply_add<STEP>(w, rows, d[r]);
    }
  }
};
using WeightsF32 = WeightsInOrder<float>;
using WeightsF16 = WeightsInOrder<uint16_t>;

// Tensor cores: activations are rounded to bfloat16. A step is two mma's of 16 inputs; which 16 does not matter as long
// as weights and activations agree, so lane t has inputs 8 t .. 8 t + 7, four for each: a single load.
struct WeightsBF16 {
  static constexpr const char* NAME = "bf16";
  static constexpr const char* DTYPE = "BF16";
  static constexpr int BLOCK = 1, BLOCK_ELEMENTS = 1;
  static constexpr int STEP = 32, STEP_BYTES = PANEL * STEP * 2;
  using Input = Bf16Rows;

  // Input k of a row lies, of [2 mma][32 lanes][4 registers][2], at
  static constexpr int place(int row, int k) {
    const int lane = row % 8 * 4 + k / 8, mma = k % 8 / 4, word = k % 4 / 2 * 2 + row / 8;
    return ((mma * 32 + lane) * 4 + word) * 2 + k % 2;
  }
  static bool pack(const TensorView& source, ptrdiff_t first, ptrdiff_t k_step, int n, std::byte* step, int row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(step);
    for (int i = 0; i < n; i++)
      std::memcpy(to + place(row, i), elements<std::byte>(source) + (first + i * k_step) * 2, 2);
    return true;
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

// ggml's quantised types (ggml_blocks.h), one struct for all. A step is a block of each of the 16 rows, as it is in the
// file. Codes less their offset are signed bytes, which tensor cores multiply with the activations' int8.
// Nothing here is tuned yet: blocks are read byte by byte.
template <const GgmlBlock& TYPE>
struct WeightsQuant {
  static constexpr const char* NAME = TYPE.name;
  static constexpr const char* DTYPE = "U8";
  static constexpr int BLOCK = TYPE.inputs, BLOCK_ELEMENTS = TYPE.bytes;
  static constexpr int STEP = TYPE.inputs, STEP_BYTES = PANEL * TYPE.bytes;
  static constexpr bool HAS_MIN = TYPE.min >= 0;
  static constexpr int GROUPS = TYPE.inputs / TYPE.group, PARTS = INT8_GROUP / TYPE.group;  // of 32 inputs: groups
  using Input = Int8Rows;

  static bool pack(const TensorView& source, ptrdiff_t first, ptrdiff_t, int, std::byte* step, int row) {
    const uint8_t* block = elements<uint8_t>(source) + first / TYPE.inputs * TYPE.bytes;
    std::memcpy(step + row * TYPE.bytes, block, static_cast<size_t>(TYPE.bytes));
    const auto finite = [&](int at) { return (block[at + 1] & 0x7c) != 0x7c; };
    if (TYPE.power_of_2) return block[TYPE.scale] != 255;  // OCP's NaN
    return finite(TYPE.scale) && (!HAS_MIN || finite(TYPE.min));
  }

  struct Scale {
    float scale, min;
  };
  static __device__ Scale scale_of(const uint8_t* block, int group) {
    constexpr GgmlBlock type = TYPE;
    const auto half = [&](int at) { return f16_to_float(static_cast<uint16_t>(block[at] | block[at + 1] << 8)); };
    const auto factor = [&](int i) {
      const uint32_t four = four_factors(type, block, i / 4 * 4);
      return static_cast<float>(static_cast<int>(four >> i % 4 * 8 & 255) - type.factor_offset);
    };
    if constexpr (type.power_of_2) {
      const uint32_t e = block[type.scale];  // below 2 a subnormal number
      return {bits_to_float(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0};
    } else if constexpr (type.factor_bits() == 0) {
      return {half(type.scale), HAS_MIN ? half(type.min) : 0};
    } else {
      return {half(type.scale) * factor(group), HAS_MIN ? -half(type.min) * factor(GROUPS + group) : 0};
    }
  }

  // Values first .. first + 7, a byte each.
  static constexpr uint64_t eight_values(size_t first) {
    uint64_t eight = 0;
    for (size_t i = 0; i < 8; i++) eight |= uint64_t{static_cast<uint8_t>(TYPE.values[first + i])} << i * 8;
    return eight;
  }

  // Inputs first .. first + 3, a signed byte each.
  static __device__ uint32_t four_values(const uint8_t* block, int first) {
    constexpr GgmlBlock type = TYPE;
    const uint32_t four = four_codes(type, block, first);
    if constexpr (!type.codes_are_places)  // the highest bits, set, keep a byte from borrowing of the next
      return type.offset == 128 ? four ^ 0x80808080u
                                : ((four | 0x80808080u) - 0x01010101u * unsigned(type.offset)) ^ 0x80808080u;
    constexpr uint64_t low = eight_values(0), high = eight_values(8);
    uint32_t four_values = 0;
    for (int i = 0; i < 4; i++) {
      const uint32_t code = four >> i * 8 & 15;
      four_values |= static_cast<uint32_t>((code < 8 ? low : high) >> code % 8 * 8 & 255) << i * 8;
    }
    return four_values;
  }

  static __device__ const uint8_t* block_of(const std::byte* step, int row) {
    return reinterpret_cast<const uint8_t*>(step) + row * TYPE.bytes;
  }
  static __device__ float element(const std::byte* step, int row, int k) {
    const uint8_t* block = block_of(step, row);
    const Scale s = scale_of(block, k / TYPE.group);
    const auto value = static_cast<int8_t>(four_values(block, k / 4 * 4) >> k % 4 * 8 & 255);
    return s.scale * static_cast<float>(value) + s.min;
  }

  template <int R>
  static __device__ void multiply(const std::byte* step, const LaneRows<Input, R>& x, int i, float (&d)[R][4]) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
    const uint8_t* const blocks[2] = {block_of(step, g), block_of(step, g + 8)};
#pragma unroll 1
    for (int k = 0; k < TYPE.inputs; k += INT8_GROUP) {
      uint32_t a[4];
#pragma unroll
      for (int j = 0; j < 4; j++) a[j] = four_values(blocks[j % 2], k + x.t * 8 + j / 2 * 4);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int group = k / TYPE.group + part;
        const Scale scales[2] = {scale_of(blocks[0], group), scale_of(blocks[1], group)};
        multiply_group(a, x.t * PARTS / 4 == part, scales, x, i + k, d);
      }
    }
  }

  // d += a group of each row: a are the 32 inputs that its own are among, with its own where `mine`.
  template <int R>
  static __device__ void multiply_group(const uint32_t (&a)[4], bool mine, const Scale (&scales)[2],
                                        const LaneRows<Input, R>& x, int i, float (&d)[R][4]) {
    const uint32_t own[4] = {mine ? a[0] : 0, mine ? a[1] : 0, mine ? a[2] : 0, mine ? a[3] : 0};
    const uint32_t one = mine ? 0x01010101u : 0, ones[4] = {one, one, one, one};
#pragma unroll
    for (int r = 0; r < R; r++) {
      const uint2 b =
          load_vector<uint2>(x.input.rows + static_cast<ptrdiff_t>(x.column[r]) * x.input.stride + i + x.t * 8);
      int products[4] = {0, 0, 0, 0}, sums[4] = {0, 0, 0, 0};  // sums: of the activations
      mma_s8(products, own, b.x, b.y);
      if constexpr (HAS_MIN) mma_s8(sums, ones, b.x, b.y);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const Scale& w = scales[c / 2];
        const float x_scale =
            x.input.scale[(static_cast<ptrdiff_t>(x.own[r][c % 2]) * x.input.stride + i) / INT8_GROUP];
        d[r][c] = fmaf(static_cast<float>(products[c]), w.scale * x_scale, d[r][c]);
        if constexpr (HAS_MIN) d[r][c] = fmaf(w.min, static_cast<float>(sums[c]) * x_scale, d[r][c]);
      }
    }
  }
};

#include "kernels/weight_list.h"

// Element (row, k) of a packed matrix with `width` inputs.
template <class Type>
__device__ float weight_element(const std::byte* data, int width, int row, int k) {
  const std::byte* panel = data + static_cast<size_t>(row / PANEL) * panel_bytes<Type>(width);
  return Type::element(panel + static_cast<size_t>(k / Type::STEP) * Type::STEP_BYTES, row % PANEL, k % Type::STEP);
}
