// int8.h: the inner loop of all quantised weights: bytes without a sign times int8 activations.
//
// The sum of the activations, known beforehand, takes back what the bytes' offset adds.
#pragma once

#include "kernels/panel.h"

// INT8_GROUP inputs of a panel have PARTS parts, with a scale (and a min) each: weight = scale * (byte - OFFSET) + min.
// HALVES: how many dot4_halves of such bytes in a row are exact; 0: dot4 it is.
template <int PARTS, bool HAS_MIN, int OFFSET, int HALVES>
struct Int8Loop {
  static constexpr int SCALES = PARTS * (1 + HAS_MIN), CHUNKS = INT8_GROUP / 4 / PARTS;

  // INT8_GROUP inputs, expanded.
  struct alignas(64) Unit {
    std::byte bytes[INT8_GROUP / 4][PANEL][4];
    float scales[SCALES][PANEL];  // of each part, then the mins of each
  };

  // acc[r][v] += the products of row x[r], units of them, with vector v of the panel's outputs.
  template <int R>
  static void multiply(const Unit* unit, int units, const Int8Group* const* x, Accumulators<R>& acc) {
    const Int8Group* input[R];
    for (int r = 0; r < R; r++) input[r] = x[r];
    for (const Unit* end = unit + units; unit < end; unit++) {
      add_unit([&](int i, int v) { return simd::load_i32(unit->bytes[i] + v * LANES); }, unit->scales, input, acc);
      for (int r = 0; r < R; r++) input[r]++;
    }
  }

  // The same of one unit, whose bytes 4 * i .. + 3 are word(i, v).
  template <int R, class Word>
  static void add_unit(Word word, const float (*scales)[PANEL], const Int8Group* const (&x)[R], Accumulators<R>& acc) {
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
      I32 sum[R][VECTORS];
      dot(word, part, x, sum);
      scale_add(sum, scales[part], x, acc);
      if constexpr (HAS_MIN) min_add(scales[PARTS + part], part, x, acc);
    }
  }

 private:
  // sum = the products of a part's bytes, without their offset, with activations.
  template <int R, class Word>
  static void dot(Word word, int part, const Int8Group* const (&x)[R], I32 (&sum)[R][VECTORS]) {
    const int first = part * CHUNKS;
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::set_i32(minus_128_sum(*x[r], part) / 128 * OFFSET);
    if constexpr (HALVES == 0) {
#pragma GCC unroll 8
      for (int i = 0; i < CHUNKS; i++) dot4<simd::dot4>(word, first + i, x, sum);
    } else {
      constexpr int IN_HALVES = std::min(CHUNKS, HALVES);
#pragma GCC unroll 8
      for (int begin = 0; begin < CHUNKS; begin += IN_HALVES) {
        I32 halves[R][VECTORS];
        for (int r = 0; r < R; r++)
          for (int v = 0; v < VECTORS; v++) halves[r][v] = simd::set_i32(0);
#pragma GCC unroll 8
        for (int i = begin; i < begin + IN_HALVES; i++) dot4<simd::dot4_halves>(word, first + i, x, halves);
        for (int r = 0; r < R; r++)
          for (int v = 0; v < VECTORS; v++) sum[r][v] += simd::total_halves(halves[r][v]);
      }
    }
  }

  // sum += inputs 4 * i .. + 3.
  template <auto DOT4, int R, class Word>
  static void dot4(Word word, int i, const Int8Group* const (&x)[R], I32 (&sum)[R][VECTORS]) {
    const I32 w[VECTORS] = {word(i, 0), word(i, 1)};
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const I32 input = simd::set_bytes(x[r]->q + 4 * i);
      for (int v = 0; v < VECTORS; v++) sum[r][v] = DOT4(sum[r][v], w[v], input);
    }
  }

  // acc += sum * weight scale * activation scale.
  template <int R>
  static void scale_add(const I32 (&sum)[R][VECTORS], const float* scale, const Int8Group* const (&x)[R],
                        Accumulators<R>& acc) {
    const F32 w[VECTORS] = {simd::load(scale), simd::load(scale + LANES)};
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++)
        acc[r][v] = simd::fma(simd::to_float(sum[r][v]), w[v] * simd::set(x[r]->scale), acc[r][v]);
  }

  // acc += min * sum of the activations.
  template <int R>
  static void min_add(const float* min, int part, const Int8Group* const (&x)[R], Accumulators<R>& acc) {
    const F32 w[VECTORS] = {simd::load(min), simd::load(min + LANES)};
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float sum =
          PARTS == 1 ? x[r]->scaled_sum : x[r]->scale * static_cast<float>(minus_128_sum(*x[r], part) / -128);
      for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::fma(w[v], simd::set(sum), acc[r][v]);
    }
  }

  // -128 * the sum of the activations of a part.
  static int32_t minus_128_sum(const Int8Group& x, int part) {
    if constexpr (PARTS == 1) return x.minus_128_sum;
    return part == 0 ? x.minus_128_half : x.minus_128_sum - x.minus_128_half;
  }
};
