// weights_quant.h: ggml's quantised types (ggml_blocks.h) as weight types (weight_types.h): one struct, one inner loop.
//
// A step of a panel is a block of each of its rows, at the width it has in the file:
//
//   scales, then mins   [PANEL] half floats, or bytes where a scale is a power of 2
//   factors             of the groups' scales, then of their mins, as Fours
//   codes               Fours for each INT8_GROUP inputs
//
// The scales and mins of a step become floats first. A group's codes are then multiplied as unsigned bytes with the
// activations' signed ones; the sum of the activations, known beforehand, takes back what the offset adds.
#pragma once

#include <array>

#include "kernels/ggml_blocks.h"
#include "kernels/panel.h"

// COUNT x 4 numbers of BITS bits in words [WORDS][PANEL] of 4 bytes: one number of each four in each byte. Their lowest
// 8, 4 or 2 bits fill words with those of the next four; the bits above fill further words.
template <int BITS, int COUNT>
struct Fours {
  static constexpr int LOW = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, HIGH = BITS - LOW;
  static constexpr int LOW_WORDS = (COUNT * LOW + 7) / 8, WORDS = LOW_WORDS + (COUNT * HIGH + 7) / 8;
  static constexpr int BYTES = WORDS * 4 * PANEL;

  // Four `i`, a byte each, out of the words that word(w) gets.
  template <class Word>
  static auto get(int i, Word word) {
    const auto low = simd::bits(word(i * LOW / 8), i * LOW % 8, in_each_byte(LOW));
    if constexpr (HIGH > 0)
      return low | simd::bits(word(LOW_WORDS + i * HIGH / 8), i * HIGH % 8 - LOW, in_each_byte(HIGH) << LOW);
    else
      return low;
  }
  // Of LANES rows, from lane * v on.
  static I32 get(int i, const std::byte* words, int v) {
    return get(i, [&](int w) { return simd::load_i32(words + (w * PANEL + v * LANES) * 4); });
  }

  // Four i is four(i).
  template <class Four>
  static void put(Four four, std::byte* words, int row) {
    uint32_t fours[COUNT];
    for (int i = 0; i < COUNT; i++) fours[i] = four(i);
    const auto fill = [&](int first, int bits, int from) {
      for (int w = 0; w * 8 < COUNT * bits; w++) {
        uint32_t word = 0;
        for (int i = w * 8 / bits; i < std::min(COUNT, (w + 1) * 8 / bits); i++)
          word |= (fours[i] >> from & in_each_byte(bits)) << i * bits % 8;
        std::memcpy(words + ((first + w) * PANEL + row) * 4, &word, 4);
      }
    };
    fill(0, LOW, 0);
    if constexpr (HIGH > 0) fill(LOW_WORDS, HIGH, LOW);
  }
};

template <const GgmlBlock& TYPE>
struct WeightsQuant {
  static constexpr const char* NAME = TYPE.name;
  static constexpr const char* DTYPE = "U8";
  static constexpr int BLOCK = TYPE.inputs, BLOCK_ELEMENTS = TYPE.bytes;
  using Input = Int8Group;
  static constexpr int ROWS = INT8_ROWS;

  static constexpr bool HAS_MIN = TYPE.min >= 0, HAS_FACTORS = TYPE.factor_bits() > 0;
  static constexpr int GROUPS = TYPE.inputs / TYPE.group, SCALES = GROUPS * (1 + HAS_MIN);  // and mins
  static constexpr int UNITS = TYPE.inputs / INT8_GROUP, PARTS = INT8_GROUP / TYPE.group;   // of a unit: groups
  using Factors = Fours<HAS_FACTORS ? TYPE.factor_bits() : 8, (SCALES + 3) / 4>;
  using Codes = Fours<TYPE.code_bits(), INT8_GROUP / 4>;

  static constexpr int FACTORS_AT = PANEL * (1 + HAS_MIN) * (TYPE.power_of_2 ? 1 : 2);
  static constexpr int CODES_AT = FACTORS_AT + HAS_FACTORS * Factors::BYTES;
  static constexpr int STEP = TYPE.inputs, STEP_BYTES = CODES_AT + UNITS * Codes::BYTES;

