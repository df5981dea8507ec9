// What the bf16 matmuls of Hopper have in common: sums over k of 128 rows of x times kCols rows of y, in fp32.
//
// Tiling:   128 rows of x, 64 for each math warpgroup, times kCols of y a CTA; 64 of k a stage; persistent over the
//           tiles of a Work. The sums stay where wgmma adds them up over all of k. Each operand is K-major, its rows
//           along k, or MN-major, as a matrix lies whose rows are k: in blocks of 64 columns then, each a TMA box.
//           The CTAs of a cluster lie side by side along x, have the rows of y in common and fetch a part each for all.
// Pipeline: who              waits for      does                                        signals
//           TMA thread       empty[stage]   loads x and y                               full[stage] (bytes)
//           math warpgroups  full[stage]    starts four wgmma, then awaits those of     empty[stage before], every CTA
//                                           the stage before
//           What becomes of the sums is in store_sm90.cuh.
// Why:      y has the side of wgmma that may have 256 columns. Bytes a clock of wgmma time; shared memory has 128 for
//           the first two:
//           tile of x by y               128x256   128x128   128x64
//           read by wgmma                   80        96       128
//           written by TMA                  48        64        96
//           from L2 alone                   48        64        96
//           from L2 in a cluster of two     32        48
#pragma once
#include "persistent_sm90.cuh"

namespace deepseek_kernels::bf16 {
using namespace hopper;

constexpr int kTileK = 64;
constexpr int kRowBytes = 128;  // of 64 elements: a swizzled row of either kind of operand
constexpr int kMathThreads = 2 * kGroupThreads;

// kMajorMnX, kMajorMnY: that operand is MN-major. kClearsTail: the k of a tile end where it says, and what lies behind
// is somebody else's; otherwise they end where the tensor ends, and TMA gives zeros. kNarrow: rows of y that a narrow
// tile has, 0 where there are none. Out: of the result, staged where it is bf16. kReserved: bytes of shared memory for
// the kernel's own purposes.
template <class Out_, int kCols_, int kCluster_, bool kMajorMnX_, bool kMajorMnY_, bool kClearsTail_, int kNarrow_,
          int kReserved>
struct Config {
  using Out = Out_;
  static constexpr int kRows = 2 * kWaveRows, kCols = kCols_, kWaves = 1;
  static constexpr int kCluster = kCluster_, kFetchers = kCluster;
  static constexpr bool kMajorMnX = kMajorMnX_, kMajorMnY = kMajorMnY_, kClearsTail = kClearsTail_;
  static constexpr int kNarrow = kNarrow_;
  static constexpr int kThreads = 3 * kGroupThreads;
  static constexpr int kSums = kCols / 2;                   // a thread
  static constexpr int kBoxX = kMajorMnX ? kTileK : kRows;  // rows of a TMA load
  static constexpr int kBoxY = kMajorMnY ? kTileK : kCols / kCluster;
  static constexpr int kStageBytes = (kRows + kCols) * kRowBytes;
  static constexpr int kSize = int(sizeof(Out)), kStagedBytes = kSize == 2 ? kRows * kCols * kSize : 0;
  static constexpr int kStages =
      (kSharedBytes - kReserved - (kStagedBytes ? kStagedBytes + 128 : 1152)) / (kStageBytes + 16);
  static_assert(kCols % 16 == 0 && kStages >= 3);
  static_assert(!kMajorMnY || kCols / kCluster % kTileK == 0);
  static_assert(!kClearsTail || (kMajorMnX && kMajorMnY && kNarrow == 0));
  static_assert(kNarrow % (kCols / kCluster) == 0 && (kNarrow == 0 || !kMajorMnY));

