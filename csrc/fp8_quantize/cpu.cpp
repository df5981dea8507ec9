// The maths of kernel.cuh and kernel_both.cuh, for CPU tensors: each thread takes a run of rows of blocks, or of tiles.
//
// 1x128 and 128x128: a block's columns are converted to fp32 in L1, row by row, for its amax and again to be encoded.
// 128x1: one amax per column, kept in L1 down the rows.
// Both: a tile of 128 x 128 is walked down twice, for the codes of the rows and the maxima of the columns, then for the
// codes of the columns, which are transposed in L1.
// Bytes: m*k*b read (twice, the second time from cache), m*k written (2*m*k for both).
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

// Maxima of columns as the bits of magnitudes, which order as the numbers do, with NaN on top.
inline void raise_to_magnitudes(const float* x, int64_t count, int32_t* bits) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = int32_t(as_bits(x[i]) & 0x7FFFFFFF);
    bits[i] = magnitude > bits[i] ? magnitude : bits[i];
  }
}

inline void encode_columns(const float* x, int64_t count, const float* scale, uint8_t* q) {
  for (int64_t i = 0; i < count; ++i) q[i] = to_e4m3(x[i] / scale[i]);
}

template <Dtype kDtype>
void quantize_columns(const Fp8QuantizeParams& p, int64_t block_row) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const int64_t begin = block_row * kBlock, end = smaller(begin + kBlock, p.m);
  const char* x = static_cast<const char*>(p.x);
  uint8_t* q = static_cast<uint8_t*>(p.q);
  alignas(64) float buffer[kBlock + 16], scale[kBlock];
  for (int64_t c = 0; c < p.k; c += kBlock) {
    const int64_t count = smaller(kBlock, p.k - c);
    alignas(64) int32_t amax[kBlock] = {};
    for (int64_t r = begin; r < end; ++r) {
      widen<kDtype>(x + (r * p.ldx + c) * kBytes, count, buffer);
      raise_to_magnitudes(buffer, count, amax);
    }
    for (int64_t i = 0; i < count; ++i) {
      scale[i] = fp8_scale(as_float(uint32_t(amax[i])), p.pow2_scale);
      p.scale[block_row * p.scale_stride_m + (c + i) * p.scale_stride_k] = scale[i];
    }
    for (int64_t r = begin; r < end; ++r) {
      widen<kDtype>(x + (r * p.ldx + c) * kBytes, count, buffer);
      encode_columns(buffer, count, scale, q + r * p.ldq + c);
    }
  }
}

struct Rows {
  int64_t begin, end;
  bool of_expert;
};

// The rows of the `block`-th block of 128: see find_rows of kernel_both.cuh.
Rows find_rows(const Fp8QuantizeBothParams& p, int64_t block) {
  const auto rows_from = [&](int64_t begin, int64_t end, bool of_expert) {
    return Rows{begin, smaller(begin + kBlock, end), of_expert};
  };
  if (p.expert_offsets == nullptr) return rows_from(block * kBlock, p.m, true);
  const auto offset = [&](int64_t e, int64_t least) {
    const int64_t o = smaller(p.expert_offsets[e], p.m);
    return o > least ? o : least;
  };
  const auto blocks_of = [](int64_t rows) { return (rows + kBlock - 1) / kBlock; };
  const int64_t early = offset(0, 0);
  int64_t begin = early;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const int64_t end = offset(e + 1, begin), blocks = blocks_of(end - begin);
    if (block < blocks) return rows_from(begin + block * kBlock, end, true);
    block -= blocks;
    begin = end;
  }
  if (block < blocks_of(early)) return rows_from(block * kBlock, early, false);
  return rows_from(begin + (block - blocks_of(early)) * kBlock, p.m, false);
}

template <Dtype kDtype>
void quantize_both(const Fp8QuantizeBothParams& p, int64_t block, int64_t c) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const Rows rows = find_rows(p, block);
  const int64_t num_rows = rows.end > rows.begin ? rows.end - rows.begin : 0, count = smaller(kBlock, p.k - c);
  const auto row_of_x = [&](int64_t r) {
    return static_cast<const char*>(p.x) + ((rows.begin + r) * p.ldx + c) * kBytes;
  };
  alignas(64) float buffer[kBlock + 16], scale[kBlock];
  alignas(64) int32_t amax[kBlock] = {};
  for (int64_t r = 0; r < num_rows; ++r) {
    widen<kDtype>(row_of_x(r), count, buffer);
    const float row_scale = fp8_scale(amax_of(buffer, count, 0.f), p.pow2_scale);
    p.scale[(rows.begin + r) * p.scale_stride_m + c / kBlock * p.scale_stride_k] = row_scale;
    encode(buffer, count, row_scale, static_cast<uint8_t*>(p.q) + (rows.begin + r) * p.ldq + c);
    if (rows.of_expert) raise_to_magnitudes(buffer, count, amax);
  }
  if (block * kBlock >= p.width) return;

  for (int64_t i = 0; i < count; ++i) {
    scale[i] = fp8_scale(as_float(uint32_t(amax[i])), p.pow2_scale);
    p.scale_t[(c + i) * p.scale_t_stride_k + block * p.scale_t_stride_w] = scale[i];
  }
  alignas(64) uint8_t codes[kBlock][kBlock];
  const int64_t tokens = rows.of_expert ? num_rows : 0;
  for (int64_t r = 0; r < tokens; ++r) {
    widen<kDtype>(row_of_x(r), count, buffer);
    encode_columns(buffer, count, scale, codes[r]);
  }
  for (int64_t i = 0; i < kBlock; ++i) buffer[i] = 0.f;
  for (int64_t r = tokens; r < kBlock; ++r) encode_columns(buffer, count, scale, codes[r]);
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* q_t = static_cast<uint8_t*>(p.q_t) + (c + i) * p.ldq_t + block * kBlock;
    for (int64_t r = 0; r < kBlock; ++r) q_t[r] = codes[r][i];
  }
}

template <Dtype kDtype>
void dequantize_row(const Fp8DequantizeParams& p, int64_t r) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const uint8_t* q = static_cast<const uint8_t*>(p.q) + r * p.ldq;
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

void fp8_quantize_both(const Fp8QuantizeBothParams& p, int threads) {
  const int64_t k_tiles = (p.k + kBlock - 1) / kBlock;
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.row_tiles * k_tiles, 2, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) quantize_both<decltype(tag)::kDtype>(p, t / k_tiles, t % k_tiles * kBlock);
    });
  });
}

void fp8_dequantize(const Fp8DequantizeParams& p, int threads) {
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.m, 32768 / (p.k + 1) + 1, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) dequantize_row<decltype(tag)::kDtype>(p, r);
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
