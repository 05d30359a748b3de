// kvcache.cpp: the only writer of the cache.
#include "kvcache.h"

#include <atomic>
#include <cmath>

#include "kernels/build.h"

// x [32], q [32]. The scale is the smallest float16 that is not below amax / 127, NaN where an element is not finite.
static uint16_t store_q8_group(const float* x, int8_t* q) {
  simd::F32 largest = simd::zero(), not_finite = simd::zero();
  for (int i = 0; i < KvQ8::GROUP_SIZE; i += simd::LANES) {
    const simd::F32 a = simd::load(x + i);
    largest = simd::max(largest, simd::max(a, simd::sub(simd::zero(), a)));
    not_finite = simd::fma(a, simd::zero(), not_finite);  // NaN for an infinity or NaN
  }
  const float amax = simd::largest(largest);
  uint16_t scale = float_to_f16(amax / 127 + simd::sum(not_finite));
  if (f16_to_float(scale) * 127 < amax) scale++;
  if (scale == 0x7c00) scale = 0x7e00;  // infinity: NaN
  const simd::F32 inverse = simd::set(scale == 0 ? 0 : 1 / f16_to_float(scale));
  float rounded[KvQ8::GROUP_SIZE];
  for (int i = 0; i < KvQ8::GROUP_SIZE; i += simd::LANES) {
    // min gives its second operand for a NaN, whose conversion to an integer would be undefined
    const simd::F32 y = simd::min(simd::mul(simd::load(x + i), inverse), simd::set(127));
    simd::store(rounded + i, simd::round(simd::max(y, simd::set(-127))));
  }
  for (int i = 0; i < KvQ8::GROUP_SIZE; i++) q[i] = static_cast<int8_t>(rounded[i]);
  return scale;
}

void KvQ8::store(const float* x, int dim, std::byte* row) {
  uint16_t* scales = reinterpret_cast<uint16_t*>(row);
  int8_t* q = reinterpret_cast<int8_t*>(row + scale_bytes(dim));
  for (int i = 0; i < dim; i += GROUP_SIZE) {
    const size_t n = static_cast<size_t>(dim - i < GROUP_SIZE ? dim - i : GROUP_SIZE);
    float group[GROUP_SIZE] = {};
    int8_t rounded[GROUP_SIZE];
    std::memcpy(group, x + i, n * sizeof(float));
    scales[i / GROUP_SIZE] = store_q8_group(group, rounded);
    std::memcpy(q + i, rounded, n);
  }
}

// One token's row becomes a column of a k-major matrix: made as a row, a q8 group at a time, then spread.
template <class Kv>
static void store_column(const float* x, int dim, std::byte* matrix, int lane) {
  using Element = typename Kv::Element;
  constexpr int SLICE = KvQ8::GROUP_SIZE;
  uint16_t* scales = reinterpret_cast<uint16_t*>(matrix) + lane;
  Element* elements = reinterpret_cast<Element*>(matrix + KEY_LANES * Kv::scale_bytes(dim)) + lane;
  for (int i = 0; i < dim; i += SLICE) {
    alignas(64) std::byte row[Kv::row_bytes(SLICE)];
    const int n = std::min(SLICE, dim - i);
    Kv::store(x + i, n, row);
    if constexpr (Kv::scale_bytes(SLICE) > 0) scales[i / SLICE * KEY_LANES] = *reinterpret_cast<uint16_t*>(row);
    const Element* from = reinterpret_cast<const Element*>(row + Kv::scale_bytes(n));
    for (int j = 0; j < n; j++) elements[(i + j) * KEY_LANES] = from[j];
  }
}

template <class Kv, int Block>
size_t KVCache<Kv, Block>::bytes_per_token(const CacheShape& shape) {
  return static_cast<size_t>(shape.n_layers) * static_cast<size_t>(shape.n_kv_heads) *
         (Kv::row_bytes(shape.k_dim) + Kv::row_bytes(shape.v_dim));
}

template <class Kv, int Block>
size_t KVCache<Kv, Block>::bytes(const CacheShape& shape) {
  return static_cast<size_t>(shape.n_layers) * static_cast<size_t>(shape.n_kv_heads) *
         static_cast<size_t>(shape.n_blocks) * runs_of_block(shape) * run_bytes(shape);
}

