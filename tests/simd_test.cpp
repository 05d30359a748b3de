// simd_test.cpp: the vector register of this build against definitions written out in scalar arithmetic.
#include "kernels/simd.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

using simd::F32;
using simd::I32;
using simd::LANES;

namespace {

// IEEE 754 binary16 by its definition.
double half_value(uint16_t h) {
  const int sign = h >> 15 ? -1 : 1, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

// bfloat16: the upper half of a float32.
double bf16_value(uint16_t h) {
  const int sign = h >> 15 ? -1 : 1, exponent = h >> 7 & 255, fraction = h & 127;
  if (exponent == 255) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(128 + fraction, exponent - 134) : std::ldexp(fraction, -133));
}

float lane(F32 x, int i) {
  float lanes[LANES];
  simd::store(lanes, x);
  return lanes[i];
}
int32_t lane(I32 x, int i) {
  int32_t lanes[LANES];
  simd::store_i32(lanes, x);
  return lanes[i];
}

bool same(double a, double b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

TEST(Simd, EveryHalfConverts) {
  for (uint32_t h = 0; h < 65536; h++) {
    const uint16_t bits = static_cast<uint16_t>(h);
    const float f16 = f16_to_float(bits), bf16 = bf16_to_float(bits);
    ASSERT_TRUE(same(double(f16), half_value(bits))) << h;
    ASSERT_TRUE(same(double(bf16), bf16_value(bits))) << h;
    ASSERT_EQ(std::signbit(f16), bool(h >> 15)) << h;
    const uint16_t back = float_to_f16(f16), bf16_back = float_to_bf16(bf16);
    if (std::isnan(f16))
      ASSERT_TRUE(std::isnan(f16_to_float(back))) << h;
    else
      ASSERT_EQ(back, bits);
    if (std::isnan(bf16))
      ASSERT_TRUE(std::isnan(bf16_to_float(bf16_back))) << h;
    else
      ASSERT_EQ(bf16_back, bits);
  }
}

// Between two neighbours: the midpoint goes to the even one, and a little less or more to the nearer.
TEST(Simd, RoundsToTheNearestHalf) {
  for (int h = 0; h < 0x7c00; h++) {
    const double low = half_value(uint16_t(h)), high = h == 0x7bff ? 65536 : half_value(uint16_t(h + 1));
    const float middle = float((low + high) / 2);
    ASSERT_EQ(float_to_f16(middle), h % 2 ? h + 1 : h) << h;
    ASSERT_EQ(float_to_f16(std::nextafter(middle, 0.0f)), h) << h;
    ASSERT_EQ(float_to_f16(std::nextafter(middle, 1e9f)), h + 1) << h;
    ASSERT_EQ(float_to_f16(-middle), 0x8000 | (h % 2 ? h + 1 : h)) << h;
  }
  EXPECT_EQ(float_to_f16(3e38f), 0x7c00);
  EXPECT_EQ(float_to_f16(0x1p-26f), 0);
  for (int h = 0; h < 0x7f80; h++) {
    const double low = bf16_value(uint16_t(h)), high = h == 0x7f7f ? 0x1p128 : bf16_value(uint16_t(h + 1));
    const float middle = float(low / 2 + high / 2);
    ASSERT_EQ(float_to_bf16(middle), h % 2 ? h + 1 : h) << h;
    ASSERT_EQ(float_to_bf16(std::nextafter(middle, 0.0f)), h) << h;
    ASSERT_EQ(float_to_bf16(std::nextafter(middle, std::numeric_limits<float>::infinity())), h + 1) << h;
  }
}

TEST(Simd, LoadsWiden) {
  uint16_t halves[LANES];
  int8_t bytes[LANES];
  uint32_t pairs[LANES];
  for (int i = 0; i < LANES; i++) {
    halves[i] = static_cast<uint16_t>(0x3c00 + 977 * i);
    bytes[i] = static_cast<int8_t>(-128 + 17 * i);
    pairs[i] = static_cast<uint32_t>(0x3f81c2a3u + 0x10203u * static_cast<uint32_t>(i));
  }
  for (int i = 0; i < LANES; i++) {
    EXPECT_EQ(double(lane(simd::load_f16(halves), i)), half_value(halves[i]));
    EXPECT_EQ(double(lane(simd::load_bf16(halves), i)), bf16_value(halves[i]));
    EXPECT_EQ(lane(simd::load_i8(bytes), i), bytes[i]);
    EXPECT_EQ(double(lane(simd::low_bf16(simd::load_i32(pairs)), i)), bf16_value(uint16_t(pairs[i] & 0xffff)));
    EXPECT_EQ(double(lane(simd::high_bf16(simd::load_i32(pairs)), i)), bf16_value(uint16_t(pairs[i] >> 16)));
  }
  uint16_t back[LANES];
  simd::store_f16(back, simd::load_f16(halves));
  for (int i = 0; i < LANES; i++) EXPECT_EQ(back[i], halves[i]);
}

// In a buffer of exactly n floats, AddressSanitizer sees a touch past them; the guard sees a write without it.
TEST(Simd, FirstLanesTouchNothingElse) {
  for (int n = 0; n <= LANES; n++) {
    std::vector<float> exact(static_cast<size_t>(std::max(n, 1)), 7.0f), guarded(size_t(LANES) + 1, -1.0f);
    const F32 x = simd::load_first(exact.data(), n);
    for (int i = 0; i < LANES; i++) EXPECT_EQ(lane(x, i), i < n ? 7.0f : 0.0f) << n;
    simd::store_first(exact.data(), simd::set(3), n);
    simd::store_first(guarded.data(), simd::set(3), n);
    for (int i = 0; i < n; i++) EXPECT_EQ(exact[size_t(i)], 3.0f);
    for (int i = 0; i <= LANES; i++) EXPECT_EQ(guarded[size_t(i)], i < n ? 3.0f : -1.0f) << n;
  }
}

TEST(Simd, DotProductsOfBytesAreExactAtTheExtremes) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 1000; trial++) {
    uint8_t u[4 * LANES];
    int8_t s[4 * LANES];
    for (int i = 0; i < 4 * LANES; i++) {
      u[i] = trial == 0 ? 255 : static_cast<uint8_t>(random());
      s[i] = trial == 0 ? static_cast<int8_t>(i / 4 % 2 ? -128 : 127) : static_cast<int8_t>(random());
    }
    const int32_t start = static_cast<int32_t>(random() % 2000001) - 1000000;
    const I32 sum = simd::dot4(simd::set_i32(start), simd::load_i32(u), simd::load_i32(s));
    const I32 low = simd::bits(simd::load_i32(u), 0, 0x0f0f0f0f), high = simd::bits(simd::load_i32(u), 4, 0x0f0f0f0f);
    for (int i = 0; i < LANES; i++) {
      int32_t expected = start;
      for (int j = 4 * i; j < 4 * i + 4; j++) expected += u[j] * s[j];
      ASSERT_EQ(lane(sum, i), expected);
      const uint32_t word = static_cast<uint32_t>(lane(simd::load_i32(u), i));
      ASSERT_EQ(uint32_t(lane(low, i)), word & 0x0f0f0f0fu);
      ASSERT_EQ(uint32_t(lane(high, i)), word >> 4 & 0x0f0f0f0fu);
    }
  }
}

