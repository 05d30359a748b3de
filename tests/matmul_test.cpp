// matmul_test.cpp: every weight type against float64 references written from the formulas in matmul.h, over odd shapes;
// and bit equality over rows, threads and grouping.
#include "matmul.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "simd.h"

namespace {

constexpr DType TYPES[] = {DType::f32, DType::bf16, DType::f16, DType::q8, DType::q4};
bool is_float(DType t) {
  return t == DType::f32 || t == DType::bf16 || t == DType::f16;
}
bool rounds_activations_to_bf16(DType t) {
  return t == DType::bf16 && kernel_level() == std::string("avx512-bf16");
}

// A tensor as it is in the model file, [n, k].
struct Tensor {
  DType type;
  int n, k;
  std::vector<uint8_t> data;
  std::vector<uint16_t> scale, min;  // [n, k / 32]

  Tensor(DType type_, int n_, int k_) : type(type_), n(n_), k(k_) {
    const size_t bytes = type == DType::f32 ? 8 : type == DType::q8 ? 2 : type == DType::q4 ? 1 : 4;  // halves
    data.resize(elements() * bytes / 2);
    if (!is_float(type)) scale.resize(elements() / GROUP);
    if (type == DType::q4) min.resize(elements() / GROUP);
  }
  size_t elements() const { return static_cast<size_t>(n) * static_cast<size_t>(k); }
  TensorView view() const { return {type, n, k, data.data(), scale.data(), min.data()}; }
  void set_float(size_t i, float x) {
    const uint16_t half = type == DType::f16 ? float_to_f16(x) : float_to_bf16(x);
    if (type == DType::f32)
      std::memcpy(&data[i * 4], &x, 4);
    else
      std::memcpy(&data[i * 2], &half, 2);
  }
  // Element (row, column) by the formulas of TensorView.
  double at(int row, int column) const {
    const size_t i = static_cast<size_t>(row) * static_cast<size_t>(k) + static_cast<size_t>(column), g = i / GROUP;
    uint16_t half = 0;
    float x = 0;
    switch (type) {
      case DType::f32:
        std::memcpy(&x, &data[i * 4], 4);
        return double(x);
      case DType::f16:
        std::memcpy(&half, &data[i * 2], 2);
        return double(f16_to_float(half));
      case DType::bf16:
        std::memcpy(&half, &data[i * 2], 2);
        return double(bf16_to_float(half));
      case DType::q8:
        return double(f16_to_float(scale[g])) * static_cast<int8_t>(data[i]);
      case DType::q4: {
        const int q = i % 2 ? data[i / 2] >> 4 : data[i / 2] & 15;
        return double(f16_to_float(scale[g])) * q + double(f16_to_float(min[g]));
      }
    }
    return 0;
  }
};

using Random = std::mt19937;

std::vector<float> normal(size_t n, Random& random) {
  std::normal_distribution<float> distribution;
  std::vector<float> x(n);
  for (float& v : x) v = distribution(random);
  return x;
}

Tensor random_tensor(DType type, int n, int k, Random& random) {
  Tensor t(type, n, k);
  std::normal_distribution<float> distribution;
  if (is_float(type)) {
    for (size_t i = 0; i < t.elements(); i++) t.set_float(i, distribution(random));
  } else {
    for (uint8_t& byte : t.data) byte = static_cast<uint8_t>(random());
    for (uint16_t& s : t.scale) s = float_to_f16(std::fabs(distribution(random)) * 0.01f);
    for (uint16_t& m : t.min) m = float_to_f16(distribution(random) * 0.05f);
  }
  return t;
}

struct Packed {
  Buffer<std::byte> memory;
  Matrix matrix;
  Packed(const TensorView& view, bool transposed = false) : memory(packed_bytes(view.type, view.n, view.k)) {
    matrix = {view.type, view.n, view.k, memory.data()};
    for (int b = row_blocks(view.n) - 1; b >= 0; b--) pack(view, transposed, b, memory.data());
  }
};

void run(const std::vector<Product>& products, int threads = 2) {
  size_t bytes = 0;
  for (const Product& p : products) bytes += matmul_workspace_bytes(p.x_rows, p.weight->k);
  MatmulWorkspace workspace(bytes);
#pragma omp parallel num_threads(threads)
  matmul(products.data(), static_cast<int>(products.size()), workspace);
}

// What one row of activations is multiplied as: itself, rounded to bfloat16, or int8 groups of 32.
std::vector<double> as_multiplied(DType type, const float* x, int k) {
  std::vector<double> out(x, x + k);
  if (rounds_activations_to_bf16(type))
    for (int i = 0; i < k; i++) out[size_t(i)] = double(bf16_to_float(float_to_bf16(x[i])));
  if (!is_float(type)) {
    for (int g = 0; g < k; g += GROUP) {
      float amax = 0;
      for (int i = g; i < g + GROUP; i++) amax = std::max(amax, std::fabs(x[i]));
      const float inverse = amax > 0 ? 127 / amax : 0;  // the factor is part of the definition: float32
      for (int i = g; i < g + GROUP; i++) out[size_t(i)] = double(amax / 127) * std::nearbyint(x[i] * inverse);
    }
  }
  return out;
}

// Checks y against the float64 product. Each of the m steps of the sum (k, or 3 a group) rounds by at most 2^-24 of the
// magnitudes added so far; a step's own factors add a few more.
void expect_product(const Product& p, const Tensor& w, bool transposed, const std::vector<float>& before,
                    const std::string& what) {
  for (int r = 0; r < p.rows; r++) {
    const float* x = p.x + ptrdiff_t(p.gather ? p.gather[r] : r) * p.x_stride;
    const std::vector<double> input = as_multiplied(w.type, x, p.weight->k);
    for (int j = 0; j < p.weight->n; j++) {
      double sum = 0, magnitude = 0;
      for (int i = 0; i < p.weight->k; i++) {
        const double product = (transposed ? w.at(i, j) : w.at(j, i)) * input[size_t(i)];
        sum += product;
        // q4's scale * q and min cancel: the magnitudes that are added are those of both.
        magnitude += w.type == DType::q4 ? 4 * std::fabs(product) + std::fabs(input[size_t(i)]) : std::fabs(product);
      }
      const size_t at = size_t(r) * size_t(p.y_stride) + size_t(j);
      if (p.bias) sum += double(p.bias[j]);
      if (p.add) sum += double(before[at]);
      magnitude += std::fabs(sum) + 1e-30;
      const double steps = is_float(w.type) ? p.weight->k + 4 : 3 * p.weight->k / GROUP + 8;
      ASSERT_NEAR(double(p.y[at]), sum, 0x1p-24 * steps * magnitude) << what << " row " << r << " output " << j;
    }
    for (int j = p.weight->n; j < p.y_stride && r + 1 < p.rows; j++)
      ASSERT_EQ(p.y[ptrdiff_t(r) * p.y_stride + j], before[size_t(r * p.y_stride + j)]) << what << " past n";
  }
}

struct Case {
  DType type;
  int n, k, rows;
  bool bias = false, add = false, gather = false, transposed = false;
};

std::string describe(const Case& c) {
  return std::string(name(c.type)) + " n " + std::to_string(c.n) + " k " + std::to_string(c.k) + " rows " +
         std::to_string(c.rows) + (c.bias ? " bias" : "") + (c.add ? " add" : "") + (c.gather ? " gather" : "") +
         (c.transposed ? " transposed" : "");
}

void check(const Case& c) {
  Random random(static_cast<unsigned>(c.n * 7919 + c.k * 31 + c.rows));
  const Tensor w = c.transposed ? random_tensor(c.type, c.k, c.n, random) : random_tensor(c.type, c.n, c.k, random);
  TensorView view = w.view();
  view.n = c.n, view.k = c.k;
  const Packed packed(view, c.transposed);
  const int x_rows = c.gather ? c.rows + 3 : c.rows, x_stride = c.k + 5, y_stride = c.n + 3;
  std::vector<float> x = normal(size_t(x_rows - 1) * size_t(x_stride) + size_t(c.k), random);
  std::vector<float> y = normal(size_t(c.rows - 1) * size_t(y_stride) + size_t(c.n), random);
  const std::vector<float> bias = normal(size_t(c.n), random), before = y;
  std::vector<int> gather(static_cast<size_t>(c.rows));
  for (int& g : gather) g = static_cast<int>(random() % unsigned(x_rows));
  const Product p{&packed.matrix, c.bias ? bias.data() : nullptr,
                  x.data(),       x_rows,
                  x_stride,       c.gather ? gather.data() : nullptr,
                  c.rows,         y.data(),
                  y_stride,       c.add};
  run({p});
  expect_product(p, w, c.transposed, before, describe(c));
}

TEST(Matmul, EveryTypeAndShape) {
  for (DType type : TYPES)
    for (int n : {1, 15, 16, 17, 33, 40, 64})
      for (int k : {1, 3, 31, 32, 64, 96, 576})
        for (int rows : {1, 2, 3, 5, 7, 16, 33})
          if (is_float(type) || k % GROUP == 0) check({type, n, k, rows});
}

}  // namespace
