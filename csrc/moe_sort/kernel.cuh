// Row of entry i = start[e_i] + #{j < i : e_j = e_i}, with start the running sum of the experts' counts, each rounded
// up to the alignment. A stable counting sort; atomics only add integers, so that nothing depends on the schedule.
//
// Tiling:  entries are dealt to CTAs in order, each taking its share a tile at a time. A warp's part of a tile is
//          32 * kRounds entries in order, one a lane and round.
//          sort_in_one: one CTA, one tile, one launch.
//          rank, place: the rank of every entry among its CTA's, left in token_topk_to_pos, and the CTA's counts; then
//          each CTA sums everybody's counts, and those of the CTAs before it, and gives its entries their rows.
// Ranks:   a ballot for each bit of the expert finds the lanes with the same one; a histogram for each warp counts the
//          rounds before; a running sum over the warps makes that the entries of the warps before.
// Bytes:   T*K*b read twice, 4*T*K of ranks written and read, 4*(T*K + R + E) written, 4*E*ctas^2 from L2.
//          T = 8192, K = 8, int64: 2 MB; bound by latency.
#pragma once
#include "common/device.cuh"
#include "common/sm90.cuh"
#include "params.h"

namespace deepseek_kernels::moe_sort {

constexpr int kWarps = 32;    // at most
constexpr int kWarpStep = 4;  // histograms summed at a time
constexpr int kUnroll = 4;    // rows of counts in flight

// -1: not an expert of ours. Ids may be garbage, so all of their bits count.
template <class Index>
DEVICE_FN int local_expert(const MoeSortParams& p, int64_t entry, int64_t end) {
  if (entry >= end) return -1;
  const Index id = __ldg(static_cast<const Index*>(p.indices) + entry);
  if (BUG(id_truncated)) {
    const int expert = int(id) - int(p.expert_begin);
    return expert >= 0 && expert < p.num_local ? expert : -1;
  }
  const uint64_t expert = uint64_t(int64_t(id)) - uint64_t(p.expert_begin);
  return expert < uint64_t(p.num_local) ? int(expert) : -1;
}

template <int kRounds>
DEVICE_FN int64_t tile_size() {
  return int64_t(blockDim.x) * kRounds;
}

// A CTA's share of the entries, in whole tiles; the last ones may get less, or nothing.
template <int kRounds>
DEVICE_FN int64_t share(const MoeSortParams& p) {
  return ceil_div(ceil_div(p.num_entries, tile_size<kRounds>()), int64_t(gridDim.x)) * tile_size<kRounds>();
}

// The entry of this thread in that round of the tile that begins at `first`.
template <int kRounds>
DEVICE_FN int64_t entry_of(int64_t first, int round) {
  return first + (int(threadIdx.x) / 32 * kRounds + round) * 32 + int(threadIdx.x) % 32;
}

// Where the padded rows of each expert begin, and below it what the running sum needs.
struct Starts {
  int32_t* start;  // [num_local + 1]
  int32_t* warps;  // [kWarps]
};

// start[e] from count[e] of every expert; begins and ends with a barrier.
DEVICE_FN void sum_starts(const MoeSortParams& p, const int32_t* count, const Starts& s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int each = ceil_div(p.num_local, int(blockDim.x)), first = int(threadIdx.x) * each;
  const int last = first + each < p.num_local ? first + each : p.num_local;
  auto padded = [&](int e) {  // at most 2^31 - 1, as the number of rows is
    return int32_t((uint32_t(count[e]) + p.alignment - 1) / p.alignment * p.alignment);
  };
  __syncthreads();
  int32_t mine = 0;
  for (int e = first; e < last; ++e) mine += padded(e);
  int32_t past = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, past, distance);
    if (lane >= distance) past += other;
  }
  if (lane == 31) s.warps[warp] = past;
  __syncthreads();
  int32_t before = past - mine;
  for (int w = 0; w < warp; ++w) before += s.warps[w];
  for (int e = first; e < last; ++e) {
    s.start[e] = before;
    before += padded(e);
  }
  if (threadIdx.x == blockDim.x - 1) s.start[p.num_local] = before;
  __syncthreads();
}

