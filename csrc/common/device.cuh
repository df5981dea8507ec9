// What a kernel file needs to be compiled by nvcc for a GPU and by g++ for the model in tests/hopper_model.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#if defined(__CUDACC__)
#define DEVICE_FN __device__ __forceinline__
#define DYNAMIC_SMEM(name) extern __shared__ __align__(1024) uint8_t name[]
// BUG(name) is true in the model when a test has planted the bug of that name. Nothing of it is left on a device.
#define BUG(name) false
#else
#include "model.h"
#define DEVICE_FN inline
#define DYNAMIC_SMEM(name) uint8_t* name = model::dynamic_smem()
#define BUG(name) (model::settings.bug == model::bug_id(#name))
#endif

namespace deepseek_kernels {

template <class T>
DEVICE_FN constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace deepseek_kernels
