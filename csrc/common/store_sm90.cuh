// How the sums of a tile leave on Hopper: rounded into boxes of a staging buffer (stmatrix for 16 bits; transposed
// where the weights are x), from where TMA stores them while the next tile is multiplied. TMA clips at the edges of d.
// Where rows of a box belong to somebody else (kMaskRows), the threads copy those that do not.
//
// A Config has Out and kSize, its bytes; kSwap: x are the columns of d; kWaves times kWaveRows of x a warpgroup, kCols
// of y, kSums a thread; kSpanN: columns of d in a wave; boxes of kBoxM x kBoxN of d, kSwizzle in rows of kBoxRowBytes;
// and Smem::d [warpgroup][wave].
#pragma once
#include "copy.cuh"
#include "numeric.cuh"
#include "persistent_sm90.cuh"

namespace deepseek_kernels::hopper {

// d [.., columns], with `ld` elements between rows.
struct Result {
  void* d;
  int64_t ld, columns;
};

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
DEVICE_FN void copy_rows(uint8_t* staging, const Result& out, int row0, int column0, int rows) {
  constexpr int kElements = 16 / C::kSize, kChunks = C::kSpanN / kElements;
  for (int i = threadIdx.x % kGroupThreads; i < rows * kChunks; i += kGroupThreads) {
    const int row = i / kChunks, column = i % kChunks * kElements;
    if (column0 + column < out.columns || BUG(columns_unmasked))
      store16(static_cast<typename C::Out*>(out.d) + (row0 + row) * out.ld + column0 + column,
              *reinterpret_cast<const uint4*>(staged<C>(staging, row, column)));
  }
}

// By a math warpgroup: until its last tile has left the staging buffer.
DEVICE_FN void wait_for_staging(int group) {
  if (BUG(store_wait_missing)) return;
  if (threadIdx.x % kGroupThreads == 0) tma_store_wait<0>();
  named_barrier_sync(1 + group, kGroupThreads);
}

// After staging, before the store.
DEVICE_FN void publish_staging(int group) {
  if (!BUG(fence_proxy_async_missing)) fence_proxy_async();
  if (!BUG(barrier_before_store_missing)) named_barrier_sync(1 + group, kGroupThreads);
}

// Of the tile at row t.row, column t.column of d, which has t.rows from there.
template <class C, bool kMaskRows, class Tile>
DEVICE_FN void store_staged(typename C::Smem& s, const TensorMap& map, const Result& out, const Tile& t, int group) {
  const bool stores = threadIdx.x % kGroupThreads == 0;
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

}  // namespace deepseek_kernels::hopper
