// simd.h: the vector register of this build, under one name for every level of instructions.
//
// F32 holds LANES floats and I32 LANES int32: vector types of the compiler, whose operators (+ - * / & << < ? : ...)
// work lane by lane and take a number for all lanes. What follows is what has no operator. The level is the compiler's
// (-march=native, or ARCH=): AVX-512 (F, BW, DQ, VL), AVX2 with FMA and F16C, or portable, from which the compiler
// makes what it can. fma is explicit everywhere and the build uses -ffp-contract=off, so that two loops over the same
// numbers round the same way, however many rows they handle.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#pragma GCC diagnostic push
// GCC 12's header passes undefined registers on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SIMD_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SIMD_AVX2 1
#else
#define SIMD_PORTABLE 1
#endif

// --- scalar conversions ----------------------------------------------------------------------------------------------

inline float bf16_to_float(uint16_t h) {
  return std::bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  const auto bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t h) {
#if defined(SIMD_PORTABLE)
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // Read as a float, the exponent is 112 too small; infinity's and NaN's is the largest of either type.
  if (magnitude >= 31u << 23) return std::bit_cast<float>(sign | 0x7f800000u | magnitude);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f));
#else
  return _cvtsh_ss(h);
#endif
}

// Round to nearest even; too large becomes infinity.
inline uint16_t float_to_f16(float f) {
#if defined(SIMD_PORTABLE)
  uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (bits < 0x38800000u)  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - 0x3f000000u));
  bits += 0xfffu + ((bits >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (bits >> 13));
#else
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), 0)));
#endif
}

