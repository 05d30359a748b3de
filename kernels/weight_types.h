// weight_types.h: the weight types of matmul, one struct each: what the file holds, how it is packed, how it
// multiplies.
//
// To add a type, write its struct and add it to WeightTypes at the end (and to exporter/weights.py, which writes it):
//
//   NAME                 in the model file's "types" and in reports
//   QUANT_GROUP          inputs of a row that share a scale; 1: plain floats
//   PARTS                its tensors in the file: name, dtype, elements for each quant group of a row
//   STEP, STEP_BYTES     the packed panel is a sequence of steps of STEP inputs
//   Input, ROWS          the activations it multiplies; rows of a register tile
//   pack(source, transposed, panel, out)    fills a panel of zeros
//   unpack(panel, row, k, out)              row `row` of a panel as float32
//   multiply<R>(panel, k, x, acc)           acc[r][v] = the products of row x[r] with vector v of the panel's outputs.
//                                           Per row and output the additions are in the order of k, whatever R is.
//
// A panel is PANEL = VECTORS * LANES output rows side by side in vector registers, read as one stream of bytes in the
// order in which it lies, in whole cache lines (AVX-512).
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>

#include "kernels/matmul.h"
#include "kernels/simd.h"

using simd::F32;
using simd::I32;
using simd::LANES;

constexpr int VECTORS = 2;
constexpr int PANEL = VECTORS * LANES;

// --- activations, in the arithmetic of the weights: Int8Group, uint16_t (bfloat16) or float --------------------------

constexpr int INT8_GROUP = 32;  // activations that share a scale

// 32 activations as int8: x = scale * q, scale = largest magnitude / 127.
struct Int8Group {
  float scale;
  float scaled_sum;       // scale * sum of q: the factor of a q4 group's minimum
  int32_t minus_128_sum;  // -128 * sum of q: takes back the 128 that q8 weights carry
  int8_t q[INT8_GROUP];
};

inline void convert(const float* x, int k, Int8Group* out) {
  for (int g = 0; g < k / INT8_GROUP; g++, x += INT8_GROUP, out++) {
    I32 bits = simd::set_i32(0);  // magnitudes compared as integers: a NaN is larger than any number and is not lost
    for (int i = 0; i < INT8_GROUP; i += LANES) bits = simd::max(bits, simd::magnitude_bits(simd::load(x + i)));
    const float amax = std::bit_cast<float>(simd::largest(bits));
    // Below this the scale would be subnormal and its inverse may be infinite: such a group counts as zeros.
    const F32 inverse = simd::set(amax < 127 * 0x1p-126f ? 0 : 127 / amax);
    I32 sums = simd::set_i32(0);
    for (int i = 0; i < INT8_GROUP; i += LANES) {
      const F32 scaled =
          simd::mul(simd::load(x + i), inverse);  // NaN next to an infinity or NaN, which the scale keeps
      const I32 q = simd::to_i32(simd::min(simd::max(scaled, simd::set(-127)), simd::set(127)));
      simd::store_i8(out->q + i, q);
      sums = simd::add(sums, q);
    }
    const int32_t sum = simd::sum(sums);
    out->scale = amax / 127;
    out->scaled_sum = out->scale * static_cast<float>(sum);
    out->minus_128_sum = -128 * sum;
  }
}

inline void convert(const float* x, int k, uint16_t* out) {  // to bfloat16, where there is arithmetic for it
  for (int i = 0; i < k; i++) out[i] = float_to_bf16(x[i]);
  if (k % 2) out[k] = 0;
}

inline void convert(const float* x, int k, float* out) {
  std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
}

// Inputs from one converted row to the next. Floats start an odd number of cache lines apart: rows a multiple of 4 KB
// apart would all want the same 8 lines of the L1 cache.
template <class Input>
ptrdiff_t row_stride(int k) {
  constexpr int LINE = 64 / static_cast<int>(sizeof(Input));
  return ((k + LINE - 1) / LINE | 1) * LINE;
}
template <>
inline ptrdiff_t row_stride<Int8Group>(int k) {
  return k / INT8_GROUP;
}

// --- inner loops ----------------------------------------------------------------------------------------------------

// Register tiles: R rows x VECTORS accumulators, for int8 twice (int32 and float32), beside weights and one activation.
#if defined(SIMD_AVX512)
constexpr int FLOAT_ROWS = 12, BF16_ROWS = 12, INT8_ROWS = 6;
#elif defined(SIMD_AVX2)
constexpr int FLOAT_ROWS = 6, BF16_ROWS = 5, INT8_ROWS = 2;
#else
constexpr int FLOAT_ROWS = 2, BF16_ROWS = 2, INT8_ROWS = 2;
#endif

template <int R>
using Accumulators = F32[R][VECTORS];

