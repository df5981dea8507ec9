// Conversions and the FP8 block scale, with the same bits on every architecture and in the model.
#pragma once
#include <cmath>

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

// x / divisor rounded as one IEEE division, at five multiply-adds for each x: two Newton steps on x * (1 / divisor),
// the last of which is exact because the reciprocal is correctly rounded (Markstein). For divisors made by fp8_scale.
class Fp8Divisor {
 public:
  Fp8Divisor() = default;
  DEVICE_FN explicit Fp8Divisor(float divisor) {
    reciprocal_ = __frcp_rn(divisor);
    negated_ = divisor < INFINITY ? -divisor : 0.f;
  }

  DEVICE_FN float divide(float x) const {
    float q = __fmul_rn(x, reciprocal_);
    q = __fmaf_rn(__fmaf_rn(q, negated_, x), reciprocal_, q);
    q = __fmaf_rn(__fmaf_rn(q, negated_, x), reciprocal_, q);
    return copysignf(q, x);  // the steps turn -0 into 0
  }

 private:
  float reciprocal_;
  float negated_;  // 0 for Inf and NaN: the steps then keep x * 0 and NaN
};

}  // namespace deepseek_kernels
