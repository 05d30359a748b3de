// kv_cpu.h: how the CPU keeps the cache's rows: each KV type's numbers, and their order within a block.
//
// A block of a KV head is bundles [block_size / BUNDLE]: each the K rows, then the V rows of BUNDLE tokens. So a tile's
// K and V lie together, wherever a sequence's blocks are; and blocks that follow each other are one stream of bytes.
//
// A score is a sum over a K row's elements, and a register holds many tokens' scores: it needs the same element of many
// tokens. So where nothing else reads K and a block is whole bundles of KEY_LANES, their K rows are kept k-major (as in
// vLLM, whose key blocks are [head_dim / x, block_size, x]). V is read by rows, and MLA's V is K: its cache stays
// token-major.
#pragma once

#include <cstring>
#include <numeric>

#include "kernels/simd.h"
#include "kvcache.h"

// Tokens whose keys may lie side by side.
constexpr int KEY_LANES = 16;
static_assert(KEY_LANES % simd::LANES == 0);

// --- numbers ---------------------------------------------------------------------------------------------------------

// A KV type's row is scales (q8 and q4) and units, each of a number (q4: of two); a k-major matrix is KEY_LANES rows,
// transposed: [scales of a row, KEY_LANES], then [units of a row, KEY_LANES]; it takes the bytes of KEY_LANES rows.
// Each codec: Unit, how many a row has, the bytes of its scales, store a row, and ways to read numbers. `element` is
// one; `lanes` is elements i .. i + LANES - 1, all within the row, i a multiple of LANES; `keys` is element i of the
// tokens lane .. lane + LANES - 1 of a k-major matrix. `place` is where an element lies in either, in bytes. Where
// GROUP is not 0 that many share a scale (and a minimum, for HAS_MINIMUM), which are not in the numbers: x = scale *
// number + minimum.
template <class Kv>
struct Codec;

// Elements without scales; Derived says how one is widened, and how a register of them.
template <class Derived, class T>
struct Unscaled {
  using Unit = T;
  static constexpr int GROUP = 0;
  static constexpr bool HAS_MINIMUM = false;
  static constexpr int units(int dim) { return dim; }
  static constexpr size_t scale_bytes(int) { return 0; }
  static size_t place(int /*dim*/, int i, int lane = 0, int n_rows = 1) {
    return static_cast<size_t>(i * n_rows + lane) * sizeof(T);
  }
  static float element(const std::byte* row, int dim, int i) { return Derived::widen(*at(row + place(dim, i))); }
  static simd::F32 lanes(const std::byte* row, int dim, int i) { return Derived::load(at(row + place(dim, i))); }
  static simd::F32 keys(const std::byte* matrix, int dim, int i, int lane) {
    return Derived::load(at(matrix + place(dim, i, lane, KEY_LANES)));
  }

 private:
  static const T* at(const std::byte* p) { return reinterpret_cast<const T*>(p); }
};

template <>
struct Codec<KvF32> : Unscaled<Codec<KvF32>, float> {
  static float widen(float x) { return x; }
  static simd::F32 load(const float* p) { return simd::load(p); }
  static void store(const float* x, int dim, std::byte* row) { std::memcpy(row, x, KvF32::row_bytes(dim)); }
};

template <>
struct Codec<KvF16> : Unscaled<Codec<KvF16>, uint16_t> {
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

template <>
struct Codec<KvBF16> : Unscaled<Codec<KvBF16>, uint16_t> {
  static float widen(uint16_t x) { return bf16_to_float(x); }
  static simd::F32 load(const uint16_t* p) { return simd::load_bf16(p); }
  static void store(const float* x, int dim, std::byte* row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    for (int i = 0; i < dim; i++) to[i] = float_to_bf16(x[i]);
  }
};

// Rows that begin with a float16 scale for each GROUP elements, and a minimum behind it, for MINIMUM.
template <class Kv, bool MINIMUM>
struct Scaled {
  static constexpr int GROUP = Kv::QUANT_GROUP;
  static constexpr bool HAS_MINIMUM = MINIMUM;
  static constexpr size_t scale_bytes(int dim) { return Kv::scale_bytes(dim); }
  // The scale of element i; of n_rows rows side by side, which are followed by their minima.
  static const uint16_t* scale(const std::byte* rows, int i, int n_rows) {
    return reinterpret_cast<const uint16_t*>(rows) + i / GROUP * (MINIMUM ? 2 : 1) * n_rows;
  }
  static float apply(float number, const uint16_t* scale, [[maybe_unused]] int n_rows) {
    const float x = number * f16_to_float(*scale);
    if constexpr (MINIMUM)
      return x + f16_to_float(scale[n_rows]);
    else
      return x;
  }
};

template <>
struct Codec<KvQ8> : Scaled<KvQ8, false> {
  using Unit = int8_t;
  static constexpr int units(int dim) { return dim; }
  static size_t place(int dim, int i, int lane = 0, int n_rows = 1) {
    return static_cast<size_t>(n_rows) * scale_bytes(dim) + static_cast<size_t>(i * n_rows + lane);
  }
  static float element(const std::byte* row, int dim, int i) { return *at(row + place(dim, i)); }
  static simd::F32 lanes(const std::byte* row, int dim, int i) { return simd::load_i8(at(row + place(dim, i))); }
  static simd::F32 keys(const std::byte* matrix, int dim, int i, int lane) {
    return simd::load_i8(at(matrix + place(dim, i, lane, KEY_LANES)));
  }
  static void store(const float* x, int dim, std::byte* row);  // kvcache.cpp

