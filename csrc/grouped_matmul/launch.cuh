// The instances of the kernel, in several sources so that they compile side by side.
#pragma once
#include "common/bf16_sm90_launch.cuh"
#include "kernel_sm90.cuh"

namespace deepseek_kernels::grouped_matmul {

template <class C>
bool launch_if_asked_for(const GroupedMatmulParams& p) {
  if (p.tile_m != C::kTileM || p.cluster_n != C::kClusterN || p.transposed != C::kTransposed) return false;
  const Matrices a = {p.a, 1, p.num_rows, p.k, p.lda, 0};
  const Matrices b = {p.b, p.num_groups, C::kTransposed ? p.k : p.n, C::kTransposed ? p.n : p.k, p.ldb, p.b_stride_g};
  const Maps maps = {{b.map(C::kBoxX), a.map(C::kBoxY)},
                     tensor_map_2d(p.d, {Element::kBf16, p.n, p.num_rows, p.n, C::kBoxN, C::kBoxM, C::kSwizzle})};
  launch(kernel<C>, launch_config<C>(p.ctas, sizeof(Smem<C>), p.stream), maps, p);
  return true;
}

template <class... Configs>
struct Compiled {
  static void list(std::vector<GroupedMatmulInstance>& into) {
    (into.push_back({Configs::kTileM, Configs::kTileN, Configs::kClusterN, Configs::kTransposed, Configs::kStages}),
     ...);
  }
  static bool launch(const GroupedMatmulParams& p) { return (launch_if_asked_for<Configs>(p) || ...); }
};

// tile_m, cluster_n
template <bool kTransposed>
using Instances = Compiled<ForwardConfig<16, 1, kTransposed>, ForwardConfig<64, 1, kTransposed>,
                           ForwardConfig<128, 2, kTransposed>, ForwardConfig<256, 2, kTransposed>>;

// Those whose b is [n, k], and those whose b is [k, n].
bool launch_nt(const GroupedMatmulParams& p);
bool launch_nn(const GroupedMatmulParams& p);

}  // namespace deepseek_kernels::grouped_matmul
