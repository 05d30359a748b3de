// Every kernel, KV type and block size against attention written from its formula in double, and against itself: the
// same bits whatever shares the batch.
#include "attention.h"

#if defined(SIMD_AVX512) || defined(SIMD_AVX2) || defined(SIMD_PORTABLE)
#error "attention.h and kvcache.h are for every device: no vector code"
#endif

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>
#include <vector>

#include "attention_world.h"
#include "q4_row.h"

namespace {

// What the cache makes of row `row` of rows [.., dim], written from the types' definitions.
double as_f16(float x) {
  return double(static_cast<_Float16>(x));
}
double as_bf16(float x) {
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), -126) - 7);
  return x == 0 || !std::isfinite(x) ? double(x) : std::nearbyint(double(x) / unit) * unit;
}
template <class Kv>
std::vector<double> stored_row(const std::vector<float>& rows, int row, int dim) {
  const float* x = rows.data() + row * dim;
  if (std::is_same_v<Kv, KvQ4>) return q4_row({x, x + dim});
  std::vector<double> y(x, x + dim);
  for (int i = 0; i < dim; i++) {
    if (std::is_same_v<Kv, KvF16>) y[at(i)] = as_f16(x[i]);
    if (std::is_same_v<Kv, KvBF16>) y[at(i)] = as_bf16(x[i]);
  }
  for (int i = 0; std::is_same_v<Kv, KvQ8> && i < dim; i += KvQ8::QUANT_GROUP) {
    const int end = std::min(dim, i + KvQ8::QUANT_GROUP);
    float amax = 0;
    for (int j = i; j < end; j++) amax = std::max(amax, std::fabs(x[j]));
    _Float16 scale = static_cast<_Float16>(amax / 127);
    if (double(scale) * 127 < double(amax))
      scale = std::bit_cast<_Float16>(static_cast<uint16_t>(std::bit_cast<uint16_t>(scale) + 1));
    for (int j = i; j < end; j++)
      y[at(j)] = amax > 0 ? double(scale) * std::nearbyint(double(x[j] * (1 / static_cast<float>(scale)))) : 0;
  }
  return y;
}

// The formula, in double on the rows as they are stored, and how far float32 may be from it; more where operands are
// rounded, by so much of the rounding.
struct Reference {
  std::vector<double> out, bound, of_rounding;  // [tokens, n_heads, v_dim]
};

template <class Kv>
Reference reference(const Data& d, const std::vector<Piece>& chunks) {
  const AttentionShape& s = d.shape;
  const int G = s.n_kv_heads, R = s.n_heads / G;
  Reference result;
  for (const Piece& c : chunks) {
    const int context = c.first + c.n;
    std::vector<std::vector<double>> k, v;  // [context * G]
    for (int i = 0; i < context * G; i++) {
      k.push_back(stored_row<Kv>(d.k[at(c.sequence)], i, s.k_dim));
      v.push_back(s.v_is_k ? k.back() : stored_row<Kv>(d.v[at(c.sequence)], i, s.v_dim));
    }
    for (int t = c.first; t < context; t++) {
      for (int h = 0; h < s.n_heads; h++) {
        const float* q = d.q[at(c.sequence)].data() + (t * s.n_heads + h) * s.k_dim;
        const int first = s.window > 0 ? std::max(0, t - s.window + 1) : 0;
        std::vector<double> p, out(at(s.v_dim));
        double largest_sum = 0, largest = -INFINITY, sum = 0, largest_v = 0;
        for (int j = first; j <= t; j++) {
          double dot = 0, magnitudes = 0;
          for (int i = 0; i < s.k_dim; i++) {
            const double product = double(q[i]) * k[at(j * G + h / R)][at(i)];
            dot += product, magnitudes += std::fabs(product);
          }
          dot *= double(s.scale);
          p.push_back(s.softcap > 0 ? double(s.softcap) * std::tanh(dot / double(s.softcap)) : dot);
          largest_sum = std::max(largest_sum, magnitudes * double(s.scale));
          largest = std::max(largest, p.back());
        }
        if (s.sinks) largest = std::max(largest, double(s.sinks[h]));
        if (s.sinks) sum = std::exp(double(s.sinks[h]) - largest);
        for (double& x : p) sum += x = std::exp(x - largest);
        for (int j = first; j <= t; j++)
          for (int i = 0; i < s.v_dim; i++) {
            const double x = v[at(j * G + h / R)][at(i)];
            out[at(i)] += p[at(j - first)] / sum * x;
            largest_v = std::max(largest_v, std::fabs(x));
          }
        // A score is a sum of k_dim rounded products (and the query's own scaling), so it is off by at most
        // (k_dim + 4) 2^-24 of the sum of magnitudes, or 2^-22 of the cap; a weight by twice that, relatively, and by
        // the exponential's and the sum's roundings; the result is a weighted mean of V.
        const double u = 0x1p-24, score = (s.k_dim + 4) * u * largest_sum + 4 * u * double(s.softcap);
        const double bound = largest_v * (2 * score + (16 + t - first) * u) + 1e-30;
        result.out.insert(result.out.end(), out.begin(), out.end());
        result.bound.insert(result.bound.end(), out.size(), bound);
        result.of_rounding.insert(result.of_rounding.end(), out.size(), largest_v * (2 * largest_sum + 1));
      }
    }
  }
  return result;
}