// -1 into every row without an entry, shared among all CTAs; the first of them writes the offsets.
DEVICE_FN void fill_gaps(const MoeSortParams& p, const int32_t* count, const int32_t* start) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  if (blockIdx.x == 0)
    for (int e = threadIdx.x; e <= p.num_local; e += blockDim.x) p.expert_offsets[e] = start[e];
  if (p.alignment > 1 && !BUG(gaps_kept))
    for (int64_t e = thread / 32; e < p.num_local; e += threads / 32)
      for (int64_t row = int64_t(start[e]) + count[e] + thread % 32; row < start[e + 1]; row += 32)
        p.pos_to_token_topk[row] = -1;
  for (int64_t row = start[p.num_local] + thread; row < p.num_rows; row += threads) p.pos_to_token_topk[row] = -1;
}

DEVICE_FN void give_row(const MoeSortParams& p, int64_t entry, int32_t pos) {
  p.token_topk_to_pos[entry] = pos;
  if (pos >= 0) p.pos_to_token_topk[pos] = int32_t(entry);
}

// Of one tile: the expert of each of a thread's entries, and its rank among those of its warp. Then histogram[w][e] is
// how many of expert e are before warp w, in the tiles before too, and count[e] is that of all so far.
// Ends with a barrier; another one is needed before the next tile.
template <class Index, int kRounds>
DEVICE_FN void rank_tile(const MoeSortParams& p, int32_t* histograms, int32_t* count, int64_t first, int64_t end,
                         int (&expert)[kRounds], int (&rank)[kRounds]) {
  const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) expert[r] = local_expert<Index>(p, entry_of<kRounds>(first, r), end);
  for (int i = threadIdx.x; i < warps * p.num_local; i += blockDim.x) histograms[i] = 0;
  __syncthreads();

  uint32_t same[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) same[r] = __ballot_sync(0xffffffffu, expert[r] >= 0);
  for (int bit = 1; bit < p.num_local; bit *= 2) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const uint32_t set = __ballot_sync(0xffffffffu, expert[r] & bit);
      same[r] &= expert[r] & bit ? set : ~set;
    }
  }
  int32_t* histogram = histograms + warp * p.num_local;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const uint32_t lower = same[r] & ((1u << lane) - 1);
    const int before = expert[r] >= 0 ? histogram[expert[r]] : 0;
    if (!BUG(histogram_not_ordered)) __syncwarp();
    rank[r] = before + __popc(lower);
    if (expert[r] >= 0 && lower == 0) histogram[expert[r]] = before + __popc(same[r]);
    __syncwarp();
  }
  __syncthreads();

  for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) {
    int32_t sum = count[e];
    for (int w = 0; w < warps; w += kWarpStep) {
      int32_t of_warp[kWarpStep];
#pragma unroll
      for (int i = 0; i < kWarpStep; ++i) of_warp[i] = histograms[(w + i) * p.num_local + e];
#pragma unroll
      for (int i = 0; i < kWarpStep; ++i) {
        histograms[(w + i) * p.num_local + e] = sum;
        sum += of_warp[i];
      }
    }
    count[e] = sum;
  }
  __syncthreads();
}

// Rank of a thread's entry among those of its CTA; -1 where it has no expert.
template <int kRounds>
DEVICE_FN int32_t rank_in_cta(const MoeSortParams& p, const int32_t* histograms, int expert, int rank) {
  return expert < 0
             ? -1
             : rank + (BUG(warps_before_forgotten) ? 0 : histograms[int(threadIdx.x) / 32 * p.num_local + expert]);
}

template <class Index, int kRounds>
__global__ void __launch_bounds__(kWarps * 32) sort_in_one(const MoeSortParams p) {
  DYNAMIC_SMEM(raw);
  int32_t* histograms = reinterpret_cast<int32_t*>(raw);
  int32_t* count = histograms + int(blockDim.x) / 32 * p.num_local;
  const Starts starts{count + p.num_local, count + 2 * p.num_local + 1};
  for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) count[e] = 0;
  int expert[kRounds], rank[kRounds];
  rank_tile<Index>(p, histograms, count, 0, p.num_entries, expert, rank);
  sum_starts(p, count, starts);
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int64_t entry = entry_of<kRounds>(0, r);
    if (entry < p.num_entries)
      give_row(p, entry,
               expert[r] < 0 ? -1 : starts.start[expert[r]] + rank_in_cta<kRounds>(p, histograms, expert[r], rank[r]));
  }
  fill_gaps(p, count, starts.start);
}

