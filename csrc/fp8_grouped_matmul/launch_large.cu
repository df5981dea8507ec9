#include "launch.cuh"

namespace deepseek_kernels::fp8_grouped_matmul {

// out, tile_m, tile_n, cluster_m, cluster_n, swap
using Bf16 = __nv_bfloat16;
using Large = Compiled<GroupedConfig<Bf16, 128, 128, 1, 2, false>, GroupedConfig<Bf16, 128, 192, 1, 2, false>,
                       GroupedConfig<float, 128, 128, 1, 2, false>>;

void list_large(Instances& into) { Large::list(into); }
bool launch_large(const Fp8GroupedMatmulParams& p) { return Large::launch(p, LaunchInstance()); }

}  // namespace deepseek_kernels::fp8_grouped_matmul
