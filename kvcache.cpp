// kvcache.cpp: the only writer of the cache, and the readers that are not in a hurry.
#include "kvcache.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "kernels/build.h"
#include "kernels/kv_cpu.h"

template <class Kv, int Block>
size_t KVCache<Kv, Block>::block_bytes(const CacheShape& shape) {
  return HeadRows<Kv, Block>::block_bytes(shape);
}

// --- writing ---------------------------------------------------------------------------------------------------------

// One token's row becomes a column of a k-major matrix: made as a row, SLICE elements at a time, then spread.
template <class Kv>
static void store_column(const float* x, int dim, std::byte* matrix, int lane) {
  using Codec = Codec<Kv>;
  using Unit = typename Codec::Unit;
  constexpr int SLICE = KvQ8::QUANT_GROUP;
  constexpr int SCALES = static_cast<int>(Codec::scale_bytes(SLICE) / sizeof(uint16_t));
  static_assert(SLICE == KvQ4::QUANT_GROUP);
  uint16_t* scales = reinterpret_cast<uint16_t*>(matrix) + lane;
  Unit* units = reinterpret_cast<Unit*>(matrix + KEY_LANES * Codec::scale_bytes(dim)) + lane;
  for (int i = 0; i < dim; i += SLICE) {
    alignas(64) std::byte row[Kv::row_bytes(SLICE)];
    const int n = std::min(SLICE, dim - i);
    Codec::store(x + i, n, row);
    for (int j = 0; j < SCALES; j++) scales[(i / SLICE * SCALES + j) * KEY_LANES] = reinterpret_cast<uint16_t*>(row)[j];
    const Unit* from = reinterpret_cast<const Unit*>(row + Codec::scale_bytes(n));
    for (int j = 0; j < Codec::units(n); j++) units[(Codec::units(i) + j) * KEY_LANES] = from[j];
  }
}

// Finite, and beyond what the type holds.
template <class Kv>
static bool overflows(const float* x, int n) {
  if constexpr (Kv::largest == FLOAT_MAX) return false;
  int over = 0;
  for (int i = 0; i < n; i++) over |= std::abs(x[i]) > Kv::largest && std::abs(x[i]) <= FLOAT_MAX;
  return over != 0;
}

// The heads of token t (RoFormer, arXiv 2104.09864, equation 34).
static void turn_heads(const Turn& turn, const Heads& heads, int t) {
  float* x = heads.x + area(t, heads.x_stride);
  const int stride = heads.head_stride, n = turn.n_angles;
  if (heads.norm) norm(Team{}, turn.kind, turn.eps, heads.norm, x, stride, heads.n, heads.norm.n, x, stride);
  const float *c = turn.cos + area(t, n), *s = turn.sin + area(t, n);
  for (int h = 0; h < heads.n; h++) {
    float* a = x + area(h, stride) + heads.rotated;
    float* b = a + n;
    for (int i = 0; i < n; i++) {
      const float rotated = a[i] * c[i] - b[i] * s[i];
      b[i] = b[i] * c[i] + a[i] * s[i];
      a[i] = rotated;
    }
  }
}

template <class Kv, int Block>
void KVCache<Kv, Block>::append(const Team& team, int layer, const Batch& batch, const Turn& turn, const float* k,
                                const float* v) {
  const int G = shape().n_kv_heads, k_dim = shape().k_dim, v_dim = shape().v_dim;
  team.for_each(batch.n_tokens, [&](int t) {
    turn_heads(turn, turn.q, t);
    turn_heads(turn, turn.k, t);
    const int block = batch.slot_mapping[t] / block_size(), slot = batch.slot_mapping[t] % block_size();
    for (int g = 0; g < G; g++) {
      const HeadRows<Kv, Block> rows(view_, layer, g);
      const float *k_row = k + area(t * G + g, k_dim), *v_row = v + area(t * G + g, v_dim);
      const int lane = slot % KEY_LANES;
      if (rows.k_major())
        store_column<Kv>(k_row, k_dim, rows.k(block, slot - lane), lane);
      else
        Codec<Kv>::store(k_row, k_dim, rows.k(block, slot));
      if (v_dim > 0) Codec<Kv>::store(v_row, v_dim, rows.v(block, slot));
      if (overflows<Kv>(k_row, k_dim) || overflows<Kv>(v_row, v_dim))
        std::atomic_ref(*overflowed_).store(1, std::memory_order_relaxed);
    }
  });
}

