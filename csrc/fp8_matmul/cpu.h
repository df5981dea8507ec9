#pragma once
#include "common/cpu/isa.h"
#include "common/cpu/slice.h"
#include "common/dtype.h"

#include <cstdint>

namespace deepseek_kernels {

struct Fp8MatmulCpuParams {
  const uint8_t* a;      // [m, k] e4m3
  const float* scale_a;  // [m, ceil(k / 128)]
  const uint8_t* b;      // [n, k] e4m3
  const float* scale_b;  // [ceil(n / 128), ceil(k / 128)]
  const float* bias;     // [n]; may be nullptr
  void* d;               // [m, n] of out_dtype
  float* workspace;      // fp8_matmul_workspace floats
  int64_t m, n, k;
  int64_t lda, ldb, ldd;
  int64_t scale_a_stride_m, scale_a_stride_k, scale_b_stride_n, scale_b_stride_k;
  Dtype out_dtype;
  bool accumulate;  // d += instead of d =
};

// Floats of workspace, enough for every instruction set.
inline int64_t fp8_matmul_workspace(int64_t m, int64_t k, int threads) {
  const int64_t rows = m * ((k + 127) / 128 * 128);
  return rows + threads * matmul_scratch(m);
}

DSK_CPU_KERNEL_BF16(fp8_matmul, Fp8MatmulCpuParams)

}  // namespace deepseek_kernels
