// A register of floats in the instruction set of this translation unit, and the conversions the formats need.
// Everything has internal linkage: two units compiled for two sets never share a function.
//
// | set    | lanes | FP8 decode                               | bf16 store                |
// | ------ | ----- | ---------------------------------------- | ------------------------- |
// | avx512 | 16    | as fp16 bits, vcvtph2ps, times 2^8       | integer round to even     |
// | avx2   | 8     | as fp16 bits, vcvtph2ps, times 2^8       | integer round to even     |
// | base   | 8     | table of 256 floats                      | integer round to even     |
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#if defined(__AVX512F__)
#define DSK_AVX512 1
#elif defined(__AVX2__)
#define DSK_AVX2 1
#endif

namespace deepseek_kernels {
namespace {

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float from_bf16(uint16_t v) { return as_float(uint32_t(v) << 16); }
inline uint16_t to_bf16(float f) {
  const uint32_t bits = as_bits(f);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float from_fp16(uint16_t v) {
#if defined(__F16C__)
  return _cvtsh_ss(v);
#else
  const uint32_t sign = uint32_t(v & 0x8000) << 16, magnitude = v & 0x7FFF;
  if (magnitude >= 0x7C00) return as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // fp16 bits in fp32's place are 2^112 too small, subnormals included
  return as_float(sign | as_bits(as_float(magnitude << 13) * as_float(0x77800000)));
#endif
}
inline uint16_t to_fp16(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = as_bits(f), magnitude = bits & 0x7FFFFFFF;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);
  if (magnitude < 0x38800000) {  // below 2^-14 the step is 2^-24, fp32's own step at 0.5
    return uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3F000000));
  }
  return uint16_t(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
#endif
}

// e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F is NaN, there is no infinity.
inline float from_e4m3(uint8_t v) {
  const uint32_t sign = uint32_t(v & 0x80) << 24, magnitude = v & 0x7F;
  if (magnitude == 0x7F) return as_float(sign | 0x7FC00000);
  if (magnitude < 8) return as_float(sign | as_bits(float(magnitude) * 0.001953125f));  // 2^-9
  return as_float(sign | ((magnitude << 20) + (120u << 23)));
}
// Rounds to nearest even and saturates at 448; NaN stays NaN. Without branches, so that loops over it become registers.
inline uint8_t to_e4m3(float f) {
  const uint32_t bits = as_bits(f), magnitude = bits & 0x7FFFFFFF;
  const uint32_t clamped = magnitude < 0x43E00000 ? magnitude : 0x43E00000;
  // below 2^-6 the step is 2^-9, fp32's own step at 2^14: the addition rounds
  const uint32_t small = as_bits(as_float(clamped) + 16384.f) - 0x46800000;
  const uint32_t normal = ((clamped + 0x7FFFF + (clamped >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t code = clamped < 0x3C800000 ? small : normal;
  return uint8_t((magnitude > 0x7F800000 ? 0x7F : code) | (bits >> 24 & 0x80));
}

#if defined(DSK_AVX512)
constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec splat(float f) { return {_mm512_set1_ps(f)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline Vec load_fp16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// 2 * kLanes codes times 2^-8, NaN as a number: sign in bit 15, exponent and mantissa at the top of fp16's, which has
// the subnormals too.
inline void load_e4m3_bits(const uint8_t* p, Vec (&out)[2]) {
  for (int i = 0; i < 2; ++i) {
    const __m256i w = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + i * 16))), 7);
    out[i] = {_mm512_cvtph_ps(_mm256_and_si256(w, _mm256_set1_epi16(int16_t(0xBF80))))};
  }
}
inline Vec load_e4m3(const uint8_t* p) {
  const __m256i w = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i bits = _mm256_and_si256(w, _mm256_set1_epi16(int16_t(0xBF80)));
  const __m512 f = _mm512_mul_ps(_mm512_cvtph_ps(bits), _mm512_set1_ps(256.f));
  const __mmask16 nan =
      _mm256_cmpeq_epi16_mask(_mm256_and_si256(bits, _mm256_set1_epi16(0x3F80)), _mm256_set1_epi16(0x3F80));
  return {_mm512_mask_mov_ps(f, nan, _mm512_set1_ps(as_float(0x7FC00000)))};
}
inline void store_bf16(uint16_t* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40)));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
inline void store_fp16(uint16_t* p, Vec a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
// a < b ? x : y in each lane
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
// One bit for each lane with a > b.
inline uint32_t greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// Lane i takes lane i ^ kDistance.
template <int kDistance>
inline Vec exchange(Vec a) {
  if constexpr (kDistance == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4E)};
  if constexpr (kDistance == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xB1)};
  if constexpr (kDistance == 2) return {_mm512_permute_ps(a.v, 0x4E)};
  if constexpr (kDistance == 1) return {_mm512_permute_ps(a.v, 0xB1)};
}
// Rows become columns.
inline void transpose(Vec (&v)[kLanes]) {
  const auto quarters = [](__m512i a, __m512i b, int half) {
    return half == 0 ? _mm512_shuffle_i32x4(a, b, 0x88) : _mm512_shuffle_i32x4(a, b, 0xDD);
  };
  __m512i x[16];
  for (int i = 0; i < 16; i += 4) {  // x[i + j]: lane j of each quarter, of 4 rows
    __m512i r[4];
    for (int j = 0; j < 4; ++j) r[j] = _mm512_castps_si512(v[i + j].v);
    const __m512i ab0 = _mm512_unpacklo_epi32(r[0], r[1]), ab1 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i cd0 = _mm512_unpacklo_epi32(r[2], r[3]), cd1 = _mm512_unpackhi_epi32(r[2], r[3]);
    x[i] = _mm512_unpacklo_epi64(ab0, cd0), x[i + 1] = _mm512_unpackhi_epi64(ab0, cd0);
    x[i + 2] = _mm512_unpacklo_epi64(ab1, cd1), x[i + 3] = _mm512_unpackhi_epi64(ab1, cd1);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = quarters(x[j], x[j + 4], 0), even1 = quarters(x[j + 8], x[j + 12], 0);
    const __m512i odd0 = quarters(x[j], x[j + 4], 1), odd1 = quarters(x[j + 8], x[j + 12], 1);
    v[j] = {_mm512_castsi512_ps(quarters(even0, even1, 0))};
    v[j + 8] = {_mm512_castsi512_ps(quarters(even0, even1, 1))};
    v[j + 4] = {_mm512_castsi512_ps(quarters(odd0, odd1, 0))};
    v[j + 12] = {_mm512_castsi512_ps(quarters(odd0, odd1, 1))};
  }
}
// 2^n for integral n in [-126, 127]
inline Vec exp2_integer(Vec n) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
#elif defined(DSK_AVX2)
constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec splat(float f) { return {_mm256_set1_ps(f)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
inline Vec load_fp16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline void load_e4m3_bits(const uint8_t* p, Vec (&out)[2]) {
  const __m256i w = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i bits = _mm256_and_si256(w, _mm256_set1_epi16(int16_t(0xBF80)));
  out[0] = {_mm256_cvtph_ps(_mm256_castsi256_si128(bits))};
  out[1] = {_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
}
inline Vec load_e4m3(const uint8_t* p) {
  const __m128i w = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  const __m128i bits = _mm_and_si128(w, _mm_set1_epi16(int16_t(0xBF80)));
  const __m256 f = _mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(256.f));
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x3F80)), _mm_set1_epi16(0x3F80));
  return {_mm256_or_ps(
      f, _mm256_castsi256_ps(_mm256_and_si256(_mm256_cvtepi16_epi32(nan), _mm256_set1_epi32(0x7FC00000))))};
}
inline void store_bf16(uint16_t* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i s = _mm256_blendv_epi8(r, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
}
inline void store_fp16(uint16_t* p, Vec a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline float sum(Vec a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float largest(Vec a) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline bool any_nan(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0; }
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline uint32_t greater(Vec a, Vec b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))); }
template <int kDistance>
inline Vec exchange(Vec a) {
  if constexpr (kDistance == 4) return {_mm256_permute2f128_ps(a.v, a.v, 1)};
  if constexpr (kDistance == 2) return {_mm256_permute_ps(a.v, 0x4E)};
  if constexpr (kDistance == 1) return {_mm256_permute_ps(a.v, 0xB1)};
}
inline void transpose(Vec (&v)[kLanes]) {
  __m256 x[8];
  for (int i = 0; i < 8; i += 4) {  // x[i + j]: lane j of each half, of 4 rows
    const __m256 ab0 = _mm256_unpacklo_ps(v[i].v, v[i + 1].v), ab1 = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
    const __m256 cd0 = _mm256_unpacklo_ps(v[i + 2].v, v[i + 3].v), cd1 = _mm256_unpackhi_ps(v[i + 2].v, v[i + 3].v);
    x[i] = _mm256_shuffle_ps(ab0, cd0, 0x44), x[i + 1] = _mm256_shuffle_ps(ab0, cd0, 0xEE);
    x[i + 2] = _mm256_shuffle_ps(ab1, cd1, 0x44), x[i + 3] = _mm256_shuffle_ps(ab1, cd1, 0xEE);
  }
  for (int j = 0; j < 4; ++j) {
    v[j] = {_mm256_permute2f128_ps(x[j], x[j + 4], 0x20)};
    v[j + 4] = {_mm256_permute2f128_ps(x[j], x[j + 4], 0x31)};
  }
}
inline Vec exp2_integer(Vec n) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}
#else
constexpr int kLanes = 8;  // short loops that the compiler turns into whatever the baseline has
struct Vec {
  float v[kLanes];
};
#define DSK_EACH(expression)                                \
  do {                                                      \
    for (int i = 0; i < kLanes; ++i) r.v[i] = (expression); \
    return r;                                               \
  } while (false)
