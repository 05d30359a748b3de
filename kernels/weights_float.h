// weights_float.h: weights that are plain floats, f32, f16 and bf16, as weight types (weight_types.h).
#pragma once

#include "kernels/panel.h"

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
bool pack_floats(const TensorView& source, bool transposed, int panel, std::byte* packed) {
  const ptrdiff_t row_step = transposed ? 1 : source.k, k_step = transposed ? source.n : 1;
  constexpr ptrdiff_t SIZE = sizeof(T);
  const std::byte* w = static_cast<const std::byte*>(source.data) + panel * PANEL * row_step * SIZE;  // not aligned
  T* out = reinterpret_cast<T*>(packed);
  for (int row = 0; row < std::min(PANEL, source.n - panel * PANEL); row++, w += row_step * SIZE)
    for (int k = 0; k < source.k; k++) std::memcpy(&out[float_index(PAIR, row, k)], w + k * k_step * SIZE, SIZE);
  return true;  // a float may be anything
}

// [k][PANEL] of T, multiplied as float32.
template <class T>
struct WeightsInOrder {
  static constexpr int BLOCK = 1, BLOCK_ELEMENTS = 1;
  static constexpr int STEP = 1, STEP_BYTES = PANEL * sizeof(T);
  using Input = float;
  static constexpr int ROWS = FLOAT_ROWS;
  static constexpr bool WORTH_EXPANDING = false;

  static bool pack(const TensorView& source, bool transposed, int panel, std::byte* out) {
    return pack_floats<T, 1>(source, transposed, panel, out);
  }
  static void unpack(const std::byte* panel, int row, int k, float* out) {
    for (int i = 0; i < k; i++) out[i] = widened(reinterpret_cast<const T*>(panel)[float_index(1, row, i)]);
  }
  template <int R>
  static void multiply(const std::byte* panel, int k, const float* const (&x)[R], Accumulators<R>& acc) {
    const T* w = reinterpret_cast<const T*>(panel);
    for (int i = 0; i < k; i++, w += PANEL) {
      const F32 weights[VECTORS] = {load(w), load(w + LANES)};
      multiply_add(weights, x, i, acc);
    }
  }

 private:
  static float widened(float x) { return x; }
  static float widened(uint16_t half) { return f16_to_float(half); }
  static F32 load(const float* w) { return simd::load(w); }
  static F32 load(const uint16_t* w) { return simd::load_f16(w); }
};

struct WeightsF32 : WeightsInOrder<float> {
  static constexpr const char* NAME = "f32";
  static constexpr const char* DTYPE = "F32";
};

struct WeightsF16 : WeightsInOrder<uint16_t> {
  static constexpr const char* NAME = "f16";
  static constexpr const char* DTYPE = "F16";
};

// One 32-bit lane holds 2 k.
struct WeightsBF16 {
  static constexpr const char* NAME = "bf16";
  static constexpr const char* DTYPE = "BF16";
  static constexpr int BLOCK = 1, BLOCK_ELEMENTS = 1;
  static constexpr int STEP = 2, STEP_BYTES = PANEL * 4;
  static constexpr int ROWS = BF16_ROWS;
  static constexpr bool WORTH_EXPANDING = false;

  static bool pack(const TensorView& source, bool transposed, int panel, std::byte* out) {
    if (transposed || source.k % 2) return pack_floats<uint16_t, 2>(source, transposed, panel, out);
    TensorView pairs = source;  // two k as one word: twice as fast
    pairs.k /= 2;
    return pack_floats<uint32_t, 1>(pairs, false, panel, out);
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
