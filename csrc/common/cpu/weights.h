// Rows of a weight in one of the stored formats, decoded to fp32 two registers at a time.
//
// A row's load gives values divided by unit(block), the same for kScaleBlock columns, so that a sum over them is
// multiplied once. A NaN code may load as a number: is_nan looks for one in the whole row, whose sums are all NaN then.
#pragma once
#include "common/cpu/vec.h"

namespace deepseek_kernels {
namespace {

constexpr int64_t kScaleBlock = 128;
constexpr int64_t kStep = 2 * kLanes;
constexpr int64_t kPrefetch = 1024;  // bytes ahead, measured best for one stream of rows

// b [n, k] of e4m3 with one fp32 scale per 128 x 128.
struct E4m3Weight {
  static constexpr bool kScaled = true;
  const uint8_t* b;
  const float* scale_b;
  int64_t ldb, scale_stride_n, scale_stride_k;

  struct Row {
    const uint8_t* b;
    const float* scale;
    int64_t scale_stride;

    float unit(int64_t block) const { return 256.f * scale[block * scale_stride]; }
    void load(int64_t column, Vec (&out)[2]) const { load_e4m3_bits(b + column, out); }
    void load_part(int64_t column, int64_t count, Vec (&out)[2]) const {
      alignas(64) uint8_t part[kStep] = {};
      std::memcpy(part, b + column, size_t(count));
      load_e4m3_bits(part, out);
    }
    bool is_nan(int64_t k) const { return any_nan_e4m3(b, k); }
    void prefetch(int64_t column) const {
      __builtin_prefetch(b + column + kPrefetch);
      __builtin_prefetch(b + column + kPrefetch + 64);
    }
  };
  Row row(int64_t j) const { return {b + j * ldb, scale_b + j / kScaleBlock * scale_stride_n, scale_stride_k}; }
};

// b [n, k] of bf16, fp16 or fp32.
template <Dtype kDtype>
struct FloatWeight {
  static constexpr bool kScaled = false;
  static constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const char* b;
  int64_t ldb;

  struct Row {
    const char* b;

    float unit(int64_t) const { return 1.f; }
    void load(int64_t column, Vec (&out)[2]) const {
      const char* p = b + column * kBytes;
      out[0] = load_as<kDtype>(p), out[1] = load_as<kDtype>(p + kLanes * kBytes);
    }
    void load_part(int64_t column, int64_t count, Vec (&out)[2]) const {
      alignas(64) char part[kStep * kBytes] = {};
      std::memcpy(part, b + column * kBytes, size_t(count * kBytes));
      out[0] = load_as<kDtype>(part), out[1] = load_as<kDtype>(part + kLanes * kBytes);
    }
    bool is_nan(int64_t) const { return false; }
    void prefetch(int64_t column) const {
      const char* p = b + column * kBytes + kPrefetch;
      for (int64_t i = 0; i < kScaleBlock * kBytes; i += 64) __builtin_prefetch(p + i);
    }
  };
  Row row(int64_t j) const { return {b + j * ldb * kBytes}; }
};

// Columns [begin, end) of a row as fp32, `begin` a multiple of kScaleBlock, zero up to a multiple of kStep.
template <class Row>
inline void decode_columns(const Row& row, int64_t begin, int64_t end, float* out) {
  for (int64_t block = begin; block < end; block += kScaleBlock) {
    const int64_t stop = block + kScaleBlock < end ? block + kScaleBlock : end;
    const Vec unit = splat(row.unit(block / kScaleBlock));
    for (int64_t c = block; c < stop; c += kStep) {
      Vec w[2];
      c + kStep <= stop ? row.load(c, w) : row.load_part(c, stop - c, w);
      store(out + c - begin, w[0] * unit);
      store(out + c - begin + kLanes, w[1] * unit);
    }
  }
}

// All k columns; a NaN among them comes first, where it makes every sum over the row NaN.
template <class Row>
inline void decode_row(const Row& row, int64_t k, float* out) {
  decode_columns(row, 0, k, out);
  if (row.is_nan(k)) out[0] = as_float(0x7FC00000);
}

}  // namespace
}  // namespace deepseek_kernels
