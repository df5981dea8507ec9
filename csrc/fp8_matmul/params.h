#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace deepseek_kernels {

struct Fp8MatmulParams {
  const void* a;         // [m, k] e4m3
  const float* scale_a;  // [m, ceil(k / 128)]
  const void* b;         // [n, k] e4m3
  const float* scale_b;  // [ceil(n / 128), ceil(k / 128)]
  const void* bias;      // [n] of bias_dtype; may be nullptr
  void* d;               // [m, n] of out_dtype
  int64_t m, n, k;
  int64_t lda, ldb, ldd;  // strides in elements; the last dimension is contiguous
  int64_t scale_a_stride_m, scale_a_stride_k;
  int64_t scale_b_stride_n, scale_b_stride_k;
  Dtype out_dtype, bias_dtype;  // kBf16 or kFp32
  bool accumulate;              // add to what is in d
  int tile_m, tile_n;
  int cluster_m, cluster_n;  // tiles of a cluster; one of both is 1
  int cluster_k;             // CTAs of a cluster that share out the k of a tile, where it has one
  bool swap;                 // b is the operand with the 64 rows of wgmma
  int raster;                // rows of clusters walked before the next column of tiles
  int ctas;                  // a multiple of the cluster
  void* stream;
};

struct Fp8MatmulInstance {
  Dtype out_dtype;
  int tile_m, tile_n, cluster_m, cluster_n;
  bool swap;
  int cluster_k;
  int stages;  // chosen by what fits
};

std::vector<Fp8MatmulInstance> fp8_matmul_instances();
void launch_fp8_matmul(const Fp8MatmulParams& params);

}  // namespace deepseek_kernels
