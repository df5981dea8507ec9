// out = q * scale of the block, in fp32, rounded once.
//
// Tiling:  one CTA per 128 x 128 tile: eight lanes hold a row of it, 16 neighbouring codes each, 256 threads 32 rows at
//          a time. All loads are issued before the first is used.
// Bytes:   m * k * (1 + sizeof(out)) + 4 per block.  m = 4096, k = 7168, bf16, 1x128: 89.0 MB, 20.7 us at 4.3 TB/s.
#pragma once
#include "params.h"
#include "tile.cuh"

namespace deepseek_kernels::fp8_quantize {

// kWhole: rows of q and out are multiples of 16 bytes apart, k is a multiple of 16.
template <class T, bool kColumnScales, bool kWhole>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Fp8DequantizeParams p) {
  const uint32_t k_tiles = uint32_t(ceil_div<int64_t>(p.k, kTile));
  const int64_t m_tile = blockIdx.x / k_tiles, k_tile = blockIdx.x % k_tiles;
  const int64_t column = k_tile * kTile + first_column();
  const int64_t columns_left = BUG(column_tail_unmasked) ? kTile : p.k - column;
  auto row_of = [&](int i) { return m_tile * kTile + i * kQuads + quad(); };
  auto valid = [&](int i) { return row_of(i) < p.m || BUG(row_tail_unmasked) ? columns_left : int64_t(0); };
  const float* scale = p.scale + k_tile * p.scale_stride_k;  // of 1x128 and 128x128
  auto scale_row = [&](int i) { return p.block_m == 1 ? row_of(i) : m_tile; };

  Fp8Pack q[kRows];
  float row_scale[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    q[i].template load<kWhole>(static_cast<const uint8_t*>(p.q) + row_of(i) * p.ldq + column, valid(i));
    if (!kColumnScales && valid(i) > 0) row_scale[i] = scale[scale_row(i) * p.scale_stride_m];
  }
  float column_scale[kPackSize] = {};
  if constexpr (kColumnScales) {  // 128x1: one row of scales for the tile
#pragma unroll
    for (int j = 0; j < kPackSize; ++j)
      if (j < columns_left) column_scale[j] = p.scale[m_tile * p.scale_stride_m + (column + j) * p.scale_stride_k];
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float value[kPackSize];
#pragma unroll
    for (int w = 0; w < 4; ++w) from_e4m3x4(q[i].word(w), value + 4 * w);
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) value[j] *= kColumnScales ? column_scale[j] : row_scale[i];
    SourcePack<T> out;
#pragma unroll
    for (int w = 0; w < SourcePack<T>::kWords * 4; ++w) out.set_word(w, to_word<T>(value + w * (4 / sizeof(T))));
    out.template store<kWhole>(static_cast<T*>(p.out) + row_of(i) * p.ld_out + column, valid(i));
  }
}

}  // namespace deepseek_kernels::fp8_quantize
