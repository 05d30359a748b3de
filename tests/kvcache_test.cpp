// The cache against a plain model of it: what each KV type keeps of a number, and where every row goes.
#include "kvcache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "batches.h"
#include "device_memory.h"
#include "kernels/build.h"
#include "kernels/threads.h"
#include "kv_rows.h"

namespace {

TEST(Codec, F32IsExact) {
  for_rows([](const std::vector<float>& x) { EXPECT_EQ(round_trip<KvF32>(x), x); });
}

// Half the distance of neighbours: 2^-11 of the number, or of 2^-14 among the subnormals.
TEST(Codec, F16WithinHalfAnUlp) {
  for_rows([](const std::vector<float>& x) {
    const std::vector<float> y = round_trip<KvF16>(x);
    for (size_t i = 0; i < x.size(); i++)
      EXPECT_LE(std::fabs(double(y[i]) - double(x[i])), 0x1p-11 * std::max(std::fabs(double(x[i])), 0x1p-14));
  });
}

// Half the distance of neighbours: 8 bits of significand, the leading one included, so 2^-9 of a power of two, which is
// 2^-8 of the number at most.
TEST(Codec, BF16WithinHalfAnUlp) {
  for_rows([](const std::vector<float>& x) {
    const std::vector<float> y = round_trip<KvBF16>(x);
    for (size_t i = 0; i < x.size(); i++)
      EXPECT_LE(std::fabs(double(y[i]) - double(x[i])), 0x1p-8 * std::fabs(double(x[i])));
  });
}

// Half a step of the scale; the scale is amax / 127, up to 2^-10 larger for its rounding to float16 (a subnormal one is
// off by 2^-24 at most), and float32's own roundings.
TEST(Codec, Q8WithinHalfAStep) {
  for_rows([](const std::vector<float>& x) {
    const std::vector<float> y = round_trip<KvQ8>(x);
    for (size_t i = 0; i < x.size(); i++) {
      const size_t first = i / 32 * 32, last = std::min(x.size(), first + 32);
      double amax = 0;
      for (size_t j = first; j < last; j++) amax = std::max(amax, std::fabs(double(x[j])));
      const double scale = std::max(amax / 127 * (1 + 0x1p-10), amax / 127 + 0x1p-24);
      EXPECT_LE(std::fabs(double(y[i]) - double(x[i])), scale / 2 * (1 + 0x1p-14))
          << x.size() << " " << i << " " << amax;
    }
  });
}

TEST(Codec, Q8OfZeros) {
  EXPECT_EQ(round_trip<KvQ8>(std::vector<float>(40)), std::vector<float>(40));
}

TEST(Codec, InfinityAndNaNStayVisible) {
  for (float bad : {INFINITY, -INFINITY, NAN}) {
    expect_visible<KvF32>(bad);
    expect_visible<KvF16>(bad);
    expect_visible<KvBF16>(bad);
    expect_visible<KvQ8>(bad);
  }
  expect_visible<KvF16>(65520);
  expect_visible<KvQ8>(3e38f);
  expect_visible<KvBF16>(std::numeric_limits<float>::max());
}

TEST(Codec, WhatATypeCannotHoldIsNaNAndReported) {
  expect_overflow_is_nan<KvF16>(65504, 65520);
  expect_overflow_is_nan<KvF16>(65504, 3e38f);
  expect_overflow_is_nan<KvQ8>(KvQ8::largest, 1.01f * KvQ8::largest);
  expect_overflow_is_nan<KvQ8>(KvQ8::largest, 3e38f);
}

TEST(Codec, RowBytes) {
  expect_row_bytes<KvF32>(80, 320);
  expect_row_bytes<KvF16>(80, 160);
  expect_row_bytes<KvBF16>(7, 14);
  expect_row_bytes<KvQ8>(64, 68);
  expect_row_bytes<KvQ8>(80, 86);
  expect_row_bytes<KvQ8>(7, 10);  // rows start at even addresses
  expect_row_bytes<KvQ8>(0, 0);
}

// A token's row is a whole number that tells where it belongs; every type keeps it to less than a half.
float name_of(int layer, int t, int g, bool is_v) {
  return static_cast<float>((layer * 61 + t * 7 + g * 3 + is_v) % 127 + 1);
}

template <class Kv, int Block>
class CacheModel {
 public:
  static constexpr int LAYERS = 3, HEADS = 2, K_DIM = 33, BLOCK_SIZE = Block ? Block : 20,
                       N_BLOCKS = 24 / BLOCK_SIZE + 4;

