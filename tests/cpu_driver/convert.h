// The conversions of common/cpu/vec.h over arrays, by the set in use.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"

namespace deepseek_kernels {

struct ConvertParams {
  const char* function;  // from_fp16, from_bf16, from_e4m3, to_fp16, to_bf16, to_e4m3, exp
  bool scalar;           // one at a time instead of a register
  const void* from;
  void* to;
  int64_t count;  // a multiple of 16
  bool known;     // set if there is such a function
};
struct ConvertCall {
  ConvertParams* call;
};

DSK_CPU_KERNEL(convert, ConvertCall)

}  // namespace deepseek_kernels
