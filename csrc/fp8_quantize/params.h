#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace deepseek_kernels {

struct Fp8QuantizeParams {
  const void* x;  // [m, k] of dtype
  void* q;        // [m, k] e4m3
  float* scale;   // [ceil(m / block_m), ceil(k / block_k)]
  int64_t m, k;
  Dtype dtype;
  int block_m, block_k;  // (1, 128), (128, 128) or (128, 1)
  int64_t ldx, ldq;      // strides in elements; the last dimension is contiguous
  int64_t scale_stride_m, scale_stride_k;
  bool pow2_scale;
  void* stream;
};

void launch_fp8_quantize(const Fp8QuantizeParams& params);

}  // namespace deepseek_kernels
