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

#include "device.h"
#include "simd.h"

// One step's work: any mix of prompt chunks and decode tokens. The tokens of sequence s are query_start[s] ..
// query_start[s + 1] - 1, in order of position, and are the last tokens of its context.
struct Batch {
  int n_tokens = 0;                   // T
  int n_sequences = 0;                // S
  const int* tokens = nullptr;        // [T]
  const int* positions = nullptr;     // [T] position in its sequence, from 0
  const int* query_start = nullptr;   // [S + 1]
  const int* context_len = nullptr;   // [S] tokens of the sequence in the cache once this step has appended its own
  const int* block_table = nullptr;   // [S, max_blocks]; entries past the context (or behind every window) are not read
  int max_blocks = 0;                 // row length of block_table
  const int* slot_mapping = nullptr;  // [T] block * block_size + slot: where append writes the token's rows
  int n_logits = 0;
  const int* logit_rows = nullptr;  // [n_logits] tokens of the batch whose logits are wanted, ascending
  int n_copies = 0;                 // blocks to copy in every layer before anything is appended (copy on write)
  const int* copy_from = nullptr;   // [n_copies] block
  const int* copy_to = nullptr;     // [n_copies] block
};

// How one row of `dim` elements is kept. Each type: name, the row's bytes (a multiple of 2), store, and three ways to
// read as floats: `lanes` is elements i .. i + LANES - 1, all within the row, i a multiple of LANES; `eight` elements i
// .. i + 7, i a multiple of 8, zeros past the end; `columns` those eight of LANES rows, transposed: out[j] is element
// i + j of each. Infinities and NaN come back as infinities or NaN (q8: as NaN, with their group), never as a plausible
// number.

// row + i, or where fewer than eight elements are left, those and zeros in `padded`.
template <class T>
const T* eight_or_padded(const T* row, int dim, int i, T (&padded)[8]) {
  if (i + 8 <= dim) return row + i;
  std::fill_n(padded, 8, T(0));
  return std::copy(row + i, row + dim, padded) - (dim - i);
}

// The same of LANES rows, whose elements begin at byte `at`.
template <class T>
struct PaddedRows {
  T padded[simd::LANES][8];
  const std::byte* row[simd::LANES];
  PaddedRows(const std::byte* const* rows, size_t at, int dim, int i) {
    for (int j = 0; j < simd::LANES; j++)
      row[j] = reinterpret_cast<const std::byte*>(
          eight_or_padded(reinterpret_cast<const T*>(rows[j] + at), dim, i, padded[j]));
  }
};

struct KvF32 {  // float32
  static constexpr const char* name = "f32";
  static constexpr size_t row_bytes(int dim) { return 4 * static_cast<size_t>(dim); }
  static void store(const float* x, int dim, std::byte* row) { std::memcpy(row, x, row_bytes(dim)); }
  static simd::F32 lanes(const std::byte* row, int, int i) {
    return simd::load(reinterpret_cast<const float*>(row) + i);
  }
  static simd::F8 eight(const std::byte* row, int dim, int i) {
    float padded[8];
    return simd::eight_f32(eight_or_padded(reinterpret_cast<const float*>(row), dim, i, padded));
  }
  static void columns(const std::byte* const* rows, int dim, int i, simd::F32 (&out)[8]) {
    if (i + 8 <= dim) return simd::columns_f32(rows, row_bytes(i), out);
    simd::columns_f32(PaddedRows<float>(rows, 0, dim, i).row, 0, out);
  }
};

struct KvF16 {  // IEEE half, round to nearest even: error 2^-11 of the element, 65520 and above become infinity
  static constexpr const char* name = "f16";
  static constexpr size_t row_bytes(int dim) { return 2 * static_cast<size_t>(dim); }
  static void store(const float* x, int dim, std::byte* row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    int i = 0;
    for (; i + simd::LANES <= dim; i += simd::LANES) simd::store_f16(to + i, simd::load(x + i));
    for (; i < dim; i++) to[i] = float_to_f16(x[i]);
  }
  static simd::F32 lanes(const std::byte* row, int, int i) {
    return simd::load_f16(reinterpret_cast<const uint16_t*>(row) + i);
  }
  static simd::F8 eight(const std::byte* row, int dim, int i) {
    uint16_t padded[8];
    return simd::eight_f16(eight_or_padded(reinterpret_cast<const uint16_t*>(row), dim, i, padded));
  }
  static void columns(const std::byte* const* rows, int dim, int i, simd::F32 (&out)[8]) {
    if (i + 8 <= dim) return simd::columns_f16(rows, row_bytes(i), out);
    simd::columns_f16(PaddedRows<uint16_t>(rows, 0, dim, i).row, 0, out);
  }
};

struct KvBF16 {  // bfloat16, round to nearest even: error 2^-8 of the element
  static constexpr const char* name = "bf16";
  static constexpr size_t row_bytes(int dim) { return 2 * static_cast<size_t>(dim); }
  static void store(const float* x, int dim, std::byte* row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    for (int i = 0; i < dim; i++) to[i] = float_to_bf16(x[i]);
  }
  static simd::F32 lanes(const std::byte* row, int, int i) {
    return simd::load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
  }
  static simd::F8 eight(const std::byte* row, int dim, int i) {
    uint16_t padded[8];
    return simd::eight_bf16(eight_or_padded(reinterpret_cast<const uint16_t*>(row), dim, i, padded));
  }
  static void columns(const std::byte* const* rows, int dim, int i, simd::F32 (&out)[8]) {
    if (i + 8 <= dim) return simd::columns_bf16(rows, row_bytes(i), out);
    simd::columns_bf16(PaddedRows<uint16_t>(rows, 0, dim, i).row, 0, out);
  }
};

