// kv_gpu.h: how a GPU keeps the cache's rows: token-major, in chunks of 16 bytes, which is what a thread loads or
// copies at once. A row begins with a chunk and is filled up to whole ones with zeros, so that nobody needs its width
// to read it. q8's scales, which would shift the elements off the chunks, lie apart.
//
// A block of a KV head is
//
//     K rows [block_size, k_stride]   V rows [block_size, v_stride]
//     K scales [block_size, k_scales]   V scales [block_size, v_scales]     (q8 alone: one for each 32 elements)
#pragma once

#include "kernels/gpu.h"
#include "kvcache.h"

constexpr int CHUNK = 16;  // bytes

constexpr size_t whole_chunks(size_t bytes) {
  return (bytes + CHUNK - 1) / CHUNK * CHUNK;
}

// --- numbers ---------------------------------------------------------------------------------------------------------

// What a type keeps of a row's numbers. widen: an element as float, without its scale. narrow: the element that is
// kept.
template <class Kv>
struct Codec;

template <>
struct Codec<KvF32> {
  using Element = float;
  static __device__ float widen(float x) { return x; }
  static __device__ float narrow(float x) { return x; }
};

template <>
struct Codec<KvF16> {
  using Element = uint16_t;
  static __device__ float widen(uint16_t x) { return f16_to_float(x); }
  static __device__ uint16_t narrow(float x) {
    const uint16_t half = float_to_f16(x);
    return (half & 0x7fff) == 0x7c00 ? 0x7e00 : half;  // infinity: NaN
  }
};

template <>
struct Codec<KvBF16> {
  using Element = uint16_t;
  static __device__ float widen(uint16_t x) { return bf16_to_float(x); }
  static __device__ uint16_t narrow(float x) { return float_to_bf16(x); }
};

template <>
struct Codec<KvQ8> {
  using Element = int8_t;
  static __device__ float widen(int8_t x) { return x; }
  // inverse: of the scale; 0 for a scale of 0. fminf gives its second operand for a NaN.
  static __device__ int8_t narrow(float x, float inverse) {
    return static_cast<int8_t>(rintf(fmaxf(fminf(x * inverse, 127), -127)));
  }
  // Of a group whose largest magnitude is amax: the smallest float16 that is not below amax / 127; NaN where it is
  // infinite.
  static __device__ uint16_t scale(float amax) {
    uint16_t s = float_to_f16(amax / 127);
    if (f16_to_float(s) * 127 < amax) s++;
    return s == 0x7c00 ? 0x7e00 : s;
  }
};

// --- places ----------------------------------------------------------------------------------------------------------

// The rows of one layer and KV head.
template <class Kv, int Block>
class HeadRows {
 public:
  constexpr HeadRows(const CacheView<Kv, Block>& view, int layer, int kv_head)
      : start_(view.block(layer, 0, kv_head)),
        block_bytes_(view.block_bytes),
        k_stride_(stride(view.shape.k_dim)),
        v_stride_(stride(view.shape.v_dim)),
        k_scales_(scales(view.shape.k_dim)),
        v_scales_(scales(view.shape.v_dim)),
        block_size_(static_cast<size_t>(view.block_size())) {}

  // Bytes from a row to the next, and a row's scales.
  static constexpr size_t stride(int dim) {
    return whole_chunks(static_cast<size_t>(dim) * sizeof(typename Codec<Kv>::Element));
  }
  static constexpr size_t scales(int dim) {  // an even number, so that they can be copied 4 bytes at a time
    return IS_QUANTISED ? static_cast<size_t>((dim + 2 * KvQ8::QUANT_GROUP - 1) / (2 * KvQ8::QUANT_GROUP) * 2) : 0;
  }
  static constexpr size_t bytes_per_token(const CacheShape& shape) {
    return stride(shape.k_dim) + stride(shape.v_dim) + (scales(shape.k_dim) + scales(shape.v_dim)) * sizeof(uint16_t);
  }
  static constexpr size_t block_bytes(const CacheShape& shape) {
    return whole_chunks(bytes_per_token(shape) * static_cast<size_t>(Block ? Block : shape.block_size));
  }

  // Of the token in `slot`.
  constexpr std::byte* k(int block, int slot) const { return at(block, slot, 0, k_stride_); }
  constexpr std::byte* v(int block, int slot) const { return at(block, slot, block_size_ * k_stride_, v_stride_); }
  // float16, one for each 32 elements.
  constexpr std::byte* k_scales(int block, int slot) const {
    return at(block, slot, block_size_ * (k_stride_ + v_stride_), k_scales_ * sizeof(uint16_t));
  }
  constexpr std::byte* v_scales(int block, int slot) const {
    return at(block, slot, block_size_ * (k_stride_ + v_stride_ + k_scales_ * sizeof(uint16_t)),
              v_scales_ * sizeof(uint16_t));
  }

  static constexpr bool IS_QUANTISED = std::is_same_v<Kv, KvQ8>;

 private:
  constexpr std::byte* at(int block, int slot, size_t first, size_t step) const {
    return start_ + static_cast<size_t>(block) * block_bytes_ + first + static_cast<size_t>(slot) * step;
  }

  std::byte* start_;
  size_t block_bytes_, k_stride_, v_stride_, k_scales_, v_scales_, block_size_;
};

// Element i of a row, as float.
template <class Kv>
__device__ float load_element(const std::byte* row, const std::byte* scales, int i) {
  const float x = Codec<Kv>::widen(reinterpret_cast<const typename Codec<Kv>::Element*>(row)[i]);
  if constexpr (!std::is_same_v<Kv, KvQ8>) return x;
  return x * f16_to_float(reinterpret_cast<const uint16_t*>(scales)[i / KvQ8::QUANT_GROUP]);
}
