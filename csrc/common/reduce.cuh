// Reductions among the lanes of a warp. Every lane gets the result.
#pragma once
#include "numeric.cuh"

namespace deepseek_kernels {

// Among lanes that differ only in the bits of kLanes (7: eight neighbours; 24: every eighth lane).
template <int kLanes>
DEVICE_FN float warp_max_nan(float x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2)
    if (kLanes & bit) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, bit));
  return x;
}

template <class T, int kLanes>
DEVICE_FN uint32_t warp_max_magnitudes(uint32_t x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2)
    if (kLanes & bit) x = max_magnitudes<T>(x, __shfl_xor_sync(0xffffffffu, x, bit));
  return x;
}

}  // namespace deepseek_kernels