template <class Kv, int Block>
KVCache<Kv, Block>::KVCache(Arena& arena, const CacheShape& shape)
    : shape_(shape),
      k_row_bytes_(Kv::row_bytes(shape.k_dim)),
      v_row_bytes_(Kv::row_bytes(shape.v_dim)),
      run_bytes_(run_bytes(shape)),
      block_bytes_(runs_of_block(shape) * run_bytes_),
      memory_(arena.take<std::byte>(bytes(shape))) {}

template <class Kv, int Block>
void KVCache<Kv, Block>::load_k(int layer, int block, int kv_head, int slot, float* out) const {
  if (!k_major()) return load_row<Kv>(k_row(layer, block, kv_head, slot), shape_.k_dim, 0, shape_.k_dim, out);
  const int lane = slot % KEY_LANES;
  const std::byte* matrix = k_row(layer, block, kv_head, slot - lane);
  for (int i = 0; i < shape_.k_dim; i++) out[i] = Kv::key(matrix, shape_.k_dim, i, lane);
}

template <class Kv, int Block>
void KVCache<Kv, Block>::store_k(int layer, int block, int kv_head, int slot, const float* x) {
  const int lane = k_major() ? slot % KEY_LANES : 0;
  std::byte* to = memory_ + k_offset(layer, block, kv_head, slot - lane);
  k_major() ? store_column<Kv>(x, shape_.k_dim, to, lane) : Kv::store(x, shape_.k_dim, to);
}

// Finite, and beyond what the type holds.
template <class Kv>
static bool overflows(const float* x, int n) {
  if constexpr (Kv::largest == FLOAT_MAX) return false;
  int over = 0;
  for (int i = 0; i < n; i++) over |= std::abs(x[i]) > Kv::largest && std::abs(x[i]) <= FLOAT_MAX;
  return over != 0;
}

template <class Kv, int Block>
void KVCache<Kv, Block>::append(const Team& team, int layer, const Batch& batch, const float* k, const float* v) {
  const int G = shape_.n_kv_heads, k_dim = shape_.k_dim, v_dim = shape_.v_dim;
  team.for_each(batch.n_tokens, [&](int t) {
    const int block = batch.slot_mapping[t] / block_size(), slot = batch.slot_mapping[t] % block_size();
    for (int g = 0; g < G; g++) {
      const size_t from = static_cast<size_t>(t) * static_cast<size_t>(G) + static_cast<size_t>(g);
      const float *key = k + from * static_cast<size_t>(k_dim), *value = v + from * static_cast<size_t>(v_dim);
      store_k(layer, block, g, slot, key);
      if (v_dim > 0) Kv::store(value, v_dim, memory_ + v_offset(layer, block, g, slot));
      if (overflows<Kv>(key, k_dim) || overflows<Kv>(value, v_dim))
        std::atomic_ref(overflowed_).store(true, std::memory_order_relaxed);
    }
  });
}

template <class Kv, int Block>
void KVCache<Kv, Block>::read_k(const Team& team, int layer, const Batch& batch, int s, int first, int n,
                                float* out) const {
  const int* table = batch.block_table + static_cast<size_t>(s) * static_cast<size_t>(batch.max_blocks);
  team.for_each(n, [&](int i) {
    const int block = table[(first + i) / block_size()], slot = (first + i) % block_size();
    load_k(layer, block, 0, slot, out + static_cast<size_t>(i) * static_cast<size_t>(shape_.k_dim));
  });
}

template <class Kv, int Block>
void KVCache<Kv, Block>::copy_blocks(const Team& team, const Batch& batch) {
  const int copies = batch.n_copies;
  team.for_each(shape_.n_layers * shape_.n_kv_heads * copies, [&](int index) {
    const int i = index % copies, head = index / copies % shape_.n_kv_heads, layer = index / copies / shape_.n_kv_heads;
    std::memcpy(memory_ + block_offset(layer, batch.copy_to[i], head),
                memory_ + block_offset(layer, batch.copy_from[i], head), block_bytes_);
  });
}

#define INSTANTIATE(Kv, Block) template class KVCache<Kv, Block>;
FOR_EACH_CACHE(INSTANTIATE)
