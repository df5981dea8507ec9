// The instances of the kernel, in several sources so that they compile side by side.
#pragma once
#include "common/fp8_sm90_launch.cuh"
#include "kernel_sm90.cuh"

namespace deepseek_kernels::fp8_matmul {

struct LaunchInstance {
  template <class C>
  void operator()(const Fp8MatmulParams& p) const {
    const RowScales scale_a = {p.scale_a,         1, p.m, ceil_div<int64_t>(p.k, kTileK), 0, p.scale_a_stride_m,
                               p.scale_a_stride_k};
    const auto maps = matmul_maps<C>({p.a, p.m, p.k, p.lda}, scale_a, {p.b, p.n, p.k, p.ldb}, {p.d, p.m, p.n, p.ldd});
    launch(kernel<C>, launch_config<C>(p, sizeof(typename C::Smem)), maps, p);
  }
};

// Each list's instances, appended; whether one of them was asked for, and is launched.
using Instances = std::vector<Fp8MatmulInstance>;
void list_small(Instances& into);
bool launch_small(const Fp8MatmulParams& p);
void list_large(Instances& into);
bool launch_large(const Fp8MatmulParams& p);
void list_fp32(Instances& into);
bool launch_fp32(const Fp8MatmulParams& p);

}  // namespace deepseek_kernels::fp8_matmul
