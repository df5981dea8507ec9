#include "launch.cuh"

namespace deepseek_kernels {

std::vector<GroupedMatmulInstance> grouped_matmul_instances() {
  std::vector<GroupedMatmulInstance> all;
  grouped_matmul::Instances<false>::list(all), grouped_matmul::Instances<true>::list(all);
  return all;
}

void launch_grouped_matmul(const GroupedMatmulParams& p) {
  if (p.num_rows == 0 || p.n == 0) return;
  DSK_CHECK(p.num_groups >= 1 && p.num_groups <= kGroupedMatmulMaxGroups, "num_groups = ", p.num_groups);
  DSK_CHECK(p.k > 0 && p.n % 8 == 0, "n, k = ", p.n, ", ", p.k);
  DSK_CHECK(p.raster >= 1, "raster = ", p.raster);
  DSK_CHECK(p.cluster_n >= 1 && p.ctas >= 1 && p.ctas % p.cluster_n == 0, "ctas = ", p.ctas,
            ", cluster_n = ", p.cluster_n);
  constexpr int64_t kLargest = int64_t(1) << 30;  // coordinates of a tensor map, rows and tiles are 32-bit
  DSK_CHECK(p.num_rows < kLargest && p.n < kLargest && p.k < kLargest, "num_rows, n, k = ", p.num_rows, ", ", p.n, ", ",
            p.k);
  DSK_CHECK(p.tile_m >= 1 && (p.num_rows / p.tile_m + p.num_groups) * (p.n / 128 + 2) < kLargest, "tiles of ", p.tile_m,
            " rows for ", p.num_rows, "x", p.n);
  const bool found = p.transposed ? grouped_matmul::launch_nn(p) : grouped_matmul::launch_nt(p);
  DSK_CHECK(found, "no instance for tile_m ", p.tile_m, ", cluster_n ", p.cluster_n,
            p.transposed ? ", transposed" : "");
}

}  // namespace deepseek_kernels
