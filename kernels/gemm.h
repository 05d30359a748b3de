// gemm.h: a small product of float32, whose second factor is read where it lies and as it lies, and which joins what is
// there, c, as the caller says: c = rescale * c + a b, or c = c + scale * a b.
//
// a [M, k], b [k, N], c [M, N]. It is computed in panels of a few rows by a few registers of columns, which stay in
// registers while k runs. An element is one chain of fma in order of k: how panels are cut does not show in any bit.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "kernels/simd.h"

namespace gemm {

using simd::F32;
using simd::LANES;

// A panel: what the register file holds, with a row of b. One register wide, it is higher: fewer sums than the
// multiply-adds under way would wait for each other.
constexpr int MAX_ROWS = 6, MAX_ROWS_OF_ONE = 12, MAX_REGISTERS = LANES == 16 ? 4 : 2;
constexpr int max_rows(int registers) {
  return registers == 1 ? MAX_ROWS_OF_ONE : MAX_ROWS;
}

// A second factor: columns(p, j) is the j-th register of row p. This one is float32 rows, `stride` apart.
struct PlainColumns {
  const float* b;
  size_t stride;
  F32 operator()(size_t p, int j) const { return simd::load(b + p * stride + j * LANES); }
};

// How sums join c. start: what a row's sums begin with. column: what belongs to register j of columns; with it, finish
// makes the new c of a sum. Here c = rescale * c + added + a b; without a rescale [rows] c is not read.
struct Rescaled {
  const float* rescale = nullptr;
  const float* added = nullptr;  // [rows], or none
  F32 start(size_t row, const float* c) const {
    const F32 x = rescale ? simd::load(c) * rescale[row] : simd::zero();
    return added ? x + added[row] : x;
  }
  struct Column {};
  Column column(int) const { return {}; }
  F32 finish(F32 sum, size_t, Column, const float*) const { return sum; }
};

// One panel: M rows, from row `row` on, N registers from register `first` of b on.
template <class Columns, class Join, int M, int N>
void panel(const float* a, size_t a_stride, const Columns& b, size_t row, int first, int k, const Join& join, float* c,
           size_t c_stride) {
  F32 sum[M][N];
#pragma GCC unroll 16
  for (size_t i = 0; i < M; i++) {
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) sum[i][j] = join.start(row + i, c + i * c_stride + j * LANES);
  }
  for (size_t p = 0; p < static_cast<size_t>(k); p++) {
    F32 column[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) column[j] = simd::in_register(b(p, first + j));
#pragma GCC unroll 16
    for (size_t i = 0; i < M; i++) {
      const F32 x = simd::set(a[i * a_stride + p]);
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) sum[i][j] = simd::fma(x, column[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < N; j++) {
    const auto column = join.column(first + j);
#pragma GCC unroll 16
    for (size_t i = 0; i < M; i++) {
      float* to = c + i * c_stride + j * LANES;
      simd::store(to, join.finish(sum[i][j], row + i, column, to));
    }
  }
}

template <class Columns, class Join, int REGISTERS, int... I>
constexpr auto panels(std::integer_sequence<int, I...>) {
  return std::array<decltype(&panel<Columns, Join, 1, 1>), MAX_ROWS_OF_ONE>{&panel<Columns, Join, I + 1, REGISTERS>...};
}
template <class Columns, class Join, int... I>
constexpr auto every_panel(std::integer_sequence<int, I...>) {
  return std::array{panels<Columns, Join, I + 1>(std::make_integer_sequence<int, max_rows(I + 1)>())...};
}

// Any number of rows. A panel that ends with row r needs registers(r) of columns and k(r) terms of the sum.
template <class Columns, class Join, class Registers, class Depth>
void product(const float* a, size_t a_stride, int rows, const Columns& b, Registers registers, Depth k,
             const Join& join, float* c, size_t c_stride) {
  static constexpr auto PANELS = every_panel<Columns, Join>(std::make_integer_sequence<int, MAX_REGISTERS>());
  for (int j = 0; j < registers(rows - 1); j += MAX_REGISTERS) {
    const int most = max_rows(registers(rows - 1) - j), n_panels = (rows + most - 1) / most;
    for (int i = 0; i < n_panels; i++) {  // of nearly equal heights
      const int first = rows * i / n_panels, end = rows * (i + 1) / n_panels;
      const int n = std::min(MAX_REGISTERS, registers(end - 1) - j);
      if (n <= 0) continue;
      const size_t row = static_cast<size_t>(first);
      const auto compute = PANELS[static_cast<size_t>(n - 1)][static_cast<size_t>(end - first - 1)];
      compute(a + row * a_stride, a_stride, b, row, j, k(end - 1), join, c + row * c_stride + j * LANES, c_stride);
    }
  }
}

}  // namespace gemm
