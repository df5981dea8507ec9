// What the FP8 matmuls of Hopper have in common: d = x y^T of block-scaled e4m3, where x has the 64 rows of wgmma.
//
// Tiling:   kRows of x times kCols of y a CTA, 128 of k a stage; persistent over the tiles of a Work. A math warpgroup
//           owns kWaves times 64 rows, or where there are only 64 every second stage: four wgmma give the unscaled
//           product of a stage, which is then scaled into a second set of registers (the tensor core keeps about 14
//           bits while it adds, so it is never asked to add more than 128 products). The CTAs of a cluster have x
//           or y in common; each fetches a part of it for all.
// Pipeline: who              waits for      does                                            signals
//           TMA thread       empty[stage]   loads x, y                                      full[stage] (bytes)
//           scale warp       empty[stage]   cp.async of the scales of x and y               full[stage] (32 arrivals)
//           math warpgroups  full[stage]    wgmma, then scales while the other one's runs   empty[stage], every CTA
//           What becomes of the sums is in fp8_sm90_store.cuh.
#pragma once
#include "sm90.cuh"

namespace deepseek_kernels::fp8 {
using namespace sm90;

constexpr int kTileK = 128;  // bytes too; also the width of a scale block
constexpr int kWaveRows = 64;
constexpr int kGroupThreads = 128;
constexpr int kSharedBytes = 232448;  // of a CTA on sm_90
constexpr int kMaxStages = 24;

enum class Shared { kX, kY };  // what the CTAs of a cluster have in common

// kScalesX: scales of x a stage. kRows of them are one a row, otherwise one holds for the tile. kScalesY: the same of
// y, where two are those of the scale block that the tile begins in and of the next one.
// Out: what the result is staged in, void where it is not staged.
// kReserved: bytes of shared memory for the kernel's own purposes.
template <class Out>
constexpr int kStagedSize = int(sizeof(Out));
template <>
inline constexpr int kStagedSize<void> = 0;

template <class Out_, int kRows_, int kCols_, int kScalesX_, int kScalesY_, int kCluster_, Shared kShared_,
          int kReserved>
struct Config {
  using Out = Out_;
  static constexpr int kRows = kRows_, kCols = kCols_, kScalesX = kScalesX_, kScalesY = kScalesY_;
  static constexpr int kCluster = kCluster_;
  static constexpr bool kSharesX = kCluster > 1 && kShared_ == Shared::kX, kSharesY = kCluster > 1 && !kSharesX;
  static constexpr bool kRowScales = kScalesX == kRows, kColScales = kScalesY == kCols;
  static constexpr bool kLateScales = kRowScales && kColScales;  // of y; too many to hold while wgmma runs
  static constexpr int kRowGroups = kRows == kWaveRows ? 1 : 2;  // math warpgroups with rows of their own
  static constexpr bool kHalves = kRowGroups == 1;
  static constexpr int kWaves = kRows / (kRowGroups * kWaveRows);
  static constexpr int kThreads = 3 * kGroupThreads;
  static constexpr int kSums = kCols / 2;                          // a thread and wave
  static constexpr int kPart = kCols & -kCols;                     // columns that surely share a scale of y
  static constexpr int kBoxX = kRows / (kSharesX ? kCluster : 1);  // rows of a TMA load
  static constexpr int kBoxY = kCols / (kSharesY ? kCluster : 1);
  static constexpr int kStageBytes = (kRows + kCols) * kTileK;
  static constexpr int kSumsBytes = kRows * kCols * kStagedSize<Out>;
  static constexpr int kHalfBytes = kHalves ? kRows * kCols * 4 : 0;
  static constexpr int kStages = [] {
    const int room = kSharedBytes - kReserved - kSumsBytes - kHalfBytes - (kSumsBytes ? 64 : 1024);
    const int stages = room / (kStageBytes + (kScalesX + kScalesY) * 4 + 16);
    return stages < kMaxStages ? stages : kMaxStages;
  }();
  static_assert(kRows % (kRowGroups * kWaveRows) == 0 && kCols % 8 == 0 && kStages >= 3);
  static_assert(kScalesX == 1 || kRowScales);
  static_assert(kScalesY == 1 || kScalesY == 2 || kColScales);

