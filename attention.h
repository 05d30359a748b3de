// attention.h: softmax(q . K^T * scale) V over the cache, for every variant, on one prototype.
//
// For each KV head g, a group of R = n_heads / n_kv_heads query heads reads the same rows:
//
//     out[h] = softmax(q[h] . K[g, first .. t] * scale) V[g, first .. t]        h in group g
//
// MHA is R = 1, MQA R = n_heads, GQA between; absorbed MLA is one KV head whose V is the first v_dim elements of K's
// row.
#pragma once

#include "kernels/build.h"
#include "kvcache.h"

struct AttentionShape {
  int n_heads = 0, n_kv_heads = 0;
  int k_dim = 0;        // width of q and of a K row
  int v_dim = 0;        // width of a V row and of out
  bool v_is_k = false;  // V is the first v_dim elements of K's row (MLA)
  float scale = 0;      // factor on q . k
  float softcap = 0;    // s -> softcap tanh(s / softcap); 0: none
  int window = 0;       // token t sees t - window + 1 .. t; 0: 0 .. t
};

struct Naive {  // materialises a row of scores, then the softmax, then the sum: the textbook
  static constexpr const char* name = "naive";
};
struct Flash {  // online softmax over tiles (Flash-Attention, arXiv 2205.14135): a tile of rows is read once for its
                // group
  static constexpr const char* name = "flash";
};

// The context is cut at multiples of this many tokens; each piece's result is computed on its own, and the results are
// merged in order of position.
constexpr int ATTENTION_SPLIT = 256;

// Scratch memory of a call, sized for the largest: bytes is for max_tokens of a batch, the longest context and the
// threads of the team. One workspace serves several shapes, one after the other: give it the largest size.
struct AttentionWorkspace {
  AttentionWorkspace() = default;
  explicit AttentionWorkspace(size_t n) : memory(n) {}
  static size_t bytes(const AttentionShape& shape, int max_tokens, int context, int n_threads);
  Buffer<std::byte> memory;
};

// q [T, n_heads, k_dim], out [T, n_heads, v_dim]. Every row's arithmetic depends on its position and its sequence's
// cache rows alone: tiles and splits of the context have a fixed size in tokens and partial results merge in order of
// position, so the result is the same bit for bit for any batch, chunking, block size and number of threads. Called by
// every thread of the team; ends with a barrier. context_len 0 and sequences without query rows are allowed.
template <class Kernel, class Kv, int Block>
void attend(const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch, const AttentionShape& shape,
            float* out, AttentionWorkspace& workspace);

// Flash attention over float32 rows in plain memory, a piece of the context at a time, for a caller who makes them as
// he goes (MLA's expanded form): for the sequence's query rows, out holds the running sum and the workspace the running
// maximum and denominator, merged by the same arithmetic as in attend.
//
//     attend_begin(...)                                            once
//     for first = 0, ATTENTION_SPLIT, ... : make rows; attend_rows(...)   in order of position
//     attend_end(...)                                              once
//
// Each is called by every thread of the team and ends with a barrier. Batch, shape, out and workspace stay the same
// from begin to end; several sequences of the batch may be under way together.
struct PlainRows {
  const float* k = nullptr;  // [n, n_kv_heads, k_dim]
  const float* v = nullptr;  // [n, n_kv_heads, v_dim]
  int first = 0;             // position of row 0, a multiple of ATTENTION_SPLIT
  int n = 0;                 // rows: up to the end of a split, or of the context
};
void attend_begin(const Batch& batch, int sequence, const AttentionShape& shape, float* out,
                  AttentionWorkspace& workspace);
void attend_rows(const float* q, const PlainRows& rows, const Batch& batch, int sequence, const AttentionShape& shape,
                 float* out, AttentionWorkspace& workspace);
void attend_end(const Batch& batch, int sequence, const AttentionShape& shape, float* out,
                AttentionWorkspace& workspace);
