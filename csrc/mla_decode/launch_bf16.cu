#include "launch.cuh"

namespace deepseek_kernels::mla_decode {

void launch_bf16(const MlaDecodeParams& p) { launch_both<__nv_bfloat16>(p); }

}  // namespace deepseek_kernels::mla_decode