TEST(Simd, EightDotProductsOfHalfBytesFit) {
  for (int8_t extreme : {int8_t(-128), int8_t(127)}) {
    const uint8_t u[4] = {15, 15, 15, 15};
    const int8_t s[4] = {extreme, extreme, extreme, extreme};
    I32 sum = simd::set_i32(0);
    for (int i = 0; i < 8; i++) sum = simd::dot4_halves(sum, simd::set_bytes(u), simd::set_bytes(s));
    for (int i = 0; i < LANES; i++) EXPECT_EQ(lane(simd::total_halves(sum), i), 8 * 4 * 15 * extreme);
  }
}

TEST(Simd, IntegersRoundAndSaturate) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const struct {
    float x;
    int32_t whole;
    int8_t byte;
  } cases[] = {{0.5f, 0, 0},
               {1.5f, 2, 2},
               {-2.5f, -2, -2},
               {127.49f, 127, 127},
               {127.5f, 128, 127},
               {-200, -200, -128},
               {1e9f, 1000000000, 127},
               {inf, INT32_MIN, -128},
               {-inf, INT32_MIN, -128},
               {nan, INT32_MIN, -128},
               {-0.0f, 0, 0},
               {-127.5f, -128, -128}};
  for (const auto& c : cases) {
    int8_t bytes[LANES];
    const I32 whole = simd::to_i32(simd::set(c.x));
    simd::store_i8(bytes, whole);
    for (int i = 0; i < LANES; i++) EXPECT_EQ(lane(whole, i), c.whole) << c.x;
    for (int i = 0; i < LANES; i++) EXPECT_EQ(bytes[i], c.byte) << c.x;
  }
  int32_t numbers[LANES], total = 0;
  for (int i = 0; i < LANES; i++) total += numbers[i] = (i * 7919 % 31 - 15) * 1000;
  EXPECT_EQ(simd::sum(simd::load_i32(numbers)), total);
  EXPECT_EQ(simd::largest(simd::load_i32(numbers)), *std::max_element(numbers, numbers + LANES));
  EXPECT_EQ(lane(simd::magnitude_bits(simd::set(-1.5f)), LANES - 1), 0x3fc00000);
  EXPECT_EQ(lane(simd::to_float(simd::set_i32(-12345)), 0), -12345.0f);
}