// acc += w * x for one k.
template <int R>
void multiply_add(const F32 (&w)[VECTORS], const float* const (&x)[R], int i, Accumulators<R>& acc) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const F32 input = simd::set(x[r][i]);
    for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::fma(w[v], input, acc[r][v]);
  }
}

// Element (row, k) of a panel whose rows keep `pair` neighbouring k together.
inline size_t float_index(int pair, int row, int k) {
  return static_cast<size_t>((k / pair * PANEL + row) * pair + k % pair);
}

template <class T, int PAIR>
void pack_floats(const TensorView& source, bool transposed, int panel, std::byte* packed) {
  const ptrdiff_t row_step = transposed ? 1 : source.k, k_step = transposed ? source.n : 1;
  constexpr ptrdiff_t SIZE = sizeof(T);
  const std::byte* w = static_cast<const std::byte*>(source.parts[0]) + panel * PANEL * row_step * SIZE;  // not aligned
  T* out = reinterpret_cast<T*>(packed);
  for (int row = 0; row < std::min(PANEL, source.n - panel * PANEL); row++, w += row_step * SIZE)
    for (int k = 0; k < source.k; k++) std::memcpy(&out[float_index(PAIR, row, k)], w + k * k_step * SIZE, SIZE);
}

// Type::pack_group for each row and quant group of a panel.
template <class Type>
void pack_groups(const TensorView& source, int panel, std::byte* out) {
  const int groups = source.k / Type::QUANT_GROUP;
  for (int g = 0; g < groups; g++, out += Type::STEP_BYTES)
    for (int row = 0; row < std::min(PANEL, source.n - panel * PANEL); row++)
      Type::pack_group(source, static_cast<ptrdiff_t>(panel * PANEL + row) * groups + g, out, row);
}

template <class T>
const T* part(const TensorView& source, int i) {
  return static_cast<const T*>(source.parts[i]);
}

struct WeightsF32 {
  static constexpr const char* NAME = "f32";
  static constexpr int QUANT_GROUP = 1;
  static constexpr WeightPart PARTS[] = {{"weight", "F32", 1}};
  static constexpr int STEP = 1, STEP_BYTES = PANEL * 4;
  using Input = float;
  static constexpr int ROWS = FLOAT_ROWS;

  static void pack(const TensorView& source, bool transposed, int panel, std::byte* out) {
    pack_floats<uint32_t, 1>(source, transposed, panel, out);
  }
  static void unpack(const std::byte* panel, int row, int k, float* out) {
    for (int i = 0; i < k; i++) out[i] = reinterpret_cast<const float*>(panel)[float_index(1, row, i)];
  }
  template <int R>
  static void multiply(const std::byte* panel, int k, const float* const (&x)[R], Accumulators<R>& acc) {
    const float* w = reinterpret_cast<const float*>(panel);  // [k][PANEL]
    for (int i = 0; i < k; i++, w += PANEL) {
      const F32 weights[VECTORS] = {simd::load(w), simd::load(w + LANES)};
      multiply_add(weights, x, i, acc);
    }
  }
};

struct WeightsF16 {
  static constexpr const char* NAME = "f16";
  static constexpr int QUANT_GROUP = 1;
  static constexpr WeightPart PARTS[] = {{"weight", "F16", 1}};
  static constexpr int STEP = 1, STEP_BYTES = PANEL * 2;
  using Input = float;
  static constexpr int ROWS = FLOAT_ROWS;

  static void pack(const TensorView& source, bool transposed, int panel, std::byte* out) {
    pack_floats<uint16_t, 1>(source, transposed, panel, out);
  }
  static void unpack(const std::byte* panel, int row, int k, float* out) {
    for (int i = 0; i < k; i++) out[i] = f16_to_float(reinterpret_cast<const uint16_t*>(panel)[float_index(1, row, i)]);
  }
  template <int R>
  static void multiply(const std::byte* panel, int k, const float* const (&x)[R], Accumulators<R>& acc) {
    const uint16_t* w = reinterpret_cast<const uint16_t*>(panel);  // [k][PANEL]
    for (int i = 0; i < k; i++, w += PANEL) {
      const F32 weights[VECTORS] = {simd::load_f16(w), simd::load_f16(w + LANES)};
      multiply_add(weights, x, i, acc);
    }
  }
};

// One 32-bit lane holds 2 k.
struct WeightsBF16 {
  static constexpr const char* NAME = "bf16";
  static constexpr int QUANT_GROUP = 1;
  static constexpr WeightPart PARTS[] = {{"weight", "BF16", 1}};
  static constexpr int STEP = 2, STEP_BYTES = PANEL * 4;
  static constexpr int ROWS = BF16_ROWS;