  struct Smem {
    alignas(1024) uint8_t x[kStages][kRows * kTileK];
    alignas(1024) uint8_t y[kStages][kCols * kTileK];
    alignas(1024) uint8_t d[kRowGroups][kWaves][kSumsBytes ? kSumsBytes / (kRowGroups * kWaves) : 1];
    float half[kHalves ? kHalfBytes / 4 : 1];
    alignas(16) float scale_x[kStages][kScalesX];
    alignas(8) float scale_y[kStages][kScalesY];
    alignas(8) uint64_t full[kStages];
    uint64_t empty[kStages];
  };
  static_assert(sizeof(Smem) + kReserved <= kSharedBytes);
};

// e4m3 in rows along k.
struct OperandMaps {
  TensorMap x, y;
};

// Scales of consecutive rows (or blocks of rows), from offset `first` of `base`; those past `count` read as zero.
struct ScaleRows {
  const float* base;
  int64_t first, stride, stride_k, count;
};

// A Work hands out tiles: done(), next(), and tile() of this type or one derived from it.
struct Tile {
  int x0, y0;            // first row of x and of y
  int k0 = 0, k_blocks;  // first column, steps of 128
  int boundary = 0;      // columns of the tile before its second scale block of y
  ScaleRows x_scales, y_scales;
};

// The order in which a grid of `rows` x `columns` is walked: `height` rows at a time, column by column, so that what
// runs at the same time has operands in common in L2.
struct Raster {
  int rows, columns, height;
  DEVICE_FN int size() const { return rows * columns; }
  DEVICE_FN int first_row(int i) const { return i / (height * columns) * height; }
  DEVICE_FN int rows_from(int first) const { return rows - first < height ? rows - first : height; }
  DEVICE_FN int row(int i) const {
    const int first = first_row(i);
    return first + (i - first * columns) % rows_from(first);
  }
  DEVICE_FN int column(int i) const {
    const int first = first_row(i);
    return (i - first * columns) / rows_from(first);
  }
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

template <class C>
DEVICE_FN int rank_in_cluster() {
  if constexpr (C::kCluster == 1) return 0;
  return int(cluster_rank());
}

// By one thread; sync_cluster must follow.
template <class C>
DEVICE_FN void init_barriers(typename C::Smem& s) {
  for (int i = 0; i < C::kStages; ++i) {
    mbarrier_init(&s.full[i], 1 + 32);
    mbarrier_init(&s.empty[i], C::kRowGroups * 4 * C::kCluster);
    debug_name(&s.full[i], "full", i), debug_name(&s.empty[i], "empty", i);
  }
  if (!BUG(fence_barrier_init_missing)) fence_barrier_init();
}

template <class C>
DEVICE_FN void sync_cluster() {
  if constexpr (C::kCluster > 1) {
    cluster_sync();
  } else {
    if (!BUG(syncthreads_missing)) __syncthreads();
  }
}

// All kRows of them, or where a cluster has them in common this CTA's part, for everyone.
template <int kRows, int kSharers>
DEVICE_FN void load_operand(uint8_t* dst, const TensorMap& map, uint64_t* full, int k, int row, int rank) {
  if constexpr (kSharers == 1) {
    tma_load_2d(dst, map, full, k, row);
  } else {
    const int first = rank * (kRows / kSharers);
    const uint16_t everyone = (1 << kSharers) - 1;
    tma_load_2d_multicast(dst + first * kTileK, map, full, k, row + first,
                          BUG(multicast_to_self_only) ? uint16_t(1 << rank) : everyone);
  }
}

template <class C, class Work>
DEVICE_FN void load_tiles(typename C::Smem& s, const OperandMaps& maps, Work work) {
  const int rank = rank_in_cluster<C>();
  Ring<C::kStages> r;
  for (; !work.done(); work.next()) {
    const Tile t = work.tile();
#pragma unroll 1
    for (int kb = 0; kb < t.k_blocks; ++kb, r.next()) {
      uint64_t* full = &s.full[r.stage];
      const int k = t.k0 + kb * kTileK;
      mbarrier_wait(&s.empty[r.stage], r.phase ^ 1);
      mbarrier_arrive_and_expect_tx(full, C::kStageBytes + (BUG(expect_too_many_bytes) ? 16 : 0));
      load_operand<C::kRows, C::kRows / C::kBoxX>(s.x[r.stage], maps.x, full, k, t.x0, rank);
      load_operand<C::kCols, C::kCols / C::kBoxY>(s.y[r.stage], maps.y, full, k, t.y0, rank);
    }
  }
  grid_dependency_launch();
}

// The scales of a tile as one lane of the scale warp reads them: rows lane, lane + 32, ...
template <int kScales>
class ScaleLane {
 public:
  DEVICE_FN explicit ScaleLane(const ScaleRows& rows)
      : next_(rows.base + rows.first + int(threadIdx.x % 32) * rows.stride),
        rows_(rows),
        count_(int(rows.count < kScales ? rows.count : kScales) - int(threadIdx.x % 32)) {
    if (BUG(scale_rows_unmasked)) count_ = kScales - int(threadIdx.x % 32);
  }
  // Those of the next block of k, into dst[0, kScales).
  DEVICE_FN void load(float* dst) {
    const float* from = next_;
#pragma unroll 4
    for (int i = 0; i < kScales; i += 32, from += 32 * rows_.stride)
      if (kScales % 32 == 0 || int(threadIdx.x) % 32 + i < kScales)
        cp_async_4(&dst[threadIdx.x % 32 + i], i < count_ ? from : rows_.base, i < count_);
    next_ += rows_.stride_k;
  }