namespace simd {

#if defined(SIMD_AVX512)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

using F32 = float __attribute__((vector_size(4 * LANES)));
using I32 = int32_t __attribute__((vector_size(4 * LANES)));  // or 4 LANES bytes
using U32 = uint32_t __attribute__((vector_size(4 * LANES)));
using I16 = int16_t __attribute__((vector_size(4 * LANES)));
using U16 = uint16_t __attribute__((vector_size(4 * LANES)));
using Half = uint16_t __attribute__((vector_size(2 * LANES)));  // LANES of them, half a register

// --- the same at every level -----------------------------------------------------------------------------------------

// One line an operation:
// clang-format off
template <class T>
T load_as(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline F32 load(const float* p) { return load_as<F32>(p); }
inline I32 load_i32(const void* p) { return load_as<I32>(p); }
inline F32 load_bf16(const uint16_t* p) {
  const I32 wide = __builtin_convertvector(load_as<Half>(p), I32);
  return std::bit_cast<F32>(wide << 16);
}
inline void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }
inline void store_i32(void* p, I32 x) { std::memcpy(p, &x, sizeof x); }

inline F32 set(float x) { return x - F32{}; }  // and not +, which would lose the sign of -0
inline F32 zero() { return F32{}; }
inline I32 set_i32(int32_t x) { return x - I32{}; }
// The same 4 bytes in every lane.
inline I32 set_bytes(const void* p) { return set_i32(load_as<int32_t>(p)); }

inline F32 min(F32 a, F32 b) { return a < b ? a : b; }  // b where either is NaN
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline I32 max(I32 a, I32 b) { return a > b ? a : b; }
inline F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
inline I32 magnitude_bits(F32 x) { return std::bit_cast<I32>(x) & 0x7fffffff; }
inline F32 low_bf16(I32 pairs) { return std::bit_cast<F32>(pairs << 16); }
inline F32 high_bf16(I32 pairs) { return std::bit_cast<F32>(pairs & -0x10000); }

// --- where a level has an instruction --------------------------------------------------------------------------------
//
// load_first, store_first: lanes 0 .. n - 1; the others are zero, and their memory is not touched.
// to_i32: to nearest even; out of range and NaN: INT32_MIN. store_i8 saturates.
// scale_by_power_of_2: a * 2^n, n a whole number in -252 .. 254.
// multiply_add_i16: in each lane the sum of the products of 2 int16, each of which fits int16 too. multiply_add_i8: in
// each int16 that of 2 bytes.
// dot4: sum + in each lane the dot product of 4 unsigned bytes (u) and 4 signed bytes (s). Exact at every level: where
// there is no vpdpbusd the bytes are widened first, because vpmaddubsw's 16 bits saturate at 2 * 255 * 127.
// dot4_halves: the same for up to 8 calls with u <= 15, which sum to at most 8 * 2 * 15 * 128 and so fit vpmaddubsw's
// 16 bits (half the instructions); the sum starts from zero and total_halves makes it an int32.

#if defined(SIMD_AVX512)

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline F32 load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_first(float* p, F32 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
inline F32 load_f16(const uint16_t* p) { return _mm512_cvtph_ps(__m256i(load_as<Half>(p))); }
inline void store_f16(uint16_t* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0)); }
inline F32 load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline I32 load_u8(const uint8_t* p) {
  return I32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 round(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 scale_by_power_of_2(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }
inline I32 to_i32(F32 x) { return I32(_mm512_cvtps_epi32(x)); }
inline void store_i8(int8_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(__m512i(x)));
}
inline I32 multiply_add_i16(I16 a, I16 b) { return I32(_mm512_madd_epi16(__m512i(a), __m512i(b))); }
inline I16 multiply_add_i8(I32 u, I32 s) { return I16(_mm512_maddubs_epi16(__m512i(u), __m512i(s))); }
#if defined(__AVX512BF16__)
#define SIMD_BF16_DOT 1
inline F32 dot2_bf16(F32 sum, I32 a, I32 b) {  // sum + a dot product of 2 bfloat16 a lane; subnormals count as zero
  return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
}
#endif
#if defined(__AVX512VNNI__)
#define SIMD_BYTE_DOT 1
inline I32 dot4(I32 sum, I32 u, I32 s) { return I32(_mm512_dpbusd_epi32(__m512i(sum), __m512i(u), __m512i(s))); }
#endif

#elif defined(SIMD_AVX2)

inline __m256i first_lanes(int n) { return __m256i(n > I32{0, 1, 2, 3, 4, 5, 6, 7}); }
inline F32 load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_first(float* p, F32 x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
inline F32 load_f16(const uint16_t* p) { return _mm256_cvtph_ps(__m128i(load_as<Half>(p))); }
inline void store_f16(uint16_t* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0)); }
inline F32 load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline I32 load_u8(const uint8_t* p) {
  return I32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 round(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I32 to_i32(F32 x) { return I32(_mm256_cvtps_epi32(x)); }
inline void store_i8(int8_t* p, I32 x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(__m256i(x)), _mm256_extracti128_si256(__m256i(x), 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline I32 multiply_add_i16(I16 a, I16 b) { return I32(_mm256_madd_epi16(__m256i(a), __m256i(b))); }
inline I16 multiply_add_i8(I32 u, I32 s) { return I16(_mm256_maddubs_epi16(__m256i(u), __m256i(s))); }
#if defined(__AVXVNNI__)
#define SIMD_BYTE_DOT 1
inline I32 dot4(I32 sum, I32 u, I32 s) { return I32(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(u), __m256i(s))); }
#endif

#else

// f(lane) in every lane.
template <class Vector = F32, class F>
inline Vector each(F f) {
  Vector x;
  for (int i = 0; i < LANES; i++) x[i] = f(i);
  return x;
}
inline F32 load_first(const float* p, int n) { return each([&](int i) { return i < n ? p[i] : 0.0f; }); }
inline void store_first(float* p, F32 x, int n) { std::memcpy(p, &x, static_cast<size_t>(n) * sizeof(float)); }
inline F32 load_f16(const uint16_t* p) { return each([&](int i) { return f16_to_float(p[i]); }); }
inline void store_f16(uint16_t* p, F32 x) { for (int i = 0; i < LANES; i++) p[i] = float_to_f16(x[i]); }
inline F32 load_i8(const int8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
inline I32 load_u8(const uint8_t* p) { return each<I32>([&](int i) { return p[i]; }); }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }  // no fused instruction to count on: rounds twice
inline F32 round(F32 x) { return each([&](int i) { return std::nearbyintf(x[i]); }); }
inline I32 to_i32(F32 x) {
  const auto lane = [](float y) {
    return std::fabs(y) < 0x1p31f ? static_cast<int32_t>(std::nearbyintf(y)) : INT32_MIN;
  };
  return each<I32>([&](int i) { return lane(x[i]); });
}
inline void store_i8(int8_t* p, I32 x) {
  for (int i = 0; i < LANES; i++) p[i] = static_cast<int8_t>(x[i] < -128 ? -128 : x[i] > 127 ? 127 : x[i]);
}
inline I32 multiply_add_i16(I16 a, I16 b) {
  const I32 products = I32(a * b);
  return (products << 16 >> 16) + (products >> 16);
}

#endif
// clang-format on

#if !defined(SIMD_AVX512)
inline F32 scale_by_power_of_2(F32 a, F32 n) {  // in two steps, so that no factor over- or underflows
  const I32 whole = to_i32(n), half = whole >> 1;
  return a * std::bit_cast<F32>((half + 127) << 23) * std::bit_cast<F32>((whole - half + 127) << 23);
}
#endif

#if !defined(SIMD_BYTE_DOT)
inline I32 dot4(I32 sum, I32 u, I32 s) {
  const U16 bytes = std::bit_cast<U16>(u);
  const I16 signed_bytes = std::bit_cast<I16>(s);
  const I32 even = multiply_add_i16(std::bit_cast<I16>(bytes & 255), signed_bytes << 8 >> 8);
  return sum + even + multiply_add_i16(std::bit_cast<I16>(bytes >> 8), signed_bytes >> 8);
}
#endif

#if defined(SIMD_BYTE_DOT) || defined(SIMD_PORTABLE)
inline I32 dot4_halves(I32 sum, I32 u, I32 s) {
  return dot4(sum, u, s);
}
inline I32 total_halves(I32 sum) {
  return sum;
}
#else
inline I32 dot4_halves(I32 sum, I32 u, I32 s) {
  return std::bit_cast<I32>(std::bit_cast<I16>(sum) + multiply_add_i8(u, s));
}
inline I32 total_halves(I32 sum) {
  return multiply_add_i16(std::bit_cast<I16>(sum), I16{} + 1);
}
#endif

// --- across the lanes ------------------------------------------------------------------------------------------------

// Lane i is lane from(i) of a and b, which are counted on from a to b.
template <class Vector, class From>
Vector shuffled(Vector a, Vector b, From) {
  const auto lanes = [&]<int... I>(std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, From{}(I)...);
  };
  return lanes(std::make_integer_sequence<int, LANES>());
}

// All lanes joined by `op`, as a tree: the order is fixed.
template <int WIDTH = LANES / 2, class Vector, class Op>
auto joined(Vector x, Op op) {
  const Vector y = op(x, shuffled(x, x, [](int i) { return (i + WIDTH) % LANES; }));
  if constexpr (WIDTH > 1)
    return joined<WIDTH / 2>(y, op);
  else
    return y[0];
}
template <class Vector>
auto sum(Vector x) {
  return joined(x, [](Vector a, Vector b) { return a + b; });
}
template <class Vector>
auto largest(Vector x) {
  return joined(x, [](Vector a, Vector b) { return max(a, b); });
}

// Four elements of each fourth row, from row[0] on, side by side.
inline F32 quads(const float* const* row, int first) {
#if defined(SIMD_AVX512)
  F32 x = _mm512_castps128_ps512(_mm_loadu_ps(row[0] + first));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(row[4] + first), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(row[8] + first), 2);
  return _mm512_insertf32x4(x, _mm_loadu_ps(row[12] + first), 3);
#elif defined(SIMD_AVX2)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[0] + first)), _mm_loadu_ps(row[4] + first), 1);
#else
  return each([&](int i) { return row[i / 4 * 4][first + i % 4]; });
#endif
}

// Eight elements of LANES rows, transposed: lane i of out[j] becomes element first + j of row i. A round of pairing
// registers i and i + 2 interleaves their lanes: seen as a number, the place of an element, register first, turns by
// one bit; so two rounds transpose four registers of four places each.
inline void columns(const float* const* row, int first, F32 (&out)[8]) {
  const auto low = [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * LANES; };
  const auto high = [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * LANES + 2; };
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
    F32* x = out + half;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] = quads(row + i, first + half);
#pragma GCC unroll 2
    for (int round = 0; round < 2; round++) {
      const F32 y[4] = {x[0], x[1], x[2], x[3]};
      x[0] = shuffled(y[0], y[2], low), x[1] = shuffled(y[0], y[2], high);
      x[2] = shuffled(y[1], y[3], low), x[3] = shuffled(y[1], y[3], high);
    }
  }
}

