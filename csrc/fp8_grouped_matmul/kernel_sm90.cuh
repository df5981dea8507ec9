// d[r, n] = sum over 128-wide blocks kb of  scale_a[r, kb] * scale_b[g, n / 128, kb] * (a[r, kb] . b[g, n, kb])
//           for the rows r of group g, whose number only the device knows
//
// Tiling and pipeline: common/fp8_sm90.cuh, as in fp8_matmul. No tile and no cluster has rows of two groups. The rows
//           below a group's last one that a tile loads belong to somebody else: they meet only their own sums, which
//           are not stored (common/fp8_sm90_store.cuh). Without `masked`, two warps write zeros to the rows of no
//           group.
// Schedule: every CTA adds up the tiles of all groups once (1 us for 1024 groups), then finds the group of each of its
//           tiles by bisection. The tiles of a group are walked as those of a matmul.
// Bytes:    rows*k + groups*n*k + rows*n*sizeof(d) + scales.  8 groups of 4096 rows, n = 4096, k = 7168, bf16: 743 MB,
//           0.17 ms at 4.3 TB/s (against 0.97 ms of multiplication at 1979 TFLOP/s).
#pragma once
#include "common/fp8_sm90_store.cuh"
#include "params.h"

namespace deepseek_kernels::fp8_grouped_matmul {
using namespace fp8;

constexpr int kMaxGroups = kFp8GroupedMatmulMaxGroups;

struct Groups {
  int start[kMaxGroups + 1];       // masked: how many rows a group has
  int first_work[kMaxGroups + 1];  // index of a group's first cluster of tiles
};

// This lane's share of [0, count): an odd number of neighbours, so that lanes meet in no bank of shared memory.
struct Share {
  int first, last;
  DEVICE_FN explicit Share(int count) {
    const int each = ceil_div(count, 32) | 1, begin = int(threadIdx.x) % 32 * each;
    first = begin < count ? begin : count;
    last = begin + each < count ? begin + each : count;
  }
};

// Of the values of the lanes before this one, by a whole warp.
template <class Combine>
DEVICE_FN int scan_before(int value, const Combine& combine) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value = combine(value, other);
  }
  const int before = __shfl_up_sync(0xffffffffu, value, 1);
  return lane == 0 ? 0 : before;
}

DEVICE_FN int rows_of(const Groups& s, const Fp8GroupedMatmulParams& p, int group) {
  return p.masked ? s.start[group] : s.start[group + 1] - s.start[group];
}

// By all threads; sync_cluster must follow. Offsets and counts are made to lie within the rows, and not to decrease.
template <class C>
DEVICE_FN void find_groups(Groups& s, const Fp8GroupedMatmulParams& p) {
  const int num_rows = int(p.num_rows), entries = p.num_groups + (p.masked ? 0 : 1);
  for (int i = threadIdx.x; i < entries; i += C::kThreads) {
    const int value = p.groups[i];
    s.start[i] = BUG(offsets_not_clamped) ? value : value < 0 ? 0 : value < num_rows ? value : num_rows;
  }
  if (!BUG(groups_read_early)) __syncthreads();
  if (threadIdx.x >= 32) return;

  const auto largest = [](int a, int b) { return a > b ? a : b; };
  if (!p.masked) {
    const Share share(entries);
    int high = 0;
    for (int i = share.first; i < share.last; ++i) high = largest(high, s.start[i]);
    high = BUG(decrease_kept) ? 0 : scan_before(high, largest);
    for (int i = share.first; i < share.last; ++i) s.start[i] = high = largest(high, s.start[i]);
    __syncwarp();
  }
  const Share share(p.num_groups);
  const int columns = int(ceil_div<int64_t>(p.n, C::kTileN * C::kClusterN));
  const auto work_of = [&](int group) { return ceil_div(rows_of(s, p, group), C::kTileM * C::kClusterM) * columns; };
  int sum = 0;
  for (int i = share.first; i < share.last; ++i) sum += work_of(i);
  sum = scan_before(sum, [](int a, int b) { return a + b; });
  for (int i = share.first; i < share.last; ++i) {
    s.first_work[i] = sum;
    sum += work_of(i);
  }
  if (threadIdx.x == 31) s.first_work[p.num_groups] = sum;  // the last share may be empty: it has the sum all the same
}

