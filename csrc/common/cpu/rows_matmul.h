// out[i, j] = sum over k of a[i, k] * w[j, k] for few rows a and a large weight w that is decoded on its way in.
//
// Tiling:   the accumulators are registers of partial sums along k, added up once at the end, so nothing is transposed.
//           m <= kTileM: kTileN weight rows at a time go from memory through a decode into the multiply-adds; a sum
//           over the columns that share a scale is multiplied by it once.
//           m >  kTileM: kPanel rows by kChunk columns are decoded into L1 and used for every tile of kTileM rows of a,
//           whose columns of the chunk stay in L1 for the whole panel.
// Rows of a: fp32, scales already applied, zero-padded to a multiple of kStep columns.
// Floor:    bytes of w for small m (the decode hides behind memory), 2*m*n*k flops of fp32 FMA for large m.
#pragma once
#include "common/cpu/count.h"
#include "common/cpu/slice.h"
#include "common/cpu/vec.h"
#include "common/cpu/weights.h"

namespace deepseek_kernels {
namespace {

#if defined(DSK_AVX512)
constexpr int kTileM = 6, kTileN = 4;  // 24 accumulators of 32 registers
#elif defined(DSK_AVX2)
constexpr int kTileM = 4, kTileN = 3;  // 12 of 16
#else
constexpr int kTileM = 2, kTileN = 2;
#endif
constexpr int kPanel = 4 * kTileN;
constexpr int64_t kChunk = 256;

inline int64_t padded(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

// Floats of scratch that one thread needs for `m` rows.
inline int64_t rows_matmul_scratch(int64_t m) { return kPanel * (kChunk + slice_rows(m) * kLanes); }

template <int kM>
inline void clear(Vec (&acc)[kM][kTileN]) {
  for (auto& row : acc)
    for (Vec& v : row) v = zero();
}

// One pass over `count` <= kTileN weight rows for kM rows of a, decoding in registers. A tile that is not full reads
// its last row again: rarely needed, so not worth code of its own.
template <int kM, class Weight, class Store>
void stream_tile(const float* const* a, const Weight& weight, int64_t j, int count, int64_t k, const Store& store) {
  typename Weight::Row rows[kTileN];
  for (int r = 0; r < kTileN; ++r) rows[r] = weight.row(j + (r < count ? r : count - 1));
  Vec totals[kM][kTileN], sums[kM][kTileN];
  clear(totals);
  Vec(&acc)[kM][kTileN] = Weight::kScaled ? sums : totals;
  const auto add = [&](int64_t c, int r, const Vec(&w)[2]) {
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < kM; ++i) acc[i][r] = fma(load(a[i] + c + h * kLanes), w[h], acc[i][r]);
  };
  for (int64_t block = 0; block < k; block += kScaleBlock) {
    const int64_t end = block + kScaleBlock < k ? block + kScaleBlock : k, whole = end - (end - block) % kStep;
    for (int r = 0; r < kTileN; ++r) rows[r].prefetch(block);
    if (Weight::kScaled) clear(sums);
    for (int64_t c = block; c < whole; c += kStep) {
      for (int r = 0; r < kTileN; ++r) {
        Vec w[2];
        rows[r].load(c, w);
        add(c, r, w);
      }
    }
    for (int r = 0; whole < end && r < kTileN; ++r) {
      Vec w[2];
      rows[r].load_part(whole, end - whole, w);
      add(whole, r, w);
    }
    for (int r = 0; Weight::kScaled && r < kTileN; ++r) {
      const Vec unit = splat(rows[r].unit(block / kScaleBlock));
      for (int i = 0; i < kM; ++i) totals[i][r] = fma(sums[i][r], unit, totals[i][r]);
    }
  }
  for (int r = 0; r < count; ++r) {
    const bool nan = rows[r].is_nan(k);
    for (int i = 0; i < kM; ++i) store(i, j + r, nan ? as_float(0x7FC00000) : sum(totals[i][r]));
  }
}

// kM rows of a times kTileN decoded weight rows of `columns` in `tile`; sums continue in `partial`.
template <int kM>
inline void tile_step(const float* const* a, const float* tile, int64_t columns, float* partial) {
  Vec acc[kM][kTileN];
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kTileN; ++r) acc[i][r] = load(partial + (i * kTileN + r) * kLanes);
  for (int64_t k = 0; k < columns; k += kLanes) {
    Vec w[kTileN];
    for (int r = 0; r < kTileN; ++r) w[r] = load(tile + r * kChunk + k);
    for (int i = 0; i < kM; ++i) {
      const Vec x = load(a[i] + k);
      for (int r = 0; r < kTileN; ++r) acc[i][r] = fma(x, w[r], acc[i][r]);
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kTileN; ++r) store(partial + (i * kTileN + r) * kLanes, acc[i][r]);
}

// A panel of `count` <= kPanel weight rows. Partial sums: [tile of rows of a][tile of weight rows][row of a][weight
// row].
template <class Weight, class Store>
void panel_rows(const float* const* a, int m, const Weight& weight, int64_t j, int count, int64_t k, float* scratch,
                const Store& store_result) {
  float* tile = scratch;
  float* partial = scratch + kPanel * kChunk;
  const int padded_count = (count + kTileN - 1) / kTileN * kTileN;
  std::memset(partial, 0, sizeof(float) * size_t(m * padded_count * kLanes));
  std::memset(tile + count * kChunk, 0, sizeof(float) * size_t((padded_count - count) * kChunk));
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t end = begin + kChunk < k ? begin + kChunk : k;
    for (int r = 0; r < count; ++r) {
      const auto row = weight.row(j + r);
      for (int64_t c = begin; c < end; c += kScaleBlock) row.prefetch(c);
      decode_columns(row, begin, end, tile + r * kChunk);
    }
    const int64_t columns = padded(end - begin);
    for (int i = 0; i < m; i += kTileM) {
      with_count<kTileM>(m - i < kTileM ? m - i : kTileM, [&](auto tag) {
        constexpr int kM = decltype(tag)::kCount;
        const float* rows[kM];
        for (int q = 0; q < kM; ++q) rows[q] = a[i + q] + begin;
        for (int r = 0; r < padded_count; r += kTileN) {
          tile_step<kM>(rows, tile + r * kChunk, columns, partial + (i * padded_count + r * kM) * kLanes);
        }
      });
    }
  }
  for (int r = 0; r < count; ++r) {
    const bool nan = weight.row(j + r).is_nan(k);
    for (int i = 0; i < m; ++i) {
      const int first = i / kTileM * kTileM, rows = m - first < kTileM ? m - first : kTileM;
      const int at = r / kTileN * kTileN * rows + (i - first) * kTileN + r % kTileN;
      const Vec v = load(partial + (first * padded_count + at) * kLanes);
      store_result(i, j + r, nan ? as_float(0x7FC00000) : sum(v));
    }
  }
}

// Weight rows [begin, end) for m <= kSliceRows rows of a. store(i, j, value) takes the results.
template <class Weight, class Store>
void rows_matmul(const float* const* a, int m, const Weight& weight, int64_t begin, int64_t end, int64_t k,
                 float* scratch, const Store& store) {
  int64_t j = begin;
  if (m <= kTileM) {
    with_count<kTileM>(m, [&](auto tag) {
      for (; j < end; j += kTileN) {
        const int count = int(end - j < kTileN ? end - j : kTileN);
        stream_tile<decltype(tag)::kCount>(a, weight, j, count, k, store);
      }
    });
    return;
  }
  for (; j < end; j += kPanel) {
    panel_rows(a, m, weight, j, int(end - j < kPanel ? end - j : kPanel), k, scratch, store);
  }
}

}  // namespace
}  // namespace deepseek_kernels
