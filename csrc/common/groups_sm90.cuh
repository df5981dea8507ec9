// The groups of rows of a grouped matmul, whose sizes only the device knows: where they begin, and whose tile is next.
// Every CTA adds up the tiles of all groups once (1 us for 1024 groups), then finds the group of each of its tiles by
// bisection. The tiles of a group are walked as those of a matmul. `Params` has groups (offsets, or counts if masked),
// num_groups, masked, num_rows, n, d and raster.
#pragma once
#include "copy.cuh"
#include "persistent_sm90.cuh"

namespace deepseek_kernels::hopper {

constexpr int kMaxGroups = 1024;

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

template <class Params>
DEVICE_FN int rows_of(const Groups& s, const Params& p, int group) {
  return p.masked ? s.start[group] : s.start[group + 1] - s.start[group];
}

// By all threads, of which the first warp comes back: Params::groups, made to lie within the rows, and offsets not to
// decrease.
template <class C, class Params>
DEVICE_FN bool read_groups(int* start, const Params& p) {
  const int num_rows = int(p.num_rows), entries = p.num_groups + (p.masked ? 0 : 1);
  for (int i = threadIdx.x; i < entries; i += C::kThreads) {
    const int value = p.groups[i];
    start[i] = BUG(offsets_not_clamped) ? value : value < 0 ? 0 : value < num_rows ? value : num_rows;
  }
  if (!BUG(groups_read_early)) __syncthreads();
  if (threadIdx.x >= 32) return false;

  if (!p.masked) {
    const auto largest = [](int a, int b) { return a > b ? a : b; };
    const Share share(entries);
    int high = 0;
    for (int i = share.first; i < share.last; ++i) high = largest(high, start[i]);
    high = BUG(decrease_kept) ? 0 : scan_before(high, largest);
    for (int i = share.first; i < share.last; ++i) start[i] = high = largest(high, start[i]);
    __syncwarp();
  }
  return true;
}

// By all threads; sync_cluster must follow.
template <class C, class Params>
DEVICE_FN void find_groups(Groups& s, const Params& p) {
  if (!read_groups<C>(s.start, p)) return;
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

// Walks the tiles of a CTA, in the order of its work.
template <class C, class Params>
class GroupWork {
 public:
  DEVICE_FN GroupWork(const Groups& groups, const Params& p)
      : groups_(groups), p_(p), rank_(rank_in_cluster<C>()), index_(int(blockIdx.x) / C::kCluster), group_(0) {
    find_group();
  }
  DEVICE_FN bool done() const { return index_ >= groups_.first_work[p_.num_groups]; }
  DEVICE_FN void next() {
    index_ += int(gridDim.x) / C::kCluster;
    find_group();
  }

 protected:
  // Where the tile at hand begins in its group, which has so many rows.
  struct Place {
    int group, rows, m0, n0;
  };
  DEVICE_FN Place place() const {
    const int rows = rows_of(groups_, p_, group_), index = index_ - groups_.first_work[group_];
    Raster raster = {ceil_div(rows, C::kTileM * C::kClusterM), int(ceil_div<int64_t>(p_.n, C::kTileN * C::kClusterN)),
                     p_.raster};
    if (raster.height > raster.rows) raster.height = raster.rows;
    return {group_, rows, (raster.row(index) * C::kClusterM + (C::kClusterM > 1 ? rank_ : 0)) * C::kTileM,
            (raster.column(index) * C::kClusterN + (C::kClusterN > 1 ? rank_ : 0)) * C::kTileN};
  }
  const Groups& groups_;
  const Params& p_;

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
  int rank_, index_, group_;
};

// Rows [first, last) of d, by 64 threads of every CTA.
template <class Out, class Params>
DEVICE_FN void zero_rows(const Params& p, int first, int last, int thread) {
  const int64_t chunks = p.n * int(sizeof(Out)) / 16;  // d is contiguous
  auto* d = static_cast<uint4*>(p.d) + first * chunks;
  for (int64_t i = int64_t(blockIdx.x) * 64 + thread; i < (last - first) * chunks; i += int64_t(gridDim.x) * 64)
    store16(&d[i], make_uint4(0, 0, 0, 0));
}

}  // namespace deepseek_kernels::hopper
