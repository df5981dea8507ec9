// d[e] = sum over the rows r of expert e of grad[r, :]^T a[r, :]  of bf16, added up in fp32, for every expert e
//
// Tiling:   128 of n by 256 of k, 64 rows a stage, as in common/bf16_sm90.cuh with grad as x and a as y, both MN-major.
//           Every expert has the same tiles, so that a tile's number gives its expert by a division; only how many rows
//           to add up depends on the offsets. The CTAs work on one expert at a time, all with the same number of rows:
//           no tile waits for a longer one of its wave. A cluster's tiles lie side by side along n and have the rows of
//           a in common.
// Tails:    the rows of an expert begin anywhere and end anywhere, and the last stage of its tiles has rows of the next
//           expert, or of none. Before they are multiplied the math warpgroups overwrite them with zeros, in shared
//           memory, in both operands; that is once a tile, and only that stage waits for both of them. An expert
//           without rows has tiles of zeros.
// Pipeline: common/bf16_sm90.cuh; a bf16 tile leaves through the staging buffer while the next one is multiplied.
//           One of fp32, which would take the room of the stages, goes to memory from the registers, in full sectors.
// Bytes:    2 * (rows*(n + k) + E*n*k).  E = 8, 4096 rows each, n = 4096, k = 7168: 1.21 GB, 0.25 ms at 4.8 TB/s,
//           against 1.95 ms of multiplication at 989 TFLOP/s.
#pragma once
#include "common/bf16_sm90.cuh"
#include "common/groups_sm90.cuh"
#include "common/store_sm90.cuh"
#include "params.h"

namespace deepseek_kernels::grouped_matmul {
using namespace bf16;

struct Rows {
  int start[kMaxGroups + 1];
};

// kTileM of n, kTileN of k.
template <class Out, int kTileN_, int kClusterM_>
struct WgradConfig : Config<Out, kTileN_, kClusterM_, true, true, true, 0, int(sizeof(Rows))> {
  static constexpr int kTileM = 2 * kWaveRows, kTileN = kTileN_, kClusterM = kClusterM_, kClusterN = 1;
  static constexpr bool kSwap = false;
  // A box of the staging buffer and of a TMA store.
  static constexpr int kSpanN = kTileN, kBoxM = kWaveRows, kBoxN = 64, kBoxRowBytes = kBoxN * 2;
  static constexpr Swizzle kSwizzle = Swizzle::k128;
};

struct WgradMaps {
  OperandMaps operands;
  TensorMap d;  // where the result is staged
};

struct WgradTile : Tile {
  int expert;
};

// The tiles of a CTA, expert after expert.
template <class C>
class WgradWork {
 public:
  DEVICE_FN WgradWork(const Rows& rows, const GroupedWgradParams& p)
      : rows_(rows),
        num_experts_(p.num_groups),
        rank_(rank_in_cluster<C>()),
        raster_{int(ceil_div<int64_t>(p.n, C::kTileM * C::kClusterM)), int(ceil_div<int64_t>(p.k, C::kTileN)), 0},
        index_(int(blockIdx.x) / C::kCluster) {
    raster_.height = p.raster < raster_.rows ? p.raster : raster_.rows;
  }
  DEVICE_FN bool done() const { return index_ >= raster_.size() * num_experts_; }
  DEVICE_FN void next() { index_ += int(gridDim.x) / C::kCluster; }
  DEVICE_FN WgradTile tile() const {
    const int local = index_ % raster_.size();
    WgradTile t;
    t.expert = index_ / raster_.size();
    t.x0 = (raster_.row(local) * C::kClusterM + rank_) * C::kTileM;
    t.y0 = raster_.column(local) * C::kTileN;
    t.k0 = rows_.start[t.expert];
    t.k = (BUG(rows_of_all_experts) ? rows_.start[num_experts_] : rows_.start[t.expert + 1]) - t.k0;
    t.matrix_x = t.matrix_y = 0;
    return t;
  }

 private:
  const Rows& rows_;
  int num_experts_, rank_;
  Raster raster_;
  int index_;
};

template <class C>
struct WgradSmem {
  typename C::Smem pipeline;
  Rows rows;
};

// TMA clips at the edges of d.
template <class C>
DEVICE_FN void store_gradient(typename C::Smem& s, const TensorMap& map, const WgradTile& t, int group,
                              const float (&sum)[C::kSums]) {
  wait_for_staging(group);
  stage<C>(s.d[group][0], sum);
  publish_staging(group);
  if (threadIdx.x % kGroupThreads != 0) return;
#pragma unroll
  for (int column = 0; column < C::kTileN; column += C::kBoxN)
    tma_store_3d(staged<C>(s.d[group][0], 0, column), map, t.y0 + column, t.x0 + group * kWaveRows,
                 BUG(first_expert_only) ? 0 : t.expert);
  tma_store_commit();
}

// The same from the registers, to the rows and columns that are there.
template <class C>
DEVICE_FN void store_sums(const GroupedWgradParams& p, const WgradTile& t, int group, const float (&sum)[C::kSums]) {
  const int row0 = t.x0 + group * kWaveRows + wave_row(), column0 = t.y0 + int(threadIdx.x) % 4 * 2;
  const int columns = BUG(columns_unmasked) ? column0 + C::kCols : int(p.k);
  float* const d = static_cast<float*>(p.d) + (t.expert * p.n + row0) * p.k + column0;
#pragma unroll
  for (int i = 0; i < C::kSums; i += 2) {
    const int row = i / 2 % 2 * 8, column = i / 4 * 8;
    if ((row0 + row < p.n || BUG(rows_unmasked)) && column0 + column < columns)
      *reinterpret_cast<float2*>(d + row * p.k + column) = make_float2(sum[i], sum[i + 1]);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    wgrad_kernel(const __grid_constant__ WgradMaps maps, const __grid_constant__ GroupedWgradParams p) {
  DYNAMIC_SMEM(raw_smem);
  auto& s = *reinterpret_cast<WgradSmem<C>*>(raw_smem);
  if (threadIdx.x / 32 == 0 && elect_one()) {
    prefetch_tensor_map(maps.operands.x), prefetch_tensor_map(maps.operands.y);
    if constexpr (C::kStagedBytes > 0) prefetch_tensor_map(maps.d);
    init_barriers<C>(s.pipeline);
  }
  if (!BUG(dependency_wait_missing)) grid_dependency_wait();
  read_groups<C>(s.rows.start, p);
  sync_cluster<C>();
  work_in_roles<C>(
      s.pipeline, maps.operands, [&] { return WgradWork<C>(s.rows, p); },
      [&](const WgradTile& t, int group, const auto& sum) {
        if constexpr (C::kStagedBytes > 0) {
          store_gradient<C>(s.pipeline, maps.d, t, group, sum);
        } else {
          store_sums<C>(p, t, group, sum);
        }
      },
      [](int) {});
}

}  // namespace deepseek_kernels::grouped_matmul
