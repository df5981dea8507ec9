#include "launch.cuh"

namespace deepseek_kernels::grouped_matmul {

bool launch_nt(const GroupedMatmulParams& p) { return Instances<false>::launch(p); }

}  // namespace deepseek_kernels::grouped_matmul
