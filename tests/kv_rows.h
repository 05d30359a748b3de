// kv_rows.h: what the tests of the KV types share: rows that go through a cache and back.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "device_memory.h"
#include "kvcache.h"

inline size_t at(int n) {
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
  cache.append(Team{}, 0, on_device.upload(batch), {}, device_copy(x).data(), nullptr);
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

template <class Kv>
void expect_row_bytes(int dim, size_t bytes) {
  EXPECT_EQ(Kv::row_bytes(dim), bytes) << Kv::name << " " << dim;
}