inline Vec splat(float f) {
  Vec r;
  DSK_EACH(f);
}
inline Vec zero() { return splat(0.f); }
inline Vec load(const float* p) {
  Vec r;
  DSK_EACH(p[i]);
}
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec load_bf16(const uint16_t* p) {
  Vec r;
  DSK_EACH(from_bf16(p[i]));
}
inline Vec load_fp16(const uint16_t* p) {
  Vec r;
  DSK_EACH(from_fp16(p[i]));
}
inline Vec load_e4m3(const uint8_t* p) {
  Vec r;
  DSK_EACH(from_e4m3(p[i]));
}
inline void load_e4m3_bits(const uint8_t* p, Vec (&out)[2]) {
  for (int i = 0; i < 2 * kLanes; ++i) out[i / kLanes].v[i % kLanes] = from_e4m3(p[i]) * 0.00390625f;
}
inline void store_bf16(uint16_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(a.v[i]);
}
inline void store_fp16(uint16_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_fp16(a.v[i]);
}
inline Vec operator+(Vec a, Vec b) {
  Vec r;
  DSK_EACH(a.v[i] + b.v[i]);
}
inline Vec operator-(Vec a, Vec b) {
  Vec r;
  DSK_EACH(a.v[i] - b.v[i]);
}
inline Vec operator*(Vec a, Vec b) {
  Vec r;
  DSK_EACH(a.v[i] * b.v[i]);
}
inline Vec operator/(Vec a, Vec b) {
  Vec r;
  DSK_EACH(a.v[i] / b.v[i]);
}
inline Vec fma(Vec a, Vec b, Vec c) {
  Vec r;
  DSK_EACH(a.v[i] * b.v[i] + c.v[i]);
}
inline Vec max(Vec a, Vec b) {
  Vec r;
  DSK_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
inline Vec min(Vec a, Vec b) {
  Vec r;
  DSK_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
inline Vec abs(Vec a) {
  Vec r;
  DSK_EACH(as_float(as_bits(a.v[i]) & 0x7FFFFFFF));
}
inline Vec round(Vec a) {
  Vec r;
  DSK_EACH(a.v[i] + 12582912.f - 12582912.f);  // for |a| < 2^22; 1.5 * 2^23 pushes the fraction out
}
inline float sum(Vec a) {
  float s = 0;
  for (float f : a.v) s += f;
  return s;
}
inline float largest(Vec a) {
  float s = a.v[0];
  for (float f : a.v) s = f > s ? f : s;
  return s;
}
inline bool any_nan(Vec a) {
  bool nan = false;
  for (float f : a.v) nan |= f != f;
  return nan;
}
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  Vec r;
  DSK_EACH(a.v[i] < b.v[i] ? x.v[i] : y.v[i]);
}
inline uint32_t greater(Vec a, Vec b) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(a.v[i] > b.v[i]) << i;
  return bits;
}
template <int kDistance>
inline Vec exchange(Vec a) {
  Vec r;
  DSK_EACH(a.v[i ^ kDistance]);
}
inline void transpose(Vec (&v)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float f = v[i].v[j];
      v[i].v[j] = v[j].v[i], v[j].v[i] = f;
    }
  }
}
inline Vec exp2_integer(Vec n) {
  Vec r;
  DSK_EACH(as_float(uint32_t(int32_t(n.v[i]) + 127) << 23));
}
#undef DSK_EACH
#endif

