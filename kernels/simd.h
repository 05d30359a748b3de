// simd.h: the vector register of this build, under one name for every level of instructions.
//
// F32 holds LANES floats. The level is the compiler's (-march=native, or ARCH=): AVX-512 (F, BW, DQ, VL), AVX2 with FMA
// and F16C, or portable arrays that the compiler vectorises as it can. fma is explicit everywhere and the build uses
// -ffp-contract=off, so that two loops over the same numbers round the same way, however many rows they handle.
#pragma once

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
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t h) {
#if defined(SIMD_AVX512) || defined(SIMD_AVX2)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 1023u;
  uint32_t bits;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float f = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

// Round to nearest even; too large becomes infinity.
inline uint16_t float_to_f16(float f) {
#if defined(SIMD_AVX512) || defined(SIMD_AVX2)
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), 0)));
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (bits >> 13));
#endif
}

// --- F32: LANES floats -----------------------------------------------------------------------------------------------

namespace simd {

// One line an instruction:
// clang-format off
#if defined(SIMD_AVX512)

constexpr int LANES = 16;
using F32 = __m512;
inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 set(float x) { return _mm512_set1_ps(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline F32 load_first(const float* p, int n) {  // lanes >= n are zero and not read
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
inline void store_first(float* p, F32 x, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), x); }
inline F32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
}
inline F32 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F32 load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 round(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 scale_by_power_of_2(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n a whole number

inline float largest(F32 x) { return _mm512_reduce_max_ps(x); }

using I32 = __m512i;  // LANES int32, or 4 LANES bytes
inline I32 set_i32(int32_t x) { return _mm512_set1_epi32(x); }
inline I32 load_i32(const void* p) { return _mm512_loadu_si512(p); }
inline void store_i32(void* p, I32 a) { _mm512_storeu_si512(p, a); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 max(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline int32_t sum(I32 x) { return _mm512_reduce_add_epi32(x); }
inline int32_t largest(I32 x) { return _mm512_reduce_max_epi32(x); }
inline I32 low_halves(I32 bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline I32 high_halves(I32 bytes) { return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15)); }
inline I32 magnitude_bits(F32 a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
inline F32 to_float(I32 a) { return _mm512_cvtepi32_ps(a); }
inline I32 to_i32(F32 a) { return _mm512_cvtps_epi32(a); }  // to nearest even; out of range and NaN: INT32_MIN
inline void store_i8(int8_t* p, I32 a) {                    // saturates
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
}
inline F32 low_bf16(I32 pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline F32 high_bf16(I32 pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
}
#if defined(__AVX512BF16__)
#define SIMD_BF16_DOT 1
inline F32 dot2_bf16(F32 sum, I32 a, I32 b) {  // sum + a dot product of 2 bfloat16 a lane; subnormals count as zero
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif
#if defined(__AVX512VNNI__)
inline I32 dot4(I32 sum, I32 u, I32 s) { return _mm512_dpbusd_epi32(sum, u, s); }
inline I32 dot4_halves(I32 sum, I32 u, I32 s) { return dot4(sum, u, s); }
inline I32 total_halves(I32 sum) { return sum; }
#else
inline I32 dot4(I32 sum, I32 u, I32 s) {
  const I32 u_even = _mm512_and_si512(u, _mm512_set1_epi16(255)), u_odd = _mm512_srli_epi16(u, 8);
  const I32 s_even = _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8), s_odd = _mm512_srai_epi16(s, 8);
  return add(sum, add(_mm512_madd_epi16(u_even, s_even), _mm512_madd_epi16(u_odd, s_odd)));
}
inline I32 dot4_halves(I32 sum, I32 u, I32 s) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(u, s)); }
inline I32 total_halves(I32 sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
#endif

#elif defined(SIMD_AVX2)

constexpr int LANES = 8;
using F32 = __m256;
inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 set(float x) { return _mm256_set1_ps(x); }
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F32 load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_first(float* p, F32 x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
inline F32 load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_f16(uint16_t* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0)); }
inline F32 load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F32 load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 round(F32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 scale_by_power_of_2(F32 a, F32 n) {  // n in -252 .. 254: two steps, so that no factor over- or underflows
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const F32 f1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const F32 f2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a, f1), f2);
}

inline float largest(F32 x) {
  const __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

using I32 = __m256i;  // LANES int32, or 4 LANES bytes
inline I32 set_i32(int32_t x) { return _mm256_set1_epi32(x); }
inline I32 load_i32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_i32(void* p, I32 a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline I32 max(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
inline int32_t sum(I32 x) {
  const __m128i a = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i b = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
inline int32_t largest(I32 x) {
  const __m128i a = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i b = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
inline I32 low_halves(I32 bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline I32 high_halves(I32 bytes) { return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15)); }
inline I32 magnitude_bits(F32 a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }
inline F32 to_float(I32 a) { return _mm256_cvtepi32_ps(a); }
inline I32 to_i32(F32 a) { return _mm256_cvtps_epi32(a); }  // to nearest even; out of range and NaN: INT32_MIN
inline void store_i8(int8_t* p, I32 a) {                    // saturates
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline F32 low_bf16(I32 pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline F32 high_bf16(I32 pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}
#if defined(__AVXVNNI__)
inline I32 dot4(I32 sum, I32 u, I32 s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
inline I32 dot4_halves(I32 sum, I32 u, I32 s) { return dot4(sum, u, s); }
inline I32 total_halves(I32 sum) { return sum; }
#else
inline I32 dot4(I32 sum, I32 u, I32 s) {
  const I32 u_even = _mm256_and_si256(u, _mm256_set1_epi16(255)), u_odd = _mm256_srli_epi16(u, 8);
  const I32 s_even = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), s_odd = _mm256_srai_epi16(s, 8);
  return add(sum, add(_mm256_madd_epi16(u_even, s_even), _mm256_madd_epi16(u_odd, s_odd)));
}
inline I32 dot4_halves(I32 sum, I32 u, I32 s) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s)); }
inline I32 total_halves(I32 sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

#else

constexpr int LANES = 8;
struct F32 {
  float lane[LANES];
};
template <class F>
inline F32 each(F f) {
  F32 r;
  for (int i = 0; i < LANES; i++) r.lane[i] = f(i);
  return r;
}
inline F32 set(float x) {
  return each([&](int) { return x; });
}
inline F32 zero() { return set(0); }
inline F32 load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline void store(float* p, F32 x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline F32 load_first(const float* p, int n) {
  return each([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store_first(float* p, F32 x, int n) { std::memcpy(p, x.lane, static_cast<size_t>(n) * sizeof(float)); }
inline F32 load_f16(const uint16_t* p) {
  return each([&](int i) { return f16_to_float(p[i]); });
}
inline void store_f16(uint16_t* p, F32 x) {
  for (int i = 0; i < LANES; i++) p[i] = float_to_f16(x.lane[i]);
}
inline F32 load_bf16(const uint16_t* p) {
  return each([&](int i) { return bf16_to_float(p[i]); });
}
inline F32 load_i8(const int8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline F32 add(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F32 sub(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F32 mul(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
// No fused instruction to count on: rounds twice, the same way everywhere in the build.
inline F32 fma(F32 a, F32 b, F32 c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline F32 min(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32 max(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32 round(F32 a) {
  return each([&](int i) { return std::nearbyintf(a.lane[i]); });
}
inline F32 scale_by_power_of_2(F32 a, F32 n) {
  return each([&](int i) { return std::ldexp(a.lane[i], static_cast<int>(n.lane[i])); });
}

inline float largest(F32 x) {
  float m = x.lane[0];
  for (int i = 1; i < LANES; i++) m = x.lane[i] > m ? x.lane[i] : m;
  return m;
}

struct I32 {  // LANES int32, or 4 LANES bytes
  int32_t lane[LANES];
};
template <class F>
inline I32 each_i32(F f) {
  I32 r;
  for (int i = 0; i < LANES; i++) r.lane[i] = f(i);
  return r;
}
inline I32 set_i32(int32_t x) {
  return each_i32([&](int) { return x; });
}
inline I32 load_i32(const void* p) {
  I32 r;
  std::memcpy(r.lane, p, sizeof r.lane);
  return r;
}
inline void store_i32(void* p, I32 a) { std::memcpy(p, a.lane, sizeof a.lane); }
inline I32 add(I32 a, I32 b) {
  return each_i32([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline I32 max(I32 a, I32 b) {
  return each_i32([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline int32_t sum(I32 x) {
  int32_t total = 0;
  for (int lane : x.lane) total += lane;
  return total;
}
inline int32_t largest(I32 x) {
  int32_t m = x.lane[0];
  for (int lane : x.lane) m = lane > m ? lane : m;
  return m;
}
inline I32 low_halves(I32 bytes) {
  return each_i32([&](int i) { return bytes.lane[i] & 0x0f0f0f0f; });
}
inline I32 high_halves(I32 bytes) {
  return each_i32([&](int i) { return (bytes.lane[i] >> 4) & 0x0f0f0f0f; });
}
inline I32 magnitude_bits(F32 a) {
  const I32 bits = load_i32(a.lane);
  return each_i32([&](int i) { return bits.lane[i] & 0x7fffffff; });
}
inline F32 to_float(I32 a) {
  return each([&](int i) { return static_cast<float>(a.lane[i]); });
}
inline I32 to_i32(F32 a) {  // to nearest even; out of range and NaN: INT32_MIN
  return each_i32([&](int i) {
    return std::fabs(a.lane[i]) < 0x1p31f ? static_cast<int32_t>(std::nearbyintf(a.lane[i])) : INT32_MIN;
  });
}
inline void store_i8(int8_t* p, I32 a) {  // saturates
  for (int i = 0; i < LANES; i++)
    p[i] = static_cast<int8_t>(a.lane[i] < -128 ? -128 : a.lane[i] > 127 ? 127 : a.lane[i]);
}
inline F32 low_bf16(I32 pairs) {
  return each([&](int i) { return bf16_to_float(static_cast<uint16_t>(pairs.lane[i] & 0xffff)); });
}
inline F32 high_bf16(I32 pairs) {
  return each([&](int i) { return bf16_to_float(static_cast<uint16_t>((pairs.lane[i] >> 16) & 0xffff)); });
}
inline I32 dot4(I32 sum, I32 u, I32 s) {
  for (int shift = 0; shift < 32; shift += 8)
    for (int i = 0; i < LANES; i++)
      sum.lane[i] += ((u.lane[i] >> shift) & 255) * static_cast<int8_t>(s.lane[i] >> shift & 255);
  return sum;
}
inline I32 dot4_halves(I32 sum, I32 u, I32 s) { return dot4(sum, u, s); }
inline I32 total_halves(I32 sum) { return sum; }

#endif
// clang-format on

// --- I32: LANES int32, or 4 LANES bytes ------------------------------------------------------------------------------
//
// dot4: sum + in each lane the dot product of 4 unsigned bytes (u) and 4 signed bytes (s). Exact at every level: where
// there is no vpdpbusd the bytes are widened first, because vpmaddubsw's 16 bits saturate at 2 * 255 * 127.
// dot4_halves: the same for up to 8 calls with u <= 15, which sum to at most 8 * 2 * 15 * 128 and so fit vpmaddubsw's
// 16 bits (half the instructions); the sum starts from zero and total_halves makes it an int32.

// The same 4 bytes in every lane.
inline I32 set_bytes(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return set_i32(x);
}

// --- columns: eight elements of LANES rows, transposed ---------------------------------------------------------------
//
// Lane i of out[j] becomes element first + j of row i. A round of `interleave` pairs register i with i + 2: seen as a
// number, the place of an element, register first, turns by one bit; so two rounds transpose four registers of four
// places each.

#if defined(SIMD_AVX512) || defined(SIMD_AVX2)
template <class Low, class High>
inline void interleave(F32 (&x)[4], Low low, High high) {
#pragma GCC unroll 2
  for (int round = 0; round < 2; round++) {
    const F32 y[4] = {low(x[0], x[2]), high(x[0], x[2]), low(x[1], x[3]), high(x[1], x[3])};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] = y[i];
  }
}
#endif

#if defined(SIMD_AVX512)
inline void columns(const float* const* row, int first, F32 (&out)[8]) {
#pragma GCC unroll 2
  for (int half = first; half < first + 8; half += 4) {
    F32 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      x[i] = _mm512_castps128_ps512(_mm_loadu_ps(row[i] + half));
      x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row[i + 4] + half), 1);
      x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row[i + 8] + half), 2);
      x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row[i + 12] + half), 3);
    }
    interleave(
        x, [](F32 a, F32 b) { return _mm512_unpacklo_ps(a, b); },
        [](F32 a, F32 b) { return _mm512_unpackhi_ps(a, b); });
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) out[half - first + j] = x[j];
  }
}
#elif defined(SIMD_AVX2)
inline void columns(const float* const* row, int first, F32 (&out)[8]) {
#pragma GCC unroll 2
  for (int half = first; half < first + 8; half += 4) {
    F32 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      x[i] =
          _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[i] + half)), _mm_loadu_ps(row[i + 4] + half), 1);
    interleave(
        x, [](F32 a, F32 b) { return _mm256_unpacklo_ps(a, b); },
        [](F32 a, F32 b) { return _mm256_unpackhi_ps(a, b); });
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) out[half - first + j] = x[j];
  }
}
#else
inline void columns(const float* const* row, int first, F32 (&out)[8]) {
  for (int j = 0; j < 8; j++) out[j] = each([&](int i) { return row[i][first + j]; });
}
#endif

// The lanes' sum, added as a tree: the order is fixed.
inline float sum(F32 x) {
  alignas(64) float lane[LANES];
  store(lane, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}

// e^x: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 7 in r (Cody and Waite reduction; coefficients of
// the Taylor series, whose first missing term is below 2^-27 of the result). Within 2 ulp for x <= 88; at most 2^-125
// below -87.3; NaN stays NaN.
inline F32 exp(F32 x) {
  const F32 clamped = max(set(-87.33654f), x);  // in this order a NaN passes
  const F32 n = round(mul(clamped, set(1.44269504f)));
  F32 r = fma(n, set(-0.693359375f), clamped);
  r = fma(n, set(2.12194440e-4f), r);
  F32 p = set(1.0f / 5040);
  p = fma(p, r, set(1.0f / 720));
  p = fma(p, r, set(1.0f / 120));
  p = fma(p, r, set(1.0f / 24));
  p = fma(p, r, set(1.0f / 6));
  p = fma(p, r, set(0.5f));
  p = fma(p, r, set(1));
  p = fma(p, r, set(1));
  return scale_by_power_of_2(p, n);
}

// x, kept in a register: g++ would rather read it from memory again at every use, and loads become the limit.
inline F32 in_register(F32 x) {
#if defined(SIMD_AVX512) || defined(SIMD_AVX2)
  asm("" : "+v"(x));
#endif
  return x;
}

// --- small numbers in the bytes of a register ------------------------------------------------------------------------

// Of each byte the bits of `mask` after a shift to the right, or to the left by -right.
inline uint32_t bits(uint32_t x, int right, uint32_t mask) {
  return (right < 0 ? x << -right : x >> right) & mask;
}
#if defined(SIMD_AVX512) || defined(SIMD_AVX2)
using U32 [[gnu::vector_size(4 * LANES)]] = uint32_t;
inline I32 bits(I32 x, int right, uint32_t mask) {
  const U32 word = reinterpret_cast<U32>(x);
  return reinterpret_cast<I32>((right < 0 ? word << -right : word >> right) & mask);
}
inline I32 either(I32 a, I32 b) {
  return a | b;
}
#else
inline I32 bits(I32 x, int right, uint32_t mask) {
  return each_i32([&](int i) { return static_cast<int32_t>(bits(static_cast<uint32_t>(x.lane[i]), right, mask)); });
}
inline I32 either(I32 a, I32 b) {
  return each_i32([&](int i) { return a.lane[i] | b.lane[i]; });
}
#endif
inline uint32_t either(uint32_t a, uint32_t b) {
  return a | b;
}

// Byte by byte table[index], table [16].
#if defined(SIMD_AVX512)
inline I32 lookup(const uint8_t* table, I32 index) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index);
}
#elif defined(SIMD_AVX2)
inline I32 lookup(const uint8_t* table, I32 index) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))),
                             index);
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
  return mul(load(x), set(0.5f));
}

// How many dot4_halves in a row are exact for u <= most; 0 where dot4 takes as few instructions.
constexpr int halves_that_fit([[maybe_unused]] int most) {
#if defined(SIMD_PORTABLE) || defined(__AVX512VNNI__) || (defined(SIMD_AVX2) && defined(__AVXVNNI__))
  return 0;
#else
  return 0x7fff / (2 * 127 * most);
#endif
}

}  // namespace simd
