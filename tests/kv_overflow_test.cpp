// What a cache's type cannot hold is NaN: an infinite key could give a weight of 0, and nobody would see it.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/kv_cpu.h"

namespace {

template <class Kv>
void expect_overflow_is_nan(float fits, float beyond) {
  constexpr int DIM = 70;  // whole registers and a rest
  for (const float sign : {1.0f, -1.0f})
    for (const int place : {0, 5, 69}) {
      std::vector<float> x(DIM, 1.0f);
      std::vector<std::byte> row(Kv::row_bytes(DIM));
      x[static_cast<size_t>(place)] = sign * fits;
      Codec<Kv>::store(x.data(), DIM, row.data());
      EXPECT_NEAR(Codec<Kv>::element(row.data(), DIM, place) / fits, sign, 0.01f) << Kv::name;
      x[static_cast<size_t>(place)] = sign * beyond;
      Codec<Kv>::store(x.data(), DIM, row.data());
      EXPECT_TRUE(std::isnan(Codec<Kv>::element(row.data(), DIM, place))) << Kv::name << " " << place;
    }
}

TEST(KvOverflow, IsNaNAndNeverInfinite) {
  expect_overflow_is_nan<KvF16>(65504, 65520);
  expect_overflow_is_nan<KvF16>(65504, 3e38f);
  expect_overflow_is_nan<KvQ8>(KvQ8::largest, 1.01f * KvQ8::largest);
  expect_overflow_is_nan<KvQ8>(KvQ8::largest, 3e38f);
}

}  // namespace