void expect_near(const std::vector<float>& out, const Reference& expected, double rounding, const char* what,
                 int block) {
  ASSERT_EQ(out.size(), expected.out.size());
  for (size_t i = 0; i < out.size(); i++)
    ASSERT_TRUE(std::fabs(double(out[i]) - expected.out[i]) <= expected.bound[i] + rounding * expected.of_rounding[i])
        << what << ", block " << block << ", element " << i << ": " << out[i] << " instead of " << expected.out[i]
        << ", bound " << expected.bound[i] << " and " << rounding << " x " << expected.of_rounding[i];
}

template <class Kv, int Block>
void check_kernels(const Data& d, const std::vector<Piece>& chunks, const Reference& expected) {
  expect_near(attention_of<Naive, Kv, Block>(d, chunks, 2), expected, 0, "naive", Block);
  if (takes<Flash, Kv>())
    expect_near(attention_of<Flash, Kv, Block>(d, chunks, 2), expected, Flash::operand_rounding<Kv>(), "flash", Block);
}

// Prefill and decode mixed; contexts at the bounds of blocks, tiles and splits; a sequence without tokens of this step.
const std::vector<int> CONTEXTS = {1, 2, 15, 16, 17, 63, 64, 65, 256, 257, 530, 3, 0};
const std::vector<Piece> CHUNKS = {{0, 0, 1},    {1, 0, 2},    {2, 14, 1}, {3, 0, 16}, {11, 3, 0},
                                   {4, 16, 1},   {5, 60, 3},   {6, 0, 64}, {7, 64, 1}, {8, 255, 1},
                                   {9, 240, 17}, {10, 529, 1}, {12, 0, 0}};

template <class Kv>
class Attention : public testing::Test {};
TYPED_TEST_SUITE(Attention, TestedTypes);

TYPED_TEST(Attention, IsTheFormula) {
  struct Mask {
    int window;
    float softcap;
  };
  for (AttentionShape s : {make_shape(3, 3, 32, 32), make_shape(9, 3, 64, 64), make_shape(12, 2, 80, 80),
                           make_shape(5, 1, 7, 7), make_shape(2, 2, 24, 18), make_shape(6, 1, 56, 40, true)}) {
    for (const Mask& mask : {Mask{0, 0}, Mask{5, 0}, Mask{100, 3}}) {
      s.window = mask.window, s.softcap = mask.softcap;
      const Data d(s, CONTEXTS);
      const Reference expected = reference<TypeParam>(d, CHUNKS);
      check_kernels<TypeParam, 0>(d, CHUNKS, expected);
      check_kernels<TypeParam, 16>(d, CHUNKS, expected);
      if (mask.window == 5) {  // blocks that some windows do not even fill
        check_kernels<TypeParam, 1>(d, CHUNKS, expected);
        check_kernels<TypeParam, 3>(d, CHUNKS, expected);
      }
      if (testing::Test::HasFatalFailure()) FAIL() << s.n_heads << " heads of " << s.k_dim << ", window " << s.window;
    }
  }
}

// A sink is a score without a value, that no cap and no window touches: one that takes nearly all, one that takes
// nothing, some between. Contexts of one split and of several; MLA's shape too.
TYPED_TEST(Attention, SinksJoinTheSoftmax) {
  const std::vector<float> sinks = {0.5f, -1e4f, 1e4f, -2, 3, 30};
  for (AttentionShape s : {make_shape(6, 2, 32, 32), make_shape(6, 1, 56, 40, true)}) {
    s.sinks = sinks.data();
    for (const auto& [window, softcap] : {std::pair(0, 0.0f), std::pair(300, 2.0f)}) {
      s.window = window, s.softcap = softcap;
      const Data d(s, {1, 256, 257, 560});
      const std::vector<Piece> chunks = {{0, 0, 1}, {1, 254, 2}, {2, 256, 1}, {3, 540, 20}};
      const Reference expected = reference<TypeParam>(d, chunks);
      check_kernels<TypeParam, 0>(d, chunks, expected);
      check_kernels<TypeParam, 16>(d, chunks, expected);
      if (testing::Test::HasFatalFailure()) FAIL() << s.n_kv_heads << " KV heads, window " << window;
    }
  }
}

// Latents of 1e4, as DeepSeek has them: half precision sums would overflow.
TYPED_TEST(Attention, LargeLatents) {
  const Data d(make_shape(16, 1, 576, 512, true), {300}, 1e4f);
  const std::vector<Piece> chunks = {{0, 298, 2}};
  check_kernels<TypeParam, 16>(d, chunks, reference<TypeParam>(d, chunks));
}

