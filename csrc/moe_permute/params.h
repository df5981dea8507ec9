#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace deepseek_kernels {

// Both maps are contiguous; -1 means no entry.
struct MoeMaps {
  const int32_t* token_topk_to_pos;  // [num_tokens, top_k]
  const int32_t* pos_to_token_topk;  // [num_rows]; not used by unpermute
  int64_t num_tokens, num_rows;
  int top_k;
};

struct MoePermuteParams {
  MoeMaps maps;
  const void* x;       // [num_tokens, row_bytes]
  void* out;           // [num_rows, row_bytes]
  const float* scale;  // [num_tokens, scale_columns]; may be nullptr with scale_columns 0
  float* out_scale;    // [num_rows, scale_columns]; may be nullptr with scale_columns 0
  int64_t row_bytes, scale_columns;
  int64_t ldx_bytes, ld_out_bytes;
  int64_t scale_stride_t, scale_stride_s;
  int64_t out_scale_stride_r, out_scale_stride_s;
  void* stream;
};

struct MoePermuteQuantizeParams {
  MoeMaps maps;
  const void* x;     // [num_tokens, hidden] of dtype
  void* out;         // [num_rows, hidden] e4m3
  float* out_scale;  // [num_rows, ceil(hidden / 128)]
  int64_t hidden;
  Dtype dtype;
  int64_t ldx, ld_out;
  int64_t out_scale_stride_r, out_scale_stride_s;
  bool pow2_scale;
  void* stream;
};

struct MoeUnpermuteParams {
  MoeMaps maps;
  const void* y;         // [num_rows, hidden] of dtype
  const float* weights;  // [num_tokens, top_k] contiguous; may be nullptr: all ones
  void* out;             // [num_tokens, hidden] of dtype
  int64_t hidden;
  Dtype dtype;
  int64_t ldy, ld_out;
  void* stream;
};

void launch_moe_permute(const MoePermuteParams& params);
void launch_moe_permute_quantize(const MoePermuteQuantizeParams& params);
void launch_moe_unpermute(const MoeUnpermuteParams& params);

}  // namespace deepseek_kernels
