// Conversions and the FP8 block scale, with the same bits on every architecture and in the model.
#pragma once
#include <cmath>
#include <type_traits>

#include "device.cuh"

namespace deepseek_kernels {

DEVICE_FN float to_float(float x) { return x; }
DEVICE_FN float to_float(__half x) { return __half2float(x); }
DEVICE_FN float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// As many elements of x as 4 bytes hold, rounded to nearest even.
template <class T>
DEVICE_FN uint32_t to_word(const float* x);
template <>
DEVICE_FN uint32_t to_word<float>(const float* x) {
  return __float_as_uint(x[0]);
}
template <>
DEVICE_FN uint32_t to_word<__half>(const float* x) {
  const __half2 pair = __floats2half2_rn(x[0], x[1]);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
DEVICE_FN uint32_t to_word<__nv_bfloat16>(const float* x) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Round to nearest even; beyond +-448 saturates; NaN becomes 0x7F.
DEVICE_FN uint32_t to_e4m3x4(float x0, float x1, float x2, float x3) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(x0, x1), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(x2, x3), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// Four values from the bytes of a word, exact.
DEVICE_FN void from_e4m3x4(uint32_t codes, float* x) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto pair = __nv_fp8x2_storage_t(codes >> 16 * i);
    const float2 values = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    x[2 * i] = values.x, x[2 * i + 1] = values.y;
  }
}

// 2^x, relative error 2^-22.5.
DEVICE_FN float exp2_near(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// The same in one instruction; 0 where 2^x is below 2^-126.
DEVICE_FN float exp2_flushed(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < -126.f ? 0.f : std::exp2(x);
#endif
}

// 1 / x for x in [1, 3], within a step.
DEVICE_FN float reciprocal_near(float x) {
#if defined(__CUDACC__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(r, __fmaf_rn(-x, r, 1.f), r);
#else
  return 1.f / x;
#endif
}

// e^x of x <= 0; 0 below -104, and of NaN.
DEVICE_FN float exp_negative(float x) {
  x = fmaxf(x, -104.f);
  const float high = __fmul_rn(x, 1.4426950408889634f);
  const float low = __fmaf_rn(x, 1.925963033500412e-8f, __fmaf_rn(x, 1.4426950408889634f, -high));
  const float power = exp2_near(high);
  return __fmaf_rn(power, __fmul_rn(low, 0.6931471805599453f), power);
}

// As torch.maximum: NaN if either is.
DEVICE_FN float max_nan(float a, float b) {
#if defined(__CUDACC__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a || b != b ? NAN : a > b ? a : b;
#endif
}

// Magnitudes of as many elements of T as a word of 4 bytes holds, in place; with max_magnitudes a maximum over several
// words costs as many instructions as words, and NaN is above all.
template <class T>
DEVICE_FN uint32_t magnitudes_of(uint32_t word) {
  return word & (sizeof(T) == 4 ? 0x7FFFFFFFu : 0x7FFF7FFFu);
}
template <class T>
DEVICE_FN uint32_t max_magnitudes(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(max_nan(__uint_as_float(a), __uint_as_float(b)));
  } else {
    uint32_t result;
    if constexpr (std::is_same_v<T, __half>)
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    else
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
#else  // the bits of magnitudes order as the numbers do
  if (sizeof(T) == 4) return a > b ? a : b;
  const uint32_t low_a = a & 0xFFFF, low_b = b & 0xFFFF, high_a = a >> 16, high_b = b >> 16;
  return (low_a > low_b ? low_a : low_b) | (high_a > high_b ? high_a : high_b) << 16;
#endif
}
// The i-th magnitude of a word.
template <class T>
DEVICE_FN float magnitude(uint32_t magnitudes, int i) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(magnitudes);
  const uint16_t bits = uint16_t(magnitudes >> 16 * i);
  return to_float(reinterpret_cast<const T&>(bits));
}
template <class T>
DEVICE_FN float largest_magnitude(uint32_t magnitudes) {
  if constexpr (sizeof(T) == 2) magnitudes = max_magnitudes<T>(magnitudes, magnitudes >> 16);
  return magnitude<T>(magnitudes, 0);
}

// exp2(ceil(log2(x))) for positive normal x; Inf and NaN stay.
DEVICE_FN float round_up_to_power_of_two(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return x;
  return __uint_as_float((bits + 0x7FFFFFu) & 0x7F800000u);
}

DEVICE_FN float fp8_scale(float amax, bool pow2_scale) {
  const float scale = __fdiv_rn(max_nan(amax, 1e-4f), 448.f);
  return pow2_scale ? round_up_to_power_of_two(scale) : scale;
}

// x / divisor rounded as one IEEE division, at three operations for each x of 16 bits and five for fp32: Newton steps
// on x * (1 / divisor). The last of two is exact because the reciprocal is correctly rounded (Markstein). For an x of
// at most 11 significant bits one is, which was tried for every pair of mantissas. For divisors made by fp8_scale.
class Fp8Divisor {
 public:
  Fp8Divisor() = default;
  DEVICE_FN explicit Fp8Divisor(float divisor) {
    reciprocal_ = __frcp_rn(divisor);
    divisor_ = divisor < INFINITY ? divisor : 0.f;
  }

  template <class T>
  DEVICE_FN float divide(T x) const {
    float q = step(__fmul_rn(to_float(x), reciprocal_), to_float(x));
    if constexpr (sizeof(T) == 4) q = step(q, x);
    return q;
  }

  // That of another lane of the warp.
  DEVICE_FN Fp8Divisor of_lane(int lane) const {
    Fp8Divisor result;
    result.reciprocal_ = __shfl_sync(0xffffffffu, reciprocal_, lane);
    result.divisor_ = __shfl_sync(0xffffffffu, divisor_, lane);
    return result;
  }

 private:
  // With the remainder taken as q * divisor - x, a q of -0 stays -0.
  DEVICE_FN float step(float q, float x) const { return __fmaf_rn(__fmaf_rn(q, divisor_, -x), -reciprocal_, q); }

  float reciprocal_;
  float divisor_;  // 0 for Inf and NaN: the steps then keep x * 0 and NaN
};

}  // namespace deepseek_kernels