  struct Smem {
    alignas(1024) uint8_t x[kStages][kRows * kRowBytes];
    alignas(1024) uint8_t y[kStages][kCols * kRowBytes];
    alignas(1024) uint8_t d[2][kWaves][kStagedBytes ? kStagedBytes / 2 : 1];
    alignas(8) uint64_t full[kStages];
    uint64_t empty[kStages];
  };
  static_assert(sizeof(Smem) + kReserved <= kSharedBytes);
};

// Of three dimensions: [matrices, rows, k], or [matrices, k, rows] of an MN-major operand.
struct OperandMaps {
  TensorMap x, y;
};

// A Work hands out tiles: done(), next(), and tile() of this type or one derived from it.
struct Tile {
  int x0, y0;              // first row of x and of y
  int k0 = 0, k;           // from k0 on
  int matrix_x, matrix_y;  // of the tensor maps
  bool narrow = false;
  DEVICE_FN int k_blocks() const { return ceil_div(k, kTileK); }
};

// By one thread; sync_cluster must follow.
template <class C>
DEVICE_FN void init_barriers(typename C::Smem& s) {
  for (int i = 0; i < C::kStages; ++i) {
    mbarrier_init(&s.full[i], 1);
    mbarrier_init(&s.empty[i], kMathThreads / 32 * C::kFetchers);
    debug_name(&s.full[i], "full", i), debug_name(&s.empty[i], "empty", i);
  }
  if (!BUG(fence_barrier_init_missing)) fence_barrier_init();
}

// kRows of an operand, or where kSharers have them in common this CTA's part, for everyone.
template <int kRows, bool kMajorMn, int kSharers>
DEVICE_FN void load_operand(uint8_t* dst, const TensorMap& map, uint64_t* full, int row, int k, int matrix, int rank) {
  constexpr int kPart = kRows / kSharers, kBox = kMajorMn ? kTileK : kPart;
  const int first = kSharers == 1 ? 0 : rank * kPart;
#pragma unroll
  for (int i = first; i < first + kPart; i += kBox) {
    const int x = kMajorMn ? row + i : k, y = kMajorMn ? k : row + i;
    if constexpr (kSharers == 1) {
      tma_load_3d(dst + i * kRowBytes, map, full, x, y, matrix);
    } else {
      const uint16_t everyone = (1 << kSharers) - 1;
      tma_load_3d_multicast(dst + i * kRowBytes, map, full, x, y, matrix,
                            BUG(multicast_to_self_only) ? uint16_t(1 << rank) : everyone);
    }
  }
}

template <class C, class Work>
DEVICE_FN void load_tiles(typename C::Smem& s, const OperandMaps& maps, Work work) {
  const int rank = rank_in_cluster<C>();
  Ring<C::kStages> r;
  for (; !work.done(); work.next()) {
    const Tile t = work.tile();
#pragma unroll 1
    for (int kb = 0; kb < t.k_blocks(); ++kb, r.next()) {
      uint64_t* full = &s.full[r.stage];
      const int k = t.k0 + kb * kTileK;
      mbarrier_wait(&s.empty[r.stage], r.phase ^ 1);
      const bool narrow = C::kNarrow > 0 && t.narrow;
      const int bytes = C::kStageBytes - (narrow ? (C::kCols - C::kNarrow) * kRowBytes : 0);
      mbarrier_arrive_and_expect_tx(full, bytes + (BUG(expect_too_many_bytes) ? 16 : 0));
      load_operand<C::kRows, C::kMajorMnX, 1>(s.x[r.stage], maps.x, full, t.x0, k, t.matrix_x, rank);
      if (!narrow || rank * (C::kCols / C::kFetchers) < C::kNarrow)
        load_operand<C::kCols, C::kMajorMnY, C::kFetchers>(s.y[r.stage], maps.y, full, t.y0, k, t.matrix_y, rank);
    }
  }
  grid_dependency_launch();
}

// By both math warpgroups: of the k of a stage only the first `valid` stay. Both operands, because 0 * NaN is NaN.
template <class C>
DEVICE_FN void clear_tail(typename C::Smem& s, int stage, int valid) {
  const int bytes = (kTileK - valid) * kRowBytes;
  auto clear = [&](uint8_t* operand, int blocks) {
    for (int block = 0; block < blocks; ++block) {
      uint8_t* const tail = operand + block * kTileK * kRowBytes + valid * kRowBytes;
      for (int i = int(threadIdx.x) * 16; i < bytes; i += kMathThreads * 16)
        *reinterpret_cast<uint4*>(tail + i) = make_uint4(0, 0, 0, 0);
    }
  };
  if (!BUG(tail_of_x_kept)) clear(s.x[stage], C::kRows / kTileK);
  if (!BUG(tail_of_y_kept)) clear(s.y[stage], C::kCols / kTileK);
  if (!BUG(tail_not_fenced)) fence_proxy_async();
  if (!BUG(tail_not_awaited)) named_barrier_sync(3, kMathThreads);
}

// Starts the products of a stage with the warpgroup's 64 rows of x; added to what `sum` holds if `keep`.
template <class C, int kCols>
DEVICE_FN void start_product(typename C::Smem& s, int stage, int group, bool keep, float (&sum)[kCols / 2]) {
  constexpr int kBlockBytes = kTileK * kRowBytes;  // of 64 rows, in either order
  constexpr uint64_t kStepK = 16 * 2 >> 4, kStepMn = 16 * kRowBytes >> 4;
  const uint8_t* const x = s.x[stage] + (BUG(rows_of_first_warpgroup) ? 0 : group) * kBlockBytes;
  const uint32_t between = BUG(blocks_half_as_far) ? kBlockBytes / 2 : kBlockBytes;
  const uint64_t desc_x = C::kMajorMnX ? desc_mn_b128(x, kBlockBytes) : desc_k_b128(x);
  const uint64_t desc_y = C::kMajorMnY ? desc_mn_b128(s.y[stage], between) : desc_k_b128(s.y[stage]);
  if (!BUG(wgmma_fence_missing)) wgmma_fence(sum);
#pragma unroll
  for (int step = 0; step < kTileK / 16; ++step)
    wgmma_bf16<kCols, C::kMajorMnX, C::kMajorMnY>(
        sum, desc_x + step * (C::kMajorMnX ? kStepMn : kStepK),
        desc_y + step * (C::kMajorMnY && !BUG(steps_along_k) ? kStepMn : kStepK), step > 0 || keep);
  wgmma_commit();
}

// sum = the products of one tile with kCols rows of y, over all of its k. What meanwhile() does is hidden behind the
// last of them.
template <class C, int kCols, class Meanwhile>
DEVICE_FN void multiply_tile(typename C::Smem& s, Ring<C::kStages>& r, const Tile& t, int group,
                             float (&sum)[kCols / 2], const Meanwhile& meanwhile) {
  const int blocks = t.k_blocks();
  auto start = [&](int block) {
    if (!BUG(full_wait_missing)) mbarrier_wait(&s.full[r.stage], r.phase);
    if constexpr (C::kClearsTail) {
      if (block == blocks - 1 && t.k % kTileK != 0) clear_tail<C>(s, r.stage, t.k % kTileK);
    }
    start_product<C, kCols>(s, r.stage, group, block > 0 || BUG(sums_of_last_tile_kept), sum);
  };
  if (blocks == 0) {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) sum[i] = 0.f;
    meanwhile();
    return;
  }
  start(0);
#pragma unroll 1
  for (int block = 1; block < blocks; ++block) {
    const int before = r.stage;
    r.next();
    start(block);
    if (!BUG(product_not_awaited)) wgmma_wait<1>(sum);
    if (!BUG(stage_never_released)) release_stage<C>(s, BUG(stage_released_early) ? r.stage : before);
  }
  meanwhile();
  if (!BUG(wgmma_wait_missing)) wgmma_wait<0>(sum);
  release_stage<C>(s, r.stage);
  r.next();
}

