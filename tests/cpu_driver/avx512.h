// The AVX-512 intrinsics the kernels use, in plain loops: with `-include` of this file the AVX-512 kernels compile to,
// and run on, any processor with AVX2.
//
// A name in this namespace hides the compiler's own of the same name. An intrinsic that is missing here shows as
// "target specific option mismatch".
#pragma once
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
// What compilers have as macros.
#undef _mm256_cmpeq_epi16_mask
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_mask_slli_epi32
#undef _mm512_permute_ps
#undef _mm512_roundscale_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_ternarylogic_epi32

namespace deepseek_kernels {
namespace {

using Floats = float __attribute__((vector_size(64)));
using Bytes = uint8_t __attribute__((vector_size(64)));
using Words = uint16_t __attribute__((vector_size(64)));
using Dwords = uint32_t __attribute__((vector_size(64)));
using Qwords = uint64_t __attribute__((vector_size(64)));

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class Lanes, class Body>
inline Lanes lanes(const Body& body) {
  Lanes out;
  for (unsigned i = 0; i < sizeof(Lanes) / sizeof(out[0]); ++i) out[i] = body(i);
  return out;
}
template <class Body>
inline __mmask16 mask_of(const Body& body) {
  unsigned mask = 0;
  for (unsigned i = 0; i < 16; ++i) mask |= unsigned(body(i)) << i;
  return __mmask16(mask);
}

inline __m512 _mm512_setzero_ps() {
  return lanes<__m512>([](int) { return 0.f; });
}
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float f) {
  return lanes<__m512>([&](int) { return f; });
}
inline __m512i _mm512_set1_epi32(int v) {
  return (__m512i)lanes<Dwords>([&](int) { return uint32_t(v); });
}
inline __m512i _mm512_set1_epi8(char v) {
  return (__m512i)lanes<Bytes>([&](int) { return uint8_t(v); });
}
inline __m512i _mm512_setr_epi64(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f, int64_t g,
                                 int64_t h) {
  return __m512i{a, b, c, d, e, f, g, h};
}

template <class To>
inline To from_memory(const void* p) {
  To to;
  std::memcpy(&to, p, sizeof to);
  return to;
}
inline __m512 _mm512_loadu_ps(const void* p) { return from_memory<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return from_memory<__m512i>(p); }
inline __m512i _mm512_load_si512(const void* p) { return from_memory<__m512i>(p); }
inline void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof a); }
inline void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof a); }
inline __m512i _mm512_maskz_loadu_epi8(uint64_t mask, const void* p) {
  return (__m512i)lanes<Bytes>([&](int i) { return mask >> i & 1 ? static_cast<const uint8_t*>(p)[i] : uint8_t(0); });
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes<__m512>([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
// The second operand where the comparison is false, as for NaN.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return lanes<__m512>([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return lanes<__m512>([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_abs_ps(__m512 a) { return (__m512)((Dwords)a & 0x7FFFFFFFu); }
inline __m512 _mm512_roundscale_ps(__m512 a, int) {  // to the nearest integer, even at the middle
  return lanes<__m512>([&](int i) { return std::nearbyintf(a[i]); });
}
inline float _mm512_reduce_add_ps(__m512 a) {
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}
inline float _mm512_reduce_max_ps(__m512 a) {
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  return a[0];
}

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  return mask_of([&](int i) {
    const bool unordered = a[i] != a[i] || b[i] != b[i];
    switch (how) {
      case _CMP_UNORD_Q:
        return unordered;
      case _CMP_LT_OQ:
        return a[i] < b[i];
      case _CMP_GT_OQ:
        return a[i] > b[i];
      case _CMP_EQ_OQ:
        return a[i] == b[i];
      case _CMP_NEQ_OQ:
        return !unordered && a[i] != b[i];
    }
    __builtin_trap();
  });
}
inline __mmask16 _mm256_cmpeq_epi16_mask(__m256i a, __m256i b) {
  using Half = uint16_t __attribute__((vector_size(32)));
  return mask_of([&](int i) { return ((Half)a)[i] == ((Half)b)[i]; });
}
inline uint64_t _mm512_cmpeq_epi8_mask(__m512i a, __m512i b) {
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t(((Bytes)a)[i] == ((Bytes)b)[i]) << i;
  return mask;
}
inline __m512 _mm512_mask_mov_ps(__m512 otherwise, __mmask16 mask, __m512 a) {
  return lanes<__m512>([&](int i) { return mask >> i & 1 ? a[i] : otherwise[i]; });
}
inline __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i a) {
  return (__m512i)lanes<Dwords>([&](int i) { return mask >> i & 1 ? ((Dwords)a)[i] : ((Dwords)otherwise)[i]; });
}
inline __m512 _mm512_mask_mul_ps(__m512 otherwise, __mmask16 mask, __m512 a, __m512 b) {
  return _mm512_mask_mov_ps(otherwise, mask, a * b);
}

inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  Qwords out{};
  for (int k = 0; k < 8; ++k) {
    if ((table >> k & 1) == 0) continue;
    const Qwords x = (Qwords)a, y = (Qwords)b, z = (Qwords)c;
    out |= (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
  }
  return (__m512i)out;
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((Dwords)a + (Dwords)b); }
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return (__m512i)((Dwords)a << n); }
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return (__m512i)((Dwords)a >> n); }

inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
inline __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return (__m512i)lanes<Dwords>([&](int i) { return uint32_t(int32_t(std::nearbyintf(a[i]))); });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  const auto half = bits_of<std::array<uint16_t, 16>>(a);
  return (__m512i)lanes<Dwords>([&](int i) { return uint32_t(half[i]); });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  std::array<uint16_t, 16> half;
  for (int i = 0; i < 16; ++i) half[i] = uint16_t(((Dwords)a)[i]);
  return bits_of<__m256i>(half);
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(a)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  return lanes<__m512>([&](int i) { return i < 8 ? low[i] : high[i - 8]; });
}
inline __m256i _mm512_cvtps_ph(__m512 a, int) {
  const auto halves = bits_of<std::array<__m256, 2>>(a);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}

// In each 128 bits
template <class Lanes>
inline __m512i unpack(__m512i a, __m512i b, int from) {
  constexpr int kSize = int(16 / sizeof(((Lanes)a)[0]));  // lanes of 128 bits
  return (__m512i)lanes<Lanes>([&](int i) {
    const int source = i / kSize * kSize + i % kSize / 2 + from * kSize / 2;
    return i % 2 == 0 ? ((Lanes)a)[source] : ((Lanes)b)[source];
  });
}
inline __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return unpack<Bytes>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return unpack<Bytes>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return unpack<Words>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return unpack<Words>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpack<Dwords>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpack<Dwords>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpack<Qwords>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpack<Qwords>(a, b, 1); }
inline __m512 _mm512_permute_ps(__m512 a, int order) {
  return lanes<__m512>([&](int i) { return a[i / 4 * 4 + (order >> i % 4 * 2 & 3)]; });
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  return lanes<__m512>([&](int i) {
    const int source = (order >> i / 4 * 2 & 3) * 4 + i % 4;
    return i < 8 ? a[source] : b[source];
  });
}
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
  return (__m512i)_mm512_shuffle_f32x4((__m512)a, (__m512)b, order);
}
inline __m512i _mm512_broadcast_i32x4(__m128i a) {
  __m128i four[4] = {a, a, a, a};
  return bits_of<__m512i>(four);
}
inline __m512i _mm512_permutexvar_epi64(__m512i order, __m512i a) {
  return lanes<__m512i>([&](int i) { return a[order[i] & 7]; });
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i order, __m512 b) {
  return lanes<__m512>([&](int i) {
    const int source = int(((Dwords)order)[i] & 31);
    return source < 16 ? a[source] : b[source - 16];
  });
}
inline __m512i _mm512_permutex2var_epi8(__m512i a, __m512i order, __m512i b) {
  return (__m512i)lanes<Bytes>([&](int i) {
    const int source = ((Bytes)order)[i] & 127;
    return source < 64 ? ((Bytes)a)[source] : ((Bytes)b)[source - 64];
  });
}

// Operands and results below the normal numbers count as zero, whatever MXCSR says; the first product, of the odd
// elements, is added before the second.
inline float flushed(float f) { return std::fabs(f) < 0x1p-126f ? std::copysign(0.f, f) : f; }
inline float from_upper(uint32_t bits) { return flushed(bits_of<float>(bits)); }
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return lanes<__m512>([&](int i) {
    const uint32_t x = ((Dwords)a)[i], y = ((Dwords)b)[i];
    const float odd = __builtin_fmaf(from_upper(x & 0xFFFF0000), from_upper(y & 0xFFFF0000), flushed(sum[i]));
    return flushed(__builtin_fmaf(from_upper(x << 16), from_upper(y << 16), flushed(odd)));
  });
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  std::array<uint16_t, 16> half;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = bits_of<uint32_t>(flushed(float(a[i])));
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    half[i] = uint16_t(nan ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  return bits_of<__m256bh>(half);
}

}  // namespace
}  // namespace deepseek_kernels
