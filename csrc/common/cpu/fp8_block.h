// One block of elements that share an FP8 scale: scale = max(amax, 1e-4) / 448, q = saturate(x / scale).
#pragma once
#include "common/cpu/vec.h"

namespace deepseek_kernels {
namespace {

// A NaN anywhere in the block makes its amax, and so everything, NaN.
inline float fp8_scale(float amax, bool pow2) {
  if (amax != amax) return amax;
  const float scale = (amax > 1e-4f ? amax : 1e-4f) / 448.f;
  const uint32_t bits = as_bits(scale);
  if (!pow2 || bits == 0x7F800000) return scale;
  return as_float((bits + 0x7FFFFF) & 0x7F800000);
}

// Folds x [count] into a running amax that keeps NaN.
inline float amax_of(const float* x, int64_t count, float amax) {
  Vec peak = splat(0.f);
  bool nan = amax != amax;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec v = load(x + i);
    nan |= any_nan(v);
    peak = max(peak, abs(v));
  }
  float most = largest(peak);
  for (; i < count; ++i) {
    const float v = as_float(as_bits(x[i]) & 0x7FFFFFFF);
    nan |= v != v;
    most = v > most ? v : most;
  }
  return nan ? as_float(0x7FC00000) : most > amax ? most : amax;
}

inline void encode(const float* x, int64_t count, float scale, uint8_t* q) {
  for (int64_t i = 0; i < count; ++i) q[i] = to_e4m3(x[i] / scale);
}

}  // namespace
}  // namespace deepseek_kernels
