// d[m, n] = sum over 128-wide blocks kb of  scale_a[m, kb] * scale_b[n / 128, kb] * (a[m, kb] . b[n, kb])  + bias[n]
//
// Tiling:   kTileM x kTileN of d a CTA, 128 of k a stage; persistent over tiles. Each math warpgroup owns 64 rows: four
//           wgmma give the unscaled product of a stage, which is then scaled into a second set of registers (the tensor
//           core keeps about 14 bits while it adds, so it is never asked to add more than 128 products).
//           A cluster of 2 takes two tiles along m; each CTA fetches half of their common rows of b for both.
//           Tiles are walked `raster` rows of clusters at a time, column by column, so that operands stay in L2.
// Pipeline: who              waits for      does                                            signals
//           TMA thread       empty[stage]   loads a, b                                      full[stage] (bytes)
//           scale warp       empty[stage]   cp.async of kTileM scale_a and one scale_b      full[stage] (32 arrivals)
//           math warpgroups  full[stage]    wgmma, then scales while the other one's runs   empty[stage], both CTAs
//           The TMA store of a tile overlaps with the next tile; its staging buffer is waited for before it is
//           refilled.
// Bytes:    m*k + n*k + m*n*sizeof(d) + scales.  m = 4096, n = 7168, k = 2048, bf16: 81.8 MB, 19 us at 4.3 TB/s
//           (against 61 us of multiplication at 1979 TFLOP/s).
#pragma once
#include "common/numeric.cuh"
#include "common/sm90.cuh"
#include "params.h"

namespace deepseek_kernels::fp8_matmul {
using namespace sm90;

constexpr int kTileK = 128;  // bytes too; also the width of a scale block
constexpr int kGroupM = 64;  // rows of a math warpgroup
constexpr int kGroupThreads = 128;
constexpr int kScaleBlockN = 128;

template <class Out_, int kTileM_, int kTileN_, int kStages_, int kCluster_>
struct Config {
  using Out = Out_;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kMathGroups = kTileM / kGroupM;
  static constexpr int kThreads = (kMathGroups + 1) * kGroupThreads;
  static constexpr int kRowsB = kTileN / kCluster;                                                 // fetched by one CTA
  static constexpr int kBoxN = kTileN * int(sizeof(Out)) < 128 ? kTileN : 128 / int(sizeof(Out));  // of a TMA store
  static constexpr int kBoxBytes = kBoxN * int(sizeof(Out));
  static constexpr int kStageBytes = (kTileM + kTileN) * kTileK;
  static_assert(kScaleBlockN % kTileN == 0, "one scale_b a tile and stage");

  struct Smem {
    alignas(1024) uint8_t a[kStages][kTileM * kTileK];
    alignas(1024) uint8_t b[kStages][kTileN * kTileK];
    alignas(1024) uint8_t d[kMathGroups][kTileN / kBoxN][kGroupM * kBoxBytes];
    alignas(16) float scale_a[kStages][kTileM];
    float scale_b[kStages];
    alignas(8) uint64_t full[kStages];
    uint64_t empty[kStages];
  };
};

struct TensorMaps {
  TensorMap a, b, d;
};

// Stage and phase parity of a position in the pipeline.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  DEVICE_FN void next() {
    if (++stage == kStages) stage = 0, phase ^= BUG(phase_never_flipped) ? 0 : 1;
  }
};

// The tiles of a cluster, in the order of its work.
template <class C>
class Schedule {
 public:
  DEVICE_FN explicit Schedule(const Fp8MatmulParams& p)
      : rank_(C::kCluster > 1 ? int(cluster_rank()) : 0),
        rows_(int(ceil_div<int64_t>(p.m, C::kTileM * C::kCluster))),
        columns_(int(ceil_div<int64_t>(p.n, C::kTileN))),
        raster_(p.raster < rows_ ? p.raster : rows_),
        work_(int(blockIdx.x) / C::kCluster) {}

  DEVICE_FN bool done() const { return work_ >= rows_ * columns_; }
  DEVICE_FN void next() { work_ += int(gridDim.x) / C::kCluster; }
  DEVICE_FN int rank() const { return rank_; }
  DEVICE_FN int m0() const {
    const int first = work_ / (raster_ * columns_) * raster_;
    return ((first + (work_ - first * columns_) % height(first)) * C::kCluster + rank_) * C::kTileM;
  }
  DEVICE_FN int n0() const {
    const int first = work_ / (raster_ * columns_) * raster_;
    return (work_ - first * columns_) / height(first) * C::kTileN;
  }

