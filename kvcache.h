// kvcache.h: where the keys and values of every token live.
//
// Token t of sequence s, layer l, KV head g is the row
//
//     block_table[s][t / block_size], slot t % block_size
//
// of layer l and head g. A contiguous cache is a paged cache whose block is the whole context (Block = 0): one
// addressing function, and the division disappears. The batch carries positions, lengths and tables as plain arrays, so
// that they can sit in device memory. Names follow vLLM: block_table, block_size, slot_mapping, context_len,
// query_start.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/arena.h"
#include "kernels/batch.h"
#include "kernels/simd.h"
#include "kernels/team.h"

// Tokens whose keys may lie side by side, see KVCache.
constexpr int KEY_LANES = 16;
static_assert(KEY_LANES % simd::LANES == 0);

// How `dim` elements of a token are kept: a row of scales (q8 alone) and elements, or, k-major, KEY_LANES tokens' rows
// as one matrix, transposed: [scales of a row, KEY_LANES], then [dim, KEY_LANES]; it takes the bytes of KEY_LANES rows.
// Each type: name, Element, the bytes of a row's scales and of all of it (a multiple of 2), store a row, and ways to
// read floats. `element` is one of a row; `lanes` is elements i .. i + LANES - 1, all within the row, i a multiple of
// LANES; `key` is element i of one token of a k-major matrix; `keys` that of tokens lane .. lane + LANES - 1.
// Infinities and NaN come back as infinities or NaN (q8: as NaN, with their group), never as a plausible number; what
// is beyond the type's `largest` as NaN: an infinite score would be a weight of 0, and nobody would see it.
template <class Codec, class T>
struct Unscaled {
  using Element = T;
  static constexpr size_t scale_bytes(int) { return 0; }
  static constexpr size_t row_bytes(int dim) { return sizeof(T) * static_cast<size_t>(dim); }
  static float element(const std::byte* row, int, int i) { return Codec::widen(at(row)[i]); }
  static simd::F32 lanes(const std::byte* row, int, int i) { return Codec::load(at(row) + i); }
  static float key(const std::byte* matrix, int, int i, int lane) {
    return Codec::widen(at(matrix)[i * KEY_LANES + lane]);
  }
  static simd::F32 keys(const std::byte* matrix, int, int i, int lane) {
    return Codec::load(at(matrix) + i * KEY_LANES + lane);
  }

 private:
  static const T* at(const std::byte* p) { return reinterpret_cast<const T*>(p); }
};

constexpr float FLOAT_MAX = std::numeric_limits<float>::max();

struct KvF32 : Unscaled<KvF32, float> {  // float32
  static constexpr float largest = FLOAT_MAX;
  static constexpr const char* name = "f32";
  static float widen(float x) { return x; }
  static simd::F32 load(const float* p) { return simd::load(p); }
  static void store(const float* x, int dim, std::byte* row) { std::memcpy(row, x, row_bytes(dim)); }
};

// IEEE half, round to nearest even: error 2^-11 of the element.
struct KvF16 : Unscaled<KvF16, uint16_t> {
  static constexpr float largest = 65504;
  static constexpr const char* name = "f16";
  static float widen(uint16_t x) { return f16_to_float(x); }
  static simd::F32 load(const uint16_t* p) { return simd::load_f16(p); }
  static void store(const float* x, int dim, std::byte* row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    int i = 0;
    for (; i + simd::LANES <= dim; i += simd::LANES) simd::store_f16(to + i, simd::load(x + i));
    for (; i < dim; i++) to[i] = float_to_f16(x[i]);
    for (i = 0; i < dim; i++)
      if ((to[i] & 0x7fff) == 0x7c00) to[i] = 0x7e00;  // infinity: NaN
  }
};

