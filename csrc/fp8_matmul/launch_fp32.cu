#include "launch.cuh"

namespace deepseek_kernels::fp8_matmul {

// out, tile_m, tile_n, cluster_m, cluster_n, swap
using Fp32 = Compiled<MatmulConfig<float, 64, 64, 1, 1, false>, MatmulConfig<float, 128, 128, 1, 1, false>>;

void list_fp32(Instances& into) { Fp32::list(into); }
bool launch_fp32(const Fp8MatmulParams& p) { return Fp32::launch(p, LaunchInstance()); }

}  // namespace deepseek_kernels::fp8_matmul
