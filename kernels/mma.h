// mma.h: a warp's products on tensor cores, and how the cache's rows become their operands.
#pragma once

#include "kernels/kv_gpu.h"

// mma.sync m16n8k16 is a warp's product D [16, 8] += A [16, 16] B [16, 8]. Lane 4 g + t (g 0 .. 7, t 0 .. 3) holds
//
//      A           k 2t 2t+1   k 2t+8 2t+9        B             column g        D           columns 2t 2t+1
//      row g         a[0]         a[2]            k 2t 2t+1       b[0]          row g           d[0]  d[1]
//      row g + 8     a[1]         a[3]            k 2t+8 2t+9     b[1]          row g + 8       d[2]  d[3]
//
// two 16-bit elements in each register of A and B. So a lane has results of two rows, and a row's lie in the four lanes
// of a quad; two D side by side lie as one A does: weights go from the first product into the second as they are.
// A may be a sum of parts: the number as 16 bits hold it, and what rounding has lost.
template <int PARTS>
struct A {
  uint32_t part[PARTS][4];
};

struct F16 {
  static __device__ uint32_t pack(float low, float high) { return pack_f16(low, high); }
  static __device__ float unpack(uint32_t x) { return f16_to_float(static_cast<uint16_t>(x)); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(d, a, b[0], b[1]);
  }
};
struct BF16 {
  static __device__ uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  static __device__ float unpack(uint32_t x) { return bf16_to_float(static_cast<uint16_t>(x)); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b[0], b[1]);
  }
};

// Register i of all parts = low and high.
template <class Type, int PARTS, int N>
__device__ inline void set(uint32_t (&part)[PARTS][N], int i, float low, float high) {
  part[0][i] = Type::pack(low, high);
  if constexpr (PARTS == 2)
    part[1][i] = Type::pack(low - Type::unpack(part[0][i]), high - Type::unpack(part[0][i] >> 16));
}

// d += a b
template <class Type, int PARTS>
__device__ void multiply(float (&d)[4], const A<PARTS>& a, const uint32_t (&b)[2]) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) Type::mma(d, a.part[i], b);
}

// How rows of a KV type become B operands, 32 elements at a time. A row is `stride` bytes behind the one before.
//
//     keys      8 tokens' rows from `rows` on: a product over 32 elements, in two steps of 16
//     values    16 tokens' rows: four products of 8 columns; result c of product n is column `column(n, c)`
//     place     where element i of q lies, so that a step's k means the same element in both operands
//
//             operands                                       parts of q, weights     their error
//     f16     f16                                            1                       2^-11
//     bf16    bf16                                           1                       2^-8
//     q8      bf16: integers, exact; scales stay float       2                       2^-16
template <class Kv>
struct Operands;

template <class T, int BITS>
struct HalfOperands {
  using Type = T;
  static constexpr int Q_PARTS = 1;
  static constexpr double ROUNDING = 1.0 / (1 << BITS);
  static __device__ void keys(uint32_t (&b)[2][2], const std::byte* rows, int stride) {
    uint32_t x[4];  // matrix m: elements 8 m .. 8 m + 7
    ldmatrix_x4(x, rows + lane_id() % 8 * stride + lane_id() / 8 * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) b[i / 2][i % 2] = x[i];
  }
  static __device__ constexpr int place(int i) {
    return i;
  }
  // Row i of matrix m: token 8 (m % 2) + i, columns 8 (m / 2) .. + 7; "trans" gives a lane two tokens of a column.
  static __device__ void values(uint32_t (&b)[4][2], const std::byte* rows, int stride) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t x[4];
      ldmatrix_x4_trans(x, rows + lane_id() % 16 * stride + lane_id() / 16 * 16 + half * 32);
#pragma unroll
      for (int i = 0; i < 4; i++) b[half * 2 + i / 2][i % 2] = x[i];
    }
  }
  static __device__ constexpr int column(int product, int c) {
    return product * 8 + c;
  }
};
template <>
struct Operands<KvF16> : HalfOperands<F16, 11> {};
template <>
struct Operands<KvBF16> : HalfOperands<BF16, 8> {};

template <>
struct Operands<KvQ8> {
  using Type = BF16;
  static constexpr int Q_PARTS = 2;
  static constexpr double ROUNDING = 0x1p-16;
  static __device__ uint32_t pair(uint32_t bytes, int i, int j) {
    const auto element = [&](int n) { return static_cast<float>(static_cast<int8_t>(bytes >> 8 * n)); };
    return pack_bf16(element(i), element(j));
  }
  // Lane t takes elements 4t .. 4t + 3 of 16 in one load: k 2t, 2t+1, 2t+8 and 2t+9.
  static __device__ void keys(uint32_t (&b)[2][2], const std::byte* rows, int stride) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const auto x = load_vector<uint32_t>(rows + lane_id() / 4 * stride + lane_id() % 4 * 4 + step * 16);
      b[step][0] = pair(x, 0, 1), b[step][1] = pair(x, 2, 3);
    }
  }
  static __device__ constexpr int place(int i) {
    return i / 16 * 16 + i % 4 / 2 * 8 + i % 16 / 4 * 2 + i % 2;
  }
  // The matrices of 16 tokens by 16 bits, each two columns: the even columns make one product, the odd ones another.
  static __device__ void values(uint32_t (&b)[4][2], const std::byte* rows, int stride) {
    uint32_t x[4];
    ldmatrix_x4_trans(x, rows + lane_id() % 16 * stride + lane_id() / 16 * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      b[i / 2 * 2][i % 2] = pair(x[i], 0, 2);
      b[i / 2 * 2 + 1][i % 2] = pair(x[i], 1, 3);
    }
  }
  static __device__ constexpr int column(int product, int c) {
    return product / 2 * 16 + 2 * c + product % 2;
  }
};
