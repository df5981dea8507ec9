// What the FP8 matmuls of Hopper have in common: d = x y^T of block-scaled e4m3, where x has the 64 rows of wgmma.
//
// Tiling:   kRows of x times kCols of y a CTA, 128 of k a stage; persistent over the tiles of a Work. A math warpgroup
//           owns kWaves times 64 rows, or where there are only 64 every second stage: four wgmma give the unscaled
//           product of a stage, which is then scaled into a second set of registers (the tensor core keeps about 14
//           bits while it adds, so it is never asked to add more than 128 products). The CTAs of a cluster have x
//           or y in common, and each fetches a part of it for all; or they share out the k of one tile, and the first
//           adds up what the others send it.
// Pipeline: who              waits for      does                                            signals
//           TMA thread       empty[stage]   loads x, y, and scales of their rows            full[stage] (bytes)
//           math warpgroups  full[stage]    wgmma, then scales while the other one's runs   empty[stage], every CTA
//           Where a warpgroup has 64 rows and few enough columns, its next wgmma run while it scales the last ones.
//           Scales of rows whose strides TMA does not take are copied by a warp of their own (cp.async, 32 arrivals on
//           full[stage]); scales of blocks of rows are read by the math warpgroups a step ahead. What becomes of the
//           sums is in fp8_sm90_store.cuh.
#pragma once
#include "persistent_sm90.cuh"

namespace deepseek_kernels::fp8 {
using namespace hopper;

constexpr int kTileK = 128;  // bytes too; also the width of a scale block
constexpr int kMaxStages = 24;

// What the CTAs of a cluster have in common. Of a tile each multiplies its own share of k.
enum class Shared { kX, kY, kTile };

// kScalesX: scales of x a stage. kRows of them are one a row, otherwise one holds for the tile. kScalesY: the same of
// y, where two are those of the scale block that the tile begins in and of the next one. Only those of rows are staged.
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
  static constexpr bool kSharesX = kCluster > 1 && kShared_ == Shared::kX;
  static constexpr bool kSharesY = kCluster > 1 && kShared_ == Shared::kY;
  static constexpr int kShares = kCluster > 1 && kShared_ == Shared::kTile ? kCluster : 1;  // of k
  static constexpr int kFetchers = kCluster / kShares;                                      // CTAs that fill a stage
  static constexpr bool kRowScales = kScalesX == kRows, kColScales = kScalesY == kCols;
  static constexpr bool kLateScales = kRowScales && kColScales;  // of y; too many to hold while wgmma runs
  static constexpr int kTurns = kLateScales ? 2 : 1;             // of the stages, before a scale of y is overwritten
  static constexpr int kBlockScales = kRowScales && kColScales ? 0 : kRowScales ? kScalesY : kScalesX;
  static constexpr int kRowGroups = kRows == kWaveRows ? 1 : 2;  // math warpgroups with rows of their own
  static constexpr bool kHalves = kRowGroups == 1;
  static constexpr int kWaves = kRows / (kRowGroups * kWaveRows);
  static constexpr bool kTwoProducts = kWaves == 1 && !kHalves && kCols <= 128;
  static constexpr int kThreads = 3 * kGroupThreads;
  static constexpr int kSums = kCols / 2;                          // a thread and wave
  static constexpr int kPart = kCols & -kCols;                     // columns that surely share a scale of y
  static constexpr int kBoxX = kRows / (kSharesX ? kCluster : 1);  // rows of a TMA load
  static constexpr int kBoxY = kCols / (kSharesY ? kCluster : 1);
  static constexpr int kStageBytes = (kRows + kCols) * kTileK;
  static constexpr int kSumsBytes = kRows * kCols * kStagedSize<Out>;
  static constexpr int kHalfBytes = kHalves ? kRows * kCols * 4 * kShares : 0;  // also those of the other shares
  // Of the scales of a stage's rows, which TMA puts at multiples of 128.
  static constexpr int kStagedX = kRowScales ? ceil_div(kRows, 32) * 32 : 0;
  static constexpr int kStagedY = kColScales ? ceil_div(kCols, 32) * 32 : 0;
  static constexpr int kScaleBytes = ((kRowScales ? kRows : 0) + (kColScales ? kCols : 0)) * 4;
  static constexpr int kStages = [] {
    const int room = kSharedBytes - kReserved - kSumsBytes - kHalfBytes - (kSumsBytes ? 144 : 1024);
    const int stages = room / (kStageBytes + (kStagedX + kTurns * kStagedY) * 4 + 16);
    return stages < kMaxStages ? stages : kMaxStages;
  }();
  static_assert(kRows % (kRowGroups * kWaveRows) == 0 && kCols % 8 == 0 && kStages >= 3);
  static_assert(kShares == 1 || kHalves);
  static_assert(kScalesX == 1 || kRowScales);
  static_assert(kScalesY == 1 || kScalesY == 2 || kColScales);

