#include "common/bf16_sm90_launch.cuh"
#include "kernel_wgrad_sm90.cuh"

namespace deepseek_kernels {
namespace {

using namespace grouped_matmul;

template <class C>
constexpr Dtype kOutDtype = C::kSize == 2 ? Dtype::kBf16 : Dtype::kFp32;

template <class C>
bool launch_if_asked_for(const GroupedWgradParams& p) {
  if (p.out_dtype != kOutDtype<C> || p.tile_n != C::kTileN || p.cluster_m != C::kClusterM) return false;
  const Matrices grad = {p.grad, 1, p.num_rows, p.n, p.ld_grad, 0}, a = {p.a, 1, p.num_rows, p.k, p.lda, 0};
  const Matrices d = {p.d, p.num_groups, p.n, p.k, p.k, p.n * p.k};
  WgradMaps maps = {{grad.map(C::kBoxX), a.map(C::kBoxY)}, {}};
  if constexpr (C::kStagedBytes > 0) maps.d = d.map(C::kBoxM);
  launch(wgrad_kernel<C>, launch_config<C>(p.ctas, sizeof(WgradSmem<C>), p.stream), maps, p);
  return true;
}

template <class... Configs>
struct Compiled {
  static std::vector<GroupedWgradInstance> instances() {
    return {{kOutDtype<Configs>, Configs::kTileM, Configs::kTileN, Configs::kClusterM, Configs::kStages}...};
  }
  static bool launch(const GroupedWgradParams& p) { return (launch_if_asked_for<Configs>(p) || ...); }
};

// out, tile_n, cluster_m
using Bf16 = __nv_bfloat16;
using Instances = Compiled<WgradConfig<Bf16, 128, 1>, WgradConfig<Bf16, 256, 2>, WgradConfig<float, 128, 1>,
                           WgradConfig<float, 256, 2>>;

}  // namespace

std::vector<GroupedWgradInstance> grouped_wgrad_instances() { return Instances::instances(); }

void launch_grouped_wgrad(const GroupedWgradParams& p) {
  if (p.num_groups == 0 || p.n == 0 || p.k == 0) return;
  DSK_CHECK(p.num_groups >= 1 && p.num_groups <= kGroupedMatmulMaxGroups, "num_groups = ", p.num_groups);
  DSK_CHECK(p.num_rows > 0 && p.k % 8 == 0, "num_rows, k = ", p.num_rows, ", ", p.k);
  DSK_CHECK(p.raster >= 1, "raster = ", p.raster);
  DSK_CHECK(p.cluster_m >= 1 && p.ctas >= 1 && p.ctas % p.cluster_m == 0, "ctas = ", p.ctas,
            ", cluster_m = ", p.cluster_m);
  constexpr int64_t kLargest = int64_t(1) << 30;  // coordinates of a tensor map and tiles are 32-bit
  DSK_CHECK(p.num_rows < kLargest && p.n < kLargest && p.k < kLargest, "num_rows, n, k = ", p.num_rows, ", ", p.n, ", ",
            p.k);
  const int64_t tiles = (p.n / 128 + 2) * (p.k / 128 + 2);
  DSK_CHECK(tiles * p.num_groups < kLargest, tiles, " tiles for each of ", p.num_groups, " experts");
  DSK_CHECK(Instances::launch(p), "no instance for out_dtype ", int(p.out_dtype), ", tile_n ", p.tile_n, ", cluster_m ",
            p.cluster_m);
}

}  // namespace deepseek_kernels