// Whether any of `count` e4m3 codes is NaN.
inline bool any_nan_e4m3(const uint8_t* p, int64_t count) {
  int64_t i = 0;
  uint8_t most = 0;
#if defined(DSK_AVX512) || defined(DSK_AVX2)
  const __m256i magnitude = _mm256_set1_epi8(0x7F);
  __m256i peak = _mm256_setzero_si256();
  for (; i + 32 <= count; i += 32) {
    peak = _mm256_max_epu8(peak, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + i)), magnitude));
  }
  if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(peak, magnitude)) != 0) return true;
#endif
  for (; i < count; ++i) most = (p[i] & 0x7F) > most ? p[i] & 0x7F : most;
  return most == 0x7F;
}

// e^x within 2 steps of fp32; 0 below -87, infinity above 88.3, NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec low = splat(-87.f);
  const Vec clamped = min(max(x, low), splat(89.f));  // what becomes of NaN differs by set; restored below
  const Vec n = round(clamped * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r) + splat(1.f);
  Vec e = p * exp2_integer(n);
#if defined(DSK_AVX512)
  e.v = _mm512_mask_mov_ps(e.v, _mm512_cmp_ps_mask(x.v, low.v, _CMP_LT_OQ), _mm512_setzero_ps());
  e.v = _mm512_mask_mov_ps(e.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), x.v);
