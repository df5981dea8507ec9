// What fp8_matmul and fp8_grouped_matmul do on Hopper with the sums of a tile: add, round, stage, store.
//
// A wave's sums are rounded into boxes of a staging buffer (stmatrix for bf16; transposed where the weights are x),
// from where TMA stores them while the next tile is multiplied. TMA clips at the edges of d. Where rows of a box belong
// to somebody else (kMaskRows), the threads copy those that do not.
#pragma once
#include "copy.cuh"
#include "dtype.h"
#include "fp8_sm90.cuh"
#include "numeric.cuh"

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

// d [.., columns] and what is added to the products.
struct Output {
  void* d;
  int64_t ld, columns;
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

template <class C>
DEVICE_FN uint8_t* staged(uint8_t* staging, int row, int column) {
  const int byte = column % C::kBoxN * C::kSize;
  const bool plain = C::kSwizzle == Swizzle::kNone || BUG(staging_not_swizzled);
  return staging + column / C::kBoxN * (C::kBoxM * C::kBoxRowBytes) +
         (plain ? row * C::kBoxRowBytes + byte : swizzled_offset(row, byte, C::kBoxRowBytes));
}

template <class C>
DEVICE_FN void stage(uint8_t* staging, const float (&sum)[C::kSums]) {
  const int lane = threadIdx.x % 32;
  if constexpr (C::kSize == 2) {
    // Matrix `lane / 8` of an stmatrix lies at rows 8 * (lane / 8 % 2), columns 8 * (lane / 16) of the wave's product.
    const int x = int(threadIdx.x) % kGroupThreads / 32 * 16 + lane / 8 % 2 * 8 + (C::kSwap ? 0 : lane % 8);
#pragma unroll
    for (int first = 0; first < C::kCols; first += 16) {
      const int y = first + lane / 16 * 8 + (C::kSwap ? lane % 8 : 0);
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4 && first / 2 + 2 * i < C::kSums; ++i)
        words[i] = to_word<typename C::Out>(&sum[first / 2 + 2 * i]);
      uint8_t* const row = staged<C>(staging, C::kSwap ? y : x, C::kSwap ? x : y);
      if constexpr (!C::kSwap) {
        stmatrix_x4(row, words[0], words[1], words[2], words[3]);
      } else if constexpr (C::kCols == 8) {
        stmatrix_x2_trans(row, words[0], words[1]);
      } else {
        stmatrix_x4_trans(row, words[0], words[1], words[2], words[3]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < C::kSums; i += 2)
      *reinterpret_cast<float2*>(staged<C>(staging, wave_row() + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2)) =
          make_float2(sum[i], sum[i + 1]);
  }
}

// The first `rows` of a wave's box, by all threads of its warpgroup.
template <class C>
DEVICE_FN void copy_rows(uint8_t* staging, const Output& out, int row0, int column0, int rows) {
  constexpr int kElements = 16 / C::kSize, kChunks = C::kSpanN / kElements;
  for (int i = threadIdx.x % kGroupThreads; i < rows * kChunks; i += kGroupThreads) {
    const int row = i / kChunks, column = i % kChunks * kElements;
    if (column0 + column < out.columns || BUG(columns_unmasked))
      store16(static_cast<typename C::Out*>(out.d) + (row0 + row) * out.ld + column0 + column,
              *reinterpret_cast<const uint4*>(staged<C>(staging, row, column)));
  }
}

template <class C, bool kMaskRows>
DEVICE_FN void finish_tile(typename C::Smem& s, const TensorMap& map, const Output& out, const MatmulTile& t, int group,
                           float (&sum)[C::kWaves][C::kSums]) {
  const bool stores = threadIdx.x % kGroupThreads == 0;
  if (!BUG(store_wait_missing)) {
    if (stores) tma_store_wait<0>();  // the previous tile has left the staging buffer
    named_barrier_sync(1 + group, kGroupThreads);
  }
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
    const int first = (group * C::kWaves + wave) * kWaveRows;
    const int row = C::kSwap ? 0 : first, column = C::kSwap ? first : 0;
    add_bias_and_previous<C>(out, t.row + row, t.column + column, t.rows - row, sum[wave]);
    stage<C>(s.d[group][wave], sum[wave]);
  }
  if (!BUG(fence_proxy_async_missing)) fence_proxy_async();
  if (!BUG(barrier_before_store_missing)) named_barrier_sync(1 + group, kGroupThreads);
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
    const int first = (group * C::kWaves + wave) * kWaveRows;
    const int row = C::kSwap ? 0 : first, column = t.column + (C::kSwap ? first : 0), rows = t.rows - row;
    uint8_t* staging = s.d[group][wave];
    if (!kMaskRows || rows >= C::kBoxM || BUG(tails_stored_whole)) {
      if (stores) {
#pragma unroll
        for (int box = 0; box < C::kSpanN / C::kBoxN; ++box)
          tma_store_2d(staged<C>(staging, 0, box * C::kBoxN), map, column + box * C::kBoxN, t.row + row);
      }
    } else {
      copy_rows<C>(staging, out, t.row + row, column, rows);
    }
  }
  if (stores) tma_store_commit();
}

}  // namespace deepseek_kernels::fp8
