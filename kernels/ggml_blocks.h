// ggml_blocks.h: the quantised types of GGUF files as data: where in a block of bytes its numbers are. The definitions
// are ggml's (ggml-common.h, ggml-quants.c).
//
// A block holds `inputs` weights of a row, a code of a few bits each. Those of a quant group share a scale and, in some
// types, a min:
//
//   weight = scale * (code - offset) + min, or scale * values[code]
//
// scale and min are half floats: of the group, or of the block, times a factor of the group (such a min is subtracted).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

// Numbers of `bits` bits, from byte `at` on: `run` bytes hold one each in their lowest bits, then one each in the bits
// above, and so on; then comes the next run. With a run of 1, neighbours share a byte.
struct BitField {
  int at = 0, bits = 0, run = 1;
};

struct GgmlBlock {
  const char* name;
  int bytes, inputs, group;
  BitField low, high = {};        // the lowest bits of a code, and those above them
  int offset = 0;                 // 128: codes are signed bytes in the block
  bool codes_are_places = false;  // in values: with offset added, none of them is negative
  std::array<int8_t, 16> values = {};
  int scale = 0, min = -1;                     // where the half floats are; -1: there is none
  bool power_of_2 = false;                     // instead of a half float the scale is a byte e: 2^(e - 128)
  BitField low_factor = {}, high_factor = {};  // of the scale of each group, then of the min of each group
  int factor_offset = 0;
  int factors_of_6_bits = 0;  // if not 0: where q4_k's and q5_k's factors are, in an order of their own

  constexpr int code_bits() const { return low.bits + high.bits; }
  constexpr int factor_bits() const { return factors_of_6_bits ? 6 : low_factor.bits + high_factor.bits; }

  // Values without a sign: offset more than they are.
  constexpr int unsigned_value(int code) const {
    return codes_are_places ? values[static_cast<size_t>(code)] + offset : code;
  }
  constexpr int largest() const {
    int largest = 0;
    for (int code = 0; code < 1 << code_bits(); code++) largest = std::max(largest, unsigned_value(code));
    return largest;
  }
  constexpr std::array<uint8_t, 16> unsigned_values() const {
    std::array<uint8_t, 16> all{};
    for (size_t code = 0; code < 16; code++) all[code] = static_cast<uint8_t>(values[code] + offset);
    return all;
  }
};

inline constexpr std::array<int8_t, 16> IQ4_VALUES = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                      1,    13,   25,  38,  53,  69,  89,  113};
inline constexpr std::array<int8_t, 16> FP4_VALUES = {0, 1,  2,  3,  4,  6,  8,  12,
                                                      0, -1, -2, -3, -4, -6, -8, -12};  // twice e2m1

inline constexpr GgmlBlock Q8_0 = {
    .name = "q8_0", .bytes = 34, .inputs = 32, .group = 32, .low = {2, 8, 32}, .offset = 128};
inline constexpr GgmlBlock Q4_0 = {
    .name = "q4_0", .bytes = 18, .inputs = 32, .group = 32, .low = {2, 4, 16}, .offset = 8};
inline constexpr GgmlBlock Q4_1 = {.name = "q4_1", .bytes = 20, .inputs = 32, .group = 32, .low = {4, 4, 16}, .min = 2};
inline constexpr GgmlBlock Q5_0 = {
    .name = "q5_0", .bytes = 22, .inputs = 32, .group = 32, .low = {6, 4, 16}, .high = {2, 1, 1}, .offset = 16};
inline constexpr GgmlBlock Q5_1 = {
    .name = "q5_1", .bytes = 24, .inputs = 32, .group = 32, .low = {8, 4, 16}, .high = {4, 1, 1}, .min = 2};
inline constexpr GgmlBlock IQ4_NL = {.name = "iq4_nl",
                                     .bytes = 18,
                                     .inputs = 32,
                                     .group = 32,
                                     .low = {2, 4, 16},
                                     .offset = 128,
                                     .codes_are_places = true,
                                     .values = IQ4_VALUES};
inline constexpr GgmlBlock MXFP4 = {.name = "mxfp4",
                                    .bytes = 17,
                                    .inputs = 32,
                                    .group = 32,
                                    .low = {1, 4, 16},
                                    .offset = 16,
                                    .codes_are_places = true,
                                    .values = FP4_VALUES,
                                    .power_of_2 = true};