  static bool pack(const TensorView& source, bool, int panel, std::byte* out) {
    const ptrdiff_t steps = source.k / STEP;
    const auto* blocks = static_cast<const uint8_t*>(source.data) + panel * PANEL * steps * TYPE.bytes;
    bool finite = true;
    for (ptrdiff_t step = 0; step < steps; step++, out += STEP_BYTES)
      for (int row = 0; row < std::min(PANEL, source.n - panel * PANEL); row++)
        finite &= pack_block(blocks + (row * steps + step) * TYPE.bytes, out, row);
    return finite;
  }

  static bool pack_block(const uint8_t* block, std::byte* out, int row) {
    bool finite = true;
    const auto pack_half = [&](int at, int place) {
      uint16_t half;
      std::memcpy(&half, block + at, 2);
      std::memcpy(out + (place * PANEL + row) * 2, &half, 2);
      finite &= (half & 0x7c00) != 0x7c00;
    };
    if constexpr (TYPE.power_of_2) {
      out[row] = std::byte{block[TYPE.scale]};
      finite &= block[TYPE.scale] != 255;  // OCP's NaN
    } else {
      pack_half(TYPE.scale, 0);
    }
    if constexpr (HAS_MIN) pack_half(TYPE.min, 1);
    if constexpr (HAS_FACTORS)
      Factors::put([&](int i) { return four_factors(TYPE, block, 4 * i); }, out + FACTORS_AT, row);
    for (int unit = 0; unit < UNITS; unit++)
      Codes::put([&](int i) { return four_codes(TYPE, block, unit * INT8_GROUP + 4 * i); },
                 out + CODES_AT + unit * Codes::BYTES, row);
    return finite;
  }

  // The groups' scales and then their mins, as float.
  static void expand(const std::byte* step, float (&out)[SCALES][PANEL]) {
    for (int v = 0; v < VECTORS; v++) {
      const auto half = [&](int i) {
        if constexpr (TYPE.power_of_2)
          return simd::load_power_of_2(reinterpret_cast<const uint8_t*>(step) + v * LANES);
        else
          return simd::load_f16(reinterpret_cast<const uint16_t*>(step) + i * PANEL + v * LANES);
      };
      if constexpr (!HAS_FACTORS) {
        for (int i = 0; i < SCALES; i++) simd::store(out[i] + v * LANES, half(i));
      } else {
        const F32 scale = half(0), min = HAS_MIN ? -half(1) : scale;
#pragma GCC unroll 32
        for (int i = 0; i < SCALES; i++) {
          const I32 factor = simd::bits(Factors::get(i / 4, step + FACTORS_AT, v), i % 4 * 8, 255);
          const F32 centred = simd::to_float(factor) - float(TYPE.factor_offset);
          simd::store(out[i] + v * LANES, (i < GROUPS ? scale : min) * centred);
        }
      }
    }
  }

  static void unpack(const std::byte* panel, int row, int k, float* out) {
    for (; k > 0; k -= STEP, panel += STEP_BYTES) {
      alignas(64) float scales[SCALES][PANEL];
      expand(panel, scales);
      for (int i = 0; i < STEP; i++, out++) {
        const std::byte* codes = panel + CODES_AT + i / INT8_GROUP * Codes::BYTES;
        const uint32_t four =
            Codes::get(i % INT8_GROUP / 4, [&](int w) { return word_at(codes + (w * PANEL + row) * 4); });
        const int code = four >> i % 4 * 8 & 255;
        *out = scales[i / TYPE.group][row] * static_cast<float>(TYPE.unsigned_value(code) - TYPE.offset);
        if constexpr (HAS_MIN) *out += scales[GROUPS + i / TYPE.group][row];
      }
    }
  }

