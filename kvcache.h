// kvcache.h: where the keys and values of every token live: the contract that every device keeps.
//
// Token t of sequence s, layer l, KV head g is the row
//
//     block_table[s][t / block_size], slot t % block_size
//
// of layer l and head g. A contiguous cache is a paged cache whose block is the whole context (Block = 0): one
// addressing function, and the division disappears. Names follow vLLM: block_table, block_size, slot_mapping,
// context_len, query_start.
//
// How a block's rows lie in it is the device's own choice: kernels/kv_cpu.h, kernels/kv_gpu.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>

#include "kernels/arena.h"
#include "kernels/batch.h"
#include "kernels/layers.h"
#include "kernels/team.h"

// What is kept of a number: a type's name and the bytes of a row of dim elements. Infinities and NaN come back as
// infinities or NaN (q8, q4: as NaN, with all that share their scale), never as a plausible number. So does what is
// beyond the type's `largest`, as NaN: an infinite key could give a weight of 0, and nobody would see it.
constexpr float FLOAT_MAX = std::numeric_limits<float>::max();

struct KvF32 {  // float32
  static constexpr const char* name = "f32";
  static constexpr float largest = FLOAT_MAX;
  static constexpr size_t row_bytes(int dim) { return sizeof(float) * static_cast<size_t>(dim); }
};

// IEEE half, round to nearest even: error 2^-11 of the element.
struct KvF16 {
  static constexpr const char* name = "f16";
  static constexpr float largest = 65504;
  static constexpr size_t row_bytes(int dim) { return sizeof(uint16_t) * static_cast<size_t>(dim); }
};

struct KvBF16 {  // bfloat16, round to nearest even: error 2^-8 of the element
  static constexpr const char* name = "bf16";
  static constexpr float largest = FLOAT_MAX;
  static constexpr size_t row_bytes(int dim) { return sizeof(uint16_t) * static_cast<size_t>(dim); }
};

// int8, and a float16 scale for each QUANT_GROUP elements (the last may be fewer): x = scale * q, q in -127 .. 127,
// scale = amax / 127 rounded *up* to float16, so that amax itself is in reach: error (1 + 2^-10) amax / 254, or 2^-25
// where the scale is subnormal.
struct KvQ8 {
  static constexpr const char* name = "q8";
  static constexpr float largest = 127 * 65504.0f;
  static constexpr int QUANT_GROUP = 32;
  static constexpr size_t scale_bytes(int dim) {
    return sizeof(uint16_t) * static_cast<size_t>((dim + QUANT_GROUP - 1) / QUANT_GROUP);
  }
  // Even, so that the scales of the next row are aligned.
  static constexpr size_t row_bytes(int dim) { return scale_bytes(dim) + static_cast<size_t>(dim + dim % 2); }
};

// 4 bits, and a float16 scale and minimum for each QUANT_GROUP elements (the last group is filled up): x = minimum +
// scale * q, q in 0 .. 15; the minimum is rounded *down* to float16, the scale = (largest - minimum) / 15 *up*, so that
// both ends are in reach: error half a scale.
struct KvQ4 {
  static constexpr const char* name = "q4";
  static constexpr float largest = 65504;
  static constexpr int QUANT_GROUP = 32;
  static constexpr size_t groups(int dim) { return static_cast<size_t>((dim + QUANT_GROUP - 1) / QUANT_GROUP); }
  static constexpr size_t scale_bytes(int dim) { return 2 * sizeof(uint16_t) * groups(dim); }
  static constexpr size_t row_bytes(int dim) { return scale_bytes(dim) + QUANT_GROUP / 2 * groups(dim); }
};

using KvTypes = std::tuple<KvF32, KvF16, KvBF16, KvQ8, KvQ4>;

struct CacheShape {
  int n_layers, n_kv_heads;
  int k_dim;       // elements of a K row
  int v_dim;       // elements of a V row; 0: there are none, V is the first elements of the K row (MLA)
  int n_blocks;    // blocks in the pool; contiguous: sequences
  int block_size;  // tokens a block; a paged cache's equals its Block
};

// The cache as kernels see it, passed by value.
template <class Kv, int Block>
struct CacheView {
  std::byte* memory = nullptr;  // [n_layers, n_kv_heads, n_blocks, block_bytes]
  CacheShape shape{};
  size_t block_bytes = 0;  // K and V rows of one head and the tokens of one block, and what the layout adds

  constexpr int block_size() const { return Block ? Block : shape.block_size; }
  constexpr std::byte* block(int layer, int block, int kv_head) const {
    const auto size = [](int n) { return static_cast<size_t>(n); };
    const size_t head = size(layer) * size(shape.n_kv_heads) + size(kv_head);
    return memory + (head * size(shape.n_blocks) + size(block)) * block_bytes;
  }
};

template <class Kv, int Block>
class KVCache {
 public:
  KVCache() = default;
  KVCache(Arena& arena, const CacheShape& shape)
      : view_{arena.take<std::byte>(bytes(shape)), shape, block_bytes(shape)}, overflowed_(arena.take<int>(1)) {}

  static size_t bytes_per_token(const CacheShape& shape) {  // all layers
    return area(shape.n_layers, shape.n_kv_heads) * (Kv::row_bytes(shape.k_dim) + Kv::row_bytes(shape.v_dim));
  }
  static size_t bytes(const CacheShape& shape) {
    return area(shape.n_layers, shape.n_kv_heads) * static_cast<size_t>(shape.n_blocks) * block_bytes(shape);
  }

  const CacheShape& shape() const { return view_.shape; }
  int block_size() const { return view_.block_size(); }
  const CacheView<Kv, Block>& view() const { return view_; }

  // The only writer. k [T, n_kv_heads, k_dim], v [T, n_kv_heads, v_dim] (null where v_dim is 0); token t goes to
  // slot_mapping[t]. Before, the step's queries and keys are turned (layers.h). Every thread of the team calls it; ends
  // with a barrier.
  void append(const Team& team, int layer, const Batch& batch, const Turn& turn, const float* k, const float* v);

  // Whether anything finite was beyond Kv::largest, and so is NaN now.
  bool overflowed() const;

  // One token's rows, for those who are not in a hurry: out [k_dim] float32 ...
  void load_k(int layer, int block, int kv_head, int slot, float* out) const;
  // ... and out [n] float32, the first n elements of V's row; of K's, where there are no V rows.
  void load_v(int layer, int block, int kv_head, int slot, int n, float* out) const;

  // out [n, k_dim] float32: the K rows of the one KV head at positions first .. first + n - 1 of the batch's sequence s
  // (for MLA's expanded form). Every thread of the team calls it; ends with a barrier.
  void read_k(const Team& team, int layer, const Batch& batch, int s, int first, int n, float* out) const;

  // Copies whole blocks, all layers: copy_from[i] -> copy_to[i]. Every thread of the team calls it; ends with a
  // barrier.
  void copy_blocks(const Team& team, const Batch& batch);

  // For the tests, which poison freed slots: [size()] bytes of device memory.
  std::byte* memory() { return view_.memory; }
  size_t size() const { return bytes(view_.shape); }

 private:
  static size_t block_bytes(const CacheShape& shape);  // as CacheView has it: the layout is the device's

  CacheView<Kv, Block> view_;
  int* overflowed_ = nullptr;  // [1] in device memory
};
