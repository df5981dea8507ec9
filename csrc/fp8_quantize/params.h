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

struct Fp8QuantizeBothParams {
  const void* x;                  // [m, k] of dtype
  const int32_t* expert_offsets;  // [num_experts + 1] or nullptr
  void* q;                        // [m, k] e4m3
  float* scale;                   // [m, ceil(k / 128)]
  void* q_t;                      // [k, width] e4m3, 16-byte aligned rows
  float* scale_t;                 // [k, width / 128]
  int64_t m, k, width;            // width: a multiple of 128 with room for the blocks of every expert
  int64_t row_tiles;              // enough for these blocks, and for those of the rows of no expert
  int num_experts;
  Dtype dtype;
  int64_t ldx, ldq, ldq_t;
  int64_t scale_stride_m, scale_stride_k, scale_t_stride_k, scale_t_stride_w;
  bool pow2_scale;
  void* stream;
};

struct Fp8DequantizeParams {
  const void* q;       // [m, k] e4m3
  const float* scale;  // [ceil(m / block_m), ceil(k / block_k)]
  void* out;           // [m, k] of dtype
  int64_t m, k;
  int64_t ldq, ld_out;
  int64_t scale_stride_m, scale_stride_k;
  int block_m, block_k;
  Dtype dtype;
  void* stream;
};

void launch_fp8_quantize(const Fp8QuantizeParams& params);
void launch_fp8_quantize_both(const Fp8QuantizeBothParams& params);
void launch_fp8_dequantize(const Fp8DequantizeParams& params);

}  // namespace deepseek_kernels