 private:
  DEVICE_FN int height(int first) const { return rows_ - first < raster_ ? rows_ - first : raster_; }
  int rank_, rows_, columns_, raster_, work_;
};

template <class C>
DEVICE_FN void load_tiles(typename C::Smem& s, const TensorMaps& maps, const Fp8MatmulParams& p) {
  const int k_blocks = int(ceil_div<int64_t>(p.k, kTileK));
  Ring<C::kStages> r;
  for (Schedule<C> work(p); !work.done(); work.next()) {
    const int m0 = work.m0(), n0 = work.n0();
    for (int kb = 0; kb < k_blocks; ++kb, r.next()) {
      uint64_t* full = &s.full[r.stage];
      mbarrier_wait_cluster(&s.empty[r.stage], r.phase ^ 1);
      mbarrier_arrive_and_expect_tx(full, C::kStageBytes + (BUG(expect_too_many_bytes) ? 16 : 0));
      tma_load_2d(s.a[r.stage], maps.a, full, kb * kTileK, m0);
      if constexpr (C::kCluster == 1) {
        tma_load_2d(s.b[r.stage], maps.b, full, kb * kTileK, n0);
      } else {
        const int first = work.rank() * C::kRowsB;
        const uint16_t everyone = (1 << C::kCluster) - 1;
        tma_load_2d_multicast(s.b[r.stage] + first * kTileK, maps.b, full, kb * kTileK, n0 + first,
                              BUG(multicast_to_self_only) ? uint16_t(1 << work.rank()) : everyone);
      }
    }
  }
}

template <class C>
DEVICE_FN void load_scales(typename C::Smem& s, const Fp8MatmulParams& p) {
  const int lane = threadIdx.x % 32, k_blocks = int(ceil_div<int64_t>(p.k, kTileK));
  Ring<C::kStages> r;
  for (Schedule<C> work(p); !work.done(); work.next()) {
    const int m0 = work.m0();
    const float* scale_b = p.scale_b + (BUG(scale_b_of_m_tile) ? m0 : work.n0()) / kScaleBlockN * p.scale_b_stride_n;
    for (int kb = 0; kb < k_blocks; ++kb, r.next()) {
      if (!BUG(scales_do_not_wait)) mbarrier_wait_cluster(&s.empty[r.stage], r.phase ^ 1);
#pragma unroll
      for (int i = lane; i < C::kTileM; i += 32) {
        const bool valid = m0 + i < p.m || BUG(scale_rows_unmasked);
        const int64_t offset = int64_t(m0 + i) * p.scale_a_stride_m + kb * p.scale_a_stride_k;
        cp_async_4(&s.scale_a[r.stage][i], valid ? p.scale_a + offset : p.scale_a, valid);
      }
      if (lane == 0) cp_async_4(&s.scale_b[r.stage], scale_b + kb * p.scale_b_stride_k, true);
      cp_async_mbarrier_arrive(&s.full[r.stage]);
    }
  }
}

DEVICE_FN float bias_at(const Fp8MatmulParams& p, int column) {
  if (p.bias == nullptr || column >= p.n) return 0.f;
  return p.bias_dtype == Dtype::kFp32 ? __ldg(static_cast<const float*>(p.bias) + column)
                                      : to_float(static_cast<const __nv_bfloat16*>(p.bias)[column]);
}

DEVICE_FN void store_pair(float* p, float x, float y) { *reinterpret_cast<float2*>(p) = make_float2(x, y); }
DEVICE_FN void store_pair(__nv_bfloat16* p, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(x, y);
}

