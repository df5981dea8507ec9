// scale = max(amax over the block, 1e-4) / 448, optionally rounded up to a power of two;  q = saturate_e4m3(x / scale).
//
// Tiling:  one CTA per 128 x 128 tile, whatever the granularity, so the tile is read once and stays in registers:
//          eight lanes hold a row of the tile (16 neighbouring elements each), 256 threads hold 32 rows, four times.
//          1x128 reduces among the eight lanes; 128x1 and 128x128 go through shared memory, one slot per warp.
// Bytes:   m * k * (sizeof(x) + 1) + 4 per block.  m = 4096, k = 7168, bf16, 1x128: 89.0 MB, 20.7 us at 4.3 TB/s.
// NaN, Inf: amax keeps them. NaN makes the block NaN; Inf makes the scale Inf, so finite / Inf = 0 and Inf / Inf = NaN.
#pragma once
#include "common/fp8_block.cuh"
#include "params.h"

namespace deepseek_kernels::fp8_quantize {

constexpr int kTile = kFp8Block;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerPass = kThreads / kLanesPerBlock;
constexpr int kPasses = kTile / kRowsPerPass;

struct Smem {
  float amax[kWarps][kTile];  // per column of the tile; [0] serves 128x128
  float scale[kTile];
};

// kWhole: rows of x and q are multiples of 16 bytes apart, k is a multiple of 16.
template <class T, int kBlockM, int kBlockK, bool kWhole>
__global__ void __launch_bounds__(kThreads) kernel(const Fp8QuantizeParams p) {
  DYNAMIC_SMEM(raw_smem);
  [[maybe_unused]] Smem& smem = *reinterpret_cast<Smem*>(raw_smem);
  const int64_t k_tiles = ceil_div<int64_t>(p.k, kTile);
  const int64_t m_tile = blockIdx.x / k_tiles, k_tile = blockIdx.x % k_tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int octet = threadIdx.x / kLanesPerBlock;
  const int first_column = threadIdx.x % kLanesPerBlock * kPackSize;  // in the tile
  const int64_t column = k_tile * kTile + first_column;
  const int64_t columns_left = BUG(column_tail_unmasked) ? kTile : p.k - column;

  auto row_of = [&](int pass) { return m_tile * kTile + pass * kRowsPerPass + octet; };
  auto valid = [&](int pass) { return row_of(pass) < p.m || BUG(row_tail_unmasked) ? columns_left : int64_t(0); };

  SourcePack<T> x[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i)
    x[i].template load<kWhole>(static_cast<const T*>(p.x) + row_of(i) * p.ldx + column, valid(i));
  auto store = [&](int pass, const auto& divisor) {
    x[pass].forget();
    to_e4m3(x[pass], divisor)
        .template store<kWhole>(static_cast<uint8_t*>(p.q) + row_of(pass) * p.ldq + column, valid(pass));
  };

  if constexpr (kBlockM == 1) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const float amax = BUG(lanes_not_reduced) ? pack_amax(x[i]) : block_amax(x[i]);
      const float scale = fp8_scale(amax, p.pow2_scale);
      if (lane % kLanesPerBlock == 0 && row_of(i) < p.m)
        p.scale[row_of(i) * p.scale_stride_m + k_tile * p.scale_stride_k] = scale;
      const Fp8Divisor divisor(scale);
      store(i, [&](int) { return divisor; });
    }
  } else if constexpr (kBlockK == kTile) {
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) amax = max_nan(amax, pack_amax(x[i]));
    amax = warp_max_nan<31>(amax);
    if (lane == 0) smem.amax[0][warp] = amax;
    if (!BUG(syncthreads_missing)) __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) amax = max_nan(amax, smem.amax[0][w]);
    const float scale = fp8_scale(amax, p.pow2_scale);
    if (threadIdx.x == 0) p.scale[m_tile * p.scale_stride_m + k_tile * p.scale_stride_k] = scale;
    const Fp8Divisor divisor(scale);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) store(i, [&](int) { return divisor; });
  } else {
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      float amax = 0.f;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) amax = max_nan(amax, fabsf(to_float(x[i][j])));
      amax = warp_max_nan<32 - kLanesPerBlock>(amax);
      if (lane < kLanesPerBlock) smem.amax[warp][first_column + j] = amax;
    }
    __syncthreads();
    if (threadIdx.x < kTile) {
      float amax = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) amax = max_nan(amax, smem.amax[w][threadIdx.x]);
      const float scale = fp8_scale(amax, p.pow2_scale);
      smem.scale[threadIdx.x] = scale;
      const int64_t k = k_tile * kTile + threadIdx.x;
      if (k < p.k) p.scale[m_tile * p.scale_stride_m + k * p.scale_stride_k] = scale;
    }
    if (!BUG(syncthreads_missing)) __syncthreads();
    Fp8Divisor divisor[kPackSize];
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) divisor[j] = Fp8Divisor(smem.scale[first_column + j]);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) store(i, [&](int j) { return divisor[j]; });
  }
}

}  // namespace deepseek_kernels::fp8_quantize