 private:
  const float* next_;
  const ScaleRows& rows_;
  int count_;
};

template <class C, class Work>
DEVICE_FN void load_scales(typename C::Smem& s, Work work) {
  Ring<C::kStages> r;
  for (; !work.done(); work.next()) {
    const Tile t = work.tile();
    ScaleLane<C::kScalesX> x(t.x_scales);
    ScaleLane<C::kScalesY> y(t.y_scales);
#pragma unroll 1
    for (int kb = 0; kb < t.k_blocks; ++kb, r.next()) {
      if (!BUG(scales_do_not_wait)) mbarrier_wait(&s.empty[r.stage], r.phase ^ 1);
      x.load(s.scale_x[r.stage]);
      y.load(s.scale_y[r.stage]);
      cp_async_mbarrier_arrive(&s.full[r.stage]);
    }
  }
}

// Accumulator i of a thread of a math warpgroup is row wave_row() + 8 * (i / 2 % 2) of the wave's 64, and column
// 8 * (i / 4) + 2 * (lane % 4) + i % 2.
DEVICE_FN int wave_row() { return int(threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4); }

// What a thread multiplies the products of a stage and wave by.
template <class C>
struct StageScales {
  float x[2];
  float y[C::kLateScales ? 1 : C::kColScales ? C::kCols / 4 : C::kScalesY];

