// scale = max(amax over the block, 1e-4) / 448, optionally rounded up to a power of two;  q = saturate_e4m3(x / scale).
//
// Tiling:  one CTA per 128 x 128 tile, whatever the granularity, so the tile is read once and stays in registers
//          (tile.cuh). 1x128 reduces among the eight lanes of a row; 128x1 and 128x128 go through shared memory, one
//          slot per warp.
// Bytes:   m * k * (sizeof(x) + 1) + 4 per block.  m = 4096, k = 7168, bf16, 1x128: 89.0 MB, 20.7 us at 4.3 TB/s.
// NaN, Inf: amax keeps them. NaN makes the block NaN; Inf makes the scale Inf, so finite / Inf = 0 and Inf / Inf = NaN.
#pragma once
#include "params.h"
#include "tile.cuh"

namespace deepseek_kernels::fp8_quantize {

template <class T>
struct Smem {
  ColumnAmax<T> columns;
  ColumnDivisors divisors;
  float warp_amax[kWarps];
};

// kWhole: rows of x and q are multiples of 16 bytes apart, k is a multiple of 16.
template <class T, int kBlockM, int kBlockK, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2) kernel(const Fp8QuantizeParams p) {
  DYNAMIC_SMEM(raw_smem);
  [[maybe_unused]] Smem<T>& smem = *reinterpret_cast<Smem<T>*>(raw_smem);
  const uint32_t k_tiles = uint32_t(ceil_div<int64_t>(p.k, kTile));
  const int64_t m_tile = blockIdx.x / k_tiles, k_tile = blockIdx.x % k_tiles;
  const int64_t row = m_tile * kTile + first_row();
  const int64_t column = k_tile * kTile + first_column();
  const int64_t columns_left = BUG(column_tail_unmasked) ? kTile : p.k - column;
  auto valid = [&](int i) { return row + i < p.m || BUG(row_tail_unmasked) ? columns_left : int64_t(0); };

  SourcePack<T> x[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    x[i].template load<kWhole>(static_cast<const T*>(p.x) + (row + i) * p.ldx + column, valid(i));
  auto store = [&](int i, const auto& divisor) {
    x[i].forget();
    to_e4m3(x[i], divisor).template store<kWhole>(static_cast<uint8_t*>(p.q) + (row + i) * p.ldq + column, valid(i));
  };

  if constexpr (kBlockM == 1) {
    const float scale = fp8_scale(row_amax(x), p.pow2_scale);
    const int64_t scale_row = row + threadIdx.x % kRows;
    if (writes_row_scale() && scale_row < p.m)
      p.scale[scale_row * p.scale_stride_m + k_tile * p.scale_stride_k] = scale;
    const Fp8Divisor divisor(scale);
#pragma unroll
    for (int i = 0; i < kRows; ++i) store(i, [d = row_divisor(divisor, i)](int) { return d; });
  } else if constexpr (kBlockK == kTile) {
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) amax = max_nan(amax, pack_amax(x[i]));
    amax = warp_max_nan<31>(amax);
    if (threadIdx.x % 32 == 0) smem.warp_amax[threadIdx.x / 32] = amax;
    if (!BUG(syncthreads_missing)) __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) amax = max_nan(amax, smem.warp_amax[w]);
    const float scale = fp8_scale(amax, p.pow2_scale);
    if (threadIdx.x == 0) p.scale[m_tile * p.scale_stride_m + k_tile * p.scale_stride_k] = scale;
    const Fp8Divisor divisor(scale);
#pragma unroll
    for (int i = 0; i < kRows; ++i) store(i, [&](int) { return divisor; });
  } else {
    smem.columns.put(x);
    __syncthreads();
    if (threadIdx.x < kTile) {
      const float scale = fp8_scale(smem.columns.get(threadIdx.x), p.pow2_scale);
      smem.divisors.set(threadIdx.x, Fp8Divisor(scale));
      const int64_t k = k_tile * kTile + threadIdx.x;
      if (k < p.k) p.scale[m_tile * p.scale_stride_m + k * p.scale_stride_k] = scale;
    }
    if (!BUG(syncthreads_missing)) __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) store(i, [&](int j) { return smem.divisors.get(j); });
  }
}

}  // namespace deepseek_kernels::fp8_quantize
