#include "launch.cuh"

namespace deepseek_kernels::grouped_matmul {

bool launch_nn(const GroupedMatmulParams& p) { return Instances<true>::launch(p); }

}  // namespace deepseek_kernels::grouped_matmul
