// d[m, n] = sum over 128-wide blocks kb of  scale_a[m, kb] * scale_b[n / 128, kb] * (a[m, kb] . b[n, kb])  + bias[n]
//           (+ d[m, n])
//
// Tiling and pipeline: common/fp8_sm90.cuh, with a as x, or b where the operands are swapped. A cluster of 2 takes two
//           tiles along m and has b in common, or two along n and has a in common; one of 2 or 4 shares out the k of a
//           tile where there are too few tiles to read b at full speed. A tile whose columns cross from one
//           scale block of b into the next (tile_n 192) takes the scales of both.
// Bytes:    m*k + n*k + m*n*sizeof(d) + scales.  m = 4096, n = 7168, k = 2048, bf16: 81.8 MB, 19 us at 4.3 TB/s
//           (against 61 us of multiplication at 1979 TFLOP/s).  m = 16: 15.0 MB, 3.5 us.
#pragma once
#include "common/fp8_sm90_store.cuh"
#include "params.h"

namespace deepseek_kernels::fp8_matmul {
using namespace fp8;

// The tiles of a CTA, in the order of its work.
template <class C>
class Work {
 public:
  DEVICE_FN explicit Work(const Fp8MatmulParams& p)
      : p_(p),
        rank_(rank_in_cluster<C>()),
        raster_{int(ceil_div<int64_t>(p.m, C::kTileM * C::kClusterM)),
                int(ceil_div<int64_t>(p.n, C::kTileN * C::kClusterN)), 0},
        index_(int(blockIdx.x) / C::kCluster) {
    raster_.height = p.raster < raster_.rows ? p.raster : raster_.rows;
  }
  DEVICE_FN bool done() const { return index_ >= raster_.size(); }
  DEVICE_FN void next() { index_ += int(gridDim.x) / C::kCluster; }
  DEVICE_FN MatmulTile tile() const {
    const int m0 = (raster_.row(index_) * C::kClusterM + (C::kClusterM > 1 ? rank_ : 0)) * C::kTileM;
    const int n0 = (raster_.column(index_) * C::kClusterN + (C::kClusterN > 1 ? rank_ : 0)) * C::kTileN;
    const int block_n = (BUG(scale_b_of_m_tile) ? m0 : n0) / kScaleBlockN;
    const ScaleRows a_scales = {
        p_.scale_a, m0 * p_.scale_a_stride_m, p_.scale_a_stride_m, p_.scale_a_stride_k, p_.m - m0, m0};
    const ScaleRows b_scales = {p_.scale_b, block_n * p_.scale_b_stride_n, p_.scale_b_stride_n, p_.scale_b_stride_k,
                                ceil_div<int64_t>(p_.n, kScaleBlockN) - block_n};
    MatmulTile t = matmul_tile<C>(m0, n0, p_.k, a_scales, b_scales, m0, n0, int(p_.m - m0));
    if constexpr (C::kShares > 1) take_share(t);
    return t;
  }

 private:
  // Leaves this CTA's part of the blocks of k.
  DEVICE_FN void take_share(MatmulTile& t) const {
    const int first = t.k_blocks * rank_ / C::kShares, last = t.k_blocks * (rank_ + 1) / C::kShares;
    t.k0 = first * kTileK, t.k_blocks = last - first;
    t.x_scales.first += first * t.x_scales.stride_k, t.y_scales.first += first * t.y_scales.stride_k;
  }
  const Fp8MatmulParams& p_;
  int rank_;
  Raster raster_;
  int index_;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    kernel(const __grid_constant__ MatmulMaps maps, const __grid_constant__ Fp8MatmulParams p) {
  DYNAMIC_SMEM(raw_smem);
  auto& s = *reinterpret_cast<typename C::Smem*>(raw_smem);
  if (threadIdx.x / 32 == 0 && elect_one()) {
    prefetch_tensor_map(maps.operands.x), prefetch_tensor_map(maps.operands.y), prefetch_tensor_map(maps.d);
    init_barriers<C>(s, maps.operands);
  }
  sync_cluster<C>();
  if (!BUG(dependency_wait_missing)) grid_dependency_wait();
  const Output out = {{p.d, p.ldd, p.n}, p.bias, p.bias_dtype, p.accumulate};
  work_in_roles<C>(
      s, maps.operands, [&] { return Work<C>(p); },
      [&](const MatmulTile& t, int group, auto& sum) { finish_tile<C, false>(s, maps.d, out, t, group, sum); },
      [](int) {});
}

}  // namespace deepseek_kernels::fp8_matmul
