// The instances of the kernel, in several sources so that they compile side by side.
#pragma once
#include "common/fp8_sm90_launch.cuh"
#include "kernel_sm90.cuh"

namespace deepseek_kernels::fp8_grouped_matmul {

struct LaunchInstance {
  template <class C>
  void operator()(const Fp8GroupedMatmulParams& p) const {
    const int64_t others = p.num_groups - 1;
    const int64_t rows_a = p.num_rows + (p.masked ? others * p.a_group_rows : 0);
    const int64_t rows_d = p.num_rows * (p.masked ? p.num_groups : 1);
    const RowScales scale_a = {
        p.scale_a,          p.masked ? p.num_groups : 1, p.num_rows,        ceil_div<int64_t>(p.k, kTileK),
        p.scale_a_stride_g, p.scale_a_stride_m,          p.scale_a_stride_k};
    const auto maps = matmul_maps<C>({p.a, rows_a, p.k, p.lda}, scale_a,
                                     {p.b, p.n + others * p.b_group_rows, p.k, p.ldb}, {p.d, rows_d, p.n, p.n});
    launch(kernel<C>, launch_config<C>(p, sizeof(Smem<C>)), maps, p);
  }
};

// Each list's instances, appended; whether one of them was asked for, and is launched.
using Instances = std::vector<Fp8GroupedMatmulInstance>;
void list_small(Instances& into);
bool launch_small(const Fp8GroupedMatmulParams& p);
void list_large(Instances& into);
bool launch_large(const Fp8GroupedMatmulParams& p);

}  // namespace deepseek_kernels::fp8_grouped_matmul
