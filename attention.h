// attention.h: softmax(q . K^T * scale) V over the cache, for every variant, on one prototype.
//
// For each KV head g, a group of R = n_heads / n_kv_heads query heads reads the same rows:
//
//     out[h] = softmax(q[h] . K[g, first .. t] * scale) V[g, first .. t]        h in group g
//
// MHA is R = 1, MQA R = n_heads, GQA between; absorbed MLA is one KV head whose V is the first v_dim elements of K's row.
#pragma once

#include "build.h"
#include "kvcache.h"

struct AttentionShape {
  int n_heads = 0, n_kv_heads = 0;
  int k_dim = 0;             // width of q and of a K row
  int v_dim = 0;             // width of a V row and of out
  bool v_is_k = false;       // V is the first v_dim elements of K's row (MLA)
  float scale = 0;           // factor on q . k
  float softcap = 0;         // s -> softcap tanh(s / softcap); 0: none
  int window = 0;            // token t sees t - window + 1 .. t; 0: 0 .. t
};

struct Naive {  // materialises a row of scores, then the softmax, then the sum: the textbook
  static constexpr const char* name = "naive";
};
struct Flash {  // online softmax over tiles (Flash-Attention, arXiv 2205.14135): a tile of rows is read once for its group
  static constexpr const char* name = "flash";
};

struct AttentionWorkspace {
  AttentionWorkspace() = default;
  // max_tokens: of a batch; context: the longest. n_threads: of the team.
  AttentionWorkspace(const AttentionShape& shape, int max_tokens, int max_sequences, int context, int n_threads);
  static size_t bytes(const AttentionShape& shape, int max_tokens, int max_sequences, int context, int n_threads);
  Buffer<std::byte> memory;
};

// q [T, n_heads, k_dim], out [T, n_heads, v_dim]. Every row's arithmetic depends on its position and its sequence's cache
// rows alone: tiles and splits of the context have a fixed size in tokens and partial results merge in order of position,
// so the result is the same bit for bit for any batch, chunking, block size and number of threads. Called by every thread
// of the team; ends with a barrier.
template <class Kernel, class Kv, int Block>
void attend(const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch, const AttentionShape& shape,
            float* out, AttentionWorkspace& workspace);
