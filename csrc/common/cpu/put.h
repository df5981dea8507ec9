// One result of fp32 arithmetic into an output of any dtype.
#pragma once
#include "common/cpu/vec.h"

namespace deepseek_kernels {
namespace {

template <Dtype kDtype>
inline void put(void* d, int64_t at, float value, bool accumulate) {
  if constexpr (kDtype == Dtype::kFp32) {
    float* p = static_cast<float*>(d) + at;
    *p = accumulate ? *p + value : value;
  } else {
    uint16_t* p = static_cast<uint16_t*>(d) + at;
    if constexpr (kDtype == Dtype::kBf16) *p = to_bf16(accumulate ? from_bf16(*p) + value : value);
    if constexpr (kDtype == Dtype::kFp16) *p = to_fp16(accumulate ? from_fp16(*p) + value : value);
  }
}

}  // namespace
}  // namespace deepseek_kernels
