#include "launch.cuh"

namespace deepseek_kernels::mla_decode {

void launch_fp16(const MlaDecodeParams& p) { launch_both<__half>(p); }

}  // namespace deepseek_kernels::mla_decode
