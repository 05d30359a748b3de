// attention.h: softmax(q . K^T * scale) V over the cache, for every variant, on one prototype.
//
// For each KV head g, a group of R = n_heads / n_kv_heads query heads reads the same rows:
//
//     out[h] = softmax(q[h] . K[g, first .. t] * scale) V[g, first .. t]        h in group g
//
// MHA is R = 1, MQA R = n_heads, GQA between; absorbed MLA is one KV head whose V is the first v_dim elements of K's
// row.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvcache.h"

struct AttentionShape {
  int n_heads = 0, n_kv_heads = 0;
  int k_dim = 0;                 // width of q and of a K row
  int v_dim = 0;                 // width of a V row and of out
  bool v_is_k = false;           // V is the first v_dim elements of K's row (MLA)
  float scale = 0;               // factor on q . k
  float softcap = 0;             // s -> softcap tanh(s / softcap); 0: none
  int window = 0;                // token t sees t - window + 1 .. t; 0: 0 .. t
  const float* sinks = nullptr;  // [n_heads] scores without a value, which join the softmax as they are, neither
                                 // scaled nor capped (gpt-oss); null: none

  // The first position that a token at this one sees.
  constexpr int first_seen(int position) const { return window > 0 && position >= window ? position - window + 1 : 0; }
};

// The context is cut at multiples of this many tokens; each piece's result is computed on its own, and the results are
// merged in order of position.
constexpr int ATTENTION_SPLIT = 256;

// Float32 rows in plain memory, a piece of the context, for a caller who makes them as he goes (MLA's expanded form).
struct PlainRows {
  const float* k = nullptr;  // [n, n_kv_heads, k_dim]
  const float* v = nullptr;  // [n, n_kv_heads, v_dim]
  int first = 0;             // position of row 0, a multiple of ATTENTION_SPLIT
  int n = 0;                 // rows: up to the end of a split, or of the context
};

// What one query row q [k_dim] of a head, at this position of a sequence whose block table is given, looks at: weights
// [position + 1], the softmax of its scores; 0 for what is behind the window. row: scratch, [k_dim]. All of it lies on
// the host; of a cache on a GPU a row at a time is fetched.
template <class Kv, int Block>
void attention_weights(const float* q, const KVCache<Kv, Block>& cache, int layer, const int* blocks, int head,
                       int position, const AttentionShape& shape, float* row, float* weights) {
  const int g = head / (shape.n_heads / shape.n_kv_heads), block_size = cache.block_size();
  const int first = shape.first_seen(position);
  std::fill_n(weights, first, 0.0f);
  float largest = shape.sinks ? shape.sinks[head] : -INFINITY;
  for (int p = first; p <= position; p++) {
    cache.load_k(layer, blocks[p / block_size], g, p % block_size, row);
    float score = 0;
    for (int i = 0; i < shape.k_dim; i++) score += q[i] * row[i];
    score *= shape.scale;
    if (shape.softcap > 0) score = shape.softcap * std::tanh(score / shape.softcap);
    weights[p] = score;
    largest = std::max(largest, score);
  }
  float sum = shape.sinks ? std::exp(shape.sinks[head] - largest) : 0;
  for (int p = first; p <= position; p++) sum += weights[p] = std::exp(weights[p] - largest);
  for (int p = first; p <= position; p++) weights[p] /= sum;
}

// A kernel's `attend`: q [T, n_heads, k_dim], out [T, n_heads, v_dim]. Every row's arithmetic depends on its position
// and its sequence's cache rows alone, so the result is the same bit for bit for any batch, chunking, block size and
// number of threads. Every thread of the team calls it; it ends with a barrier. context_len 0 and sequences without
// query rows are allowed. workspace_bytes: for this shape and the largest batch, context and team; one workspace serves
// several shapes, one after the other. A call that needs more, such as one of a larger team, throws Error on every
// thread before anything is written.

// attention.cpp: a row of scores, its softmax, the weighted sum of V: the textbook.
struct Naive {
  static constexpr const char* name = "naive";
  static constexpr bool takes_rows = false;
  template <class Kv, int Block>
  static void attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                     const AttentionShape& shape, float* out, const Workspace& workspace);
  static size_t workspace_bytes(const AttentionShape& shape, const Limits& limits);
};

// kernels/flash.cpp: online softmax over tiles (FlashAttention, arXiv 2205.14135): a tile of rows is read once for its
// group.
struct Flash {
  static constexpr const char* name = "flash";
  static constexpr bool takes_rows = true;
  template <class Kv, int Block>
  static void attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                     const AttentionShape& shape, float* out, const Workspace& workspace);
  static size_t workspace_bytes(const AttentionShape& shape, const Limits& limits);

  // How far a query's element and a weight are rounded before they are multiplied, relatively: 0 but on tensor cores,
  // which take 16-bit numbers (kernels/mma.h).
  template <class Kv>
  static double operand_rounding();

  // The same over PlainRows, for one sequence of the batch: called for each split of its context that a query sees, in
  // order of position, with all else the same. Between the calls out holds the running sum and the workspace the
  // running maximum and denominator; several sequences of the batch may be under way together.
  static void attend_rows(const Team& team, const float* q, const PlainRows& rows, const Batch& batch, int sequence,
                          const AttentionShape& shape, float* out, const Workspace& workspace);
};