  static CacheShape shape_of(int v_width) { return {LAYERS, HEADS, K_DIM, v_width, N_BLOCKS, BLOCK_SIZE}; }

  explicit CacheModel(int v_width)
      : v_dim(v_width), memory(arena_bytes<Kv, Block>(shape_of(v_width))), cache(memory, shape_of(v_width)), slots(20) {
    std::vector<int> pool(at(N_BLOCKS * BLOCK_SIZE));
    std::iota(pool.begin(), pool.end(), 0);
    std::shuffle(pool.begin(), pool.end(), std::mt19937(4));
    std::copy_n(pool.begin(), slots.size(), slots.begin());
    batch.n_tokens = static_cast<int>(slots.size());
    batch.slot_mapping = slots.data();
    for (int layer = 0; layer < LAYERS; layer++) append(layer);
  }

  void append(int layer) {
    std::vector<float> k, v;
    for (int t = 0; t < batch.n_tokens; t++)
      for (int g = 0; g < HEADS; g++) {
        k.insert(k.end(), at(K_DIM), name_of(layer, t, g, false));
        v.insert(v.end(), at(v_dim), name_of(layer, t, g, true));
      }
    const Buffer<float> device_k = device_copy(k), device_v = device_copy(v);
    const Batch& uploaded = on_device.upload(batch);
    threads.run(3,
                [&](const Team& team) { cache.append(team, layer, uploaded, {}, device_k.data(), device_v.data()); });
  }

  void expect_token(int t, int block, int slot) {
    for (int layer = 0; layer < LAYERS; layer++)
      for (int g = 0; g < HEADS; g++) {
        float k[K_DIM], v[K_DIM];
        cache.load_k(layer, block, g, slot, k);
        for (int i = 0; i < K_DIM; i++) ASSERT_NEAR(k[i], name_of(layer, t, g, false), 0.49);
        // Where there are no V rows, V is the first elements of K's.
        const int width = v_dim > 0 ? v_dim : 21;
        v[width] = -7;
        cache.load_v(layer, block, g, slot, width, v);
        for (int i = 0; i < width; i++) ASSERT_NEAR(v[i], name_of(layer, t, g, v_dim > 0), 0.49);
        ASSERT_EQ(v[width], -7);
      }
  }

  // The first half of the blocks into the second half.
  void copy_and_check() {
    std::vector<int> from, to;
    for (int b = 0; b < N_BLOCKS / 2; b++) from.push_back(b), to.push_back(b + (N_BLOCKS + 1) / 2);
    batch.n_copies = static_cast<int>(from.size());
    batch.copy_from = from.data(), batch.copy_to = to.data();
    const Batch& uploaded = on_device.upload(batch);
    threads.run(3, [&](const Team& team) { cache.copy_blocks(team, uploaded); });
    for (int t = 0; t < batch.n_tokens; t++) {
      const int block = slots[at(t)] / BLOCK_SIZE, slot = slots[at(t)] % BLOCK_SIZE;
      if (block >= N_BLOCKS / 2) continue;
      expect_token(t, block, slot);
      expect_token(t, block + (N_BLOCKS + 1) / 2, slot);
    }
  }

