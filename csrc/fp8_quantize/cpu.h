#pragma once
#include "common/cpu/isa.h"
#include "fp8_quantize/params.h"

namespace deepseek_kernels {

struct Fp8DequantizeCpuParams {
  const uint8_t* q;    // [m, k] e4m3
  const float* scale;  // [ceil(m / block_m), ceil(k / block_k)]
  void* out;           // [m, k] of dtype
  int64_t m, k, ldq, ld_out;
  int64_t scale_stride_m, scale_stride_k;
  int block_m, block_k;
  Dtype dtype;
};

DSK_CPU_KERNEL(fp8_quantize, Fp8QuantizeParams)
DSK_CPU_KERNEL(fp8_dequantize, Fp8DequantizeCpuParams)

}  // namespace deepseek_kernels
