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
#include "kernels/int8.h"

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
  static constexpr int HALVES = simd::halves_that_fit(TYPE.largest());
  static constexpr bool WORTH_EXPANDING = TYPE.code_bits() < 8;  // once for many rows
  // Expanded bytes are codes + BIAS, so that most types share a loop: that of small codes is faster on some levels.
  static constexpr int OFFSET = HAS_MIN || HALVES ? TYPE.offset : 128, BIAS = OFFSET - TYPE.offset;
  using Expanded = Int8Loop<PARTS, HAS_MIN, OFFSET, HALVES>;
  using Unit = typename Expanded::Unit;
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

  template <int R>
  static void multiply(const std::byte* panel, int k, const Int8Group* const (&x)[R], Accumulators<R>& acc) {
    const Int8Group* input[R];
    for (int r = 0; r < R; r++) input[r] = x[r];
    for (; k > 0; k -= STEP, panel += STEP_BYTES) {
      alignas(64) float scales[UNITS][Expanded::SCALES][PANEL];
      expand_scales(panel, [&](int unit) { return scales[unit]; });
      for (int unit = 0; unit < UNITS; unit++) {
        const std::byte* codes = panel + CODES_AT + unit * Codes::BYTES;
        const auto word = [&](int i, int v) { return four_bytes(codes, i, v); };
        Int8Loop<PARTS, HAS_MIN, TYPE.offset, HALVES>::add_unit(word, scales[unit], input, acc);
        for (int r = 0; r < R; r++) input[r]++;
      }
    }
  }

  // k inputs as units.
  static void expand(const std::byte* packed, int k, Unit* units) {
    for (; k > 0; k -= STEP, packed += STEP_BYTES) {
      expand_scales(packed, [&](int unit) { return units[unit].scales; });
      for (int unit = 0; unit < UNITS; unit++, units++) {
        const std::byte* codes = packed + CODES_AT + unit * Codes::BYTES;
#pragma GCC unroll 8
        for (int i = 0; i < INT8_GROUP / 4; i++)
          for (int v = 0; v < VECTORS; v++)
            simd::store_i32(units->bytes[i] + v * LANES,
                            std::bit_cast<I32>(std::bit_cast<simd::U32>(four_bytes(codes, i, v)) + BIAS * 0x01010101u));
      }
    }
  }

  static void unpack(const std::byte* panel, int row, int k, float* out) {
    for (; k > 0; k -= STEP, panel += STEP_BYTES) {
      Unit units[UNITS];
      expand(panel, STEP, units);
      for (int i = 0; i < STEP; i++, out++) {
        const Unit& unit = units[i / INT8_GROUP];
        const int part = i % INT8_GROUP / TYPE.group;
        const int byte = std::to_integer<int>(unit.bytes[i % INT8_GROUP / 4][row][i % 4]);
        *out = unit.scales[part][row] * static_cast<float>(byte - OFFSET);
        if constexpr (HAS_MIN) *out += unit.scales[PARTS + part][row];
      }
    }
  }

 private:
  // The groups' scales and then their mins, as float, to scales(unit) [Expanded::SCALES][PANEL].
  template <class Scales>
  static void expand_scales(const std::byte* step, Scales scales) {
    for (int v = 0; v < VECTORS; v++) {
      const auto half = [&](int i) {
        if constexpr (TYPE.power_of_2)
          return simd::load_power_of_2(reinterpret_cast<const uint8_t*>(step) + v * LANES);
        else
          return simd::load_f16(reinterpret_cast<const uint16_t*>(step) + i * PANEL + v * LANES);
      };
      const auto put = [&](int i, F32 x) {
        const int group = i % GROUPS, place = group % PARTS + (i < GROUPS ? 0 : PARTS);
        simd::store(scales(group / PARTS)[place] + v * LANES, x);
      };
      if constexpr (!HAS_FACTORS) {
        for (int i = 0; i < SCALES; i++) put(i, half(i));
      } else {
        const F32 scale = half(0), min = HAS_MIN ? -half(1) : scale;
#pragma GCC unroll 32
        for (int i = 0; i < SCALES; i++) {
          const I32 factor = simd::bits(Factors::get(i / 4, step + FACTORS_AT, v), i % 4 * 8, 255);
          put(i, (i < GROUPS ? scale : min) * (simd::to_float(factor) - float(TYPE.factor_offset)));
        }
      }
    }
  }

  // Inputs 4 * i .. + 3 of a unit, of LANES rows: their codes without a sign.
  static I32 four_bytes(const std::byte* codes, int i, int v) {
    const I32 four = Codes::get(i, codes, v);
    if constexpr (TYPE.codes_are_places) return simd::lookup(VALUES.data(), four);
    return four;
  }

  static constexpr std::array<uint8_t, 16> VALUES = TYPE.unsigned_values();
};
