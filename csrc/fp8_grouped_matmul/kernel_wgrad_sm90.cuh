// d[e] (+)= sum over the 128-wide blocks c of columns of expert e of
//           scale_grad[:, c] * scale_a[:, c] * (grad_t[:, c] . a_t[:, c]^T)      fp32 [n, k], for every expert e
// Without offsets there is one expert, and it has all columns: the weight gradient of fp8_matmul.
//
// Tiling:   kTileM of n by kTileN of k, 128 columns a stage, as in common/fp8_sm90.cuh with grad_t as x and a_t as y.
//           Every expert has the same tiles, so that a tile's number gives its expert by a division; only how many
//           blocks to sum depends on the offsets, which every role adds up as it goes from tile to tile. The CTAs work
//           on one expert at a time, all with the same number of blocks: no tile waits for a longer one of its wave.
//           A cluster's tiles lie side by side in one expert, and have x in common (along k) or y (along n).
// Why:      each product is multiplied by two scales and added, which is 2 instructions an element instead of the 1 of
//           128x128 scales: 4 * kTileM * kTileN / 256 issue slots a stage and SM sub-partition, half of the time of the
//           wgmma, and hidden while the other warpgroup's wgmma runs. The scales of y are read from shared memory when
//           a product is complete, because kTileN / 4 registers more do not fit beside the sums; they stay there for a
//           turn of the stages longer than the operands.
//           The sums go to memory from the registers, in full 32-byte sectors: a staged fp32 tile of 256x128 would take
//           128 of the 227 KB, and leave one stage. Those of 128x128 are staged, and TMA stores them, or adds, while
//           the next tile is multiplied. Operands from L2 for each stage, in bytes a clock of wgmma time and SM:
//           256x128 48, or 32 with x in common; 128x192 53, or 37 with y; 128x128 64, or 48.
// Order:    a sum is added to what d holds once, in one rounding. k is not split: with 448 tiles of 256x128 for the
//           smallest gradient of a V3 expert there is nothing to gain, and d would be written twice.
// Bytes:    C*(n + k) + 4*(n + k)*C/128 + 4*E*n*k (twice where it is added to).
//           E=8, 4096 rows each, n=4096, k=7168: 1.32 GB, 0.28 ms at 4.8 TB/s, against 0.97 ms of multiplication at
//           1979 TFLOP/s.
#pragma once
#include "common/fp8_sm90_store.cuh"
#include "params.h"

namespace deepseek_kernels::fp8_grouped_matmul {
using namespace fp8;

// kStaged: the sums leave through shared memory, while the next tile is multiplied.
template <int kTileM_, int kTileN_, int kClusterM_, int kClusterN_, bool kStaged_ = false>
struct WgradConfig : Config<std::conditional_t<kStaged_, float, void>, kTileM_, kTileN_, kTileM_, kTileN_,
                            kClusterM_ * kClusterN_, (kClusterN_ > 1) ? Shared::kX : Shared::kY, 0> {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kClusterM = kClusterM_, kClusterN = kClusterN_;
  static constexpr bool kStaged = kStaged_, kSwap = false;
  static constexpr int kSize = 4, kBoxM = kWaveRows, kBoxN = 32, kBoxRowBytes = kBoxN * kSize;
  static constexpr Swizzle kSwizzle = Swizzle::k128;
  static_assert((kClusterM == 1 || kClusterN == 1) && kTileN % kBoxN == 0);
};

struct WgradMaps {
  OperandMaps operands;
  TensorMap d;  // where the sums are staged
};

struct WgradTile : Tile {
  int expert;
};

// The tiles of a CTA, expert after expert.
template <class C>
class WgradWork {
 public:
  DEVICE_FN explicit WgradWork(const Fp8GroupedWgradParams& p)
      : p_(p),
        rank_(rank_in_cluster<C>()),
        raster_{int(ceil_div<int64_t>(p.n, C::kTileM * C::kClusterM)),
                int(ceil_div<int64_t>(p.k, C::kTileN * C::kClusterN)), 0},
        index_(int(blockIdx.x) / C::kCluster),
        end_block_(p.expert_offsets ? 0 : num_blocks()),
        rows_(p.expert_offsets ? offset(0) : 0) {
    raster_.height = p.raster < raster_.rows ? p.raster : raster_.rows;
    find_blocks();
  }
  DEVICE_FN bool done() const { return index_ >= raster_.size() * p_.num_experts; }
  DEVICE_FN void next() {
    index_ += int(gridDim.x) / C::kCluster;
    find_blocks();
  }
  DEVICE_FN WgradTile tile() const {
    const int local = index_ % raster_.size();
    WgradTile t;
    t.expert = expert();
    t.x0 = (raster_.row(local) * C::kClusterM + (C::kClusterM > 1 ? rank_ : 0)) * C::kTileM;
    t.y0 = (raster_.column(local) * C::kClusterN + (C::kClusterN > 1 ? rank_ : 0)) * C::kTileN;
    t.k0 = first_block_ * kTileK;
    t.k_blocks = end_block_ - first_block_;
    t.x_scales = scale_rows(p_.scale_grad, t.x0, p_.scale_grad_stride_n, p_.scale_grad_stride_c, p_.n);
    t.y_scales = scale_rows(p_.scale_a, t.y0, p_.scale_a_stride_k, p_.scale_a_stride_c, p_.k);
    return t;
  }

