// attention_world.h: what the tests of attention share: random queries, keys and values of some sequences, and a cache
// in which they take steps.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "batches.h"
#include "device_memory.h"
#include "kernels/threads.h"
#include "tensor_cores.h"

#ifdef BUILD_Q4
using TestedTypes = testing::Types<KvQ4>;
#else
using TestedTypes = testing::Types<KvF32, KvF16, KvBF16, KvQ8>;
#endif

inline size_t at(int n) {
  return static_cast<size_t>(n);
}

inline AttentionShape make_shape(int n_heads, int n_kv_heads, int k_dim, int v_dim, bool v_is_k = false) {
  AttentionShape s;
  s.n_heads = n_heads, s.n_kv_heads = n_kv_heads, s.k_dim = k_dim, s.v_dim = v_dim, s.v_is_k = v_is_k;
  s.scale = 1 / std::sqrt(static_cast<float>(k_dim));
  return s;
}

// Queries, keys and values of every token of some sequences.
struct Data {
  AttentionShape shape;
  std::vector<int> contexts;
  std::vector<std::vector<float>> q, k, v;  // a sequence each: [context, n_heads, k_dim], [context, n_kv_heads, ...]

  Data(const AttentionShape& s, std::vector<int> lengths, float k_size = 1) : shape(s), contexts(std::move(lengths)) {
    std::mt19937 random(1);
    const auto fill = [&](int n, float size) {
      std::normal_distribution<float> normal(0, size);
      std::vector<float> x(at(n));
      for (float& value : x) value = normal(random);
      return x;
    };
    for (int n : contexts) {
      q.push_back(fill(n * s.n_heads * s.k_dim, 1 / k_size));
      k.push_back(fill(n * s.n_kv_heads * s.k_dim, k_size));
      v.push_back(s.v_is_k ? std::vector<float>() : fill(n * s.n_kv_heads * s.v_dim, 1));
    }
  }
};

constexpr int LAYERS = 2, LAYER = 1;

// What a kernel plans for such a call and no more, filled with NaN.
template <class Kernel>
struct ScratchMemory {
  ScratchMemory(const AttentionShape& shape, int n_tokens, int context, int n_threads) {
    Limits limits;
    limits.max_tokens = n_tokens, limits.context = context, limits.max_threads = n_threads;
    const size_t bytes = Kernel::workspace_bytes(shape, limits);
    workspace.plan(bytes);
    memory = Arena(bytes_of([&](Arena& arena) { workspace.allocate(arena); }));
    workspace.allocate(memory);
    if (bytes > 0) fill(workspace.begin().take<std::byte>(0), 0xff, bytes);
  }
  Arena memory;
  Workspace workspace;
};

// A cache in which the sequences' blocks are permuted and every byte that no token wrote makes a NaN.
template <class Kv, int Block>
class World {
 public:
  explicit World(const Data& data)
      : d(data),
        batches(static_cast<int>(data.contexts.size()),
                std::max(1, *std::max_element(data.contexts.begin(), data.contexts.end())), Block, 3) {
    const AttentionShape& s = d.shape;
    const CacheShape shape{
        LAYERS, s.n_kv_heads, s.k_dim, s.v_is_k ? 0 : s.v_dim, batches.n_blocks(), batches.block_size()};
    memory = Arena(bytes_of([&](Arena& arena) { KVCache<Kv, Block>(arena, shape); }));
    cache = KVCache<Kv, Block>(memory, shape);
    fill(cache.memory(), 0xff, cache.size());
  }

  // The tokens enter the cache, no more.
  void append(const Piece& chunk) {
    const Batch& batch = gather({chunk});
    const Buffer<float> device_k = device_copy(k), device_v = device_copy(v);
    cache.append(Team{}, LAYER, on_device.upload(batch), {}, device_k.data(), device_v.data());
    synchronize();
  }

  // One step, by n_threads in memory for `planned`: the chunks' tokens enter the cache, then attend.
  template <class Kernel>
  const std::vector<float>& step(const std::vector<Piece>& chunks, int n_threads, int planned) {
    const Batch& batch = on_device.upload(gather(chunks));
    AttentionShape s = d.shape;
    const Buffer<float> device_q = device_copy(q), device_k = device_copy(k), device_v = device_copy(v);
    const Buffer<float> sinks =
        device_copy(s.sinks ? std::vector<float>(s.sinks, s.sinks + s.n_heads) : std::vector<float>());
    s.sinks = sinks.data();
    out.assign(at(batch.n_tokens * s.n_heads * s.v_dim), -7);
    Buffer<float> device_out = device_copy(out);
    ScratchMemory<Kernel> scratch(s, batch.n_tokens, longest_context, planned);
    Threads threads(n_threads);
    threads.run(n_threads, [&](const Team& team) {
      cache.append(team, LAYER, batch, {}, device_k.data(), device_v.data());
      Kernel::attend(team, device_q.data(), cache, LAYER, batch, s, device_out.data(), scratch.workspace);
    });
    return out = host_copy(device_out);
  }

  std::vector<float> out;  // [tokens, n_heads, v_dim] of the last step

 private:
  const Batch& gather(const std::vector<Piece>& chunks) {
    const AttentionShape& s = d.shape;
    q.clear(), k.clear(), v.clear();
    longest_context = 0;
    const auto append = [](std::vector<float>& to, const std::vector<float>& from, int first, int n, int width) {
      if (!from.empty()) to.insert(to.end(), from.begin() + first * width, from.begin() + (first + n) * width);
    };
    for (const Piece& c : chunks) {
      append(q, d.q[at(c.sequence)], c.first, c.n, s.n_heads * s.k_dim);
      append(k, d.k[at(c.sequence)], c.first, c.n, s.n_kv_heads * s.k_dim);
      append(v, d.v[at(c.sequence)], c.first, c.n, s.n_kv_heads * s.v_dim);
      longest_context = std::max(longest_context, c.first + c.n);
    }
    return batches.batch(chunks, {}, s.window);
  }

  const Data& d;
  Batches batches;
  DeviceBatch on_device;
  Arena memory;
  KVCache<Kv, Block> cache;
  int longest_context = 0;
  std::vector<float> q, k, v;
};

// One step, with the tokens before the chunks in the cache.
template <class Kernel, class Kv, int Block>
std::vector<float> attention_of(const Data& d, const std::vector<Piece>& chunks, int n_threads) {
  World<Kv, Block> world(d);
  for (const Piece& c : chunks)
    if (c.first > 0) world.append({c.sequence, 0, c.first});
  return world.template step<Kernel>(chunks, n_threads, n_threads);
}

inline void expect_same_bits(const std::vector<float>& a, const std::vector<float>& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0) << what;
}