// The tiles of a CTA, in the order of its work.
template <class C>
class Work {
 public:
  DEVICE_FN Work(const Groups& groups, const Fp8GroupedMatmulParams& p)
      : groups_(groups), p_(p), rank_(rank_in_cluster<C>()), index_(int(blockIdx.x) / C::kCluster), group_(0) {
    find_group();
  }
  DEVICE_FN bool done() const { return index_ >= groups_.first_work[p_.num_groups]; }
  DEVICE_FN void next() {
    index_ += int(gridDim.x) / C::kCluster;
    find_group();
  }
  DEVICE_FN MatmulTile tile() const {
    const int rows = rows_of(groups_, p_, group_), index = index_ - groups_.first_work[group_];
    Raster raster = {ceil_div(rows, C::kTileM * C::kClusterM), int(ceil_div<int64_t>(p_.n, C::kTileN * C::kClusterN)),
                     p_.raster};
    if (raster.height > raster.rows) raster.height = raster.rows;
    const int m0 = (raster.row(index) * C::kClusterM + (C::kClusterM > 1 ? rank_ : 0)) * C::kTileM;
    const int n0 = (raster.column(index) * C::kClusterN + (C::kClusterN > 1 ? rank_ : 0)) * C::kTileN;
    const int block_n = n0 / kScaleBlockN;
    const int a0 = m0 + (p_.masked ? group_ * int(p_.a_group_rows) : groups_.start[group_]);
    const int row = m0 + (p_.masked ? group_ * int(p_.num_rows) : groups_.start[group_]);
    const int64_t scale_a =
        p_.masked ? group_ * p_.scale_a_stride_g + m0 * p_.scale_a_stride_m : row * p_.scale_a_stride_m;
    const int64_t scale_b =
        (BUG(scale_b_of_first_group) ? 0 : group_ * p_.scale_b_stride_g) + block_n * p_.scale_b_stride_n;
    return matmul_tile<C>(a0, n0 + (BUG(weights_of_first_group) ? 0 : group_ * int(p_.b_group_rows)), p_.k,
                          {p_.scale_a, scale_a, p_.scale_a_stride_m, p_.scale_a_stride_k, rows - m0,
                           p_.masked ? m0 : row, p_.masked ? group_ : 0},
                          {p_.scale_b, scale_b, p_.scale_b_stride_n, p_.scale_b_stride_k,
                           ceil_div<int64_t>(p_.n, kScaleBlockN) - block_n},
                          row, n0, rows - m0);
  }

 private:
  // The last group whose work begins at or before index_; it is not empty.
  DEVICE_FN void find_group() {
    if (done()) return;
    int after = p_.num_groups;
    if (index_ < groups_.first_work[group_ + 1]) after = group_ + 1;
    while (after - group_ > 1) {
      const int middle = (group_ + after) / 2;
      if (groups_.first_work[middle] <= index_) {
        group_ = middle;
      } else {
        after = middle;
      }
    }
  }
  const Groups& groups_;
  const Fp8GroupedMatmulParams& p_;
  int rank_, index_, group_;
};

// Rows [first, last) of d, by 64 threads of every CTA.
template <class Out>
DEVICE_FN void zero_rows(const Fp8GroupedMatmulParams& p, int first, int last, int thread) {
  const int64_t chunks = p.n * int(sizeof(Out)) / 16;  // d is contiguous
  auto* d = static_cast<uint4*>(p.d) + first * chunks;
  for (int64_t i = int64_t(blockIdx.x) * 64 + thread; i < (last - first) * chunks; i += int64_t(gridDim.x) * 64)
    store16(&d[i], make_uint4(0, 0, 0, 0));
}

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
  const Output out = {p.d, p.n, p.n, nullptr, Dtype::kFp32, false};
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
