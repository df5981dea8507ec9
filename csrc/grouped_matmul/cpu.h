#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/cpu/slice.h"
#include "common/dtype.h"

namespace deepseek_kernels {

// One struct for both ops: with scale_a and scale_b the operands are e4m3, without them they are of `dtype`.
struct GroupedMatmulCpuParams {
  const void* a;                     // [num_tokens, k]
  const float* scale_a;              // [num_tokens, ceil(k / 128)]; nullptr for floats
  const void* b;                     // [num_experts, n, k], last stride 1
  const float* scale_b;              // [num_experts, ceil(n / 128), ceil(k / 128)]; nullptr for floats
  const int32_t* expert_offsets;     // [num_experts + 1]
  const int32_t* pos_to_token_topk;  // [num_rows]: row r is token entry / top_k of a; nullptr: row r of a;
                                     // a row whose entry does not exist is zero
  void* d;                           // [num_rows, n] of out_dtype; rows of no expert become zero
  float* workspace;                  // grouped_matmul_workspace floats
  int64_t num_tokens, num_rows, n, k, num_experts;
  int64_t lda, ldb, ldd, b_stride_e;
  int64_t scale_a_stride_m, scale_a_stride_k, scale_b_stride_e, scale_b_stride_n, scale_b_stride_k;
  int top_k;
  Dtype dtype, out_dtype;
};

// Floats of workspace, enough for every instruction set: a and a row of zeros in fp32, the scratch of each thread,
// the row pointers.
inline int64_t grouped_matmul_workspace(int64_t num_tokens, int64_t num_rows, int64_t k, int64_t num_experts,
                                        int threads) {
  const int64_t rows = (num_tokens + 1) * ((k + 127) / 128 * 128);
  return rows + threads * matmul_scratch(num_rows) + 4 * num_rows + 2 * (num_experts + 2);
}

DSK_CPU_KERNEL_BF16(grouped_matmul, GroupedMatmulCpuParams)

}  // namespace deepseek_kernels