template <class Kv, int Block>
bool KVCache<Kv, Block>::overflowed() const {
  return *overflowed_ != 0;
}

template <class Kv, int Block>
void KVCache<Kv, Block>::copy_blocks(const Team& team, const Batch& batch) {
  const int copies = batch.n_copies, G = shape().n_kv_heads;
  team.for_each(shape().n_layers * G * copies, [&](int index) {
    const int i = index % copies, head = index / copies % G, layer = index / copies / G;
    std::memcpy(view_.block(layer, batch.copy_to[i], head), view_.block(layer, batch.copy_from[i], head),
                view_.block_bytes);
  });
}

// --- reading ---------------------------------------------------------------------------------------------------------

template <class Kv, int Block>
void KVCache<Kv, Block>::load_k(int layer, int block, int kv_head, int slot, float* out) const {
  const HeadRows<Kv, Block> rows(view_, layer, kv_head);
  const int dim = shape().k_dim, lane = slot % KEY_LANES;
  if (!rows.k_major()) return load_row<Kv>(rows.k(block, slot), dim, dim, out);
  const std::byte* matrix = rows.k(block, slot - lane);
  const int among = lane % simd::LANES;
  for (int i = 0; i < dim; i++) {
    out[i] = Codec<Kv>::keys(matrix, dim, i, lane - among)[among];
    if constexpr (Codec<Kv>::GROUP > 0)
      out[i] = Codec<Kv>::apply(out[i], Codec<Kv>::scale(matrix, i, KEY_LANES) + lane, KEY_LANES);
  }
}

template <class Kv, int Block>
void KVCache<Kv, Block>::load_v(int layer, int block, int kv_head, int slot, int n, float* out) const {
  const HeadRows<Kv, Block> rows(view_, layer, kv_head);
  if (shape().v_dim > 0)
    load_row<Kv>(rows.v(block, slot), shape().v_dim, n, out);
  else
    load_row<Kv>(rows.k(block, slot), shape().k_dim, n, out);
}

template <class Kv, int Block>
void KVCache<Kv, Block>::read_k(const Team& team, int layer, const Batch& batch, int s, int first, int n,
                                float* out) const {
  const int* table = batch.block_table + area(s, batch.max_blocks);
  team.for_each(n, [&](int i) {
    const int block = table[(first + i) / block_size()], slot = (first + i) % block_size();
    load_k(layer, block, 0, slot, out + area(i, shape().k_dim));
  });
}

// --- q8 --------------------------------------------------------------------------------------------------------------

// x [32], q [32]. The scale is the smallest float16 that is not below amax / 127, NaN where an element is not finite.
static uint16_t store_quant_group(const float* x, int8_t* q) {
  constexpr int N = KvQ8::QUANT_GROUP;
  simd::F32 largest = simd::zero(), not_finite = simd::zero();
  for (int i = 0; i < N; i += simd::LANES) {
    const simd::F32 a = simd::load(x + i);
    largest = simd::max(largest, simd::max(a, -a));
    not_finite += a * 0.0f;  // NaN for an infinity or NaN
  }
  const float amax = simd::largest(largest);
  uint16_t scale = float_to_f16(amax / 127 + simd::sum(not_finite));
  if (f16_to_float(scale) * 127 < amax) scale++;
  if (scale == 0x7c00) scale = 0x7e00;  // infinity: NaN
  const float inverse = scale == 0 ? 0 : 1 / f16_to_float(scale);
  for (int i = 0; i < N; i += simd::LANES) {
    // min gives its second operand for a NaN
    const simd::F32 bounded = simd::max(simd::min(simd::load(x + i) * inverse, simd::set(127)), simd::set(-127));
    simd::store_i8(q + i, simd::to_i32(bounded));
  }
  return scale;
}