template <class Index, int kRounds>
__global__ void __launch_bounds__(kWarps * 32) rank(const MoeSortParams p) {
  sm90::grid_dependency_launch();
  DYNAMIC_SMEM(raw);
  int32_t* histograms = reinterpret_cast<int32_t*>(raw);
  int32_t* count = histograms + int(blockDim.x) / 32 * p.num_local;
  for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) count[e] = 0;
  const int64_t begin = blockIdx.x * share<kRounds>(p);
  const int64_t end = begin + share<kRounds>(p) < p.num_entries ? begin + share<kRounds>(p) : p.num_entries;
  for (int64_t first = begin; first < end; first += tile_size<kRounds>()) {
    int expert[kRounds], rank[kRounds];
    rank_tile<Index>(p, histograms, count, first, end, expert, rank);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t entry = entry_of<kRounds>(first, r);
      if (entry < end) p.token_topk_to_pos[entry] = rank_in_cta<kRounds>(p, histograms, expert[r], rank[r]);
    }
    __syncthreads();
  }
  const int columns = ceil_div(p.num_local, 4) * 4;
  for (int e = threadIdx.x; e < columns; e += blockDim.x)  // those that this thread has counted
    p.counts[int64_t(blockIdx.x) * columns + e] = e < p.num_local ? count[e] : 0;
}

template <class Index, int kRounds>
__global__ void __launch_bounds__(kWarps * 32) place(const MoeSortParams p) {
  DYNAMIC_SMEM(raw);
  const int quads = ceil_div(p.num_local, 4), columns = quads * 4;
  int32_t* count = reinterpret_cast<int32_t*>(raw);
  int32_t* before = count + columns;
  const Starts starts{before + columns, before + columns + p.num_local + 1};
  for (int e = threadIdx.x; e < 2 * columns; e += blockDim.x) count[e] = 0;
  sm90::grid_dependency_wait();

  const int64_t begin = blockIdx.x * share<kRounds>(p);
  const int64_t end = begin + share<kRounds>(p) < p.num_entries ? begin + share<kRounds>(p) : p.num_entries;
  // A rank of -1 says that the id is not to be looked at; of others the low bits say all.
  int32_t id[kRounds], rank[kRounds];
  auto load = [&](int64_t first) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t entry = entry_of<kRounds>(first, r);
      id[r] = entry < end ? int32_t(__ldg(static_cast<const Index*>(p.indices) + entry)) : 0;
      rank[r] = entry < end ? p.token_topk_to_pos[entry] : -1;
    }
  };
  load(begin);  // in flight while the counts are summed
  __syncthreads();

  // Threads that share a group of four experts take turns at the rows of counts.
  const int parts = quads && int(blockDim.x) > quads ? int(blockDim.x) / quads : 1;
  for (int unit = threadIdx.x; unit < quads * parts; unit += blockDim.x) {
    const int quad = unit % quads;
    const int4* column = reinterpret_cast<const int4*>(p.counts) + quad;
    int4 all = make_int4(0, 0, 0, 0), earlier = all;
#pragma unroll kUnroll
    for (int cta = unit / quads; cta < int(gridDim.x); cta += parts) {
      const int4 row = column[int64_t(cta) * quads];
      all.x += row.x, all.y += row.y, all.z += row.z, all.w += row.w;
      if (cta < int(blockIdx.x) + BUG(own_counted_before))
        earlier.x += row.x, earlier.y += row.y, earlier.z += row.z, earlier.w += row.w;
    }
    int32_t *to = count + quad * 4, *to_before = before + quad * 4;
    atomicAdd(to, all.x), atomicAdd(to + 1, all.y), atomicAdd(to + 2, all.z), atomicAdd(to + 3, all.w);
    atomicAdd(to_before, earlier.x), atomicAdd(to_before + 1, earlier.y);
    atomicAdd(to_before + 2, earlier.z), atomicAdd(to_before + 3, earlier.w);
  }
  sum_starts(p, count, starts);

  for (int64_t first = begin; first < end;) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t entry = entry_of<kRounds>(first, r);
      const int expert = id[r] - int32_t(p.expert_begin);
      if (entry < end) give_row(p, entry, rank[r] < 0 ? -1 : starts.start[expert] + before[expert] + rank[r]);
    }
    first += tile_size<kRounds>();
    load(first);
  }
  fill_gaps(p, count, starts.start);
}

}  // namespace deepseek_kernels::moe_sort
