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

constexpr int64_t kMlaTokens = 64;   // cached rows a thread decodes at a time
constexpr int64_t kMlaColumns = 64;  // columns of them transposed at a time
constexpr int64_t kMlaMasses = 4;    // sums of rounded weights of a row

inline int64_t mla_align(int64_t columns) { return (columns + 63) / 64 * 64; }

// Floats of a running result: the output, its maximum, sum and masses.
inline int64_t mla_state(int64_t rows, int64_t d_latent) { return rows * (mla_align(d_latent) + 2 + kMlaMasses); }

// One thread's part: queries, the running result, scores, a tile of rows, two partial results.
// The bf16 kernel, which copies no queries and holds rows in half the space, needs no more than this.
inline int64_t mla_decode_workspace(int64_t rows, int64_t d_latent, int64_t d_rope, int threads) {
  const int64_t width = mla_align(d_latent + d_rope), state = mla_state(rows, d_latent);
  return threads * (rows * width + 3 * state + rows * (kMlaTokens + 1) + kMlaTokens * (width + kMlaColumns));
}

DSK_CPU_KERNEL_BF16(mla_decode, MlaDecodeCpuParams)

}  // namespace deepseek_kernels