  template <int R>
  static void multiply(const std::byte* panel, int k, const Int8Group* const (&x)[R], Accumulators<R>& acc) {
    for (int g = 0; g < k / INT8_GROUP; panel += STEP_BYTES) {
      alignas(64) float scales[SCALES][PANEL];
      expand(panel, scales);
      const std::byte* codes = panel + CODES_AT;
      for (int group = 0; group < GROUPS; group += PARTS, g++, codes += Codes::BYTES)
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
          I32 sum[R][VECTORS];
          dot(codes, part, x, g, sum);
          scale_add(sum, scales[group + part], x, g, acc);
          if constexpr (HAS_MIN) min_add(scales[GROUPS + group + part], part, x, g, acc);
        }
    }
  }

  // sum = the products of a group's codes, without their offset, with activations.
  template <int R>
  static void dot(const std::byte* codes, int part, const Int8Group* const (&x)[R], int g, I32 (&sum)[R][VECTORS]) {
    constexpr int CHUNKS = TYPE.group / 4, IN_HALVES = std::min(CHUNKS, simd::halves_that_fit(TYPE.largest()));
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::set_i32(minus_128_sum(x[r][g], part) / 128 * TYPE.offset);
    if constexpr (IN_HALVES == 0) {
#pragma GCC unroll 8
      for (int i = 0; i < CHUNKS; i++) dot4<simd::dot4>(codes, part * CHUNKS + i, x, g, sum);
    } else {
#pragma GCC unroll 8
      for (int first = 0; first < CHUNKS; first += IN_HALVES) {
        I32 halves[R][VECTORS];
        for (int r = 0; r < R; r++)
          for (int v = 0; v < VECTORS; v++) halves[r][v] = simd::set_i32(0);
#pragma GCC unroll 8
        for (int i = first; i < first + IN_HALVES; i++) dot4<simd::dot4_halves>(codes, part * CHUNKS + i, x, g, halves);
        for (int r = 0; r < R; r++)
          for (int v = 0; v < VECTORS; v++) sum[r][v] += simd::total_halves(halves[r][v]);
      }
    }
  }

  // sum += inputs 4 * chunk .. + 3 of a unit.
  template <auto DOT4, int R>
  static void dot4(const std::byte* codes, int chunk, const Int8Group* const (&x)[R], int g, I32 (&sum)[R][VECTORS]) {
    I32 w[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
      w[v] = Codes::get(chunk, codes, v);
      if constexpr (TYPE.codes_are_places) w[v] = simd::lookup(VALUES.data(), w[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const I32 input = simd::set_bytes(x[r][g].q + 4 * chunk);
      for (int v = 0; v < VECTORS; v++) sum[r][v] = DOT4(sum[r][v], w[v], input);
    }
  }

  // acc += sum * weight scale * activation scale.
  template <int R>
  static void scale_add(const I32 (&sum)[R][VECTORS], const float* scale, const Int8Group* const (&x)[R], int g,
                        Accumulators<R>& acc) {
    const F32 w[VECTORS] = {simd::load(scale), simd::load(scale + LANES)};
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++)
        acc[r][v] = simd::fma(simd::to_float(sum[r][v]), w[v] * simd::set(x[r][g].scale), acc[r][v]);
  }

  // acc += min * sum of the activations.
  template <int R>
  static void min_add(const float* min, int part, const Int8Group* const (&x)[R], int g, Accumulators<R>& acc) {
    const F32 w[VECTORS] = {simd::load(min), simd::load(min + LANES)};
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Int8Group& input = x[r][g];
      const float sum =
          PARTS == 1 ? input.scaled_sum : input.scale * static_cast<float>(minus_128_sum(input, part) / -128);
      for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::fma(w[v], simd::set(sum), acc[r][v]);
    }
  }

  // -128 * the sum of the activations of a unit's part.
  static int32_t minus_128_sum(const Int8Group& x, int part) {
    if constexpr (PARTS == 1) return x.minus_128_sum;
    return part == 0 ? x.minus_128_half : x.minus_128_sum - x.minus_128_half;
  }

  static constexpr std::array<uint8_t, 16> VALUES = TYPE.unsigned_values();
};
