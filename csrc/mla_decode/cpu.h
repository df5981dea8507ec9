#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace deepseek_kernels {

struct MlaDecodeCpuParams {
  const void* q;               // [b, s_q, h_q, d_latent + d_rope] of dtype, last stride 1
  const void* kv_cache;        // [num_pages, page_size, row] of dtype, or the 656-byte FP8 rows
  const int32_t* block_table;  // [b, max_pages]
  const int32_t* seqlens_kv;   // [b]
  const float* sink;           // [h_q]; may be nullptr
  void* out;                   // [b, s_q, h_q, d_latent] of dtype
  float* lse;                  // [b, h_q, s_q]
  float* workspace;            // mla_decode_workspace floats
  int64_t b, s_q, h_q, d_latent, d_rope, num_pages, page_size, max_pages;
  int64_t q_stride_b, q_stride_s, q_stride_h;  // elements
  int64_t page_bytes, row_bytes;
  float scale;
  Dtype dtype;
  bool causal, fp8;
};

constexpr int64_t kMlaTokens = 32;  // cached rows a thread decodes at a time

inline int64_t mla_align(int64_t columns) { return (columns + 63) / 64 * 64; }

// One thread's part: queries, the running output with its maximum and sum, scores, a tile of rows, two partial results.
inline int64_t mla_decode_workspace(int64_t rows, int64_t d_latent, int64_t d_rope, int threads) {
  const int64_t width = mla_align(d_latent + d_rope), state = rows * (mla_align(d_latent) + 2);
  return threads * (rows * width + 3 * state + rows * (kMlaTokens + 1) + (kMlaTokens + 4) * width);
}

DSK_CPU_KERNEL(mla_decode, MlaDecodeCpuParams)

}  // namespace deepseek_kernels
