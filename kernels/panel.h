// panel.h: what all weight types of matmul share: how wide a panel is, the activations in the weights' arithmetic, and
// the register tile.
//
// A panel is PANEL = VECTORS * LANES output rows side by side in vector registers, read as one stream of bytes in the
// order in which it lies, in whole cache lines (AVX-512).
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

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
  float scaled_sum;        // scale * sum of q: the factor of a quant group's minimum
  int32_t minus_128_sum;   // -128 * sum of q: takes back the offset that weights are stored with
  int32_t minus_128_half;  // the same of the first half of q
  int8_t q[INT8_GROUP];
};

inline void convert(const float* x, int k, Int8Group* out) {
  for (int g = 0; g < k / INT8_GROUP; g++, x += INT8_GROUP, out++) {
    I32 bits = simd::set_i32(0);  // magnitudes compared as integers: a NaN is larger than any number and is not lost
    for (int i = 0; i < INT8_GROUP; i += LANES) bits = simd::max(bits, simd::magnitude_bits(simd::load(x + i)));
    const float amax = std::bit_cast<float>(simd::largest(bits));
    // Below this the scale would be subnormal and its inverse may be infinite: such a group counts as zeros.
    const F32 inverse = simd::set(amax < 127 * 0x1p-126f ? 0 : 127 / amax);
    I32 sums[2] = {simd::set_i32(0), simd::set_i32(0)};  // of each half
    for (int i = 0; i < INT8_GROUP; i += LANES) {
      const F32 scaled = simd::load(x + i) * inverse;  // NaN next to an infinity or NaN, which the scale keeps
      const I32 q = simd::to_i32(simd::min(simd::max(scaled, simd::set(-127)), simd::set(127)));
      simd::store_i8(out->q + i, q);
      I32& half = sums[i / (INT8_GROUP / 2)];
      half += q;
    }
    const int32_t sum = simd::sum(sums[0] + sums[1]);
    out->scale = amax / 127;
    out->scaled_sum = out->scale * static_cast<float>(sum);
    out->minus_128_sum = -128 * sum;
    out->minus_128_half = -128 * simd::sum(sums[0]);
  }
}

inline void convert(const float* x, int k, uint16_t* out) {  // to bfloat16, where there is arithmetic for it
  for (int i = 0; i < k; i++) out[i] = float_to_bf16(x[i]);
  if (k % 2) out[k] = 0;
}

inline void convert(const float* x, int k, float* out) {
  std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
}

// Inputs from one converted row to the next: an odd number of cache lines, or of groups. Rows a multiple of 4 KB apart
// would all want the same 8 lines of the L1 cache.
template <class Input>
ptrdiff_t row_stride(int k) {
  constexpr int LINE = 64 / static_cast<int>(sizeof(Input));
  return ((k + LINE - 1) / LINE | 1) * LINE;
}
template <>
inline ptrdiff_t row_stride<Int8Group>(int k) {
  return k / INT8_GROUP | 1;
}

// --- the register tile ----------------------------------------------------------------------------------------------

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
