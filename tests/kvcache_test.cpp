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

namespace {

size_t at(int n) {
  return static_cast<size_t>(n);
}

template <class Kv, int Block>
size_t arena_bytes(const CacheShape& shape) {
  return bytes_of([&](Arena& arena) { KVCache<Kv, Block>(arena, shape); });
}

// A row through the cache and back, with a guard behind it.
template <class Kv>
std::vector<float> round_trip(const std::vector<float>& x, bool* overflowed = nullptr) {
  const CacheShape shape{1, 1, static_cast<int>(x.size()), 0, 1, 1};
  Arena memory(arena_bytes<Kv, 1>(shape));
  KVCache<Kv, 1> cache(memory, shape);
  const int slot = 0;
  Batch batch;
  batch.n_tokens = 1;
  batch.slot_mapping = &slot;
  DeviceBatch on_device;
  cache.append(Team{}, 0, on_device.upload(batch), device_copy(x).data(), nullptr);
  std::vector<float> y(x.size() + 1, -7);
  cache.load_k(0, 0, 0, 0, y.data());
  EXPECT_EQ(y.back(), -7);
  y.pop_back();
  if (overflowed) *overflowed = cache.overflowed();
  return y;
}

// Rows of every width around the registers' and groups' ends, over ten decades.
template <class Check>
void for_rows(Check check) {
  std::mt19937 random(3);
  for (int dim : {1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 80, 100, 576})
    for (float size : {1e-6f, 1e-2f, 1.0f, 300.0f, 1e4f}) {
      std::normal_distribution<float> normal(0, size);
      std::vector<float> x(at(dim));
      for (float& value : x) value = std::clamp(normal(random), -4 * size, 4 * size);
      check(x);
    }
}

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

// What cannot be kept comes back as no number, so that a fault upstream stays visible; its neighbours in other groups
// are not touched.
template <class Kv>
void expect_visible(float bad) {
  std::vector<float> x(70, 1);
  x[3] = bad;
  const std::vector<float> y = round_trip<Kv>(x);
  EXPECT_FALSE(std::isfinite(y[3])) << Kv::name << " " << bad << " became " << y[3];
  for (size_t i = 32; i < 70; i++) EXPECT_NEAR(y[i], 1, 1.0 / 254) << Kv::name;
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

// NaN and never infinite: an infinite key could give a weight of 0, and nobody would see it. The cache tells it.
template <class Kv>
void expect_overflow_is_nan(float fits, float beyond) {
  for (const float sign : {1.0f, -1.0f})
    for (const size_t place : {0, 5, 69}) {  // of whole registers and a rest
      std::vector<float> x(70, 1.0f);
      bool overflowed = true;
      x[place] = sign * fits;
      EXPECT_NEAR(round_trip<Kv>(x, &overflowed)[place] / fits, sign, 0.01f) << Kv::name;
      EXPECT_FALSE(overflowed);
      x[place] = sign * beyond;
      EXPECT_TRUE(std::isnan(round_trip<Kv>(x, &overflowed)[place])) << Kv::name << " " << place;
      EXPECT_TRUE(overflowed);
    }
}

TEST(Codec, WhatATypeCannotHoldIsNaNAndReported) {
  expect_overflow_is_nan<KvF16>(65504, 65520);
  expect_overflow_is_nan<KvF16>(65504, 3e38f);
  expect_overflow_is_nan<KvQ8>(KvQ8::largest, 1.01f * KvQ8::largest);
  expect_overflow_is_nan<KvQ8>(KvQ8::largest, 3e38f);
}

template <class Kv>
void expect_row_bytes(int dim, size_t bytes) {
  EXPECT_EQ(Kv::row_bytes(dim), bytes) << Kv::name << " " << dim;
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
    threads.run(3, [&](const Team& team) { cache.append(team, layer, uploaded, device_k.data(), device_v.data()); });
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
    cache.append(team, 0, batch, device_k.data(), nullptr);
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

}  // namespace
