// probe_attention.h: the attention of this build, measured.
#pragma once

#include <numeric>
#include <vector>

#include "cli/probe.h"
#include "variants.h"

// FLOP/s of the last `tokens` of a sequence of `context` (MLA: absorbed) on a team of `size` threads, in one layer
// after the other. Of decode those are as many as the model has, so that rows come from where a step's come from; of a
// prompt, whose tokens share rows, it is one.
template <class Kernel, class Kv, int Block>
double attention_speed(Threads& threads, int size, const Config& c, int tokens, int context,
                       const std::function<void()>& before) {
  constexpr size_t MOST = size_t{128} << 20;  // bytes of the cache
  constexpr double LONG_ENOUGH = 0.05;        // s of a run: a slow kernel walks through fewer layers
  const int block_size = Block ? Block : context;
  CacheShape row;
  with_variant(c.attention,
               [&](auto v) { row = decltype(v)::type::cache_shape(c, (context - 1) / block_size + 1, block_size); });
  row.n_layers = 1;
  if (tokens == 1)
    row.n_layers = largest(c.n_layers, [&](int n) {
      return n * KVCache<Kv, Block>::bytes_per_token(row) * static_cast<size_t>(context) <= MOST || n == 1;
    });
  const bool v_is_k = row.v_dim == 0;
  const AttentionShape shape{.n_heads = c.n_heads,
                             .n_kv_heads = row.n_kv_heads,
                             .k_dim = row.k_dim,
                             .v_dim = v_is_k ? c.kv_lora_rank : row.v_dim,
                             .v_is_k = v_is_k,
                             .scale = 1};
  Arena memory(bytes_of([&](Arena& arena) { KVCache<Kv, Block>(arena, row); }));
  KVCache<Kv, Block> cache(memory, row);
  fill(cache.memory(), 0, cache.size());  // pages that were never written would all be one
  Limits limits;
  limits.max_tokens = tokens, limits.max_sequences = 1, limits.context = context, limits.max_threads = size;
  Workspace workspace;
  workspace.plan(Kernel::workspace_bytes(shape, limits));
  Arena scratch(bytes_of([&](Arena& arena) { workspace.allocate(arena); }));
  workspace.allocate(scratch);

  std::vector<int> count(static_cast<size_t>(context));  // blocks, and positions, that follow each other
  std::iota(count.begin(), count.end(), 0);
  const int query_start[] = {0, tokens};
  Batch batch;
  batch.n_tokens = tokens, batch.n_sequences = 1, batch.max_blocks = row.n_blocks;
  batch.positions = count.data() + context - tokens, batch.block_table = count.data();
  batch.query_start = query_start, batch.context_len = &context;
  const Buffer<float> q(area(tokens, shape.n_heads * shape.k_dim));
  Buffer<float> out(area(tokens, shape.n_heads * shape.v_dim));
  int layers = 1;
  const auto attend = [&](const Team& team) {
    for (int i = 0; i < layers; i++) Kernel::attend(team, q.data(), cache, i, batch, shape, out.data(), workspace);
  };
  if (row.n_layers > 1)
    layers = std::clamp(static_cast<int>(LONG_ENOUGH / median_seconds(threads, size, attend)), 1, row.n_layers);
  const double seconds = median_seconds(threads, size, attend, before);
  const double pairs = tokens * (context - (tokens - 1) / 2.0);
  return layers * 2 * pairs * shape.n_heads * (shape.k_dim + shape.v_dim) / seconds;
}
