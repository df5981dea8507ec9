#include "launch.cuh"

namespace deepseek_kernels::fp8_grouped_matmul {

// out, tile_m, tile_n, cluster_m, cluster_n, swap
using Bf16 = __nv_bfloat16;
using Small = Compiled<GroupedConfig<Bf16, 8, 64, 1, 1, true>, GroupedConfig<Bf16, 16, 128, 1, 1, true>,
                       GroupedConfig<Bf16, 32, 128, 1, 1, true>, GroupedConfig<Bf16, 64, 128, 1, 2, true>,
                       GroupedConfig<float, 64, 64, 1, 2, false>>;

void list_small(Instances& into) { Small::list(into); }
bool launch_small(const Fp8GroupedMatmulParams& p) { return Small::launch(p, LaunchInstance()); }

}  // namespace deepseek_kernels::fp8_grouped_matmul
