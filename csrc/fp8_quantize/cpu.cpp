// The maths of kernel.cuh, for CPU tensors: each thread takes a run of rows of blocks.
//
// 1x128 and 128x128: a block's columns are converted to fp32 in L1, row by row, for its amax and again to be encoded.
// 128x1: one amax per column, kept in a register for kLanes columns at a time down the rows.
// Bytes: m*k*b read (twice, the second time from cache), m*k written.
#include "fp8_quantize/cpu.h"

#include "common/cpu/fp8_block.h"
#include "common/cpu/parallel.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

constexpr int64_t kBlock = 128;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <Dtype kDtype>
inline void widen(const char* from, int64_t count, float* to) {  // `to` has room for whole registers
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_as<kDtype>(from + i * kBytes));
  if (i < count) store(to + i, load_part<kDtype>(from + i * kBytes, int(count - i)));
}

template <Dtype kDtype>
void quantize_rows(const Fp8QuantizeParams& p, int64_t block_row) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const int64_t begin = block_row * p.block_m, end = smaller(begin + p.block_m, p.m);
  const char* x = static_cast<const char*>(p.x);
  uint8_t* q = static_cast<uint8_t*>(p.q);
  alignas(64) float buffer[kBlock + 16];
  for (int64_t c = 0; c < p.k; c += kBlock) {
    const int64_t count = smaller(kBlock, p.k - c);
    float* scale = p.scale + block_row * p.scale_stride_m + c / kBlock * p.scale_stride_k;
    float amax = 0.f;
    for (int64_t r = begin; r < end; ++r) {
      widen<kDtype>(x + (r * p.ldx + c) * kBytes, count, buffer);
      amax = amax_of(buffer, count, amax);
    }
    *scale = fp8_scale(amax, p.pow2_scale);
    for (int64_t r = begin; r < end; ++r) {
      if (end - begin > 1) widen<kDtype>(x + (r * p.ldx + c) * kBytes, count, buffer);
      encode(buffer, count, *scale, q + r * p.ldq + c);
    }
  }
}

template <Dtype kDtype>
void quantize_columns(const Fp8QuantizeParams& p, int64_t block_row) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const int64_t begin = block_row * kBlock, end = smaller(begin + kBlock, p.m);
  const char* x = static_cast<const char*>(p.x);
  uint8_t* q = static_cast<uint8_t*>(p.q);
  alignas(64) float buffer[kBlock + 16], amax[kBlock], scale[kBlock];
  for (int64_t c = 0; c < p.k; c += kBlock) {
    const int64_t count = smaller(kBlock, p.k - c);
    for (int64_t i = 0; i < count; ++i) amax[i] = 0.f;
    for (int64_t r = begin; r < end; ++r) {
      widen<kDtype>(x + (r * p.ldx + c) * kBytes, count, buffer);
      for (int64_t i = 0; i < count; ++i) {
        const float v = as_float(as_bits(buffer[i]) & 0x7FFFFFFF);
        amax[i] = v > amax[i] || v != v ? v : amax[i];  // a NaN stays: nothing is greater
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      scale[i] = fp8_scale(amax[i], p.pow2_scale);
      p.scale[block_row * p.scale_stride_m + (c + i) * p.scale_stride_k] = scale[i];
    }
    for (int64_t r = begin; r < end; ++r) {
      widen<kDtype>(x + (r * p.ldx + c) * kBytes, count, buffer);
      for (int64_t i = 0; i < count; ++i) q[r * p.ldq + c + i] = to_e4m3(buffer[i] / scale[i]);
    }
  }
}

template <Dtype kDtype>
void dequantize_row(const Fp8DequantizeCpuParams& p, int64_t r) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const uint8_t* q = p.q + r * p.ldq;
  const float* scale = p.scale + r / p.block_m * p.scale_stride_m;
  char* out = static_cast<char*>(p.out) + r * p.ld_out * kBytes;
  for (int64_t c = 0; c < p.k; c += kLanes) {
    const int count = int(smaller(kLanes, p.k - c));
    alignas(64) uint8_t code[kLanes] = {};
    alignas(64) float s[kLanes] = {};
    std::memcpy(code, q + c, size_t(count));
    for (int i = 0; i < count; ++i) s[i] = scale[(c + i) / p.block_k * p.scale_stride_k];
    store_some<kDtype>(out + c * kBytes, load_e4m3(code) * load(s), count);
  }
}

}  // namespace

void fp8_quantize(const Fp8QuantizeParams& p, int threads) {
  const int64_t blocks = (p.m + p.block_m - 1) / p.block_m;
  const int64_t grain = 32768 / (p.k * p.block_m + 1) + 1;
  with_dtype(p.dtype, [&](auto tag) {
    constexpr Dtype kDtype = decltype(tag)::kDtype;
    parallel_runs(blocks, grain, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t b = begin; b < end; ++b) {
        if (p.block_k == 1)
          quantize_columns<kDtype>(p, b);
        else
          quantize_rows<kDtype>(p, b);
      }
    });
  });
}

void fp8_dequantize(const Fp8DequantizeCpuParams& p, int threads) {
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.m, 32768 / (p.k + 1) + 1, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) dequantize_row<decltype(tag)::kDtype>(p, r);
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
