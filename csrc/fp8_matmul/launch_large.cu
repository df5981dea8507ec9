#include "launch.cuh"

namespace deepseek_kernels::fp8_matmul {

// out, tile_m, tile_n, cluster_m, cluster_n, swap
using Bf16 = __nv_bfloat16;
using Large = Compiled<MatmulConfig<Bf16, 128, 128, 1, 2, false>, MatmulConfig<Bf16, 128, 192, 1, 1, false>,
                       MatmulConfig<Bf16, 256, 128, 1, 2, false>>;

void list_large(Instances& into) { Large::list(into); }
bool launch_large(const Fp8MatmulParams& p) { return Large::launch(p, LaunchInstance()); }

}  // namespace deepseek_kernels::fp8_matmul
