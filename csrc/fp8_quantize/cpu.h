#pragma once
#include "common/cpu/isa.h"
#include "fp8_quantize/params.h"

namespace deepseek_kernels {

DSK_CPU_KERNEL(fp8_quantize, Fp8QuantizeParams)
DSK_CPU_KERNEL(fp8_quantize_both, Fp8QuantizeBothParams)
DSK_CPU_KERNEL(fp8_dequantize, Fp8DequantizeParams)

}  // namespace deepseek_kernels