 private:
  DEVICE_FN int num_blocks() const { return int(ceil_div<int64_t>(p_.columns, kTileK)); }
  DEVICE_FN int expert() const { return index_ / raster_.size(); }
  DEVICE_FN int offset(int i) const {
    const int value = __ldg(p_.expert_offsets + i), most = int(p_.columns);
    if (BUG(offsets_unclamped)) return value;
    return value < 0 ? 0 : value > most ? most : value;
  }
  DEVICE_FN ScaleRows scale_rows(const float* base, int row, int64_t stride, int64_t stride_c, int64_t rows) const {
    const int block = BUG(scales_of_first_block) ? 0 : first_block_;
    return {base, row * stride + block * stride_c, stride, stride_c, rows - row, row};
  }
  // Those of the experts up to the tile's.
  DEVICE_FN void find_blocks() {
    if (p_.expert_offsets == nullptr || done()) return;
    for (; counted_ <= expert(); ++counted_) {
      int end = offset(counted_ + 1);
      if (end < rows_ && !BUG(decreasing_offset_kept)) end = rows_;
      first_block_ = end_block_;
      end_block_ += BUG(blocks_rounded_down) ? (end - rows_) / kTileK : ceil_div(end - rows_, kTileK);
      if (end_block_ > num_blocks() && !BUG(blocks_past_the_end)) end_block_ = num_blocks();
      rows_ = end;
    }
  }

  const Fp8GroupedWgradParams& p_;
  int rank_;
  Raster raster_;
  int index_;
  int counted_ = 0;  // experts whose rows are added up
  int first_block_ = 0, end_block_;
  int rows_;  // the offset after them
};

// To the rows and columns of the tile that are there.
template <class C>
DEVICE_FN void store_sums(const Fp8GroupedWgradParams& p, const WgradTile& t, int group,
                          const float (&sum)[C::kWaves][C::kSums]) {
  if (p.accumulate && t.k_blocks == 0) return;
  const int column0 = t.y0 + int(threadIdx.x) % 4 * 2, columns = BUG(columns_unmasked) ? column0 + C::kCols : int(p.k);
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
    const int row0 = t.x0 + (group * C::kWaves + wave) * kWaveRows + wave_row();
    float* const d = p.d + (BUG(first_expert_only) ? 0 : t.expert) * p.d_stride_e + row0 * p.ldd + column0;
    const bool inside[] = {row0 < p.n || BUG(rows_unmasked), row0 + 8 < p.n || BUG(rows_unmasked)};
    auto at = [&](int i) { return reinterpret_cast<float2*>(d + i / 2 % 2 * 8 * p.ldd + i / 4 * 8); };
    auto stored = [&](int i) { return inside[i / 2 % 2] && column0 + i / 4 * 8 < columns; };
    float2 value[C::kSums / 2];
#pragma unroll
    for (int i = 0; i < C::kSums; i += 2) {
      value[i / 2] = make_float2(0.f, 0.f);
      if (p.accumulate && stored(i)) value[i / 2] = *at(i);
    }
#pragma unroll
    for (int i = 0; i < C::kSums; i += 2) {
      const float2 total = make_float2(value[i / 2].x + sum[wave][i], value[i / 2].y + sum[wave][i + 1]);
      if (stored(i)) *at(i) = total;
    }
  }
}

// The same by TMA, which adds where it is asked to: an element has one addition.
template <class C>
DEVICE_FN void stage_sums(typename C::Smem& s, const TensorMap& map, const Fp8GroupedWgradParams& p, const WgradTile& t,
                          int group, const float (&sum)[C::kWaves][C::kSums]) {
  if (p.accumulate && t.k_blocks == 0) return;
  const bool stores = threadIdx.x % kGroupThreads == 0;
  wait_for_staging(group);
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) stage<C>(s.d[group][wave], sum[wave]);
  publish_staging(group);
  if (!stores) return;
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave)
    for (int column = 0; column < C::kTileN; column += C::kBoxN) {
      const uint8_t* box = staged<C>(s.d[group][wave], 0, column);
      const int x = t.y0 + column, y = t.x0 + (group * C::kWaves + wave) * kWaveRows;
      const int expert = BUG(first_expert_only) ? 0 : t.expert;
      if (p.accumulate && !BUG(stored_for_added)) {
        tma_reduce_add_3d(box, map, x, y, expert);
      } else {
        tma_store_3d(box, map, x, y, expert);
      }
    }
  tma_store_commit();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    wgrad_kernel(const __grid_constant__ WgradMaps maps, const __grid_constant__ Fp8GroupedWgradParams p) {
  DYNAMIC_SMEM(raw_smem);
  auto& s = *reinterpret_cast<typename C::Smem*>(raw_smem);
  if (threadIdx.x / 32 == 0 && elect_one()) {
    prefetch_tensor_map(maps.operands.x), prefetch_tensor_map(maps.operands.y), prefetch_tensor_map(maps.d);
    init_barriers<C>(s, maps.operands);
  }
  sync_cluster<C>();
  if (!BUG(dependency_wait_missing)) grid_dependency_wait();
  work_in_roles<C>(
      s, maps.operands, [&] { return WgradWork<C>(p); },
      [&](const WgradTile& t, int group, auto& sum) {
        if constexpr (C::kStaged) {
          stage_sums<C>(s, maps.d, p, t, group, sum);
        } else {
          store_sums<C>(p, t, group, sum);
        }
      },
      [](int) {});
}

}  // namespace deepseek_kernels::fp8_grouped_matmul
