#include "common/fp8_sm90_launch.cuh"
#include "kernel_wgrad_sm90.cuh"

namespace deepseek_kernels {
namespace {

using namespace fp8_grouped_matmul;

template <class C>
bool launch_if_asked_for(const Fp8GroupedWgradParams& p) {
  if (p.tile_m != C::kTileM || p.tile_n != C::kTileN || p.cluster_m != C::kClusterM || p.cluster_n != C::kClusterN)
    return false;
  WgradMaps maps = {operand_maps<C>({p.grad_t, p.n, p.columns, p.ld_grad}, {p.a_t, p.k, p.columns, p.ld_a}), {}};
  const int64_t blocks = ceil_div<int64_t>(p.columns, kTileK);
  const RowScales scale_grad = {p.scale_grad, 1, p.n, blocks, 0, p.scale_grad_stride_n, p.scale_grad_stride_c};
  const RowScales scale_a = {p.scale_a, 1, p.k, blocks, 0, p.scale_a_stride_k, p.scale_a_stride_c};
  if (scale_grad.can_be_mapped() && scale_a.can_be_mapped()) {
    maps.operands.scales = true;
    maps.operands.scale_x = scale_grad.map(C::kTileM), maps.operands.scale_y = scale_a.map(C::kTileN);
  }
  if constexpr (C::kStaged) {
    const int64_t between = p.num_experts == 1 ? p.ldd * p.n : p.d_stride_e;
    maps.d = tensor_map_3d(
        p.d, {Element::kFp32, p.k, p.n, p.num_experts, p.ldd, between, C::kBoxN, C::kBoxM, 1, C::kSwizzle});
  }
  LaunchConfig config{};
  config.grid_x = p.ctas;
  config.threads = C::kThreads;
  config.stream = p.stream;
  config.smem = sizeof(typename C::Smem);
  config.cluster = C::kCluster;
  config.dependent = true;
  launch(wgrad_kernel<C>, config, maps, p);
  return true;
}

template <class... Configs>
struct Compiled {
  static std::vector<Fp8GroupedWgradInstance> instances() {
    return {{Configs::kTileM, Configs::kTileN, Configs::kClusterM, Configs::kClusterN, Configs::kStages}...};
  }
  static bool launch(const Fp8GroupedWgradParams& p) { return (launch_if_asked_for<Configs>(p) || ...); }
};

// tile_m, tile_n, cluster_m, cluster_n
using Instances = Compiled<WgradConfig<128, 64, 1, 1>, WgradConfig<128, 128, 1, 2, true>, WgradConfig<128, 192, 2, 1>,
                           WgradConfig<256, 128, 1, 2>>;

}  // namespace

std::vector<Fp8GroupedWgradInstance> fp8_grouped_wgrad_instances() { return Instances::instances(); }

void launch_fp8_grouped_wgrad(const Fp8GroupedWgradParams& p) {
  if (p.num_experts == 0 || p.n == 0 || p.k == 0) return;
  DSK_CHECK(p.num_experts > 0 && (p.expert_offsets || p.num_experts == 1), "num_experts = ", p.num_experts);
  DSK_CHECK(p.columns > 0 && p.columns % (p.expert_offsets ? kTileK : 16) == 0, "columns = ", p.columns);
  DSK_CHECK(p.k % 2 == 0 && p.ldd % 2 == 0 && p.d_stride_e % 2 == 0, "k, ldd, d_stride_e = ", p.k, ", ", p.ldd, ", ",
            p.d_stride_e);
  DSK_CHECK(p.raster >= 1, "raster = ", p.raster);
  const int cluster = p.cluster_m * p.cluster_n;
  DSK_CHECK(cluster >= 1 && p.ctas >= 1 && p.ctas % cluster == 0, "ctas = ", p.ctas, ", cluster = ", cluster);
  constexpr int64_t kLargest = int64_t(1) << 30;  // coordinates of a tensor map and tiles are 32-bit
  DSK_CHECK(p.n < kLargest && p.k < kLargest && p.columns < kLargest, "n, k, columns = ", p.n, ", ", p.k, ", ",
            p.columns);
  const int64_t tiles = (ceil_div<int64_t>(p.n, p.tile_m) + 1) * (ceil_div<int64_t>(p.k, p.tile_n) + 1);
  DSK_CHECK(tiles * p.num_experts < kLargest, tiles, " tiles for each of ", p.num_experts, " experts");
  DSK_CHECK(Instances::launch(p), "no instance for tile ", p.tile_m, "x", p.tile_n, ", cluster ", p.cluster_m, "x",
            p.cluster_n);
}

}  // namespace deepseek_kernels
