// What the persistent kernels of Hopper have in common: one warpgroup that loads, two that multiply (wgmma), a ring of
// stages between them, and the order in which tiles are walked.
#pragma once
#include "sm90.cuh"

namespace deepseek_kernels::hopper {
using namespace sm90;

constexpr int kWaveRows = 64;  // of wgmma
constexpr int kGroupThreads = 128;
constexpr int kSharedBytes = 232448;  // of a CTA on sm_90

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

template <class C>
DEVICE_FN void sync_cluster() {
  if constexpr (C::kCluster > 1) {
    cluster_sync();
  } else {
    if (!BUG(syncthreads_missing)) __syncthreads();
  }
}

// Accumulator i of a thread of a math warpgroup is row wave_row() + 8 * (i / 2 % 2) of the wave's 64, and column
// 8 * (i / 4) + 2 * (lane % 4) + i % 2.
DEVICE_FN int wave_row() { return int(threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4); }

// By every thread of a math warpgroup that has read all it needs of a stage.
template <class C>
DEVICE_FN void release_stage(typename C::Smem& s, int stage) {
  const int lane = threadIdx.x % 32;
  if constexpr (C::kFetchers == 1) {
    if (lane == 0) mbarrier_arrive(&s.empty[stage]);
  } else {
    if (lane < C::kFetchers) mbarrier_arrive_cluster_after_reads(&s.empty[stage], lane);
  }
}

}  // namespace deepseek_kernels::hopper
