#pragma once
#include "common/cpu/isa.h"
#include "moe_permute/params.h"

namespace deepseek_kernels {

DSK_CPU_KERNEL(moe_permute, MoePermuteParams)
DSK_CPU_KERNEL(moe_unpermute, MoeUnpermuteParams)

}  // namespace deepseek_kernels
