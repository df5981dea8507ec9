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
  static constexpr int cluster_k = 1;
  int raster;  // rows of clusters walked before the next column of tiles
  int ctas;    // a multiple of the cluster
  void* stream;
};

struct Fp8GroupedMatmulInstance {
  Dtype out_dtype;
  int tile_m, tile_n, cluster_m, cluster_n;
  bool swap;
  int cluster_k;
  int stages;  // chosen by what fits
};

constexpr int kFp8GroupedMatmulMaxGroups = 1024;
std::vector<Fp8GroupedMatmulInstance> fp8_grouped_matmul_instances();
void launch_fp8_grouped_matmul(const Fp8GroupedMatmulParams& params);

// The gradient of b: for each expert the product of its columns of two matrices.
struct Fp8GroupedWgradParams {
  const void* grad_t;             // [n, columns] e4m3
  const float* scale_grad;        // [n, ceil(columns / 128)]
  const void* a_t;                // [k, columns] e4m3
  const float* scale_a;           // [k, ceil(columns / 128)]
  const int32_t* expert_offsets;  // [num_experts + 1] first rows; nullptr: one expert has all columns
  float* d;                       // [num_experts, n, k]
  int64_t n, k, columns;
  int num_experts;
  int64_t ld_grad, ld_a, ldd, d_stride_e;  // in elements, between rows and between experts
  int64_t scale_grad_stride_n, scale_grad_stride_c;
  int64_t scale_a_stride_k, scale_a_stride_c;
  bool accumulate;           // add to what is in d
  int tile_m, tile_n;        // of n, of k
  int cluster_m, cluster_n;  // tiles of a cluster; one of both is 1
  int raster;                // rows of clusters walked before the next column of tiles
  int ctas;                  // a multiple of the cluster
  void* stream;
};

struct Fp8GroupedWgradInstance {
  int tile_m, tile_n, cluster_m, cluster_n;
  int stages;  // chosen by what fits
};

std::vector<Fp8GroupedWgradInstance> fp8_grouped_wgrad_instances();
void launch_fp8_grouped_wgrad(const Fp8GroupedWgradParams& params);

}  // namespace deepseek_kernels
