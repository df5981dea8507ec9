#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace deepseek_kernels {

struct SwigluCpuParams {
  const void* gate_up;               // [num_rows, 2 * intermediate] of dtype: gate columns, then up columns
  const float* weights;              // [num_weights]; may be nullptr: all ones
  const int32_t* pos_to_token_topk;  // [num_rows]: entry of weights, -1: the row is zero; nullptr: row r has weights[r]
  void* out;                         // [num_rows, intermediate] of dtype, or e4m3 with scale_out
  float* scale_out;                  // [num_rows, ceil(intermediate / 128)]; nullptr: not quantised
  int64_t num_rows, intermediate, num_weights, ld;
  float clamp;  // infinity: none
  Dtype dtype;
};

struct SwigluBackwardCpuParams {
  const void* grad;                  // [num_rows, intermediate] of dtype
  const void* gate_up;               // as above, like the other inputs
  const float* weights;              // [num_weights]; may be nullptr: all ones, and no gradient of them
  const int32_t* pos_to_token_topk;  // [num_rows]; nullptr: row r has weights[r]
  void* grad_gate_up;                // [num_rows, 2 * intermediate] of dtype; rows without an entry become zero
  float* grad_weights;               // [num_weights]; entries without a row are left as they are
  int64_t num_rows, intermediate, num_weights, ld_grad, ld;
  float clamp;
  Dtype dtype;
};

DSK_CPU_KERNEL(swiglu, SwigluCpuParams)
DSK_CPU_KERNEL(swiglu_backward, SwigluBackwardCpuParams)

}  // namespace deepseek_kernels
