#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace deepseek_kernels {

struct MergeStatesCpuParams {
  const void *out_a, *out_b;   // [b, s_q, h_q, d_v] of dtype, contiguous
  const float *lse_a, *lse_b;  // [b, h_q, s_q], contiguous
  void* out;                   // as out_a
  float* lse;                  // as lse_a
  int64_t b, s_q, h_q, d_v;
  Dtype dtype;
};

DSK_CPU_KERNEL(merge_states, MergeStatesCpuParams)

}  // namespace deepseek_kernels