  DEVICE_FN StageScales(const typename C::Smem& s, int stage, int first_row) {
    const float* sx = &s.scale_x[stage][C::kRowScales ? first_row + wave_row() : 0];
    x[0] = sx[0];
    x[1] = sx[C::kRowScales ? (BUG(scale_of_next_row) ? 1 : 8) : 0];
    if constexpr (C::kLateScales) {
      y[0] = 0.f;
    } else if constexpr (C::kColScales) {
#pragma unroll
      for (int i = 0; i < C::kCols / 8; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(&s.scale_y[stage][i * 8 + threadIdx.x % 4 * 2]);
        y[2 * i] = pair.x, y[2 * i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < C::kScalesY; ++i) y[i] = s.scale_y[stage][i];
    }
  }
  // Of accumulator i; the compiler finds what several have in common.
  DEVICE_FN float of(int i, int boundary) const {
    const float row = x[i / 2 % 2];
    if constexpr (C::kColScales) return row * y[i / 4 * 2 + i % 2];
    if constexpr (C::kScalesY == 1) return row * y[0];
    return row * (i / 4 * 8 / C::kPart * C::kPart < boundary ? y[0] : y[C::kScalesY - 1]);
  }
};

// sum += scale_x * scale_y * product, with the scales of y read as they are needed.
template <class C>
DEVICE_FN void add_scaled(const float* scale_y, const float (&scale_x)[2], const float (&product)[C::kSums],
                          float (&sum)[C::kSums]) {
#pragma unroll
  for (int i = 0; i < C::kSums; i += 4) {
    const float2 y = *reinterpret_cast<const float2*>(&scale_y[i * 2 + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[i + 2 * row] += scale_x[row] * y.x * product[i + 2 * row];
      sum[i + 2 * row + 1] += scale_x[row] * y.y * product[i + 2 * row + 1];
    }
  }
}

// sum[wave] += the scaled products of one tile, over all of its k, or over this warpgroup's half of the blocks.
template <class C>
DEVICE_FN void multiply_tile(typename C::Smem& s, Ring<C::kStages>& r, const Tile& t, int group,
                             float (&sum)[C::kWaves][C::kSums]) {
  const int lane = threadIdx.x % 32;
  float product[C::kSums];
  for (int kb = 0; kb < t.k_blocks; ++kb, r.next()) {
    if (C::kHalves && kb % 2 != group) continue;
    if (!BUG(full_wait_missing)) mbarrier_wait(&s.full[r.stage], r.phase);
    const uint64_t desc_y = desc_k_b128(s.y[r.stage]);
    auto release = [&] {
      if constexpr (C::kCluster == 1) {
        if (lane == 0) mbarrier_arrive(&s.empty[r.stage]);
      } else {
        if (lane < C::kCluster) mbarrier_arrive_cluster_after_reads(&s.empty[r.stage], lane);
      }
    };
    if (BUG(stage_released_early)) release();
#pragma unroll
    for (int wave = 0; wave < C::kWaves; ++wave) {
      const int first_row = ((C::kHalves ? 0 : group) * C::kWaves + wave) * kWaveRows;
      const uint64_t desc_x =
          desc_k_b128(s.x[r.stage] + first_row * kTileK, BUG(descriptor_stride_halved) ? 512 : 1024);
      StageScales<C> scales(s, r.stage, first_row);
      if (!BUG(wgmma_fence_missing)) wgmma_fence(product);
#pragma unroll
      for (int step = 0; step < kTileK / 32; ++step)
        wgmma_e4m3<C::kCols>(product, desc_x + step * 2, desc_y + step * (BUG(k_step_doubled) ? 4 : 2), step != 0);
      wgmma_commit();
      if (!BUG(wgmma_wait_missing)) wgmma_wait<0>(product);
      const bool late = C::kLateScales && !BUG(late_scales_after_release);
      if (wave == C::kWaves - 1 && !late && !BUG(stage_released_early) && !BUG(stage_never_released)) release();
      if (BUG(scale_read_after_release)) scales = StageScales<C>(s, r.stage, first_row);
      if constexpr (C::kLateScales) {
        add_scaled<C>(s.scale_y[r.stage], scales.x, product, sum[wave]);
        if (wave == C::kWaves - 1 && late && !BUG(stage_released_early) && !BUG(stage_never_released)) {
          if (!BUG(late_syncwarp_missing)) __syncwarp();
          release();
        }
      } else {
#pragma unroll
        for (int i = 0; i < C::kSums; ++i) sum[wave][i] += scales.of(i, t.boundary) * product[i];
      }
    }
  }
}

// The first warpgroup's sums of a tile become those of both, always in this order.
template <class C>
DEVICE_FN void add_halves(typename C::Smem& s, int group, float (&sum)[C::kSums]) {
  float* half = &s.half[threadIdx.x % kGroupThreads];
  if (group == 1) {
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) half[i * kGroupThreads] = sum[i];
  }
  if (!BUG(half_not_awaited)) named_barrier_sync(3, 2 * kGroupThreads);
  if (group == 0) {
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sum[i] += half[i * kGroupThreads];
  }
  if (!BUG(half_overwritten)) named_barrier_sync(3, 2 * kGroupThreads);
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
    } else if (warp % 4 == 1) {
      load_scales<C>(s, make_work());
    } else {
      spare(int(threadIdx.x) % 64);
    }
  } else {
    reg_inc<224>();
    Ring<C::kStages> r;
    for (auto work = make_work(); !work.done(); work.next()) {
      const auto t = work.tile();
      float sum[C::kWaves][C::kSums] = {};
      multiply_tile<C>(s, r, t, group, sum);
      if constexpr (C::kHalves) add_halves<C>(s, group, sum[0]);
      if (!C::kHalves || group == 0) finish(t, group, sum);
    }
    if (threadIdx.x % kGroupThreads == 0) tma_store_wait<0>();
  }
  // A CTA stays while its peer may still arrive on its barriers.
  if constexpr (C::kCluster > 1) {
    __syncwarp();
    if (!BUG(last_cluster_sync_missing)) cluster_sync();
  }
}

}  // namespace deepseek_kernels::fp8
