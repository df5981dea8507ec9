// Rows of a weight in one of the stored formats, decoded to fp32 a register at a time.
#pragma once
#include "common/cpu/vec.h"

namespace deepseek_kernels {
namespace {

constexpr int64_t kScaleBlock = 128;
constexpr int64_t kPrefetch = 1024;  // bytes ahead, measured best for one stream of rows

// b [n, k] of e4m3 with one fp32 scale per 128 x 128.
struct E4m3Weight {
  const uint8_t* b;
  const float* scale_b;
  int64_t ldb, scale_stride_n, scale_stride_k;

  Vec scale(int64_t row, int64_t column) const {
    return splat(scale_b[row / kScaleBlock * scale_stride_n + column / kScaleBlock * scale_stride_k]);
  }
  Vec load(int64_t row, int64_t column, Vec s) const { return load_e4m3(b + row * ldb + column) * s; }
  Vec load_part(int64_t row, int64_t column, int count, Vec s) const {
    alignas(64) uint8_t part[kLanes] = {};
    std::memcpy(part, b + row * ldb + column, size_t(count));
    return load_e4m3(part) * s;
  }
  void prefetch(int64_t row, int64_t column) const {
    const uint8_t* p = b + row * ldb + column + kPrefetch;
    __builtin_prefetch(p);
    __builtin_prefetch(p + 64);
  }
};

// b [n, k] of bf16, fp16 or fp32.
template <Dtype kDtype>
struct FloatWeight {
  static constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const char* b;
  int64_t ldb;

  Vec scale(int64_t, int64_t) const { return zero(); }
  Vec load(int64_t row, int64_t column, Vec) const { return load_as<kDtype>(b + (row * ldb + column) * kBytes); }
  Vec load_part(int64_t row, int64_t column, int count, Vec) const {
    return deepseek_kernels::load_part<kDtype>(b + (row * ldb + column) * kBytes, count);
  }
  void prefetch(int64_t row, int64_t column) const {
    const char* p = b + (row * ldb + column) * kBytes + kPrefetch;
    for (int64_t i = 0; i < kScaleBlock * kBytes; i += 64) __builtin_prefetch(p + i);
  }
};

}  // namespace
}  // namespace deepseek_kernels
