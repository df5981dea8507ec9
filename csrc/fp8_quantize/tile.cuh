// A 128 x 128 tile of x in the registers of one CTA, and the maxima of its columns.
//
// Eight lanes hold a row of the tile, 16 neighbouring elements each; a thread holds the same columns of four
// neighbouring rows, so that four codes of one column are one word. A warp's load touches four whole rows of 128
// elements.
#pragma once
#include "common/fp8_block.cuh"

namespace deepseek_kernels::fp8_quantize {

constexpr int kTile = kFp8Block;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = kTile * kLanesPerBlock / kThreads;
constexpr int kQuads = kThreads / kLanesPerBlock;  // groups of kRows rows

DEVICE_FN int quad() { return threadIdx.x / kLanesPerBlock; }
DEVICE_FN int first_row() { return quad() * kRows; }                               // in the tile
DEVICE_FN int first_column() { return threadIdx.x % kLanesPerBlock * kPackSize; }  // in the tile

// Of row first_row() + lane % kRows. Every exchange leaves a lane with half of the rows it had.
template <class T>
DEVICE_FN float row_amax(const SourcePack<T> (&x)[kRows]) {
  static_assert(kRows == 4 && kLanesPerBlock == 8);
  uint32_t most[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) most[i] = pack_max_magnitudes(x[i]);
  if (BUG(lanes_not_reduced)) return largest_magnitude<T>(most[threadIdx.x % kRows]);
  auto exchange = [](int bit, uint32_t if_clear, uint32_t if_set) {
    const bool set = threadIdx.x & bit;
    const uint32_t given = __shfl_xor_sync(0xffffffffu, set ? if_clear : if_set, bit);
    return max_magnitudes<T>(set ? if_set : if_clear, given);
  };
  const uint32_t row = exchange(2, exchange(1, most[0], most[1]), exchange(1, most[2], most[3]));
  return largest_magnitude<T>(exchange(4, row, row));
}

// The divisor of each of a thread's rows, from the lanes that have row_amax.
DEVICE_FN Fp8Divisor row_divisor(const Fp8Divisor& of_my_row, int i) {
  return of_my_row.of_lane(int(threadIdx.x % 32) / kLanesPerBlock * kLanesPerBlock + i);
}

// Does this lane write the scale that it has?
DEVICE_FN bool writes_row_scale() { return threadIdx.x % kLanesPerBlock < kRows; }

// One for each column of the tile, read by eight lanes 16 columns apart: the gap puts them in different banks.
struct ColumnDivisors {
  alignas(16) Fp8Divisor divisors[kLanesPerBlock][kPackSize + 2];

  DEVICE_FN void set(int column, const Fp8Divisor& d) { divisors[column / kPackSize][column % kPackSize] = d; }
  // Of this thread's j-th column.
  DEVICE_FN const Fp8Divisor& get(int j) const { return divisors[threadIdx.x % kLanesPerBlock][j]; }
};

template <class T>
struct ColumnAmax {
  static constexpr int kWords = SourcePack<T>::kWords * 4;  // of magnitudes in a pack

  uint32_t magnitudes[kWarps][kLanesPerBlock * kWords];

  // What this warp's rows hold; readable after __syncthreads().
  DEVICE_FN void put(const SourcePack<T> (&x)[kRows]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) most = max_magnitudes<T>(most, magnitudes_of<T>(x[i].word(w)));
      most = warp_max_magnitudes<T, 32 - kLanesPerBlock>(most);
      if (lane < kLanesPerBlock) magnitudes[warp][lane * kWords + w] = most;
    }
  }

  // Of one column of the tile.
  DEVICE_FN float get(int column) const {
    constexpr int kPerWord = 4 / sizeof(T);
    uint32_t most = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = max_magnitudes<T>(most, magnitudes[w][column / kPerWord]);
    return magnitude<T>(most, column % kPerWord);
  }
};

}  // namespace deepseek_kernels::fp8_quantize