#elif defined(DSK_AVX2)
  e.v = _mm256_andnot_ps(_mm256_cmp_ps(x.v, low.v, _CMP_LT_OQ), e.v);
  e.v = _mm256_blendv_ps(e.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
#else
  for (int i = 0; i < kLanes; ++i) e.v[i] = x.v[i] != x.v[i] ? x.v[i] : x.v[i] < -87.f ? 0.f : e.v[i];
#endif
  return e;
}

inline int element_bytes(Dtype dtype) { return dtype == Dtype::kFp32 ? 4 : 2; }

// kLanes elements of a format from p, as fp32.
template <Dtype kDtype>
inline Vec load_as(const void* p) {
  if constexpr (kDtype == Dtype::kFp32) return load(static_cast<const float*>(p));
  if constexpr (kDtype == Dtype::kFp16) return load_fp16(static_cast<const uint16_t*>(p));
  if constexpr (kDtype == Dtype::kBf16) return load_bf16(static_cast<const uint16_t*>(p));
}
template <Dtype kDtype>
inline void store_as(void* p, Vec a) {
  if constexpr (kDtype == Dtype::kFp32) store(static_cast<float*>(p), a);
  if constexpr (kDtype == Dtype::kFp16) store_fp16(static_cast<uint16_t*>(p), a);
  if constexpr (kDtype == Dtype::kBf16) store_bf16(static_cast<uint16_t*>(p), a);
}
// The first `count` < kLanes elements; the rest is zero, and memory past them is not touched.
template <Dtype kDtype>
inline Vec load_part(const void* p, int count) {
  alignas(64) uint8_t part[kLanes * 4] = {};
  std::memcpy(part, p, size_t(count) * (kDtype == Dtype::kFp32 ? 4 : 2));
  return load_as<kDtype>(part);
}
template <Dtype kDtype>
inline void store_part(void* p, Vec a, int count) {
  alignas(64) uint8_t part[kLanes * 4];
  store_as<kDtype>(part, a);
  std::memcpy(p, part, size_t(count) * (kDtype == Dtype::kFp32 ? 4 : 2));
}

// As many of kLanes elements as `left` has; the rest is zero, or not stored.
template <Dtype kDtype>
inline Vec load_some(const void* p, int64_t left) {
  return left >= kLanes ? load_as<kDtype>(p) : load_part<kDtype>(p, int(left));
}
template <Dtype kDtype>
inline void store_some(void* p, Vec a, int64_t left) {
  if (left >= kLanes)
    store_as<kDtype>(p, a);
  else
    store_part<kDtype>(p, a, int(left));
}

// Calls body(tag) with a tag whose static `kDtype` is the run-time dtype.
template <Dtype kValue>
struct DtypeTag {
  static constexpr Dtype kDtype = kValue;
};
template <class Body>
inline void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFp32:
      return body(DtypeTag<Dtype::kFp32>{});
    case Dtype::kFp16:
      return body(DtypeTag<Dtype::kFp16>{});
    case Dtype::kBf16:
      return body(DtypeTag<Dtype::kBf16>{});
  }
}

}  // namespace
}  // namespace deepseek_kernels
