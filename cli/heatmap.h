// heatmap.h: what each head looks at, as a picture: --heatmap FILE.png.
#pragma once

#include <algorithm>
#include <numeric>

#include "cli/session.h"
#include "transformer.h"

constexpr int MOST_TOKENS_DRAWN = 64;  // more do not fit a screen

// The attention weights of one prompt.
struct AttentionMap {
  int layer = 0, n_heads = 0, n_tokens = 0;
  std::vector<float> weights;  // [n_heads, n_tokens, n_tokens]: of the row's token on the column's
};

// A kernel that keeps, beside its results, what the heads of one layer looked at.
template <class Kernel>
struct Watched : Kernel {
  static inline AttentionMap* map = nullptr;

  template <class Kv, int Block>
  static void attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                     const AttentionShape& shape, float* out, const Workspace& workspace) {
    if (layer == map->layer && team.rank == 0) watch(q, cache, batch, shape);
    Kernel::attend(team, q, cache, layer, batch, shape, out, workspace);
  }

  // Of q [T, n_heads, k_dim].
  template <class Kv, int Block>
  static void watch(const float* q, const KVCache<Kv, Block>& cache, const Batch& batch, AttentionShape shape) {
    const int T = map->n_tokens, H = shape.n_heads;
    const auto queries = on_host(q, area(T * H, shape.k_dim));
    const auto blocks = on_host(batch.block_table, area(1, batch.max_blocks));
    const auto sinks = on_host(shape.sinks, shape.sinks ? area(H, 1) : 0);
    if (shape.sinks) shape.sinks = sinks.data();
    std::vector<float> row(area(1, shape.k_dim));
    for (int t = 0; t < T; t++)  // at position t
      for (int h = 0; h < H; h++)
        attention_weights(queries.data() + area(t * H + h, shape.k_dim), cache, map->layer, blocks.data(), h, t, shape,
                          row.data(), map->weights.data() + area(h * T + t, T));
  }

  template <class T>
  static std::vector<T> on_host(const T* x, size_t n) {
    std::vector<T> copy(n);
    if (n > 0) download(copy.data(), x, n * sizeof(T));
    return copy;
  }
};

// One step of the session's prompt, watched at the layer that --layer names.
template <class Attention, class Kernel, class Kv, int Block>
AttentionMap watch(const Session& session) {
  const int n = static_cast<int>(session.prompt.size()), block_size = session.setup.block_size;
  const int n_blocks = (n + block_size - 1) / block_size;
  Limits limits = session.setup.limits;
  limits.max_tokens = limits.context = n, limits.n_blocks = n_blocks, limits.max_sequences = limits.max_logits = 1;
  limits.mla_form = MlaForm::absorbed;  // the one that attends to the rows of the cache
  Transformer<Attention, Watched<Kernel>, Kv, Block> transformer(session.model, limits);

  const int H = session.model.config.n_heads;
  AttentionMap map{session.options.layer, H, n, std::vector<float>(static_cast<size_t>(H) * area(n, n))};
  Watched<Kernel>::map = &map;
  std::vector<int> count(static_cast<size_t>(n));  // token t is at position t, in slot t; the blocks follow each other
  std::iota(count.begin(), count.end(), 0);
  const int query_start[] = {0, n};
  Batch batch;
  batch.n_tokens = n, batch.n_sequences = 1, batch.max_blocks = n_blocks, batch.tokens = session.prompt.data();
  batch.query_start = query_start, batch.context_len = &n;
  batch.positions = batch.slot_mapping = batch.block_table = count.data();
  transformer.forward(batch, session.threads, limits.max_threads);
  return map;
}

// Throws Error where the prompt is too long to draw, or the model has no such head.
void check_heatmap(const Session& session);

// Draws the head that --head names, or all of the layer, to the file that --heatmap names.
void draw(const Session& session, const AttentionMap& map);
