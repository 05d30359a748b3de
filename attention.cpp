// attention.cpp: attention as its formula says, in plain loops: for each token and query head a row of scores over the
// context, its softmax, the weighted sum of V. Every K and V row is read again for every query head; the fast one is
// kernels/flash.cpp.
#include "attention.h"

#include <algorithm>

#include "kernels/build.h"

namespace {

// A team's scratch memory.
struct Scratch {
  int context, width;
  float* weights;  // [n_threads, context]
  float* rows;     // [n_threads, width] a K or V row each

  Scratch(Arena& arena, const AttentionShape& shape, int longest_context, int n_threads)
      : context(longest_context),
        width(std::max(shape.k_dim, shape.v_dim)),
        weights(arena.take<float>(area(n_threads, context))),
        rows(arena.take<float>(area(n_threads, width))) {}
};

}  // namespace

template <class Kv, int Block>
void Naive::attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                   const AttentionShape& shape, float* out, const Workspace& workspace) {
  const int H = shape.n_heads, block_size = cache.block_size();
  const int longest = std::max(0, *std::max_element(batch.context_len, batch.context_len + batch.n_sequences));
  Arena arena = workspace.begin();
  const Scratch scratch(arena, shape, longest, team.size);
  float* weights = scratch.weights + area(team.rank, scratch.context);
  float* row = scratch.rows + area(team.rank, scratch.width);
  const int first_token = batch.query_start[0], n_tokens = batch.query_start[batch.n_sequences] - first_token;

  team.for_each_dynamic(n_tokens * H, [&](int index) {
    const int t = first_token + index / H, h = index % H, g = h / (H / shape.n_kv_heads);
    const int* next = std::upper_bound(batch.query_start, batch.query_start + batch.n_sequences, t);
    const int sequence = static_cast<int>(next - batch.query_start) - 1;
    const int* blocks = batch.block_table + area(sequence, batch.max_blocks);
    const int position = batch.positions[t];
    attention_weights(q + area(t * H + h, shape.k_dim), cache, layer, blocks, h, position, shape, row, weights);
    float* result = out + area(t * H + h, shape.v_dim);
    std::fill_n(result, shape.v_dim, 0.0f);
    for (int p = shape.first_seen(position); p <= position; p++) {
      cache.load_v(layer, blocks[p / block_size], g, p % block_size, shape.v_dim, row);
      for (int i = 0; i < shape.v_dim; i++) result[i] += weights[p] * row[i];
    }
  });
}

size_t Naive::workspace_bytes(const AttentionShape& shape, const Limits& limits) {
  return bytes_of([&](Arena& arena) { Scratch(arena, shape, limits.context, limits.max_threads); });
}

#define INSTANTIATE(Kv, Block)                                                                                    \
  template void Naive::attend<Kv, Block>(const Team&, const float*, const KVCache<Kv, Block>&, int, const Batch&, \
                                         const AttentionShape&, float*, const Workspace&);
FOR_EACH_CPU_CACHE(INSTANTIATE)