TEST(Simd, SumsInAFixedTree) {
  float x[LANES];
  std::mt19937 random(2);
  for (float& v : x) v = std::ldexp(float(random() % 1000), int(random() % 20));
  std::vector<float> tree(x, x + LANES);
  while (tree.size() > 1) {
    const size_t half = tree.size() / 2;
    for (size_t i = 0; i < half; i++) tree[i] += tree[i + half];
    tree.resize(half);
  }
  EXPECT_EQ(simd::sum(simd::load(x)), tree[0]);
  EXPECT_EQ(simd::largest(simd::load(x)), *std::max_element(x, x + LANES));
}

TEST(Simd, ColumnsOfRows) {
  constexpr int WIDTH = 13, FIRST = 5;
  float rows[LANES][WIDTH];
  const float* row[LANES];
  for (int i = 0; i < LANES; i++) {
    for (int j = 0; j < WIDTH; j++) rows[i][j] = float(100 * i + j);
    row[i] = rows[i];
  }
  F32 out[8];
  simd::columns(row, FIRST, out);
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < 8; j++) EXPECT_EQ(lane(out[j], i), rows[i][FIRST + j]) << "row " << i << ", element " << j;
}

// Without a fused multiply-add (portable) each step of the polynomial rounds twice.
TEST(Simd, ExpIsWithinTwoUlp) {
  double worst = 0;
  for (double x = -87.3; x <= 88; x += 0.00037) {
    const float input = float(x);
    const double expected = std::exp(double(input)), actual = double(lane(simd::exp(simd::set(input)), LANES / 2));
    const double ulp = std::ldexp(1, std::max(std::ilogb(expected), -126) - 23);
    worst = std::max(worst, std::fabs(actual - expected) / ulp);
  }
  EXPECT_LE(worst, 2);
  EXPECT_EQ(lane(simd::exp(simd::zero()), 0), 1.0f);
  for (float x : {-88.0f, -1000.0f, -3e38f, -std::numeric_limits<float>::infinity()}) {
    EXPECT_GE(lane(simd::exp(simd::set(x)), 0), 0.0f);
    EXPECT_LE(lane(simd::exp(simd::set(x)), 0), 0x1p-125f);
  }
  EXPECT_TRUE(std::isnan(lane(simd::exp(simd::set(std::nanf(""))), 0)));
}

#if defined(SIMD_BF16_DOT)
TEST(Simd, DotProductsOfBfloat16) {
  const uint16_t a[2] = {0x3f80, 0x4040}, b[2] = {0x4000, 0xbf00};  // 1, 3 and 2, -0.5
  const F32 sum = simd::dot2_bf16(simd::set(10), simd::set_bytes(a), simd::set_bytes(b));
  for (int i = 0; i < LANES; i++) EXPECT_EQ(lane(sum, i), 10.5f);
}
#endif

}  // namespace