 private:
  static const int8_t* at(const std::byte* p) { return reinterpret_cast<const int8_t*>(p); }
};

// A byte holds elements j and j + HALF of a group.
template <>
struct Codec<KvQ4> : Scaled<KvQ4, true> {
  static constexpr int HALF = GROUP / 2;
  using Unit = uint8_t;
  static constexpr int units(int dim) { return static_cast<int>(KvQ4::groups(dim)) * HALF; }
  static size_t place(int dim, int i, int lane = 0, int n_rows = 1) {
    return static_cast<size_t>(n_rows) * scale_bytes(dim) +
           static_cast<size_t>((i / GROUP * HALF + i % HALF) * n_rows + lane);
  }
  static float element(const std::byte* row, int dim, int i) {
    return static_cast<float>(*at(row + place(dim, i)) >> shift(i) & 15);
  }
  static simd::F32 lanes(const std::byte* row, int dim, int i) { return widen(at(row + place(dim, i)), i); }
  static simd::F32 keys(const std::byte* matrix, int dim, int i, int lane) {
    return widen(at(matrix + place(dim, i, lane, KEY_LANES)), i);
  }
  static void store(const float* x, int dim, std::byte* row);  // kvcache.cpp

 private:
  static int shift(int i) { return i % GROUP / HALF * 4; }
  static simd::F32 widen(const uint8_t* p, int i) { return simd::to_float(simd::load_u8(p) >> shift(i) & 15); }
  static const uint8_t* at(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }
};

// x [last - first]: the numbers of elements first .. last - 1 of a row of dim; first is a multiple of LANES.
template <class Kv>
void load_numbers(const std::byte* row, int dim, int first, int last, float* x) {
  int i = first;
  for (; i + simd::LANES <= last; i += simd::LANES) simd::store(x + i - first, Codec<Kv>::lanes(row, dim, i));
  for (; i < last; i++) x[i - first] = Codec<Kv>::element(row, dim, i);
}

// x [n]: the first n elements of a row of dim.
template <class Kv>
void load_row(const std::byte* row, int dim, int n, float* x) {
  load_numbers<Kv>(row, dim, 0, n, x);
  if constexpr (Codec<Kv>::GROUP > 0)
    for (int i = 0; i < n; i++) x[i] = Codec<Kv>::apply(x[i], Codec<Kv>::scale(row, i, 1), 1);
}

// --- places ----------------------------------------------------------------------------------------------------------

// The rows of one layer and KV head.
template <class Kv, int Block>
class HeadRows {
 public:
  static constexpr int BUNDLE = std::gcd(Block, KEY_LANES);  // Block 0: KEY_LANES; the context is rounded up to it

  HeadRows(const CacheView<Kv, Block>& view, int layer, int kv_head)
      : start_(view.block(layer, 0, kv_head)),
        block_bytes_(view.block_bytes),
        k_bytes_(Kv::row_bytes(view.shape.k_dim)),
        v_bytes_(Kv::row_bytes(view.shape.v_dim)),
        k_major_(BUNDLE == KEY_LANES && view.shape.v_dim > 0) {}

  static size_t block_bytes(const CacheShape& shape) {
    const int bundles = ((Block ? Block : shape.block_size) + BUNDLE - 1) / BUNDLE;
    return static_cast<size_t>(bundles * BUNDLE) * (Kv::row_bytes(shape.k_dim) + Kv::row_bytes(shape.v_dim));
  }

  bool k_major() const { return k_major_; }
  size_t k_bytes() const { return k_bytes_; }  // from a row to the next of its bundle
  size_t v_bytes() const { return v_bytes_; }

  // Of the token in `slot`; k-major: k is the matrix of the bundle that begins with slot, a multiple of BUNDLE.
  std::byte* k(int block, int slot) const { return bundle(block, slot) + in_bundle(slot) * k_bytes_; }
  std::byte* v(int block, int slot) const {
    return bundle(block, slot) + BUNDLE * k_bytes_ + in_bundle(slot) * v_bytes_;
  }

 private:
  static size_t in_bundle(int slot) { return static_cast<size_t>(slot % BUNDLE); }
  std::byte* bundle(int block, int slot) const {
    return start_ + static_cast<size_t>(block) * block_bytes_ +
           static_cast<size_t>(slot / BUNDLE) * (BUNDLE * (k_bytes_ + v_bytes_));
  }

  std::byte* start_;
  size_t block_bytes_, k_bytes_, v_bytes_;
  bool k_major_;
};