inline constexpr GgmlBlock Q2_K = {.name = "q2_k",
                                   .bytes = 84,
                                   .inputs = 256,
                                   .group = 16,
                                   .low = {16, 2, 32},
                                   .scale = 80,
                                   .min = 82,
                                   .low_factor = {0, 4, 16}};
inline constexpr GgmlBlock Q3_K = {.name = "q3_k",
                                   .bytes = 110,
                                   .inputs = 256,
                                   .group = 16,
                                   .low = {32, 2, 32},
                                   .high = {0, 1, 32},
                                   .offset = 4,
                                   .scale = 108,
                                   .low_factor = {96, 4, 8},
                                   .high_factor = {104, 2, 4},
                                   .factor_offset = 32};
inline constexpr GgmlBlock Q4_K = {
    .name = "q4_k", .bytes = 144, .inputs = 256, .group = 32, .low = {16, 4, 32}, .min = 2, .factors_of_6_bits = 4};
inline constexpr GgmlBlock Q5_K = {.name = "q5_k",
                                   .bytes = 176,
                                   .inputs = 256,
                                   .group = 32,
                                   .low = {48, 4, 32},
                                   .high = {16, 1, 32},
                                   .min = 2,
                                   .factors_of_6_bits = 4};
inline constexpr GgmlBlock Q6_K = {.name = "q6_k",
                                   .bytes = 210,
                                   .inputs = 256,
                                   .group = 16,
                                   .low = {0, 4, 64},
                                   .high = {128, 2, 32},
                                   .offset = 32,
                                   .scale = 208,
                                   .low_factor = {192, 8, 16},
                                   .factor_offset = 128};
inline constexpr GgmlBlock IQ4_XS = {.name = "iq4_xs",
                                     .bytes = 136,
                                     .inputs = 256,
                                     .group = 32,
                                     .low = {8, 4, 16},
                                     .offset = 128,
                                     .codes_are_places = true,
                                     .values = IQ4_VALUES,
                                     .low_factor = {4, 4, 1},
                                     .high_factor = {2, 2, 1},
                                     .factor_offset = 32};

// Each byte of a word: its lowest `bits` bits.
constexpr uint32_t in_each_byte(int bits) {
  return 0x01010101u * ((1u << bits) - 1);
}

template <class Byte>
constexpr uint32_t word_at(const Byte* p) {  // wherever it is; constexpr, as all that follows: GPUs run it, too
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

// Numbers first .. first + 3 of a field, a byte each; first is a multiple of 4.
constexpr uint32_t four_of(const uint8_t* block, BitField field, int first) {
  if (field.bits == 0) return 0;
  const int per_byte = 8 / field.bits;
  if (field.run >= 4) {  // in four neighbouring bytes, at the same place in each
    const uint32_t word = word_at(block + field.at + first / (field.run * per_byte) * field.run + first % field.run);
    return word >> (first / field.run % per_byte * field.bits) & in_each_byte(field.bits);
  }
  uint32_t four = 0;
  for (int i = 0; i < 4; i++) {
    const int byte = block[field.at + (first + i) / per_byte], shift = (first + i) % per_byte * field.bits;
    four |= static_cast<uint32_t>(byte >> shift & ((1 << field.bits) - 1)) << 8 * i;
  }
  return four;
}

// Signed bytes become the codes 0 .. 255.
constexpr uint32_t sign_bits(int bits) {
  return bits == 8 ? 0x80808080u : 0;
}

// The codes of inputs first .. first + 3, a byte each.
constexpr uint32_t four_codes(const GgmlBlock& type, const uint8_t* block, int first) {
  return (four_of(block, type.low, first) | four_of(block, type.high, first) << type.low.bits) ^
         sign_bits(type.code_bits());
}

// The factors first .. first + 3 of the groups' scales and then of their mins.
constexpr uint32_t four_factors(const GgmlBlock& type, const uint8_t* block, int first) {
  if (type.factors_of_6_bits) {  // of groups 0 to 3 in 6 bits of 4 bytes, whose upper bits are those of groups 4 to 7
    const uint8_t* at = block + type.factors_of_6_bits;
    const int min = first / 8;
    const uint32_t word = word_at(at + 4 * min);
    if (first % 8 == 0) return word & in_each_byte(6);
    return (word_at(at + 8) >> 4 * min & in_each_byte(4)) | (word >> 2 & in_each_byte(2) << 4);
  }
  return (four_of(block, type.low_factor, first) | four_of(block, type.high_factor, first) << type.low_factor.bits) ^
         sign_bits(type.factor_bits());
}