// int8 in groups of 32 (the last may be shorter): x = scale * q, q in -127 .. 127, scale = amax / 127 rounded *up* to
// float16, so that amax itself is in reach: error (1 + 2^-10) amax / 254 of the group's largest magnitude, or 2^-25
// where the scale is subnormal. The scales lie before the elements: [groups] float16, [dim] int8.
struct KvQ8 {
  static constexpr const char* name = "q8";
  static constexpr int GROUP_SIZE = 32;
  static constexpr int groups(int dim) { return (dim + GROUP_SIZE - 1) / GROUP_SIZE; }
  static constexpr size_t row_bytes(int dim) { return static_cast<size_t>(2 * groups(dim) + dim + dim % 2); }
  static void store(const float* x, int dim, std::byte* row);
  static simd::F32 lanes(const std::byte* row, int dim, int i) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(row);
    const int8_t* q = reinterpret_cast<const int8_t*>(scales + groups(dim));
    return simd::mul(simd::load_i8(q + i), simd::set(f16_to_float(scales[i / GROUP_SIZE])));
  }
  static simd::F8 eight(const std::byte* row, int dim, int i) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(row);
    const int8_t* q = reinterpret_cast<const int8_t*>(scales + groups(dim));
    int8_t padded[8];
    return simd::eight_i8(eight_or_padded(q, dim, i, padded), f16_to_float(scales[i / GROUP_SIZE]));
  }
  static void columns(const std::byte* const* rows, int dim, int i, simd::F32 (&out)[8]) {
    float scale[simd::LANES];
    for (int j = 0; j < simd::LANES; j++)
      scale[j] = f16_to_float(reinterpret_cast<const uint16_t*>(rows[j])[i / GROUP_SIZE]);
    const size_t at = sizeof(uint16_t) * static_cast<size_t>(groups(dim));
    if (i + 8 <= dim) return simd::columns_i8(rows, at + static_cast<size_t>(i), simd::load(scale), out);
    simd::columns_i8(PaddedRows<int8_t>(rows, at, dim, i).row, 0, simd::load(scale), out);
  }
};

// Elements first .. last - 1 of a row of dim; first is a multiple of 8.
template <class Kv>
void load_row(const std::byte* row, int dim, int first, int last, float* x) {
  for (; first + 8 <= last; first += 8, x += 8) simd::store_eight(x, Kv::eight(row, dim, first));
  if (first == last) return;
  float rest[8];
  simd::store_eight(rest, Kv::eight(row, dim, first));
  std::copy_n(rest, last - first, x);
}

struct CacheShape {
  int n_layers, n_kv_heads;
  int k_dim;       // elements of a K row
  int v_dim;       // elements of a V row; 0: there are none, V is the first elements of the K row (MLA)
  int n_blocks;    // blocks in the pool; contiguous: sequences
  int block_size;  // tokens a block; a paged cache's equals its Block
};

// K: [n_layers, n_kv_heads, n_blocks, block_size] rows of k_dim; V likewise of v_dim. Blocks that follow each other are
// one stream of bytes for a head: a sequence that has the machine to itself reads its blocks as if they were one.
template <class Kv, int Block>
class KVCache {
 public:
  KVCache() = default;
  explicit KVCache(const CacheShape& shape);

  static size_t bytes_per_token(const CacheShape& shape);  // all layers
  static size_t bytes(const CacheShape& shape);

  const CacheShape& shape() const { return shape_; }
  int block_size() const { return Block ? Block : shape_.block_size; }

  const std::byte* k_row(int layer, int block, int kv_head, int slot) const {
    return k_.data() + row_index(layer, block, kv_head, slot) * k_row_bytes_;
  }
  const std::byte* v_row(int layer, int block, int kv_head, int slot) const {
    return v_.data() + row_index(layer, block, kv_head, slot) * v_row_bytes_;
  }

  // The only writer. k [T, n_kv_heads, k_dim], v [T, n_kv_heads, v_dim] (null where v_dim is 0); token t goes to
  // slot_mapping[t]. Called by every thread of the team.
  void append(int layer, const Batch& batch, const float* k, const float* v);

  // out [n, k_dim] float32: the K rows of the one KV head at positions first .. first + n - 1 of the batch's sequence s
  // (for MLA's expanded form). Called by every thread of the team; ends with a barrier.
  void read_k(int layer, const Batch& batch, int s, int first, int n, float* out) const;

  // Copies whole blocks, all layers: copy_from[i] -> copy_to[i]. Called by every thread of the team.
  void copy_blocks(const Batch& batch);

  std::byte* k_memory() { return k_.data(); }  // for the tests: freed slots are poisoned
  std::byte* v_memory() { return v_.data(); }

 private:
  size_t row_index(int layer, int block, int kv_head, int slot) const {
    const auto size = [](int n) { return static_cast<size_t>(n); };
    const size_t head = size(layer) * size(shape_.n_kv_heads) + size(kv_head);
    return (head * size(shape_.n_blocks) + size(block)) * size(block_size()) + size(slot);
  }

  CacheShape shape_{};
  size_t k_row_bytes_ = 0, v_row_bytes_ = 0;
  Buffer<std::byte> k_, v_;
};