// By hand: key j is the unit vector j, so the query 1e4 e_j selects value j, to the bit; where it is 0, the
// exponential's least value, e^-87, may show.
TYPED_TEST(Attention, OneHotKeysSelectOneValue) {
  if (!takes<Flash, TypeParam>()) GTEST_SKIP() << "no flash for this type";
  const int n = 70, dim = 80;
  Data d(make_shape(2, 1, dim, dim), {n});
  for (int t = 0; t < n; t++)
    for (int i = 0; i < dim; i++) {
      d.k[0][at(t * dim + i)] = t == i ? 1 : 0;
      for (int h = 0; h < 2; h++) d.q[0][at((t * 2 + h) * dim + i)] = i == (t + h) / 2 ? 1e4f : 0;
    }
  const std::vector<float> naive = attention_of<Naive, TypeParam, 3>(d, {{0, 0, n}}, 2);
  const std::vector<float> flash = attention_of<Flash, TypeParam, 3>(d, {{0, 0, n}}, 2);
  for (int t = 0; t < n; t++)
    for (int h = 0; h < 2; h++) {
      const int j = (t + h) / 2;
      if (j > t) continue;
      const std::vector<double> row = stored_row<TypeParam>(d.v[0], j, dim);
      for (int i = 0; i < dim; i++) {
        ASSERT_NEAR(double(naive[at((t * 2 + h) * dim + i)]), row[at(i)], row[at(i)] == 0 ? 1e-35 : 0)
            << t << " " << h << " " << i;
        ASSERT_NEAR(double(flash[at((t * 2 + h) * dim + i)]), row[at(i)], row[at(i)] == 0 ? 1e-35 : 0)
            << t << " " << h << " " << i;
      }
    }
}

template <class Kernel, class Kv, int Block>
std::vector<float> in_chunks(const Data& d, int n, int n_threads, bool beside) {
  World<Kv, Block> world(d);
  std::vector<float> all;
  const int width = d.shape.n_heads * d.shape.v_dim;
  for (int first = 0, other = 0; first < d.contexts[0]; first += n) {
    std::vector<Piece> chunks;
    const int length = std::min(n, d.contexts[0] - first);
    if (beside && other < d.contexts[1]) chunks.push_back({1, other++, 1});
    const int skipped = static_cast<int>(chunks.size()) * width;
    chunks.push_back({0, first, length});
    if (beside && first % 3 == 0) chunks.push_back({2, 0, d.contexts[2]});
    const std::vector<float> out = world.template step<Kernel>(chunks, n_threads, n_threads);
    all.insert(all.end(), out.begin() + skipped, out.begin() + skipped + length * width);
  }
  return all;
}

template <class Kernel, class Kv, int Block>
void expect_same_in_any_chunks(const Data& d, const std::vector<float>& expected) {
  const std::string name = std::string(Kernel::name) + ", block " + std::to_string(Block);
  if (Block == 0 || Block == 16) {
    expect_same_bits(in_chunks<Kernel, Kv, Block>(d, 600, 1, false), expected, name + ", whole");
    expect_same_bits(in_chunks<Kernel, Kv, Block>(d, 100, 3, false), expected, name + ", chunks of 100, 3 threads");
  }
  expect_same_bits(in_chunks<Kernel, Kv, Block>(d, 37, 2, true), expected,
                   name + ", chunks of 37 in company, 2 threads");
  if (Block == 16 && std::is_same_v<Kernel, Flash>)
    expect_same_bits(in_chunks<Kernel, Kv, Block>(d, 1, 2, false), expected, name + ", a token at a time, 2 threads");
}

TYPED_TEST(Attention, SameBitsInAnyChunksBatchBlocksAndThreads) {
  if (!takes<Flash, TypeParam>()) GTEST_SKIP() << "no flash for this type";
  for (AttentionShape s : {make_shape(6, 2, 20, 20), make_shape(2, 1, 24, 20, true)}) {
    for (int window : {0, 70}) {
      s.window = window;
      const Data d(s, {300, 260, 20});
      const std::vector<float> naive = in_chunks<Naive, TypeParam, 0>(d, 150, 3, true);
      const std::vector<float> flash = in_chunks<Flash, TypeParam, 0>(d, 150, 3, true);
      expect_same_in_any_chunks<Naive, TypeParam, 16>(d, naive);
      expect_same_in_any_chunks<Flash, TypeParam, 0>(d, flash);
      expect_same_in_any_chunks<Flash, TypeParam, 1>(d, flash);
      expect_same_in_any_chunks<Flash, TypeParam, 3>(d, flash);
      expect_same_in_any_chunks<Flash, TypeParam, 16>(d, flash);
    }
  }
}

}  // namespace