  int v_dim;
  Threads threads{3};
  Arena memory;
  KVCache<Kv, Block> cache;
  std::vector<int> slots;
  Batch batch;
  DeviceBatch on_device;
};

template <class Kv, int Block>
void check_cache() {
  for (int v_dim : {0, 17}) {
    CacheModel<Kv, Block> model(v_dim);
    for (int t = 0; t < model.batch.n_tokens; t++)
      model.expect_token(t, model.slots[at(t)] / model.BLOCK_SIZE, model.slots[at(t)] % model.BLOCK_SIZE);
    model.copy_and_check();
    EXPECT_EQ(model.cache.size(), (KVCache<Kv, Block>::bytes(model.cache.shape())));
  }
}

// Rows that are whole chunks of every device, with an even number of q8's scales, cost what they hold; a block may be
// filled up to 16 tokens (a contiguous one) or 16 bytes.
template <class Kv, int Block>
void check_size(int v_dim) {
  const CacheShape shape{3, 2, 64, v_dim, 7, Block ? Block : 20};
  const size_t heads = at(shape.n_layers * shape.n_kv_heads), blocks = at(shape.n_blocks);
  const size_t per_token = KVCache<Kv, Block>::bytes_per_token(shape), bytes = KVCache<Kv, Block>::bytes(shape);
  EXPECT_EQ(per_token, heads * (Kv::row_bytes(64) + Kv::row_bytes(v_dim)));
  EXPECT_GE(bytes, per_token * blocks * at(shape.block_size));
  EXPECT_LE(bytes, per_token * blocks * at(Block ? Block : 32) + heads * blocks * 15);
}

TEST(KVCache, TakesWhatItsRowsHold) {
#define CHECK_SIZE(Kv, Block) check_size<Kv, Block>(0), check_size<Kv, Block>(64);
  FOR_EACH_CACHE(CHECK_SIZE)
}

TEST(KVCache, EveryRowHasItsPlace) {
#define CHECK_CACHE(Kv, Block) check_cache<Kv, Block>();
  FOR_EACH_CACHE(CHECK_CACHE)
}

// read_k walks a permuted table; entries past the last row asked for are poison.
template <class Kv, int Block>
void check_read_k() {
  constexpr int dim = 40, context = 19;
  Batches batches(1, context, Block ? Block : 20, 2);
  const CacheShape shape{1, 1, dim, 0, batches.n_blocks(), batches.block_size()};
  Arena memory(arena_bytes<Kv, Block>(shape));
  KVCache<Kv, Block> cache(memory, shape);
  std::vector<float> k;
  for (int t = 0; t < context; t++) k.insert(k.end(), at(dim), static_cast<float>(t + 1));
  DeviceBatch on_device;
  const Batch& batch = on_device.upload(batches.batch({{0, 0, context}}));
  const Buffer<float> device_k = device_copy(k);
  Buffer<float> rows(at(14 * dim));
  Threads(2).run(2, [&](const Team& team) {
    cache.append(team, 0, batch, {}, device_k.data(), nullptr);
    cache.read_k(team, 0, batch, 0, 5, 14, rows.data());
  });
  const std::vector<float> out = host_copy(rows);
  for (int i = 0; i < 14 * dim; i++)
    ASSERT_NEAR(out[at(i)], static_cast<float>(5 + i / dim + 1), 20.0 / 254 * (1 + 0x1p-9)) << Kv::name << " " << i;
}

TEST(KVCache, ReadKWalksTheTable) {
#define CHECK_READ_K(Kv, Block) check_read_k<Kv, Block>();
  FOR_EACH_CACHE(CHECK_READ_K)
}

// The first elements of x divided by their root mean square, times w.
void norm_of(std::vector<double>& x, const std::vector<float>& w) {
  double squares = 0;
  for (size_t i = 0; i < w.size(); i++) squares += x[i] * x[i] / static_cast<double>(w.size());
  for (size_t i = 0; i < w.size(); i++) x[i] *= double(w[i]) / std::sqrt(squares + 1e-5);
}

// Elements first + i and first + n + i rotate together.
void turn_of(std::vector<double>& x, int first, const float* cos, const float* sin, int n) {
  for (int i = 0; i < n; i++) {
    const double a = x[at(first + i)], b = x[at(first + n + i)];
    x[at(first + i)] = a * double(cos[i]) - b * double(sin[i]);
    x[at(first + n + i)] = b * double(cos[i]) + a * double(sin[i]);
  }
}

// Queries and keys are normed over their first elements and then turned, and the rest stays; what enters the cache is
// the turned key.
TEST(KVCache, TurnsQueriesAndKeysOnTheWay) {
  constexpr int T = 3, HEADS = 4, KV_HEADS = 2, DIM = 11, NORMED = 10, ROTATED = 2, N = 4;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto numbers = [&](int n) {
    std::vector<float> x(at(n));
    for (float& number : x) number = normal(random);
    return x;
  };
  // A token's queries are followed by what is no head.
  constexpr int Q_STRIDE = HEADS * DIM + 3;
  const std::vector<float> q = numbers(T * Q_STRIDE), k = numbers(T * KV_HEADS * DIM), v = numbers(T * KV_HEADS * 5),
                           w = numbers(NORMED), cos = numbers(T * N), sin = numbers(T * N);
  const Buffer<float> device_v = device_copy(v), device_w = device_copy(w), device_cos = device_copy(cos),
                      device_sin = device_copy(sin);
  Buffer<float> device_q = device_copy(q), device_k = device_copy(k);
  const Norm weights{device_w.data(), nullptr, NORMED};
  const Turn turn{{device_q.data(), Q_STRIDE, HEADS, DIM, {}, ROTATED},
                  {device_k.data(), KV_HEADS * DIM, KV_HEADS, DIM, weights, ROTATED},
                  NormKind::rms,
                  1e-5f,
                  N,
                  device_cos.data(),
                  device_sin.data()};

  const CacheShape shape{1, KV_HEADS, DIM, 5, 1, T};
  Arena memory(arena_bytes<KvF32, 0>(shape));
  KVCache<KvF32, 0> cache(memory, shape);
  const int slots[] = {2, 0, 1};
  Batch batch;
  batch.n_tokens = T, batch.slot_mapping = slots;
  DeviceBatch on_device;
  const Batch& uploaded = on_device.upload(batch);
  Threads(2).run(2, [&](const Team& team) { cache.append(team, 0, uploaded, turn, device_k.data(), device_v.data()); });

  const auto turned = [&](std::vector<double> x, bool is_normed, int t) {
    if (is_normed) norm_of(x, w);
    turn_of(x, ROTATED, &cos[at(t * N)], &sin[at(t * N)], N);
    return x;
  };
  const std::vector<float> q_after = host_copy(device_q);
  for (int t = 0; t < T; t++) {
    for (int h = 0; h < HEADS; h++) {
      const auto head = q.begin() + t * Q_STRIDE + h * DIM;
      const auto expected = turned({head, head + DIM}, false, t);
      for (int i = 0; i < DIM; i++) EXPECT_NEAR(q_after[at(t * Q_STRIDE + h * DIM + i)], expected[at(i)], 1e-5);
    }
    for (int i = HEADS * DIM; i < Q_STRIDE; i++) EXPECT_EQ(q_after[at(t * Q_STRIDE + i)], q[at(t * Q_STRIDE + i)]);
    for (int g = 0; g < KV_HEADS; g++) {
      const auto head = k.begin() + (t * KV_HEADS + g) * DIM;
      const auto expected = turned({head, head + DIM}, true, t);
      float row[DIM];
      cache.load_k(0, 0, g, slots[t], row);
      for (int i = 0; i < DIM; i++) EXPECT_NEAR(row[i], expected[at(i)], 1e-5);
    }
  }
}

}  // namespace
