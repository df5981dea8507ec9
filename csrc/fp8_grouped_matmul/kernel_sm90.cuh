// d[r, n] = sum over 128-wide blocks kb of  scale_a[r, kb] * scale_b[g, n / 128, kb] * (a[r, kb] . b[g, n, kb])
//           for the rows r of group g, whose number only the device knows
//
// Tiling and pipeline: common/fp8_sm90.cuh, as in fp8_matmul. No tile and no cluster has rows of two groups. The rows
//           below a group's last one that a tile loads belong to somebody else: they meet only their own sums, which
//           are not stored (common/fp8_sm90_store.cuh). Without `masked`, two warps write zeros to the rows of no
//           group.
// Schedule: common/groups_sm90.cuh.
// Bytes:    rows*k + groups*n*k + rows*n*sizeof(d) + scales.  8 groups of 4096 rows, n = 4096, k = 7168, bf16: 743 MB,
//           0.17 ms at 4.3 TB/s (against 0.97 ms of multiplication at 1979 TFLOP/s).
#pragma once
#include "common/fp8_sm90_store.cuh"
#include "common/groups_sm90.cuh"
#include "params.h"

namespace deepseek_kernels::fp8_grouped_matmul {
using namespace fp8;

static_assert(kMaxGroups == kFp8GroupedMatmulMaxGroups);

template <class C>
class Work : public GroupWork<C, Fp8GroupedMatmulParams> {
 public:
  using GroupWork<C, Fp8GroupedMatmulParams>::GroupWork;
  DEVICE_FN MatmulTile tile() const {
    const auto& p = this->p_;
    const auto [group, rows, m0, n0] = this->place();
    const int block_n = n0 / kScaleBlockN;
    const int a0 = m0 + (p.masked ? group * int(p.a_group_rows) : this->groups_.start[group]);
    const int row = m0 + (p.masked ? group * int(p.num_rows) : this->groups_.start[group]);
    const int64_t scale_a = p.masked ? group * p.scale_a_stride_g + m0 * p.scale_a_stride_m : row * p.scale_a_stride_m;
    const int64_t scale_b =
        (BUG(scale_b_of_first_group) ? 0 : group * p.scale_b_stride_g) + block_n * p.scale_b_stride_n;
    return matmul_tile<C>(
        a0, n0 + (BUG(weights_of_first_group) ? 0 : group * int(p.b_group_rows)), p.k,
        {p.scale_a, scale_a, p.scale_a_stride_m, p.scale_a_stride_k, rows - m0, p.masked ? m0 : row,
         p.masked ? group : 0},
        {p.scale_b, scale_b, p.scale_b_stride_n, p.scale_b_stride_k, ceil_div<int64_t>(p.n, kScaleBlockN) - block_n},
        row, n0, rows - m0);
  }
};

template <class Out, int kTileM, int kTileN, int kClusterM, int kClusterN, bool kSwap>
using GroupedConfig = MatmulConfig<Out, kTileM, kTileN, kClusterM, kClusterN, kSwap, int(sizeof(Groups))>;

template <class C>
struct Smem {
  typename C::Smem pipeline;
  Groups groups;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    kernel(const __grid_constant__ MatmulMaps maps, const __grid_constant__ Fp8GroupedMatmulParams p) {
  DYNAMIC_SMEM(raw_smem);
  auto& s = *reinterpret_cast<Smem<C>*>(raw_smem);
  if (threadIdx.x / 32 == 0 && elect_one()) {
    prefetch_tensor_map(maps.operands.x), prefetch_tensor_map(maps.operands.y), prefetch_tensor_map(maps.d);
    init_barriers<C>(s.pipeline, maps.operands);
  }
  grid_dependency_wait();
  find_groups<C>(s.groups, p);
  sync_cluster<C>();
  const Output out = {{p.d, p.n, p.n}, nullptr, Dtype::kFp32, false};
  work_in_roles<C>(
      s.pipeline, maps.operands, [&] { return Work<C>(s.groups, p); },
      [&](const MatmulTile& t, int group, auto& sum) { finish_tile<C, true>(s.pipeline, maps.d, out, t, group, sum); },
      [&](int thread) {
        if (p.masked || BUG(rows_of_no_group_kept)) return;
        zero_rows<typename C::Out>(p, 0, s.groups.start[0], thread);
        zero_rows<typename C::Out>(p, s.groups.start[p.num_groups], int(p.num_rows), thread);
      });
}

}  // namespace deepseek_kernels::fp8_grouped_matmul
