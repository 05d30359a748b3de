// What "one arithmetic" rests on, asked of the tensor cores themselves: an element of an mma's result depends on its
// own row of A and column of B alone, bit for bit, wherever they lie among the 16 rows and 8 columns, and whatever the
// others hold, infinities and NaNs among it.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "device_memory.h"
#include "mma_rows.h"

namespace {

constexpr int TRIALS = 20, MOVES = 400, M = 16, N = 8, K = 16;

class Mma : public testing::TestWithParam<const char*> {
 protected:
  const bool bf16 = GetParam() == std::string("bf16");
  const int mantissa = bf16 ? 7 : 10, bias = bf16 ? 127 : 15;
  std::mt19937 random{1};

  int below(int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); }

  // With an exponent from -8 to 7.
  uint16_t any_number() {
    const unsigned sign_and_mantissa = static_cast<unsigned>(random()) & (0x8000u | ((1u << mantissa) - 1));
    return static_cast<uint16_t>(sign_and_mantissa | static_cast<unsigned>(bias - 8 + below(16)) << mantissa);
  }
  double value(uint16_t x) const {
    const int exponent = (x & 0x7fff) >> mantissa, digits = x & ((1 << mantissa) - 1);
    return std::ldexp((1 << mantissa) + digits, exponent - bias - mantissa) * (x & 0x8000 ? -1 : 1);
  }

  MmaTile numbers() {
    MmaTile t;
    for (auto& row : t.a)
      for (uint16_t& x : row) x = any_number();
    for (auto& column : t.b)
      for (uint16_t& x : column) x = any_number();
    for (auto& row : t.d)
      for (float& x : row) x = static_cast<float>(value(any_number()));
    return t;
  }
  MmaTile any_bits() {
    std::array<uint32_t, sizeof(MmaTile) / 4> bits;
    for (uint32_t& x : bits) x = static_cast<uint32_t>(random());
    return std::bit_cast<MmaTile>(bits);
  }

  std::vector<MmaTile> results(const std::vector<MmaTile>& tiles) const {
    Buffer<MmaTile> memory = device_copy(tiles);
    multiply_tiles(bf16, memory.data(), static_cast<int>(tiles.size()));
    return host_copy(memory);
  }
};

TEST_P(Mma, MultipliesAndAdds) {
  const MmaTile x = numbers(), y = results({x})[0];
  for (int r = 0; r < M; r++)
    for (int c = 0; c < N; c++) {
      double sum = x.d[r][c], size = std::abs(sum);
      for (int k = 0; k < K; k++) {
        const double term = value(x.a[r][k]) * value(x.b[c][k]);
        sum += term, size += std::abs(term);
      }
      EXPECT_NEAR(y.d[r][c], sum, size * 0x1p-20) << "row " << r << " column " << c;
    }
}

TEST_P(Mma, AnElementDependsOnItsRowAndColumnAlone) {
  struct Move {
    int row, to_row, column, to_column;
  };
  for (int trial = 0; trial < TRIALS; trial++) {
    const MmaTile first = numbers();
    std::vector<MmaTile> tiles{first};
    std::vector<Move> moves;
    for (int i = 0; i < MOVES; i++) {
      const Move m{below(M), below(M), below(N), below(N)};
      MmaTile t = any_bits();
      std::copy_n(first.a[m.row], K, t.a[m.to_row]);
      std::copy_n(first.b[m.column], K, t.b[m.to_column]);
      t.d[m.to_row][m.to_column] = first.d[m.row][m.column];
      tiles.push_back(t), moves.push_back(m);
    }
    const std::vector<MmaTile> y = results(tiles);
    for (size_t i = 0; i < moves.size(); i++) {
      const Move& m = moves[i];
      ASSERT_EQ(std::bit_cast<uint32_t>(y[i + 1].d[m.to_row][m.to_column]),
                std::bit_cast<uint32_t>(y[0].d[m.row][m.column]))
          << "row " << m.row << " at " << m.to_row << ", column " << m.column << " at " << m.to_column;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Mma, testing::Values("f16", "bf16"), [](const auto& type) { return type.param; });

}  // namespace
