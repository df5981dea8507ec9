#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace deepseek_kernels {

// Groups of rows of a, each times its own matrix of b.
struct GroupedMatmulParams {
  const void* a;          // [num_rows, k] bf16
  const void* b;          // [num_groups, n, k] bf16; [num_groups, k, n] if transposed
  const int32_t* groups;  // [num_groups + 1] first rows
  void* d;                // [num_rows, n] bf16, contiguous
  int64_t num_rows, n, k;
  int num_groups;
  static constexpr bool masked = false;
  int64_t lda, ldb, b_stride_g;  // in elements, between rows and between groups
  bool transposed;               // b has its n side by side
  int tile_m;                    // rows; of n always 128
  int cluster_n;                 // tiles of a cluster
  int raster;                    // rows of clusters walked before the next column of tiles
  int ctas;                      // a multiple of the cluster
  void* stream;
};

struct GroupedMatmulInstance {
  int tile_m, tile_n, cluster_n;
  bool transposed;
  int stages;  // chosen by what fits
};

constexpr int kGroupedMatmulMaxGroups = 1024;
std::vector<GroupedMatmulInstance> grouped_matmul_instances();
void launch_grouped_matmul(const GroupedMatmulParams& params);

// The gradient of b: for each group of rows the product of what two matrices have in them.
struct GroupedWgradParams {
  const void* grad;       // [num_rows, n] bf16
  const void* a;          // [num_rows, k] bf16
  const int32_t* groups;  // [num_groups + 1] first rows
  void* d;                // [num_groups, n, k] of out_dtype, contiguous
  int64_t num_rows, n, k;
  int num_groups;
  static constexpr bool masked = false;
  int64_t ld_grad, lda;  // in elements
  Dtype out_dtype;       // kBf16 or kFp32
  int tile_n;            // of k; of n always 128
  int cluster_m;         // tiles of a cluster, along n
  int raster;            // rows of clusters walked before the next column of tiles
  int ctas;              // a multiple of the cluster
  void* stream;
};

struct GroupedWgradInstance {
  Dtype out_dtype;
  int tile_m, tile_n, cluster_m;
  int stages;  // chosen by what fits
};

std::vector<GroupedWgradInstance> grouped_wgrad_instances();
void launch_grouped_wgrad(const GroupedWgradParams& params);

}  // namespace deepseek_kernels
