// What KV q4, which the CPU alone keeps, makes of a row.
#include "kv_rows.h"

namespace {

// Half a step of the scale and float32's own roundings. The scale is a 15th of what lies between the minimum, rounded
// down by 2^-10 of itself or 2^-24 (subnormal), and the largest, and up to 2^-10 or 2^-24 larger for its own rounding.
TEST(Codec, Q4WithinHalfAStep) {
  for_rows([](const std::vector<float>& x) {
    const std::vector<float> y = round_trip<KvQ4>(x);
    for (size_t i = 0; i < x.size(); i++) {
      const size_t first = i / 32 * 32, last = std::min(x.size(), first + 32);
      const auto [least, most] = std::minmax_element(x.begin() + ptrdiff_t(first), x.begin() + ptrdiff_t(last));
      const double range = double(*most) - double(*least) + std::max(0x1p-10 * std::fabs(double(*least)), 0x1p-24);
      const double scale = std::max(range / 15 * (1 + 0x1p-10), range / 15 + 0x1p-24);
      EXPECT_LE(std::fabs(double(y[i]) - double(x[i])),
                scale / 2 * (1 + 0x1p-14) + 0x1p-23 * std::max(std::fabs(double(*least)), std::fabs(double(*most))))
          << x.size() << " " << i << " " << *least << " .. " << *most;
    }
  });
}

// A group of one number that a float16 can hold comes back as it is: zeros, and a group's padding is no zero.
TEST(Codec, Q4OfOneNumber) {
  for (const float x : {0.0f, 1.5f, -1024.0f})
    EXPECT_EQ(round_trip<KvQ4>(std::vector<float>(40, x)), std::vector<float>(40, x));
}

TEST(Codec, Q4KeepsFaultsVisible) {
  for (const float bad : {INFINITY, -INFINITY, NAN, 3e38f, -3e38f}) expect_visible<KvQ4>(bad);
  expect_overflow_is_nan<KvQ4>(65504, 65520);
  expect_overflow_is_nan<KvQ4>(65504, 3e38f);
}

TEST(Codec, Q4RowBytes) {
  expect_row_bytes<KvQ4>(64, 40);  // 5 bits a number
  expect_row_bytes<KvQ4>(80, 60);
  expect_row_bytes<KvQ4>(7, 20);
  expect_row_bytes<KvQ4>(0, 0);
}

}  // namespace