void Codec<KvQ8>::store(const float* x, int dim, std::byte* row) {
  constexpr int N = KvQ8::QUANT_GROUP;
  uint16_t* scales = reinterpret_cast<uint16_t*>(row);
  int8_t* q = reinterpret_cast<int8_t*>(row + scale_bytes(dim));
  for (int i = 0; i < dim; i += N) {
    const size_t n = static_cast<size_t>(std::min(N, dim - i));
    float padded[N] = {};
    int8_t rounded[N];
    std::memcpy(padded, x + i, n * sizeof(float));
    scales[i / N] = store_quant_group(padded, rounded);
    std::memcpy(q + i, rounded, n);
  }
}

// --- q4 --------------------------------------------------------------------------------------------------------------

// The largest float16 that is not above x; NaN where that is infinite.
static uint16_t round_down_to_f16(float x) {
  uint16_t half = float_to_f16(x);
  if (f16_to_float(half) > x) half = static_cast<uint16_t>(half & 0x8000 ? half + 1 : half - 1);
  return (half & 0x7c00) == 0x7c00 ? 0x7e00 : half;
}

// x [32], q [16], scales: the scale and the minimum, which is NaN where an element is not finite, or too large.
static void store_q4_group(const float* x, uint16_t* scales, uint8_t* q) {
  constexpr int HALF = Codec<KvQ4>::HALF;
  simd::F32 high = simd::load(x), low = high, not_finite = simd::zero();
  for (int i = 0; i < 2 * HALF; i += simd::LANES) {
    const simd::F32 a = simd::load(x + i);
    high = simd::max(high, a), low = simd::min(low, a);
    not_finite += a * 0.0f;  // NaN for an infinity or NaN
  }
  const float most = simd::largest(high), least = -simd::largest(-low);
  scales[1] = most > KvQ4::largest ? 0x7e00 : round_down_to_f16(least + simd::sum(not_finite));
  const float minimum = f16_to_float(scales[1]), range = most - minimum;
  scales[0] = float_to_f16(range / 15);
  if (f16_to_float(scales[0]) * 15 < range) scales[0]++;
  const float inverse = scales[0] == 0 ? 0 : 1 / f16_to_float(scales[0]);
  int8_t numbers[2 * HALF];
  for (int i = 0; i < 2 * HALF; i += simd::LANES) {
    // min gives its second operand for a NaN
    const simd::F32 bounded =
        simd::max(simd::min((simd::load(x + i) - minimum) * inverse, simd::set(15)), simd::zero());
    simd::store_i8(numbers + i, simd::to_i32(bounded));
  }
  for (int i = 0; i < HALF; i++) q[i] = static_cast<uint8_t>(numbers[i] | numbers[i + HALF] << 4);
}

void Codec<KvQ4>::store(const float* x, int dim, std::byte* row) {
  uint16_t* scales = reinterpret_cast<uint16_t*>(row);
  uint8_t* q = reinterpret_cast<uint8_t*>(row + scale_bytes(dim));
  for (int i = 0; i < dim; i += GROUP, scales += 2, q += HALF) {
    float filled[GROUP];  // by the last element, which widens no range
    for (int j = 0; j < GROUP; j++) filled[j] = x[std::min(i + j, dim - 1)];
    store_q4_group(filled, scales, q);
  }
}

#define INSTANTIATE(Kv, Block) template class KVCache<Kv, Block>;
FOR_EACH_CPU_CACHE(INSTANTIATE)