// Every thread of the kernel, after sync_cluster. make_work() gives the CTA's Work, finish(tile, group, sum) is called
// by each math warpgroup for each tile, spare(thread) by the 64 threads that neither load nor multiply.
template <class C, class MakeWork, class Finish, class Spare>
DEVICE_FN void work_in_roles(typename C::Smem& s, const OperandMaps& maps, const MakeWork& make_work,
                             const Finish& finish, const Spare& spare) {
  // From lane 0, so that the compiler knows it to be the same in a whole warp.
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), group = warp / 4;
  if (group == 2) {
    reg_dec<56>();
    if (warp % 4 == 0) {
      if (elect_one()) load_tiles<C>(s, maps, make_work());
    } else if (warp % 4 >= 2) {
      spare(int(threadIdx.x) % 64);
    }
  } else {
    reg_inc<224>();
    Ring<C::kStages> r;
    auto work = make_work();
    bool more = !work.done();
    decltype(work.tile()) t, next;
    if (more) t = work.tile();
    while (more) {
      float sum[C::kSums];
      const auto find_next = [&] {
        work.next();
        more = !work.done();
        if (more) next = work.tile();
      };
      if (C::kNarrow > 0 && t.narrow) {
        constexpr int kCols = C::kNarrow > 0 ? C::kNarrow : C::kCols;
        multiply_tile<C, kCols>(s, r, t, group, reinterpret_cast<float (&)[kCols / 2]>(sum), find_next);
      } else {
        multiply_tile<C, C::kCols>(s, r, t, group, sum, find_next);
      }
      finish(t, group, sum);
      t = next;
    }
    if (threadIdx.x % kGroupThreads == 0) tma_store_wait<0>();
  }
  // A CTA stays while its peer may still arrive on its barriers.
  if constexpr (C::kCluster > 1) {
    __syncwarp();
    if (!BUG(last_cluster_sync_missing)) cluster_sync();
  }
}

}  // namespace deepseek_kernels::bf16
