// What fp8_matmul and fp8_grouped_matmul do on Hopper with the sums of a tile: add, then round, stage and store as
// store_sm90.cuh does.
#pragma once
#include "dtype.h"
#include "fp8_sm90.cuh"
#include "store_sm90.cuh"

namespace deepseek_kernels::fp8 {

constexpr int kScaleBlockN = 128;

constexpr int scales_of_b(int tile_n) { return kScaleBlockN % tile_n == 0 ? 1 : 2; }

// A cluster has the rows of b in common where its tiles lie along m, the rows of a where they lie along n, and one tile
// where it lies along k.
constexpr Shared shared_in_cluster(int cluster_m, int cluster_n, int cluster_k, bool swap) {
  return cluster_k > 1 ? Shared::kTile : (cluster_m > cluster_n) == swap ? Shared::kX : Shared::kY;
}

// kSwap: b, the weights, are x; tiles of few rows of a then cost no more than they must.
template <class Out, int kTileM_, int kTileN_, int kClusterM_, int kClusterN_, bool kSwap_, int kReserved = 0,
          int kClusterK_ = 1>
struct MatmulConfig
    : Config<Out, kSwap_ ? kTileN_ : kTileM_, kSwap_ ? kTileM_ : kTileN_, kSwap_ ? scales_of_b(kTileN_) : kTileM_,
             kSwap_ ? kTileM_ : scales_of_b(kTileN_), kClusterM_ * kClusterN_ * kClusterK_,
             shared_in_cluster(kClusterM_, kClusterN_, kClusterK_, kSwap_), kReserved> {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_;
  static constexpr int kClusterM = kClusterM_, kClusterN = kClusterN_, kClusterK = kClusterK_;
  static constexpr bool kSwap = kSwap_;
  static constexpr int kSize = int(sizeof(Out));
  static constexpr int kSpanN = kSwap ? kWaveRows : kTileN;  // columns of a wave
  static constexpr int kSpanBytes = kSpanN * kSize;
  // A box of the staging buffer and of a TMA store.
  static constexpr int kBoxM = kSwap ? kTileM : kWaveRows;
  static constexpr int kBoxN = kSpanN / (kSpanBytes % 128 == 0 ? kSpanBytes / 128 : ceil_div(kSpanBytes, 128));
  static constexpr int kBoxRowBytes = kBoxN * kSize;
  static constexpr Swizzle kSwizzle = kBoxRowBytes == 128  ? Swizzle::k128
                                      : kBoxRowBytes == 64 ? Swizzle::k64
                                      : kBoxRowBytes == 32 ? Swizzle::k32
                                                           : Swizzle::kNone;
  static_assert((kClusterM > 1) + (kClusterN > 1) + (kClusterK > 1) <= 1);
  static_assert(kSpanN % kBoxN == 0 && kBoxRowBytes % 16 == 0);
  static_assert(!kSwap || kSize == 2);
};

struct MatmulMaps {
  OperandMaps operands;
  TensorMap d;
};

// d and what is added to the products.
struct Output : Result {
  const void* bias;  // [columns] or nullptr
  Dtype bias_dtype;
  bool accumulate;
};

// `row`, `column`: where the tile begins in d; `rows` of it exist from there, and belong to it.
struct MatmulTile : Tile {
  int row, column, rows;
};

// The tile that begins at row `a0` of a and `b0` of b, and at (row, column) of d.
template <class C>
DEVICE_FN MatmulTile matmul_tile(int a0, int b0, int64_t k, const ScaleRows& a_scales, const ScaleRows& b_scales,
                                 int row, int column, int rows) {
  MatmulTile t;
  t.k_blocks = int(ceil_div<int64_t>(k, kTileK));
  t.boundary = kScaleBlockN - column % kScaleBlockN;
  t.x0 = C::kSwap ? b0 : a0, t.y0 = C::kSwap ? a0 : b0;
  t.x_scales = C::kSwap ? b_scales : a_scales, t.y_scales = C::kSwap ? a_scales : b_scales;
  t.row = row, t.column = column, t.rows = rows;
  return t;
}

DEVICE_FN float bias_at(const Output& out, int column) {
  return out.bias_dtype == Dtype::kFp32 ? __ldg(static_cast<const float*>(out.bias) + column)
                                        : to_float(static_cast<const __nv_bfloat16*>(out.bias)[column]);
}

// Of the wave whose corner is (row0, column0), of which `rows` may be read.
template <class C>
DEVICE_FN void add_bias_and_previous(const Output& out, int row0, int column0, int rows, float (&sum)[C::kSums]) {
  if (out.bias == nullptr && !out.accumulate) return;
  const auto* d = static_cast<const typename C::Out*>(out.d) + row0 * out.ld;
#pragma unroll
  for (int i = 0; i < C::kSums; ++i) {
    const int x = wave_row() + i / 2 % 2 * 8, y = i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
    const int row = C::kSwap ? y : x, column = column0 + (C::kSwap ? x : y);
    if (column >= out.columns) continue;
    if (out.bias != nullptr) sum[i] += bias_at(out, column);
    if (out.accumulate && (row < rows || BUG(previous_rows_unmasked))) sum[i] += to_float(d[row * out.ld + column]);
  }
}

template <class C, bool kMaskRows>
DEVICE_FN void finish_tile(typename C::Smem& s, const TensorMap& map, const Output& out, const MatmulTile& t, int group,
                           float (&sum)[C::kWaves][C::kSums]) {
  wait_for_staging(group);
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
    const int first = (group * C::kWaves + wave) * kWaveRows;
    const int row = C::kSwap ? 0 : first, column = C::kSwap ? first : 0;
    add_bias_and_previous<C>(out, t.row + row, t.column + column, t.rows - row, sum[wave]);
    stage<C>(s.d[group][wave], sum[wave]);
  }
  publish_staging(group);
  store_staged<C, kMaskRows>(s, map, out, t, group);
}

}  // namespace deepseek_kernels::fp8