struct KvBF16 : Unscaled<KvBF16, uint16_t> {  // bfloat16, round to nearest even: error 2^-8 of the element
  static constexpr float largest = FLOAT_MAX;
  static constexpr const char* name = "bf16";
  static float widen(uint16_t x) { return bf16_to_float(x); }
  static simd::F32 load(const uint16_t* p) { return simd::load_bf16(p); }
  static void store(const float* x, int dim, std::byte* row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    for (int i = 0; i < dim; i++) to[i] = float_to_bf16(x[i]);
  }
};

// int8 in groups of 32 (the last may be shorter): x = scale * q, q in -127 .. 127, scale = amax / 127 rounded *up* to
// float16, so that amax itself is in reach: error (1 + 2^-10) amax / 254 of the group's largest magnitude, or 2^-25
// where the scale is subnormal.
struct KvQ8 {
  static constexpr const char* name = "q8";
  static constexpr int GROUP_SIZE = 32;
  static constexpr float largest = 127 * 65504.0f;
  using Element = int8_t;
  static constexpr size_t scale_bytes(int dim) {
    return sizeof(uint16_t) * static_cast<size_t>((dim + GROUP_SIZE - 1) / GROUP_SIZE);
  }
  static constexpr size_t row_bytes(int dim) { return scale_bytes(dim) + static_cast<size_t>(dim + dim % 2); }
  static float element(const std::byte* row, int dim, int i) {
    return static_cast<float>(elements(row, dim, 1)[i]) * f16_to_float(*scale(row, i, 1));
  }
  static simd::F32 lanes(const std::byte* row, int dim, int i) {
    return simd::mul(simd::load_i8(elements(row, dim, 1) + i), simd::set(f16_to_float(*scale(row, i, 1))));
  }
  static float key(const std::byte* matrix, int dim, int i, int lane) {
    return static_cast<float>(elements(matrix, dim, KEY_LANES)[i * KEY_LANES + lane]) *
           f16_to_float(scale(matrix, i, KEY_LANES)[lane]);
  }
  static simd::F32 keys(const std::byte* matrix, int dim, int i, int lane) {
    return simd::mul(simd::load_i8(elements(matrix, dim, KEY_LANES) + i * KEY_LANES + lane),
                     simd::load_f16(scale(matrix, i, KEY_LANES) + lane));
  }
  static void store(const float* x, int dim, std::byte* row);

 private:
  static const uint16_t* scale(const std::byte* rows, int i, int n_rows) {
    return reinterpret_cast<const uint16_t*>(rows) + i / GROUP_SIZE * n_rows;
  }
  static const int8_t* elements(const std::byte* rows, int dim, size_t n_rows) {
    return reinterpret_cast<const int8_t*>(rows + n_rows * scale_bytes(dim));
  }
};

// Elements first .. last - 1 of a row of dim; first is a multiple of LANES.
template <class Kv>
void load_row(const std::byte* row, int dim, int first, int last, float* x) {
  int i = first;
  for (; i + simd::LANES <= last; i += simd::LANES) simd::store(x + i - first, Kv::lanes(row, dim, i));
  for (; i < last; i++) x[i - first] = Kv::element(row, dim, i);
}

struct CacheShape {
  int n_layers, n_kv_heads;
  int k_dim;       // elements of a K row
  int v_dim;       // elements of a V row; 0: there are none, V is the first elements of the K row (MLA)
  int n_blocks;    // blocks in the pool; contiguous: sequences
  int block_size;  // tokens a block; a paged cache's equals its Block
};

// One array of runs [n_layers, n_kv_heads, n_blocks, block_size / RUN]: each the K rows, then the V rows of RUN tokens.
// So a tile's K and V lie together (4 KB of f16 at a head_dim of 64), wherever a sequence's blocks are; and blocks that
// follow each other are one stream of bytes for a head.
//
// A score is a sum over a K row's elements, and a register holds many tokens' scores: it needs the same element of many
// tokens. So where nothing else reads K and a block is whole matrices, KEY_LANES tokens' rows are kept k-major (as in
// vLLM, whose key blocks are [head_dim / x, block_size, x]). V is read by rows, and MLA's V is K: its cache stays
// token-major.
template <class Kv, int Block>
class KVCache {
 public:
  static constexpr int RUN = std::gcd(Block, KEY_LANES);  // Block 0: KEY_LANES; the context is rounded up to it