  struct Smem {
    alignas(1024) uint8_t x[kStages][kRows * kTileK];
    alignas(1024) uint8_t y[kStages][kCols * kTileK];
    alignas(1024) uint8_t d[kRowGroups][kWaves][kSumsBytes ? kSumsBytes / (kRowGroups * kWaves) : 1];
    float half[kHalves ? kRows * kCols : 1];
    float share[kShares > 1 ? kShares - 1 : 1][kShares > 1 ? kRows * kCols : 1];
    alignas(128) float scale_x[kRowScales ? kStages : 1][kRowScales ? kStagedX : 1];
    alignas(kColScales ? 128 : 4) float scale_y[kColScales ? kTurns * kStages : 1][kColScales ? kStagedY : 1];
    alignas(8) uint64_t full[kStages];
    uint64_t empty[kStages];
    uint64_t shares_full, shares_empty;
  };
  static_assert(sizeof(Smem) + kReserved <= kSharedBytes);
};

// e4m3 in rows along k, and the scales of rows, [matrices, blocks of k, rows].
struct OperandMaps {
  TensorMap x, y, scale_x, scale_y;
  bool scales;  // whether there are maps of the scales
};

// Scales of consecutive rows (or blocks of rows), from offset `first` of `base`; those past `count` read as zero.
// `row`, `matrix`: where they begin in the tensor map.
struct ScaleRows {
  const float* base;
  int64_t first, stride, stride_k, count;
  int row = 0, matrix = 0;
};

// A Work hands out tiles: done(), next(), and tile() of this type or one derived from it.
struct Tile {
  int x0, y0;            // first row of x and of y
  int k0 = 0, k_blocks;  // first column, steps of 128
  int boundary = 0;      // columns of the tile before its second scale block of y
  ScaleRows x_scales, y_scales;
};

template <int kStages>
struct ScaleRing : Ring<kStages> {
  // The place of its scales of y. What is read of them after a stage is let go stays for another turn of the stages.
  template <int kTurns>
  DEVICE_FN int scale_slot() const {
    return kTurns == 1 || BUG(scales_stay_one_turn) ? this->stage : this->stage + int(this->phase) * kStages;
  }
};