  static void pack(const TensorView& source, bool transposed, int panel, std::byte* out) {
    if (transposed || source.k % 2) return pack_floats<uint16_t, 2>(source, transposed, panel, out);
    TensorView pairs = source;  // two k as one word: twice as fast
    pairs.k /= 2;
    pack_floats<uint32_t, 1>(pairs, false, panel, out);
  }
  static void unpack(const std::byte* panel, int row, int k, float* out) {
    for (int i = 0; i < k; i++)
      out[i] = bf16_to_float(reinterpret_cast<const uint16_t*>(panel)[float_index(2, row, i)]);
  }
#if defined(SIMD_BF16_DOT)
  using Input = uint16_t;
  template <int R>
  static void multiply(const std::byte* panel, int k, const uint16_t* const (&x)[R], Accumulators<R>& acc) {
    for (int i = 0; i < k; i += 2, panel += PANEL * 4) {  // [k / 2][PANEL][2]
      const I32 w[VECTORS] = {simd::load_i32(panel), simd::load_i32(panel + LANES * 4)};
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const I32 input = simd::set_bytes(x[r] + i);
        for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::dot2_bf16(acc[r][v], w[v], input);
      }
    }
  }
#else
  using Input = float;
  template <int R>
  static void multiply(const std::byte* panel, int k, const float* const (&x)[R], Accumulators<R>& acc) {
    for (int i = 0; i < k; i += 2, panel += PANEL * 4) {  // [k / 2][PANEL][2]
      const I32 pairs[VECTORS] = {simd::load_i32(panel), simd::load_i32(panel + LANES * 4)};
      const F32 even[VECTORS] = {simd::low_bf16(pairs[0]), simd::low_bf16(pairs[1])};
      multiply_add(even, x, i, acc);
      if (i + 1 == k) break;
      const F32 odd[VECTORS] = {simd::high_bf16(pairs[0]), simd::high_bf16(pairs[1])};
      multiply_add(odd, x, i + 1, acc);
    }
  }
#endif
};

// sum += 4 k of weights * activations.
template <auto DOT4, int R>
void dot4(const I32 (&w)[VECTORS], const Int8Group* const (&x)[R], int g, int chunk, I32 (&sum)[R][VECTORS]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const I32 input = simd::set_bytes(x[r][g].q + 4 * chunk);
    for (int v = 0; v < VECTORS; v++) sum[r][v] = DOT4(sum[r][v], w[v], input);
  }
}

// acc += sum * weight scale * activation scale.
template <int R>
void scale_add(const I32 (&sum)[R][VECTORS], const uint16_t* scale, const Int8Group* const (&x)[R], int g,
               Accumulators<R>& acc) {
  const F32 w[VECTORS] = {simd::load_f16(scale), simd::load_f16(scale + LANES)};
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++)
      acc[r][v] = simd::fma(simd::to_float(sum[r][v]), simd::mul(w[v], simd::set(x[r][g].scale)), acc[r][v]);
}

// A step is { [8][PANEL][4 k] as q + 128, scale [PANEL] }.
struct WeightsQ8 {
  static constexpr const char* NAME = "q8";
  static constexpr int QUANT_GROUP = 32;
  static constexpr WeightPart PARTS[] = {{"weight", "I8", 32}, {"scale", "F16", 1}};
  static constexpr int STEP = QUANT_GROUP, STEP_BYTES = PANEL * (QUANT_GROUP + 2);
  using Input = Int8Group;
  static constexpr int ROWS = INT8_ROWS;

  static void pack(const TensorView& source, bool, int panel, std::byte* out) {
    pack_groups<WeightsQ8>(source, panel, out);
  }
  static void pack_group(const TensorView& source, ptrdiff_t group, std::byte* out, int row) {
    const int8_t* from = part<int8_t>(source, 0) + group * QUANT_GROUP;
    for (int chunk = 0; chunk < 8; chunk++) {
      uint32_t word;
      std::memcpy(&word, from + 4 * chunk, 4);
      word ^= 0x80808080u;
      std::memcpy(out + (chunk * PANEL + row) * 4, &word, 4);
    }
    reinterpret_cast<uint16_t*>(out + PANEL * QUANT_GROUP)[row] = part<uint16_t>(source, 1)[group];
  }
  static void unpack(const std::byte* panel, int row, int k, float* out) {
    for (int i = 0; i < k; i++) {
      const std::byte* step = panel + i / STEP * STEP_BYTES;
      const int chunk = i % STEP / 4;
      const int q = static_cast<int>(step[(chunk * PANEL + row) * 4 + i % 4]) - 128;
      out[i] = f16_to_float(reinterpret_cast<const uint16_t*>(step + PANEL * QUANT_GROUP)[row]) * static_cast<float>(q);
    }
  }
  template <int R>
  static void multiply(const std::byte* panel, int k, const Int8Group* const (&x)[R], Accumulators<R>& acc) {
    for (int g = 0; g < k / QUANT_GROUP; g++) {
      I32 sum[R][VECTORS];
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::set_i32(x[r][g].minus_128_sum);
#pragma GCC unroll 8
      for (int chunk = 0; chunk < 8; chunk++, panel += PANEL * 4) {
        const I32 w[VECTORS] = {simd::load_i32(panel), simd::load_i32(panel + LANES * 4)};
        dot4<simd::dot4>(w, x, g, chunk, sum);
      }
      scale_add(sum, reinterpret_cast<const uint16_t*>(panel), x, g, acc);
      panel += PANEL * 2;
    }
  }
};

