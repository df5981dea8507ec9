#include "launch.cuh"

namespace deepseek_kernels {

std::vector<Fp8GroupedMatmulInstance> fp8_grouped_matmul_instances() {
  std::vector<Fp8GroupedMatmulInstance> all;
  fp8_grouped_matmul::list_small(all), fp8_grouped_matmul::list_large(all);
  return all;
}

void launch_fp8_grouped_matmul(const Fp8GroupedMatmulParams& p) {
  if (p.num_rows == 0 || p.n == 0) return;
  DSK_CHECK(p.num_groups >= 1 && p.num_groups <= kFp8GroupedMatmulMaxGroups, "num_groups = ", p.num_groups);
  DSK_CHECK(p.k > 0 && p.k % 16 == 0, "k = ", p.k);
  DSK_CHECK(p.n % 8 == 0, "n = ", p.n);
  DSK_CHECK(p.raster >= 1, "raster = ", p.raster);
  const int cluster = p.cluster_m * p.cluster_n;
  DSK_CHECK(cluster >= 1 && p.ctas >= 1 && p.ctas % cluster == 0, "ctas = ", p.ctas, ", cluster = ", cluster);
  constexpr int64_t kLargest = int64_t(1) << 30;  // coordinates of a tensor map, rows and tiles are 32-bit
  const int64_t rows_a = p.num_rows + (p.masked ? p.num_groups * (p.a_group_rows + p.num_rows) : 0);
  const int64_t rows_b = p.n + p.num_groups * p.b_group_rows;
  DSK_CHECK(rows_a < kLargest && rows_b < kLargest && p.k < kLargest, "rows of a, rows of b, k = ", rows_a, ", ",
            rows_b, ", ", p.k);
  DSK_CHECK((rows_a / p.tile_m + p.num_groups) * ceil_div<int64_t>(p.n, p.tile_n) < kLargest, "tiles of ", p.tile_m,
            "x", p.tile_n, " for ", rows_a, "x", p.n);
  const bool found = fp8_grouped_matmul::launch_small(p) || fp8_grouped_matmul::launch_large(p);
  DSK_CHECK(found, "no instance for out_dtype ", int(p.out_dtype), ", tile ", p.tile_m, "x", p.tile_n, ", cluster ",
            p.cluster_m, "x", p.cluster_n, p.swap ? ", swapped" : "");
}

}  // namespace deepseek_kernels