// By one thread; sync_cluster must follow.
template <class C>
DEVICE_FN void init_barriers(typename C::Smem& s, const OperandMaps& maps) {
  for (int i = 0; i < C::kStages; ++i) {
    mbarrier_init(&s.full[i], maps.scales ? 1 : 1 + 32);
    mbarrier_init(&s.empty[i], C::kRowGroups * 4 * C::kFetchers);
    debug_name(&s.full[i], "full", i), debug_name(&s.empty[i], "empty", i);
  }
  if constexpr (C::kShares > 1) {
    mbarrier_init(&s.shares_full, (C::kShares - 1) * kGroupThreads);
    mbarrier_init(&s.shares_empty, 4);
    debug_name(&s.shares_full, "shares_full", 0), debug_name(&s.shares_empty, "shares_empty", 0);
  }
  if (!BUG(fence_barrier_init_missing)) fence_barrier_init();
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
  ScaleRing<C::kStages> r;
  for (; !work.done(); work.next()) {
    const Tile t = work.tile();
#pragma unroll 1
    for (int kb = 0; kb < t.k_blocks; ++kb, r.next()) {
      uint64_t* full = &s.full[r.stage];
      const int k = t.k0 + kb * kTileK;
      mbarrier_wait(&s.empty[r.stage], r.phase ^ 1);
      mbarrier_arrive_and_expect_tx(
          full, C::kStageBytes + (maps.scales ? C::kScaleBytes : 0) + (BUG(expect_too_many_bytes) ? 16 : 0));
      if (maps.scales) {
        const int block = k / kTileK + (BUG(scales_of_next_block) ? 1 : 0);
        if constexpr (C::kRowScales)
          tma_load_3d(s.scale_x[r.stage], maps.scale_x, full, t.x_scales.row, block, t.x_scales.matrix);
        if constexpr (C::kColScales)
          tma_load_3d(s.scale_y[r.template scale_slot<C::kTurns>()], maps.scale_y, full, t.y_scales.row, block,
                      t.y_scales.matrix);
      }
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
  ScaleRing<C::kStages> r;
  for (; !work.done(); work.next()) {
    const Tile t = work.tile();
    ScaleLane<C::kScalesX> x(t.x_scales);
    ScaleLane<C::kScalesY> y(t.y_scales);
#pragma unroll 1
    for (int kb = 0; kb < t.k_blocks; ++kb, r.next()) {
      if (!BUG(scales_do_not_wait)) mbarrier_wait(&s.empty[r.stage], r.phase ^ 1);
      if constexpr (C::kRowScales) x.load(s.scale_x[r.stage]);
      if constexpr (C::kColScales) y.load(s.scale_y[r.template scale_slot<C::kTurns>()]);
      cp_async_mbarrier_arrive(&s.full[r.stage]);
    }
  }
}

// The scales that hold for blocks of rows, of x or of y: those of the step at hand. The next step's are on their way.
template <class C>
class BlockScales {
 public:
  static constexpr int kScales = C::kBlockScales ? C::kBlockScales : 1;
  static constexpr int kStep = C::kHalves ? 2 : 1;  // blocks of k from one step of a warpgroup to its next
  float value[kScales];

  DEVICE_FN BlockScales() {}
  // At the first step of a tile.
  DEVICE_FN void begin(const Tile& t, int group) {
    if constexpr (C::kBlockScales > 0) {
      const ScaleRows& rows = C::kRowScales ? t.y_scales : t.x_scales;
      const int first = C::kHalves ? group : 0;
      from_ = rows.base + rows.first + first * rows.stride_k;
      to_second_ = rows.count > 1 || BUG(scale_block_past_the_end) ? rows.stride : 0;
      step_ = kStep * rows.stride_k;
      left_ = rows.count > 0 ? t.k_blocks - first : 0;  // a cluster's last tile may lie outside
      load();
    }
  }
  DEVICE_FN void next() {
#pragma unroll
    for (int i = 0; i < kScales; ++i) value[i] = next_[i];
    if constexpr (C::kBlockScales > 0) load();
  }

 private:
  DEVICE_FN void load() {
    if (left_ <= 0 && !BUG(scales_past_the_last_step)) return;
#pragma unroll
    for (int i = 0; i < kScales; ++i) next_[i] = __ldg(from_ + i * to_second_);
    from_ += step_, left_ -= kStep;
  }
  float next_[kScales];
  const float* from_;
  int64_t to_second_, step_;
  int left_;
};

// What a thread multiplies the products of a stage and wave by.
template <class C>
struct StageScales {
  float x[2];
  float y[C::kLateScales ? 1 : C::kColScales ? C::kCols / 4 : C::kScalesY];

  DEVICE_FN StageScales() {}
  DEVICE_FN StageScales(const typename C::Smem& s, int stage, int first_row, const BlockScales<C>& blocks) {
    if constexpr (C::kRowScales) {
      const float* sx = &s.scale_x[stage][first_row + wave_row()];
      x[0] = sx[0];
      x[1] = sx[BUG(scale_of_next_row) ? 1 : 8];
    } else {
      x[0] = x[1] = blocks.value[0];
    }
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
      for (int i = 0; i < C::kScalesY; ++i) y[i] = blocks.value[i];
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

// Starts the multiplication of a stage's 64 rows from `first_row`.
template <class C>
DEVICE_FN void start_product(typename C::Smem& s, int stage, int first_row, float (&product)[C::kSums]) {
  const uint64_t desc_x = desc_k_b128(s.x[stage] + first_row * kTileK, BUG(descriptor_stride_halved) ? 512 : 1024);
  const uint64_t desc_y = desc_k_b128(s.y[stage]);
  if (!BUG(wgmma_fence_missing)) wgmma_fence(product);
#pragma unroll
  for (int step = 0; step < kTileK / 32; ++step)
    wgmma_e4m3<C::kCols>(product, desc_x + step * 2, desc_y + step * (BUG(k_step_doubled) ? 4 : 2), step != 0);
  wgmma_commit();
}

// sum += scale_x * scale_y * product, with late scales of y read as they are needed.
template <class C>
DEVICE_FN void add_products(const typename C::Smem& s, int slot, const StageScales<C>& scales, int boundary,
                            const float (&product)[C::kSums], float (&sum)[C::kSums]) {
  if constexpr (C::kLateScales) {
#pragma unroll
    for (int i = 0; i < C::kSums; i += 4) {
      const float2 y = *reinterpret_cast<const float2*>(&s.scale_y[slot][i * 2 + threadIdx.x % 4 * 2]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        sum[i + 2 * row] += scales.x[row] * y.x * product[i + 2 * row];
        sum[i + 2 * row + 1] += scales.x[row] * y.y * product[i + 2 * row + 1];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sum[i] += scales.of(i, boundary) * product[i];
  }
}

// sum[wave] += the scaled products of one tile, over all of its k, or over this warpgroup's half of the blocks.
template <class C>
DEVICE_FN void multiply_tile(typename C::Smem& s, ScaleRing<C::kStages>& r, const Tile& t, int group,
                             BlockScales<C>& blocks, float (&sum)[C::kWaves][C::kSums]) {
  float product[C::kSums];
  // Unrolled, so that the next stage is asked for while products are scaled.
#pragma unroll(C::kLateScales ? 1 : 4)
  for (int kb = 0; kb < t.k_blocks; ++kb, r.next()) {
    if (C::kHalves && kb % 2 != group) continue;
    if (!BUG(full_wait_missing)) mbarrier_wait(&s.full[r.stage], r.phase);
    if (BUG(stage_released_early)) release_stage<C>(s, r.stage);
    blocks.next();
#pragma unroll
    for (int wave = 0; wave < C::kWaves; ++wave) {
      const int first_row = ((C::kHalves ? 0 : group) * C::kWaves + wave) * kWaveRows;
      StageScales<C> scales(s, r.stage, first_row, blocks);
      start_product<C>(s, r.stage, first_row, product);
      if (!BUG(wgmma_wait_missing)) wgmma_wait<0>(product);
      if (wave == C::kWaves - 1 && !BUG(stage_released_early) && !BUG(stage_never_released))
        release_stage<C>(s, r.stage);
      if (BUG(scale_read_after_release)) scales = StageScales<C>(s, r.stage, first_row, blocks);
      add_products<C>(s, r.template scale_slot<C::kTurns>(), scales, t.boundary, product, sum[wave]);
    }
  }
}

// The same with two products under way: the tensor core never waits for their scaling.
template <class C>
DEVICE_FN void multiply_tile_ahead(typename C::Smem& s, ScaleRing<C::kStages>& r, const Tile& t, int group,
                                   BlockScales<C>& blocks, float (&sum)[C::kWaves][C::kSums]) {
  struct Step {
    float product[C::kSums];
    int stage, slot;
    StageScales<C> scales;
  } even, odd;
  auto start = [&](Step& step) {
    if (!BUG(full_wait_missing)) mbarrier_wait(&s.full[r.stage], r.phase);
    blocks.next();
    step.stage = r.stage, step.slot = r.template scale_slot<C::kTurns>();
    step.scales = StageScales<C>(s, r.stage, group * kWaveRows, blocks);
    start_product<C>(s, r.stage, group * kWaveRows, step.product);
    r.next();
  };
  auto add = [&](Step& step) {
    if (!BUG(stage_never_released)) release_stage<C>(s, step.stage);
    add_products<C>(s, step.slot, step.scales, t.boundary, step.product, sum[0]);
  };
  if (t.k_blocks == 0) return;
  start(even);
  int left = t.k_blocks;
#pragma unroll 2
  for (; left > 2; left -= 2) {
    start(odd);
    if (!BUG(older_product_not_awaited)) wgmma_wait<1>(even.product);
    add(even);
    start(even);
    wgmma_wait<1>(odd.product);
    add(odd);
  }
  if (left == 2) {
    start(odd);
    wgmma_wait<1>(even.product);
    add(even);
    wgmma_wait<0>(odd.product);
    add(odd);
  } else {
    wgmma_wait<0>(even.product);
    add(even);
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

// The sums of a tile of the cluster's first CTA become those of all, always in this order. By a warpgroup of each.
template <class C>
DEVICE_FN void add_shares(typename C::Smem& s, uint32_t& phase, float (&sum)[C::kSums]) {
  const int thread = threadIdx.x % kGroupThreads, rank = rank_in_cluster<C>();
  if (rank > 0) {
    if (!BUG(shares_overwritten)) mbarrier_wait_cluster(&s.shares_empty, phase ^ 1);
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) store_cluster(&s.share[rank - 1][i * kGroupThreads + thread], 0, sum[i]);
    mbarrier_arrive_cluster(&s.shares_full, 0);
  } else {
    if (!BUG(shares_not_awaited)) mbarrier_wait_cluster(&s.shares_full, phase);
    for (int other = 0; other < C::kShares - 1; ++other)
#pragma unroll
      for (int i = 0; i < C::kSums; ++i) sum[i] += s.share[other][i * kGroupThreads + thread];
    __syncwarp();
    if (thread % 32 < C::kShares - 1) mbarrier_arrive_cluster_after_reads(&s.shares_empty, 1 + thread % 32);
  }
  phase ^= 1;
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
      if (!maps.scales) load_scales<C>(s, make_work());
    } else {
      spare(int(threadIdx.x) % 64);
    }
  } else {
    reg_inc<224>();
    ScaleRing<C::kStages> r;
    uint32_t shares_phase = 0;
    BlockScales<C> blocks;
    auto work = make_work();
    bool more = !work.done();
    if (more) blocks.begin(work.tile(), group);
    while (more) {
      const auto t = work.tile();
      float sum[C::kWaves][C::kSums] = {};
      if constexpr (C::kTwoProducts) {
        multiply_tile_ahead<C>(s, r, t, group, blocks, sum);
      } else {
        multiply_tile<C>(s, r, t, group, blocks, sum);
      }
      if constexpr (C::kHalves) add_halves<C>(s, group, sum[0]);
      if constexpr (C::kShares > 1) {
        if (group == 0) add_shares<C>(s, shares_phase, sum[0]);
      }
      work.next();
      more = !work.done();
      if (more) blocks.begin(work.tile(), group);
      if ((!C::kHalves || group == 0) && (C::kShares == 1 || rank_in_cluster<C>() == 0)) finish(t, group, sum);
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