// Accumulator i of a thread: row lane / 4 + 8 * (i / 2 % 2) of the warp's 16, column 8 * (i / 4) + 2 * (lane % 4) + i
// % 2.
template <class C>
DEVICE_FN void multiply(typename C::Smem& s, const TensorMaps& maps, const Fp8MatmulParams& p, int group) {
  using Out = typename C::Out;
  const int lane = threadIdx.x % 32, k_blocks = int(ceil_div<int64_t>(p.k, kTileK));
  const int row = threadIdx.x % kGroupThreads / 32 * 16 + lane / 4;  // in the group, and row + 8
  const bool stores = threadIdx.x % kGroupThreads == 0;
  Ring<C::kStages> r;
  for (Schedule<C> work(p); !work.done(); work.next()) {
    float sum[C::kTileN / 2] = {}, product[C::kTileN / 2];
    for (int kb = 0; kb < k_blocks; ++kb, r.next()) {
      if (!BUG(full_wait_missing)) mbarrier_wait(&s.full[r.stage], r.phase);
      const float* scale_a = &s.scale_a[r.stage][group * kGroupM + row];
      float scale0 = scale_a[0] * s.scale_b[r.stage];
      float scale1 = scale_a[BUG(scale_of_next_row) ? 1 : 8] * s.scale_b[r.stage];
      const uint64_t desc_a =
          desc_k_b128(s.a[r.stage] + group * kGroupM * kTileK, BUG(descriptor_stride_halved) ? 512 : 1024);
      const uint64_t desc_b = desc_k_b128(s.b[r.stage]);
      auto release = [&] {
        if constexpr (C::kCluster == 1) {
          if (lane == 0) mbarrier_arrive(&s.empty[r.stage]);
        } else {
          if (lane < C::kCluster) mbarrier_arrive_cluster(&s.empty[r.stage], lane);
        }
      };
      if (BUG(stage_released_early)) release();
      if (!BUG(wgmma_fence_missing)) wgmma_fence(product);
#pragma unroll
      for (int step = 0; step < kTileK / 32; ++step)
        wgmma_e4m3<C::kTileN>(product, desc_a + step * 2, desc_b + step * (BUG(k_step_doubled) ? 4 : 2), step != 0);
      wgmma_commit();
      if (!BUG(wgmma_wait_missing)) wgmma_wait<0>(product);
      if (!BUG(stage_released_early) && !BUG(stage_never_released)) release();
      if (BUG(scale_read_after_release)) scale0 = scale_a[0] * s.scale_b[r.stage];
#pragma unroll
      for (int i = 0; i < C::kTileN / 2; ++i) sum[i] += (i / 2 % 2 ? scale1 : scale0) * product[i];
    }

    const int m0 = work.m0() + group * kGroupM, n0 = work.n0();
    if (!BUG(store_wait_missing)) {
      if (stores) tma_store_wait<0>();  // the previous tile has left the staging buffer
      named_barrier_sync(1 + group, kGroupThreads);
    }
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; i += 2) {
      const int column = i / 4 * 8 + lane % 4 * 2;
      const int box_row = row + i / 2 % 2 * 8, byte = column % C::kBoxN * int(sizeof(Out));
      const int offset =
          BUG(staging_not_swizzled) ? box_row * C::kBoxBytes + byte : swizzled_offset(box_row, byte, C::kBoxBytes);
      store_pair(reinterpret_cast<Out*>(s.d[group][column / C::kBoxN] + offset), sum[i] + bias_at(p, n0 + column),
                 sum[i + 1] + bias_at(p, n0 + column + 1));
    }
    if (!BUG(fence_proxy_async_missing)) fence_proxy_async();
    if (!BUG(barrier_before_store_missing)) named_barrier_sync(1 + group, kGroupThreads);
    if (stores) {
#pragma unroll
      for (int box = 0; box < C::kTileN / C::kBoxN; ++box)
        tma_store_2d(s.d[group][box], maps.d, n0 + box * C::kBoxN, m0);
      tma_store_commit();
    }
  }
  if (stores) tma_store_wait<0>();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ Fp8MatmulParams p) {
  DYNAMIC_SMEM(raw_smem);
  auto& s = *reinterpret_cast<typename C::Smem*>(raw_smem);
  const int warp = threadIdx.x / 32, group = warp / 4;

  if (warp == 0 && elect_one()) {
    prefetch_tensor_map(maps.a), prefetch_tensor_map(maps.b), prefetch_tensor_map(maps.d);
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(&s.full[i], 1 + 32);
      mbarrier_init(&s.empty[i], C::kMathGroups * 4 * C::kCluster);
      debug_name(&s.full[i], "full", i), debug_name(&s.empty[i], "empty", i);
    }
    if (!BUG(fence_barrier_init_missing)) fence_barrier_init();
  }
  if constexpr (C::kCluster > 1) {
    cluster_sync();
  } else {
    if (!BUG(syncthreads_missing)) __syncthreads();
  }

  if (group == C::kMathGroups) {
    reg_dec<56>();
    if (warp % 4 == 0) {
      if (elect_one()) load_tiles<C>(s, maps, p);
    } else if (warp % 4 == 1) {
      load_scales<C>(s, p);
    }
  } else {
    reg_inc<224>();
    multiply<C>(s, maps, p, group);
  }
  // A CTA stays while its peer may still arrive on its barriers.
  if constexpr (C::kCluster > 1) {
    __syncwarp();
    if (!BUG(last_cluster_sync_missing)) cluster_sync();
  }
}

}  // namespace deepseek_kernels::fp8_matmul
