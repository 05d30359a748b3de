// matmul_test.cpp: every weight type against float64 references written from the formulas in matmul.h, over odd shapes;
// and bit equality over rows, threads and grouping. What a type means is written a second time in ggml_types.h.
#include "kernels/matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "device_memory.h"
#include "ggml_types.h"
#include "kernels/layers.h"
#include "kernels/simd.h"
#include "kernels/threads.h"

namespace {

constexpr int GROUP = 32;  // activations that share a scale

WeightType weight_type(const std::string& type) {
  return find_weight_type(type).value();
}
bool is_float(const std::string& type) {
  return ggml_type(type) == nullptr;
}
bool rounds_activations_to_bf16(const std::string& type) {
  return type == "bf16" && (kernel_level() == std::string("avx512-bf16") || device_name() == std::string("cuda"));
}
// The next number of inputs from k on that are whole blocks.
int whole(const std::string& type, int k) {
  const int block = is_float(type) ? 1 : ggml_type(type)->inputs;
  return (k + block - 1) / block * block;
}

// A tensor as it is in the model file, [n, k].
struct Tensor {
  std::string type;
  int n, k;
  const GgmlType* blocks;
  std::vector<uint8_t> data;

  Tensor(const std::string& type_, int n_, int k_) : type(type_), n(n_), k(k_), blocks(ggml_type(type)) {
    if (!blocks) data.resize(elements() * (type == "f32" ? 4 : 2));
  }
  size_t elements() const { return static_cast<size_t>(n) * static_cast<size_t>(k); }
  TensorView view() const { return {weight_type(type), n, k, data.data()}; }
  void set_float(size_t i, float x) {
    const uint16_t half = type == "f16" ? float_to_f16(x) : float_to_bf16(x);
    if (type == "f32")
      std::memcpy(&data[i * 4], &x, 4);
    else
      std::memcpy(&data[i * 2], &half, 2);
  }
  // Element (row, column), exactly.
  GgmlWeight weight(int row, int column) const {
    const size_t i = static_cast<size_t>(row) * static_cast<size_t>(k) + static_cast<size_t>(column);
    if (blocks) {
      const size_t inputs = static_cast<size_t>(blocks->inputs);
      return ggml_weight(type, &data[i / inputs * static_cast<size_t>(blocks->bytes)], static_cast<int>(i % inputs));
    }
    float x;
    uint16_t half;
    if (type == "f32") {
      std::memcpy(&x, &data[i * 4], 4);
    } else {
      std::memcpy(&half, &data[i * 2], 2);
      x = type == "f16" ? f16_to_float(half) : bf16_to_float(half);
    }
    return {double(x)};
  }
  double at(int row, int column) const { return weight(row, column).value; }
  // The magnitude of the numbers that are added for a weight.
  double size(int row, int column) const {
    const GgmlWeight w = weight(row, column);
    return std::fabs(w.value) + 2 * std::fabs(w.min);
  }
};

// What at() and size() say of a whole tensor, or its transpose.
struct Weights {
  size_t k;
  std::vector<double> values, sizes;  // [n, k]
  explicit Weights(const Tensor& t, bool transposed = false) : k(static_cast<size_t>(transposed ? t.n : t.k)) {
    for (int j = 0; j < (transposed ? t.k : t.n); j++)
      for (int i = 0; i < int(k); i++) {
        values.push_back(transposed ? t.at(i, j) : t.at(j, i));
        sizes.push_back(transposed ? t.size(i, j) : t.size(j, i));
      }
  }
  const double* row(size_t j) const { return &values[j * k]; }
  const double* row_sizes(size_t j) const { return &sizes[j * k]; }
};

using Random = std::mt19937;

std::vector<float> normal(size_t n, Random& random) {
  std::normal_distribution<float> distribution;
  std::vector<float> x(n);
  for (float& v : x) v = distribution(random);
  return x;
}

Tensor random_tensor(const std::string& type, int n, int k, Random& random) {
  Tensor t(type, n, k);
  std::normal_distribution<float> distribution;
  if (is_float(type)) {
    for (size_t i = 0; i < t.elements(); i++) t.set_float(i, distribution(random));
    return t;
  }
  const float factors = t.blocks->inputs == 256 ? 1.0f / 32 : 1;  // of about 32, that a half float is multiplied by
  for (size_t i = 0; i < t.elements(); i += static_cast<size_t>(t.blocks->inputs)) {
    const auto half = [&](size_t place) {
      return float_to_f16(distribution(random) * factors * (place == 0 ? 0.01f : 0.05f));
    };
    const std::vector<uint8_t> block = random_ggml_block(*t.blocks, random, half);
    t.data.insert(t.data.end(), block.begin(), block.end());
  }
  return t;
}

struct Packed {
  Buffer<std::byte> memory;
  Matrix matrix;
  Packed(const TensorView& view, bool transposed = false) {
    std::vector<std::byte> packed(packed_bytes(view.type, view.n, view.k));
    for (int b = panels(view.n) - 1; b >= 0; b--) pack(view, transposed, b, packed.data());
    memory = device_copy(packed);
    matrix = {view.type, view.n, view.k, 1, memory.data()};
  }
};

size_t input_rows(const Product& p) {
  return static_cast<size_t>(p.x_group ? p.weight->groups * p.x_rows : p.x_rows);
}

// Products whose operands lie in the host's memory, as products of copies in the device's.
class OnDevice {
 public:
  explicit OnDevice(std::vector<Product> products) : host_(products), device_(std::move(products)) {
    for (const Product& p : host_) floats_[p.x] = std::max(floats_[p.x], x_size(p));
    for (const auto& [x, n] : floats_) x_[x] = device_copy(std::vector<float>(x, x + n));
    for (Product& p : device_) {
      const size_t groups = size_t(p.weight->groups);
      p.x = x_[p.x].data();
      if (p.bias) p.bias = keep(kept_, p.bias, groups * size_t(p.weight->n));
      if (p.gather) p.gather = keep(ints_, p.gather, size_t(p.rows));
      if (p.row_start) p.row_start = keep(ints_, p.row_start, groups + 1);
      y_.push_back(device_copy(std::vector<float>(p.y, p.y + y_size(p))));
      p.y = y_.back().data();
    }
  }
  const std::vector<Product>& products() const { return device_; }
  void bring_back() const {
    for (size_t i = 0; i < y_.size(); i++)
      if (y_[i].size() > 0) download(host_[i].y, y_[i].data(), y_[i].size() * sizeof(float));
  }

