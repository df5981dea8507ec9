#include "launch.cuh"

namespace deepseek_kernels::fp8_matmul {

// out, tile_m, tile_n, cluster_m, cluster_n, swap, reserved, cluster_k
using Bf16 = __nv_bfloat16;
using Small = Compiled<MatmulConfig<Bf16, 16, 64, 1, 1, true>, MatmulConfig<Bf16, 16, 64, 1, 1, true, 0, 2>,
                       MatmulConfig<Bf16, 16, 64, 1, 1, true, 0, 4>, MatmulConfig<Bf16, 16, 128, 1, 1, true>,
                       MatmulConfig<Bf16, 32, 64, 1, 1, true, 0, 4>, MatmulConfig<Bf16, 32, 128, 1, 1, true>,
                       MatmulConfig<Bf16, 64, 64, 1, 1, true, 0, 2>, MatmulConfig<Bf16, 64, 64, 1, 1, true, 0, 4>,
                       MatmulConfig<Bf16, 64, 128, 1, 2, true>, MatmulConfig<Bf16, 64, 16, 1, 1, false>,
                       MatmulConfig<Bf16, 64, 32, 1, 1, false>, MatmulConfig<Bf16, 128, 32, 1, 2, false>,
                       MatmulConfig<Bf16, 128, 64, 1, 2, false>>;

void list_small(Instances& into) { Small::list(into); }
bool launch_small(const Fp8MatmulParams& p) { return Small::launch(p, LaunchInstance()); }

}  // namespace deepseek_kernels::fp8_matmul
