// ggml_types.h: what the blocks of ggml's quantised types are worth, written from ggml's dequantize_row_* functions
// (ggml-quants.c): the witness of kernels/ggml_blocks.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/simd.h"

struct GgmlType {
  std::string name;
  int inputs, bytes;
  std::vector<int> halves;  // where its half floats are
};

inline const std::vector<GgmlType> GGML_TYPES = {
    {"q8_0", 32, 34, {0}},      {"q4_0", 32, 18, {0}},       {"q4_1", 32, 20, {0, 2}},  {"q5_0", 32, 22, {0}},
    {"q5_1", 32, 24, {0, 2}},   {"q2_k", 256, 84, {80, 82}}, {"q3_k", 256, 110, {108}}, {"q4_k", 256, 144, {0, 2}},
    {"q5_k", 256, 176, {0, 2}}, {"q6_k", 256, 210, {208}},   {"iq4_nl", 32, 18, {0}},   {"iq4_xs", 256, 136, {0}},
    {"mxfp4", 32, 17, {}}};

inline const GgmlType* ggml_type(const std::string& name) {
  for (const GgmlType& type : GGML_TYPES)
    if (type.name == name) return &type;
  return nullptr;
}

// Every weight type that there is.
inline const std::vector<std::string> TYPES = [] {
  std::vector<std::string> all = {"f32", "bf16", "f16"};
  for (const GgmlType& type : GGML_TYPES) all.push_back(type.name);
  return all;
}();

struct GgmlWeight {
  double value, min = 0;  // the min is in the value
};

// Weight i of a block.
inline GgmlWeight ggml_weight(const std::string& type, const uint8_t* b, int i) {
  const auto half = [&](int at) {
    uint16_t bits;
    std::memcpy(&bits, b + at, 2);
    return double(f16_to_float(bits));
  };
  const auto nibble = [](int byte, bool high) { return high ? byte >> 4 : byte & 15; };
  const auto bit = [&](int at, int n) { return b[at + n / 8] >> n % 8 & 1; };
  const auto with_min = [](double value, double min) { return GgmlWeight{value + min, min}; };
  constexpr int IQ4[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  constexpr double FP4[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};

  // Blocks of 32: the second 16 are in the high halves.
  const auto of_32 = [&](int at) { return nibble(b[at + i % 16], i >= 16); };
  if (type == "q8_0") return {half(0) * static_cast<int8_t>(b[2 + i])};
  if (type == "q4_0") return {half(0) * (of_32(2) - 8)};
  if (type == "q4_1") return with_min(half(0) * of_32(4), half(2));
  if (type == "q5_0") return {half(0) * (of_32(6) + 16 * bit(2, i) - 16)};
  if (type == "q5_1") return with_min(half(0) * (of_32(8) + 16 * bit(4, i)), half(2));
  if (type == "iq4_nl") return {half(0) * IQ4[of_32(2)]};
  if (type == "mxfp4") return {std::ldexp(FP4[of_32(1)], b[0] - 127)};

  // Blocks of 256.
  const int i128 = i / 128, i64 = i / 64, i32 = i / 32, i16 = i / 16;
  if (type == "q2_k") {
    const int q = b[16 + 32 * i128 + i % 32] >> i32 % 4 * 2 & 3;
    return with_min(half(80) * (b[i16] & 15) * q, -half(82) * (b[i16] >> 4));
  }
  if (type == "q3_k") {
    const uint8_t* s = b + 96;
    const int scale = nibble(s[i16 % 8], i16 >= 8) | (s[8 + i16 % 4] >> i16 / 4 * 2 & 3) << 4;
    const int q = (b[32 + 32 * i128 + i % 32] >> i32 % 4 * 2 & 3) - (b[i % 32] >> i32 & 1 ? 0 : 4);
    return {half(108) * (scale - 32) * q};
  }
  if (type == "q4_k" || type == "q5_k") {  // get_scale_min_k4
    const uint8_t* s = b + 4;
    const int j = i32;
    const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    const int min = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
    const bool five = type == "q5_k";
    const int q =
        nibble(b[(five ? 48 : 16) + 32 * i64 + i % 32], i32 % 2) + (five ? 16 * (b[16 + i % 32] >> j & 1) : 0);
    return with_min(half(0) * scale * q, -half(2) * min);
  }
  if (type == "q6_k") {
    const int q = nibble(b[64 * i128 + i % 64], i64 % 2) | (b[128 + 32 * i128 + i % 32] >> i32 % 4 * 2 & 3) << 4;
    return {half(208) * static_cast<int8_t>(b[192 + i16]) * (q - 32)};
  }
  // iq4_xs
  const int scale = nibble(b[4 + i32 / 2], i32 % 2) | ((b[2] | b[3] << 8) >> 2 * i32 & 3) << 4;
  return {half(0) * (scale - 32) * IQ4[nibble(b[8 + 16 * i32 + i % 16], i % 32 >= 16)]};
}

// A block of random bits whose half floats are half(), for each place.
template <class Random, class Half>
std::vector<uint8_t> random_ggml_block(const GgmlType& type, Random& random, Half half) {
  std::vector<uint8_t> block(static_cast<size_t>(type.bytes));
  for (uint8_t& byte : block) byte = static_cast<uint8_t>(random());
  if (type.name == "mxfp4") block[0] = static_cast<uint8_t>(118 + random() % 8);
  for (size_t i = 0; i < type.halves.size(); i++) {
    const uint16_t bits = half(i);
    std::memcpy(block.data() + type.halves[i], &bits, 2);
  }
  return block;
}