 private:
  template <class T>
  static const T* keep(std::vector<Buffer<T>>& where, const T* x, size_t n) {
    where.push_back(device_copy(std::vector<T>(x, x + n)));
    return where.back().data();
  }
  static size_t size(int rows, int stride, int groups, int group, int width) {
    return rows == 0 ? 0 : size_t((rows - 1) * stride + (groups - 1) * group + width);
  }
  static size_t x_size(const Product& p) {
    return size(p.x_rows, p.x_stride, p.weight->groups, p.x_group, p.weight->k);
  }
  static size_t y_size(const Product& p) { return size(p.rows, p.y_stride, p.weight->groups, p.y_group, p.weight->n); }

  std::vector<Product> host_, device_;
  std::map<const float*, size_t> floats_;  // of each x
  std::map<const float*, Buffer<float>> x_;
  std::vector<Buffer<float>> kept_, y_;
  std::vector<Buffer<int>> ints_;
};

void run(const std::vector<Product>& products, int threads = 1) {
  static Threads team(3);
  size_t bytes = 0;
  for (const Product& p : products) bytes += matmul_workspace_bytes(static_cast<int>(input_rows(p)), p.weight->k);
  Arena memory(bytes + 128);
  Workspace workspace;
  workspace.plan(bytes);
  workspace.allocate(memory);
  Arena whole = workspace.begin();
  if (bytes > 128) fill(whole.take<std::byte>(bytes - 64), 0xff, bytes - 64);  // an earlier call's: NaN
  const OnDevice copies(products);
  const std::vector<Product>& p = copies.products();
  team.run(threads, [&](const Team& t) { matmul(t, p.data(), static_cast<int>(p.size()), workspace); });
  copies.bring_back();
}

// y = W x of one row.
Product one_row(const Matrix& w, const std::vector<float>& x, std::vector<float>& y) {
  Product p;
  p.weight = &w;
  p.x = x.data(), p.x_rows = 1, p.x_stride = w.k;
  p.rows = 1, p.y = y.data(), p.y_stride = w.n;
  return p;
}

// What one row of activations is multiplied as: itself, rounded to bfloat16, or int8 groups of 32.
std::vector<double> as_multiplied(const std::string& type, const float* x, int k) {
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

// One product on random data.
struct Case {
  std::string type;
  int n, k, rows;
  bool bias = false, add = false, gather = false, transposed = false;
};

std::string describe(const Case& c) {
  return c.type + " n " + std::to_string(c.n) + " k " + std::to_string(c.k) + " rows " + std::to_string(c.rows) +
         (c.bias ? " bias" : "") + (c.add ? " add" : "") + (c.gather ? " gather" : "") +
         (c.transposed ? " transposed" : "");
}

constexpr size_t GUARD = 40;  // floats past the last row of y, which must stay

// The operands of a case: strides larger than the rows, rows of x that are not used.
struct Operands {
  Tensor w;
  Packed packed;
  std::vector<float> x, y, bias;
  std::vector<int> gather;
  Product product;

  Operands(const Case& c, Random& random)
      : w(c.transposed ? random_tensor(c.type, c.k, c.n, random) : random_tensor(c.type, c.n, c.k, random)),
        packed(view(c), c.transposed) {
    const int x_rows = c.gather ? c.rows + 3 : c.rows, x_stride = c.k + 5, y_stride = c.n + 3;
    x = normal(size_t(x_rows - 1) * size_t(x_stride) + size_t(c.k), random);
    y = normal(size_t(c.rows - 1) * size_t(y_stride) + size_t(c.n) + GUARD, random);
    bias = normal(size_t(c.n), random);
    for (int r = 0; r < c.rows; r++) gather.push_back(static_cast<int>(random() % unsigned(x_rows)));
    product = {.weight = &packed.matrix, .bias = c.bias ? bias.data() : nullptr, .x = x.data()};
    product.x_rows = x_rows, product.x_stride = x_stride;
    product.gather = c.gather ? gather.data() : nullptr;
    product.rows = c.rows, product.y = y.data(), product.y_stride = y_stride, product.add = c.add;
  }
  TensorView view(const Case& c) const {
    TensorView v = w.view();
    v.n = c.n, v.k = c.k;
    return v;
  }
};

// y against the float64 product of what is multiplied. In float32 every step of a sum (k of them, or 3 a quant group of
// at least 16) rounds by at most 2^-24 of the magnitudes added so far, and a step's own factors (two scales, or scale
// and sum) by 3 more.
void check(const Case& c) {
  Random random(static_cast<unsigned>(c.n * 7919 + c.k * 31 + c.rows));
  Operands o(c, random);
  const std::vector<float> before = o.y;
  run({o.product});
  const size_t n = size_t(c.n), k = size_t(c.k), y_stride = size_t(o.product.y_stride);
  const Weights w(o.w, c.transposed);
  const double steps = is_float(c.type) ? c.k + 3 : 3 * c.k / 16 + 6;
  std::vector<float> expected_bytes = before;  // where y may not be written
  for (size_t r = 0; r < size_t(c.rows); r++) {
    const float* x = o.x.data() + ptrdiff_t(c.gather ? o.gather[r] : int(r)) * o.product.x_stride;
    const std::vector<double> input = as_multiplied(c.type, x, c.k);
    for (size_t j = 0; j < n; j++) {
      double sum = 0, magnitude = 0;
      for (size_t i = 0; i < k; i++)
        sum += w.row(j)[i] * input[i], magnitude += w.row_sizes(j)[i] * std::fabs(input[i]);
      if (c.bias) sum += double(o.bias[j]), magnitude += std::fabs(double(o.bias[j]));
      if (c.add) sum += double(before[r * y_stride + j]), magnitude += std::fabs(double(before[r * y_stride + j]));
      ASSERT_NEAR(double(o.y[r * y_stride + j]), sum, 0x1p-24 * steps * magnitude)
          << describe(c) << ", row " << r << " output " << j;
      expected_bytes[r * y_stride + j] = o.y[r * y_stride + j];
    }
  }
  ASSERT_EQ(o.y, expected_bytes) << describe(c) << ": written past n";
}

TEST(Matmul, EveryTypeAndShape) {
  for (const std::string& type : TYPES)
    for (int n : {1, 15, 16, 17, 33, 40, 64})
      for (int k : {1, 3, 31, 32, 64, 96, 256, 576, 768})
        for (int rows : {1, 2, 3, 5, 7, 16, 33})
          if (k == whole(type, k) && (k < 256 || n == 33 || rows == 3)) check({type, n, k, rows});
  for (const char* type : {"f32", "bf16", "f16"}) check({type, 33, 1001, 33});
}

TEST(Matmul, BiasAddGatherTransposed) {
  for (const std::string& type : TYPES)
    for (int options = 1; options < 16; options++)
      for (int n : {1, 33, 64}) {
        const Case c{
            type, n, whole(type, 96), 13, bool(options & 1), bool(options & 2), bool(options & 4), bool(options & 8)};
        if (is_float(type) || !c.transposed) check(c);
      }
}

TEST(Matmul, NoRows) {
  Random random(3);
  for (const std::string& type : TYPES) {
    Operands o({type, 40, whole(type, 64), 1}, random);
    const std::vector<float> before = o.y;
    o.product.rows = 0;
    run({o.product});
    o.product.x_rows = 0;
    run({o.product});
    run({});
    EXPECT_EQ(o.y, before);
  }
}

// Every row alone, on one thread, in one product.
std::vector<float> row_by_row(const Operands& o) {
  std::vector<float> y = o.y;
  for (int r = 0; r < o.product.rows; r++) {
    Product p = o.product;
    p.x += ptrdiff_t(p.gather ? p.gather[r] : r) * p.x_stride;
    p.x_rows = p.rows = 1;
    p.gather = nullptr;
    p.y = y.data() + ptrdiff_t(r) * p.y_stride;
    run({p}, 1);
  }
  return y;
}

TEST(Matmul, ARowIsTheSameInAnyCompany) {
  Random random(4);
  for (const std::string& type : TYPES)
    for (int rows : {2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 24, 25, 61}) {
      Operands o({type, 97, whole(type, 288), rows, true, rows % 2 == 0, rows % 3 == 0}, random);
      const std::vector<float> before = o.y, alone = row_by_row(o);
      for (int threads : {1, 2, 3}) {
        o.y = before;
        run({o.product}, threads);
        ASSERT_EQ(o.y, alone) << type << " rows " << rows << " threads " << threads;
      }
    }
}

// More rows than a quantised panel is expanded for, and more inputs than at a time.
TEST(Matmul, ARowIsTheSameAmongMany) {
  Random random(12);
  for (const std::string& type : TYPES) {
    Operands o({type, 33, whole(type, 1056), 200, true, true}, random);
    const std::vector<float> alone = row_by_row(o);
    run({o.product}, 2);
    ASSERT_EQ(o.y, alone) << type;
  }
}

// Products of several types, sizes and inputs in one call: those on one x are neighbours, some x come back later.
TEST(Matmul, AProductIsTheSameInAnyCompany) {
  Random random(5);
  for (int rows : {1, 9, 70})
    for (int threads : {1, 2, 3}) {
      std::vector<Operands> all;
      std::vector<Product> products;
      std::vector<std::vector<float>> alone;
      all.reserve(TYPES.size());
      for (int i = 0; i < int(TYPES.size()); i++)
        all.emplace_back(Case{TYPES[size_t(i) * 5 % TYPES.size()], 20 + 37 * (i % 10), 256, rows, i % 3 == 0}, random);
      for (Operands& o : all) {
        const size_t input = products.size() / 3 * 3;  // 0 0 0 3 3 3 6 6 6 9
        o.product.x = all[input % 6].x.data();
        if (products.size() == 2) o.product.x_stride -= 5;  // the same x, cut into other rows
        products.push_back(o.product);
        alone.push_back(row_by_row(o));
      }
      run(products, threads);
      for (size_t i = 0; i < all.size(); i++)
        ASSERT_EQ(all[i].y, alone[i]) << i << " rows " << rows << " threads " << threads;
    }
}

TEST(Matmul, RowsUnpackExactly) {
  Random random(6);
  for (const std::string& type : TYPES)
    for (int k : {1, 31, 64, 96, 768}) {
      if (k != whole(type, k)) continue;
      const Tensor w = random_tensor(type, 37, k, random);
      const Packed packed(w.view());
      std::vector<float> row(static_cast<size_t>(k));
      for (int j = 0; j < w.n; j++) {
        unpack_row(packed.matrix, j, row.data());
        for (int i = 0; i < k; i++) ASSERT_EQ(row[size_t(i)], float(w.at(j, i))) << type << " " << j << " " << i;
      }
    }
}

// The largest bytes on both sides: sums of pairs are past 16 bits. The bound is check()'s.
TEST(Matmul, ExtremeBytesDoNotSaturate) {
  for (const GgmlType& type : GGML_TYPES)
    for (int byte : {0, 0x7f, 0x80, 0xff})
      for (float sign : {1.0f, -1.0f}) {
        const int k = whole(type.name, 64);
        Tensor w(type.name, 3, k);
        w.data.resize(w.elements() / size_t(type.inputs) * size_t(type.bytes), static_cast<uint8_t>(byte));
        for (size_t at = 0; at < w.data.size(); at += size_t(type.bytes)) {
          if (type.name == "mxfp4") w.data[at] = 128;
          for (int half : type.halves) std::memcpy(&w.data[at + size_t(half)], "\0\x3c", 2);  // 1
        }
        const Packed packed(w.view());
        std::vector<float> x(size_t(k), 127 * sign), y(3);
        x[5] = -x[5];
        double expected = 0, magnitude = 0;
        for (int i = 0; i < k; i++) {
          expected += w.at(0, i) * double(x[size_t(i)]);
          magnitude += w.size(0, i) * 127;
        }
        run({one_row(packed.matrix, x, y)});
        for (float v : y)
          EXPECT_NEAR(double(v), expected, 0x1p-24 * (3 * k / 16 + 6) * magnitude) << type.name << " " << byte;
      }
}

// Against the activations before they are rounded to int8: each is off by half a step of its group, and a little.
TEST(Matmul, Int8ActivationsAreWithinHalfAStep) {
  Random random(7);
  for (const GgmlType& type : GGML_TYPES) {
    const int k = whole(type.name, 288);
    Operands o({type.name, 33, k, 4}, random);
    for (float& v : o.x) v = v * v * v;  // a few large values in a group: the hard case
    run({o.product});
    for (int r = 0; r < 4; r++)
      for (int j = 0; j < 33; j++) {
        const float* x = o.x.data() + r * o.product.x_stride;
        double sum = 0, bound = 0;
        for (int i = 0; i < k; i++) {
          const float* group = x + i / GROUP * GROUP;
          float amax = 0;
          for (int l = 0; l < GROUP; l++) amax = std::max(amax, std::fabs(group[l]));
          sum += o.w.at(j, i) * double(x[i]);
          bound += o.w.size(j, i) * double(amax) * (0.5001 / 127);
        }
        EXPECT_NEAR(double(o.y[size_t(r * o.product.y_stride + j)]), sum, bound);
      }
  }
}

TEST(Matmul, ZerosTinyHugeAndNotANumber) {
  Random random(8);
  const float inf = std::numeric_limits<float>::infinity();
  for (const std::string& type : TYPES) {
    const size_t k = size_t(whole(type, 64));
    const Tensor w = random_tensor(type, 17, int(k), random);
    double largest = 0;
    for (int j = 0; j < 17; j++)
      for (int i = 0; i < int(k); i++) largest = std::max(largest, w.size(j, i));
    const Packed packed(w.view());
    const auto times = [&](std::vector<float> x) {
      std::vector<float> y(17);
      run({one_row(packed.matrix, x, y)});
      return y;
    };
    for (float y : times(std::vector<float>(k, 0.0f))) EXPECT_EQ(y, 0.0f);
    for (float tiny : {1e-45f, 1e-40f, 1.1e-38f, 1e-37f, 1e-36f})
      for (float y : times(std::vector<float>(k, tiny)))
        EXPECT_LE(double(std::fabs(y)), 1.01 * double(k) * largest * double(tiny)) << type;
    for (float y : times(std::vector<float>(k, 1e36f))) EXPECT_TRUE(std::isfinite(y)) << type;
    for (float odd : {inf, -inf, std::nanf("")}) {
      std::vector<float> x = normal(k, random);
      x[37] = odd;
      for (float y : times(x)) EXPECT_FALSE(std::isfinite(y)) << type << " " << odd;
    }
  }
}

TEST(Matmul, PackedSizes) {
  for (const std::string& type : TYPES)
    for (int n : {1, 16, 33})
      for (int k : {256, 768}) EXPECT_EQ(packed_bytes(weight_type(type), n, k) % 64, 0u);
}

TEST(Matmul, EveryTypeOfTheTableIsTested) {
  EXPECT_EQ(weight_formats().size(), TYPES.size());
  EXPECT_FALSE(find_weight_type("q3"));
}

// --- groups ----------------------------------------------------------------------------------------------------------

// `groups` matrices [n, k] behind each other.
struct Stack {
  std::vector<Tensor> w;
  Buffer<std::byte> memory;
  Matrix matrix;
  std::vector<float> bias;  // [groups, n]

  Stack(const std::string& type, int groups, int n, int k, Random& random) : bias(normal(size_t(groups * n), random)) {
    std::vector<std::byte> packed(packed_bytes(weight_type(type), n, k) * size_t(groups));
    for (int g = 0; g < groups; g++) {
      w.push_back(random_tensor(type, n, k, random));
      std::byte* at = packed.data() + packed_bytes(weight_type(type), n, k) * size_t(g);
      for (int p = 0; p < panels(n); p++) pack(w.back().view(), false, p, at);
    }
    memory = device_copy(packed);
    matrix = {weight_type(type), n, k, groups, memory.data()};
  }
  Matrix one(int g) const {
    Matrix m = matrix;
    m.groups = 1;
    m.data += packed_bytes(m.type, m.n, m.k) * size_t(g);
    return m;
  }
};

// Row r of group g of a product: where its x and y are. Written from the comment on Product.
struct Place {
  const float* x;
  ptrdiff_t y;  // from the start of y
};
Place place(const Product& p, int group, int r) {
  const int first = p.row_start ? p.row_start[group] : 0;
  const int x_row = p.gather ? p.gather[first + r] : first + r;
  return {p.x + ptrdiff_t(x_row) * p.x_stride + ptrdiff_t(group) * p.x_group,
          ptrdiff_t(first + r) * p.y_stride + ptrdiff_t(group) * p.y_group};
}

// Every number of y against float64 sums and, bit for bit, against a product of this row alone.
void check_groups(const std::string& type, const Stack& s, Product p, std::vector<float>& y) {
  const std::vector<float> before = y;
  p.weight = &s.matrix, p.y = y.data();
  std::vector<float> expected = before;  // what no product writes must stay
  for (int g = 0; g < s.matrix.groups; g++) {
    const Matrix w = s.one(g);
    const int rows = p.row_start ? p.row_start[g + 1] - p.row_start[g] : p.rows;
    for (int r = 0; r < rows; r++) {
      const Place at = place(p, g, r);
      Product alone;
      alone.weight = &w, alone.bias = p.bias ? p.bias + g * w.n : nullptr, alone.add = p.add;
      alone.x = at.x, alone.x_rows = 1, alone.x_stride = w.k;
      alone.rows = 1, alone.y = expected.data() + at.y, alone.y_stride = w.n;
      run({alone});
    }
  }
  for (int threads : {1, 2, 3}) {
    y = before;
    run({p}, threads);
    ASSERT_EQ(y, expected) << type << ", threads " << threads;
  }
  for (int g = 0; g < s.matrix.groups; g++) {
    const Weights w(s.w[size_t(g)]);
    for (int r = 0; r < (p.row_start ? p.row_start[g + 1] - p.row_start[g] : p.rows); r++) {
      const Place at = place(p, g, r);
      const std::vector<double> x = as_multiplied(type, at.x, s.matrix.k);
      for (int j = 0; j < s.matrix.n; j++) {
        const size_t out = size_t(at.y + j);
        double sum = 0, size = 0;
        const auto take = [&](double term, double magnitude) { sum += term, size += magnitude; };
        if (p.bias) take(double(p.bias[g * s.matrix.n + j]), std::fabs(double(p.bias[g * s.matrix.n + j])));
        if (p.add) take(double(before[out]), std::fabs(double(before[out])));
        for (size_t i = 0; i < x.size(); i++)
          take(w.row(size_t(j))[i] * x[i], w.row_sizes(size_t(j))[i] * std::fabs(x[i]));
        // As in check().
        ASSERT_NEAR(double(y[out]), sum, 0x1p-24 * (s.matrix.k + 8) * size) << type << " " << g << " " << r;
      }
    }
  }
}

// MLA: each head a matrix, its rows a stretch of the token's row.
TEST(Matmul, AGroupAHead) {
  Random random(9);
  for (const std::string& type : TYPES)
    for (int rows : {1, 3, 14, 31}) {
      const int heads = 5, n = 37, k = whole(type, 64), x_head = k + 32, y_head = n + 2;
      const Stack s(type, heads, n, k, random);
      Product p;
      p.x_rows = p.rows = rows, p.x_stride = heads * x_head + 3, p.x_group = x_head;
      p.y_stride = heads * y_head + 1, p.y_group = y_head;
      const std::vector<float> x = normal(size_t(rows * p.x_stride), random);
      std::vector<float> y = normal(size_t(rows * p.y_stride), random);
      p.x = x.data();
      for (const bool options : {false, true}) {
        p.bias = options ? s.bias.data() : nullptr, p.add = options;
        check_groups(type, s, p, y);
      }
    }
}

// Experts: sorted rows, of which each group has its own number.
TEST(Matmul, AGroupAnExpert) {
  Random random(10);
  const std::vector<std::vector<int>> row_starts = {
      {0, 0, 0, 0, 0}, {0, 1, 1, 1, 2}, {0, 0, 45, 45, 45}, {0, 3, 16, 16, 45}, {0, 0, 0, 0, 31}};
  for (const std::string& type : TYPES)
    for (const std::vector<int>& row_start : row_starts)
      for (const bool gathered : {false, true}) {
        const int n = 70, k = whole(type, 96), rows = row_start.back(), x_rows = gathered ? 9 : rows;
        const Stack s(type, 4, n, k, random);
        const std::vector<float> x = normal(size_t(std::max(1, x_rows) * (k + 1)), random);
        std::vector<float> y = normal(size_t(rows * (n + 5) + 7), random);
        std::vector<int> gather;
        for (int r = 0; r < rows; r++) gather.push_back(static_cast<int>(random() % 9));
        Product p;
        p.x = x.data(), p.x_rows = x_rows, p.x_stride = k + 1, p.gather = gathered ? gather.data() : nullptr;
        p.rows = rows, p.row_start = row_start.data(), p.y_stride = n + 5;
        p.bias = s.bias.data();
        check_groups(type, s, p, y);
      }
}

// Bit for bit the products, and then the activation of what they make.
void check_activated(const Operands& gate, const Operands& up, bool gated) {
  std::vector<Product> products = {up.product};
  if (gated) products.push_back(gate.product);
  Workspace workspace;
  const size_t bytes = 2 * matmul_workspace_bytes(up.product.x_rows, up.product.weight->k);
  workspace.plan(bytes);
  Arena memory(bytes + 128);
  workspace.allocate(memory);
  const OnDevice parts(products), fused(products);
  const Product &p = parts.products()[0], f = fused.products()[0];
  Threads(2).run(2, [&](const Team& team) {
    matmul(team, parts.products().data(), static_cast<int>(products.size()), workspace);
    activate(team, Activation::gelu_tanh, 0, gated ? parts.products()[1].y : nullptr, p.y, p.rows, p.weight->n, p.y);
    matmul_activated(team, gated ? fused.products()[1] : Product{}, f, Activation::gelu_tanh, 0, workspace);
  });
  parts.bring_back();
  const std::vector<float> expected = up.y;
  fused.bring_back();
  EXPECT_EQ(up.y, expected) << gated << " rows " << p.rows;
}

TEST(Matmul, AnActivatedProductIsItsParts) {
  Random random(12);
  for (const auto& [gate_type, up_type] :
       {std::pair{"bf16", "bf16"}, {"q8_0", "q8_0"}, {"f32", "f32"}, {"q4_1", "q8_0"}})
    for (const int rows : {1, 3, 20}) {
      const int n = 40, k = 544;
      Operands gate({gate_type, n, k, rows, true}, random), up({up_type, n, k, rows, true}, random);
      gate.product.y_stride = up.product.y_stride = n;
      gate.product.x = up.product.x;
      check_activated(gate, up, true);
      check_activated(gate, up, false);
    }
}

// A call larger than the plan is refused by every thread, before anything is written.
TEST(Matmul, MoreRowsThanPlannedAreRefused) {
  Random random(11);
  Operands o({"q8_0", 33, 576, 100}, random);
  Workspace workspace;
  workspace.plan(matmul_workspace_bytes(50, 576));
  Arena memory(matmul_workspace_bytes(50, 576) + 128);
  workspace.allocate(memory);
  const std::vector<float> before = o.y;
  Threads threads(2);
  const auto multiply = [&] {
    const OnDevice copies({o.product});
    threads.run(2, [&](const Team& team) { matmul(team, copies.products().data(), 1, workspace); });
    copies.bring_back();
  };
  EXPECT_THROW(multiply(), Error);
  EXPECT_EQ(o.y, before);
  o.product.rows = o.product.x_rows = 50;
  multiply();
  EXPECT_NE(o.y, before);
}

}  // namespace
