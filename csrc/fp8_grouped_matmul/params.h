#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace deepseek_kernels {

// Groups of rows of a, each times its own matrix of b.
struct Fp8GroupedMatmulParams {
  const void* a;          // [num_rows, k] e4m3; masked: [num_groups, num_rows, k]
  const float* scale_a;   // as a, one for each 128 of k
  const void* b;          // [num_groups, n, k] e4m3
  const float* scale_b;   // [num_groups, ceil(n / 128), ceil(k / 128)]
  const int32_t* groups;  // [num_groups + 1] first rows; masked: [num_groups] counts of rows
  void* d;                // [num_rows, n] of out_dtype; masked: [num_groups, num_rows, n]; contiguous
  int64_t num_rows, n, k;
  int num_groups;
  bool masked;
  int64_t lda, ldb;                    // elements between rows
  int64_t a_group_rows, b_group_rows;  // rows from one group to the next; of a only if masked
  int64_t scale_a_stride_g, scale_a_stride_m, scale_a_stride_k;
  int64_t scale_b_stride_g, scale_b_stride_n, scale_b_stride_k;
  Dtype out_dtype;  // kBf16 or kFp32
  int tile_m, tile_n;
  int cluster_m, cluster_n;  // tiles of a cluster; one of both is 1
  bool swap;                 // b is the operand with the 64 rows of wgmma
  int raster;                // rows of clusters walked before the next column of tiles
  int ctas;                  // a multiple of the cluster
  void* stream;
};

struct Fp8GroupedMatmulInstance {
  Dtype out_dtype;
  int tile_m, tile_n, cluster_m, cluster_n;
  bool swap;
  int stages;  // chosen by what fits
};

constexpr int kFp8GroupedMatmulMaxGroups = 1024;
std::vector<Fp8GroupedMatmulInstance> fp8_grouped_matmul_instances();
void launch_fp8_grouped_matmul(const Fp8GroupedMatmulParams& params);

}  // namespace deepseek_kernels