  KVCache() = default;
  KVCache(Arena& arena, const CacheShape& shape);

  static size_t bytes_per_token(const CacheShape& shape);  // all layers
  static size_t bytes(const CacheShape& shape);

  const CacheShape& shape() const { return shape_; }
  int block_size() const { return Block ? Block : shape_.block_size; }
  bool k_major() const { return RUN == KEY_LANES && shape_.v_dim > 0; }

  // k-major: the matrix of the run that begins with slot, a multiple of RUN
  const std::byte* k_row(int layer, int block, int kv_head, int slot) const {
    return memory_ + k_offset(layer, block, kv_head, slot);
  }
  const std::byte* v_row(int layer, int block, int kv_head, int slot) const {
    return memory_ + v_offset(layer, block, kv_head, slot);
  }

  // out [k_dim] float32: one token's K row, for those who are not in a hurry.
  void load_k(int layer, int block, int kv_head, int slot, float* out) const;

  // The only writer. k [T, n_kv_heads, k_dim], v [T, n_kv_heads, v_dim] (null where v_dim is 0); token t goes to
  // slot_mapping[t]. Every thread of the team calls it.
  void append(const Team& team, int layer, const Batch& batch, const float* k, const float* v);
  // Whether anything finite was beyond Kv::largest, and so is NaN now.
  bool overflowed() const { return overflowed_; }

  // out [n, k_dim] float32: the K rows of the one KV head at positions first .. first + n - 1 of the batch's sequence s
  // (for MLA's expanded form). Every thread of the team calls it; ends with a barrier.
  void read_k(const Team& team, int layer, const Batch& batch, int s, int first, int n, float* out) const;

  // Copies whole blocks, all layers: copy_from[i] -> copy_to[i]. Every thread of the team calls it.
  void copy_blocks(const Team& team, const Batch& batch);

  // For the tests, which poison freed slots: [size()] bytes.
  std::byte* memory() { return memory_; }
  size_t size() const { return bytes(shape_); }

 private:
  static size_t runs_of_block(const CacheShape& shape) {
    return static_cast<size_t>(((Block ? Block : shape.block_size) + RUN - 1) / RUN);
  }
  static size_t run_bytes(const CacheShape& shape) {
    return RUN * (Kv::row_bytes(shape.k_dim) + Kv::row_bytes(shape.v_dim));
  }
  size_t block_offset(int layer, int block, int kv_head) const {
    const auto size = [](int n) { return static_cast<size_t>(n); };
    const size_t head = size(layer) * size(shape_.n_kv_heads) + size(kv_head);
    return (head * size(shape_.n_blocks) + size(block)) * block_bytes_;
  }
  size_t k_offset(int layer, int block, int kv_head, int slot) const {
    const size_t run = static_cast<size_t>(slot / RUN), i = static_cast<size_t>(slot % RUN);
    return block_offset(layer, block, kv_head) + run * run_bytes_ + i * k_row_bytes_;
  }
  size_t v_offset(int layer, int block, int kv_head, int slot) const {
    const size_t i = static_cast<size_t>(slot % RUN);
    return k_offset(layer, block, kv_head, slot - slot % RUN) + RUN * k_row_bytes_ + i * v_row_bytes_;
  }
  void store_k(int layer, int block, int kv_head, int slot, const float* x);

  CacheShape shape_{};
  size_t k_row_bytes_ = 0, v_row_bytes_ = 0, run_bytes_ = 0, block_bytes_ = 0;
  std::byte* memory_ = nullptr;
  bool overflowed_ = false;
};