// 4 half bytes become the low halves of 4 bytes.
inline uint32_t spread(uint32_t halves) {
  return (halves & 0xf) | (halves & 0xf0) << 4 | (halves & 0xf00) << 8 | (halves & 0xf000) << 12;
}

// A step is { [4][PANEL][4 k in the low halves, those 16 later in the high ones], scale, min [PANEL] }.
struct WeightsQ4 {
  static constexpr const char* NAME = "q4";
  static constexpr int QUANT_GROUP = 32;
  static constexpr WeightPart PARTS[] = {{"weight", "U8", 16}, {"scale", "F16", 1}, {"min", "F16", 1}};
  static constexpr int STEP = QUANT_GROUP, STEP_BYTES = PANEL * (QUANT_GROUP / 2 + 4);
  using Input = Int8Group;
  static constexpr int ROWS = INT8_ROWS;

  static void pack(const TensorView& source, bool, int panel, std::byte* out) {
    pack_groups<WeightsQ4>(source, panel, out);
  }
  static void pack_group(const TensorView& source, ptrdiff_t group, std::byte* out, int row) {
    const uint8_t* from = part<uint8_t>(source, 0) + group * (QUANT_GROUP / 2);
    for (int chunk = 0; chunk < 4; chunk++) {
      uint16_t low, high;
      std::memcpy(&low, from + 2 * chunk, 2);
      std::memcpy(&high, from + 2 * (chunk + 4), 2);
      const uint32_t word = spread(low) | spread(high) << 4;
      std::memcpy(out + (chunk * PANEL + row) * 4, &word, 4);
    }
    uint16_t* scale = reinterpret_cast<uint16_t*>(out + PANEL * QUANT_GROUP / 2);
    scale[row] = part<uint16_t>(source, 1)[group];
    scale[PANEL + row] = part<uint16_t>(source, 2)[group];
  }
  static void unpack(const std::byte* panel, int row, int k, float* out) {
    for (int i = 0; i < k; i++) {
      const std::byte* step = panel + i / STEP * STEP_BYTES;
      const int chunk = i % STEP / 4;
      const int q = static_cast<int>(step[(chunk % 4 * PANEL + row) * 4 + i % 4]) >> (chunk / 4 * 4) & 15;
      const uint16_t* scale = reinterpret_cast<const uint16_t*>(step + PANEL * QUANT_GROUP / 2);
      out[i] = f16_to_float(scale[row]) * static_cast<float>(q) + f16_to_float(scale[PANEL + row]);
    }
  }
  template <int R>
  static void multiply(const std::byte* panel, int k, const Int8Group* const (&x)[R], Accumulators<R>& acc) {
    for (int g = 0; g < k / QUANT_GROUP; g++) {
      I32 sum[R][VECTORS];
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::set_i32(0);
#pragma GCC unroll 4
      for (int chunk = 0; chunk < 4; chunk++, panel += PANEL * 4) {
        const I32 bytes[VECTORS] = {simd::load_i32(panel), simd::load_i32(panel + LANES * 4)};
        const I32 low[VECTORS] = {simd::low_halves(bytes[0]), simd::low_halves(bytes[1])};
        dot4<simd::dot4_halves>(low, x, g, chunk, sum);
        const I32 high[VECTORS] = {simd::high_halves(bytes[0]), simd::high_halves(bytes[1])};
        dot4<simd::dot4_halves>(high, x, g, chunk + 4, sum);
      }
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::total_halves(sum[r][v]);
      const uint16_t* scale = reinterpret_cast<const uint16_t*>(panel);
      scale_add(sum, scale, x, g, acc);
      const F32 min[VECTORS] = {simd::load_f16(scale + PANEL), simd::load_f16(scale + PANEL + LANES)};
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::fma(min[v], simd::set(x[r][g].scaled_sum), acc[r][v]);
      panel += PANEL * 4;
    }
  }
};

// --- the table -------------------------------------------------------------------------------------------------------

using WeightTypes = std::tuple<WeightsF32, WeightsBF16, WeightsF16, WeightsQ8, WeightsQ4>;