// --- functions -------------------------------------------------------------------------------------------------------

// e^x: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 7 in r (Cody and Waite reduction; coefficients of
// the Taylor series, whose first missing term is below 2^-27 of the result). Within 2 ulp for x <= 88; at most 2^-125
// below -87.3; NaN stays NaN.
inline F32 exp(F32 x) {
  const F32 clamped = max(set(-87.33654f), x);  // in this order a NaN passes
  const F32 n = round(clamped * 1.44269504f);
  F32 r = fma(n, set(-0.693359375f), clamped);
  r = fma(n, set(2.12194440e-4f), r);
  F32 p = set(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = fma(p, r, set(coefficient));
  return scale_by_power_of_2(p, n);
}

// x, kept in a register: g++ would rather read it from memory again at every use, and loads become the limit.
inline F32 in_register(F32 x) {
#if !defined(SIMD_PORTABLE)
  asm("" : "+v"(x));
#endif
  return x;
}

// --- small numbers in the bytes of a register ------------------------------------------------------------------------

// Of each byte the bits of `mask` after a shift to the right, or to the left by -right.
inline uint32_t bits(uint32_t x, int right, uint32_t mask) {
  return (right < 0 ? x << -right : x >> right) & mask;
}
inline I32 bits(I32 x, int right, uint32_t mask) {
  const auto word = std::bit_cast<U32>(x);
  return std::bit_cast<I32>((right < 0 ? word << -right : word >> right) & mask);
}

// Byte by byte table[index], table [16].
#if defined(SIMD_AVX512)
inline I32 lookup(const uint8_t* table, I32 index) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return I32(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), __m512i(index)));
}
#elif defined(SIMD_AVX2)
inline I32 lookup(const uint8_t* table, I32 index) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return I32(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), __m256i(index)));
}
#else
inline I32 lookup(const uint8_t* table, I32 index) {
  uint8_t bytes[4 * LANES];
  store_i32(bytes, index);
  for (uint8_t& byte : bytes) byte = table[byte];
  return load_i32(bytes);
}
#endif

// 2^(p[i] - 128), a subnormal number too.
inline F32 load_power_of_2(const uint8_t* p) {
  float x[LANES];
  for (int i = 0; i < LANES; i++) {
    // Half of 2^(p[i] - 127): there the exponent is the byte itself, but for 0.
    const uint32_t bits = p[i] ? static_cast<uint32_t>(p[i]) << 23 : 0x00400000u;
    std::memcpy(&x[i], &bits, 4);
  }
  return load(x) * 0.5f;
}

// How many dot4_halves in a row are exact for u <= most; 0 where dot4 takes as few instructions.
constexpr int halves_that_fit([[maybe_unused]] int most) {
#if defined(SIMD_PORTABLE) || defined(SIMD_BYTE_DOT)
  return 0;
#else
  return 0x7fff / (2 * 127 * most);
#endif
}

}  // namespace simd
