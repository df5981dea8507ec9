#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace deepseek_kernels {

struct RotationCpu {
  const float* cos_sin;   // [max_positions, d_rope]: cosines in the first half of a row, sines in the second
  const void* positions;  // [num_tokens] int32 or int64, clamped to the rows of cos_sin
  int64_t max_positions, d_rope;
  bool wide_positions;  // positions are int64
  bool interleaved;     // pairs are (2i, 2i + 1), else (i, i + d_rope / 2)
  bool inverse;
};

struct MlaCacheWriteCpuParams {
  RotationCpu rotation;
  const void* c_kv;         // [num_tokens, d_latent] of c_kv_dtype
  const void* k_rope;       // [num_tokens, d_rope] of k_rope_dtype
  const void* norm_weight;  // [d_latent] of norm_dtype; may be nullptr: no norm
  void* kv_cache;           // [num_pages, page_size, row] of cache_dtype, or the 656-byte FP8 rows
  const void* slots;        // [num_tokens] int32 or int64; a token whose slot does not exist is skipped
  int64_t num_tokens, d_latent, num_pages, page_size;
  int64_t ld_c_kv, ld_k_rope, page_bytes, row_bytes;
  float eps;
  Dtype c_kv_dtype, k_rope_dtype, norm_dtype, cache_dtype;
  bool wide_slots, fp8;
};

struct MlaRopeCpuParams {
  RotationCpu rotation;
  const void* x;  // [num_tokens, heads, d_rope] of dtype
  void* out;      // as x, contiguous
  int64_t num_tokens, heads, x_stride_t, x_stride_h;
  Dtype dtype;
};

DSK_CPU_KERNEL(mla_cache_write, MlaCacheWriteCpuParams)
DSK_CPU_KERNEL(mla_rope, MlaRopeCpuParams)

}  // namespace deepseek_kernels
