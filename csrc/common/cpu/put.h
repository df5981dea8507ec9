// One result of fp32 arithmetic into an output of any dtype.
#pragma once
#include "common/cpu/vec.h"

namespace deepseek_kernels {
namespace {

// A choice at run time: next to the sum behind a result it costs nothing, and the kernels are compiled once.
inline void put(Dtype dtype, void* d, int64_t at, float value, bool accumulate) {
  if (dtype == Dtype::kFp32) {
    float* p = static_cast<float*>(d) + at;
    *p = accumulate ? *p + value : value;
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(d) + at;
  if (dtype == Dtype::kBf16)
    *p = to_bf16(accumulate ? from_bf16(*p) + value : value);
  else
    *p = to_fp16(accumulate ? from_fp16(*p) + value : value);
}

}  // namespace
}  // namespace deepseek_kernels
