// d[r, n] = a[r] . b[g, n]  in bf16, added up in fp32, for the rows r of group g, whose number only the device knows
//
// Tiling:   kTileM rows of a by 128 of n, as in common/bf16_sm90.cuh with b as x and a as y, so that tiles of few rows
//           cost no more than they must; b is K-major, or MN-major where its n lie side by side (the gradient of a). No
//           tile and no cluster has rows of two groups: clusters lie along n, and have the rows of a in common. The
//           rows below a group's last one that a tile loads belong to somebody else: they meet only their own sums,
//           which are not stored; where they are half of 256, they are neither loaded nor multiplied. Two warps write
//           zeros to the rows of no group.
// Pipeline: common/bf16_sm90.cuh. The products are those of d^T, and are transposed on their way to the staging buffer
//           (common/store_sm90.cuh), which a tile leaves while the next one is multiplied.
// Schedule: common/groups_sm90.cuh.
// Bytes:    2 * (rows*k + groups*n*k + rows*n).  8 groups of 4096 rows, n = 4096, k = 7168: 1.21 GB, 0.25 ms at
//           4.8 TB/s (against 1.95 ms of multiplication at 989 TFLOP/s).
#pragma once
#include "common/bf16_sm90.cuh"
#include "common/groups_sm90.cuh"
#include "common/store_sm90.cuh"
#include "params.h"

namespace deepseek_kernels::grouped_matmul {
using namespace bf16;

static_assert(kMaxGroups == kGroupedMatmulMaxGroups);

template <int kTileM_, int kClusterN_, bool kTransposed_>
struct ForwardConfig : Config<__nv_bfloat16, kTileM_, kClusterN_, kTransposed_, false, false, kTileM_ == 256 ? 128 : 0,
                              int(sizeof(Groups))> {
  static constexpr int kTileM = kTileM_, kTileN = 2 * kWaveRows, kClusterM = 1, kClusterN = kClusterN_;
  static constexpr bool kTransposed = kTransposed_, kSwap = true;
  // A box of the staging buffer and of a TMA store.
  static constexpr int kSpanN = kWaveRows, kBoxM = kTileM, kBoxN = kWaveRows, kBoxRowBytes = kBoxN * 2;
  static constexpr Swizzle kSwizzle = Swizzle::k128;
};

struct Maps {
  OperandMaps operands;
  TensorMap d;
};

// The tile begins at (row, column) of d; `rows` of it exist from there, and belong to its group.
struct ForwardTile : Tile {
  int row, column, rows;
};

template <class C>
class Work : public GroupWork<C, GroupedMatmulParams> {
 public:
  using GroupWork<C, GroupedMatmulParams>::GroupWork;
  DEVICE_FN ForwardTile tile() const {
    const auto [group, rows, m0, n0] = this->place();
    ForwardTile t;
    t.row = this->groups_.start[group] + m0, t.column = n0, t.rows = rows - m0;
    t.x0 = n0, t.matrix_x = BUG(weights_of_first_group) ? 0 : group;
    t.y0 = t.row, t.matrix_y = 0;
    t.k = int(this->p_.k);
    t.narrow = t.rows <= (BUG(narrow_too_early) ? 2 : 1) * C::kNarrow;
    return t;
  }
};

template <class C>
struct Smem {
  typename C::Smem pipeline;
  Groups groups;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    kernel(const __grid_constant__ Maps maps, const __grid_constant__ GroupedMatmulParams p) {
  DYNAMIC_SMEM(raw_smem);
  auto& s = *reinterpret_cast<Smem<C>*>(raw_smem);
  if (threadIdx.x / 32 == 0 && elect_one()) {
    prefetch_tensor_map(maps.operands.x), prefetch_tensor_map(maps.operands.y), prefetch_tensor_map(maps.d);
    init_barriers<C>(s.pipeline);
  }
  if (!BUG(dependency_wait_missing)) grid_dependency_wait();
  find_groups<C>(s.groups, p);
  sync_cluster<C>();
  const Result result = {p.d, p.n, p.n};
  work_in_roles<C>(
      s.pipeline, maps.operands, [&] { return Work<C>(s.groups, p); },
      [&](const ForwardTile& t, int group, const auto& sum) {
        wait_for_staging(group);
        stage<C>(s.pipeline.d[group][0], sum);
        publish_staging(group);
        store_staged<C, true>(s.pipeline, maps.d, result, t, group);
      },
      [&](int thread) {
        if (BUG(rows_of_no_group_kept)) return;
        zero_rows<__nv_bfloat16>(p, 0, s.groups.start[0], thread);
        zero_rows<__nv_bfloat16>(p, s.groups.start[p.num_groups], int(p.num_rows), thread);
      });
}

}  // namespace deepseek_kernels::grouped_matmul
