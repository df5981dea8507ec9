#include "launch.cuh"

namespace deepseek_kernels {

std::vector<Fp8MatmulInstance> fp8_matmul_instances() {
  std::vector<Fp8MatmulInstance> all;
  fp8_matmul::list_small(all), fp8_matmul::list_large(all), fp8_matmul::list_fp32(all);
  return all;
}

void launch_fp8_matmul(const Fp8MatmulParams& p) {
  if (p.m == 0 || p.n == 0) return;
  DSK_CHECK(p.k > 0 && p.k % 16 == 0, "k = ", p.k);
  DSK_CHECK(p.n % 8 == 0, "n = ", p.n);
  DSK_CHECK(p.raster >= 1, "raster = ", p.raster);
  const int cluster = p.cluster_m * p.cluster_n * p.cluster_k;
  DSK_CHECK(cluster >= 1 && p.ctas >= 1 && p.ctas % cluster == 0, "ctas = ", p.ctas, ", cluster = ", cluster);
  constexpr int64_t kLargest = int64_t(1) << 30;  // coordinates of a tensor map are 32-bit
  DSK_CHECK(p.m < kLargest && p.n < kLargest && p.k < kLargest, "m, n, k = ", p.m, ", ", p.n, ", ", p.k);
  DSK_CHECK(ceil_div<int64_t>(p.m, p.tile_m) * ceil_div<int64_t>(p.n, p.tile_n) < kLargest, "tiles of ", p.tile_m, "x",
            p.tile_n, " for ", p.m, "x", p.n);
  const bool found = fp8_matmul::launch_small(p) || fp8_matmul::launch_large(p) || fp8_matmul::launch_fp32(p);
  DSK_CHECK(found, "no instance for out_dtype ", int(p.out_dtype), ", tile ", p.tile_m, "x", p.tile_n, ", cluster ",
            p.cluster_m, "x", p.cluster_n, "x", p.cluster_k, p.swap ? ", swapped" : "");
}

}  // namespace deepseek_kernels
