// out[i, j] = sum over k of a[i, k] * w[j, k] for few rows a and a large weight w that is decoded on its way in.
//
// Tiling:   kTileN weight rows at a time, each read once in order; kTileM rows of a per pass; the accumulators are
//           registers of partial sums along k, added up once at the end, so nothing is transposed or packed.
//           m <= kTileM: the weight goes from memory through a decode into the multiply-adds.
//           m >  kTileM: a chunk of kChunk columns is decoded into L1 and used for every tile of a.
// Rows of a: fp32, scales already applied, zero-padded to a multiple of kLanes columns.
// Floor:    bytes of w for small m (the decode hides behind memory), 2*m*n*k flops of fp32 FMA for large m.
#pragma once
#include "common/cpu/slice.h"
#include "common/cpu/vec.h"
#include "common/cpu/weights.h"

namespace deepseek_kernels {
namespace {

#if defined(DSK_AVX512)
constexpr int kTileM = 6, kTileN = 4;  // 24 accumulators of 32 registers
#elif defined(DSK_AVX2)
constexpr int kTileM = 3, kTileN = 3;  // 9 of 16
#else
constexpr int kTileM = 2, kTileN = 2;
#endif
constexpr int64_t kChunk = 1024;

inline int64_t padded(int64_t k) { return (k + kLanes - 1) / kLanes * kLanes; }

// Floats of scratch that one thread needs for `m` rows.
inline int64_t rows_matmul_scratch(int64_t m) { return kTileN * kChunk + (slice_rows(m) + kTileM) * kTileN * kLanes; }

// acc[i][r] += a[i][k] * source(r, k) over [begin, end), all multiples of kLanes.
template <int kM, int kN, class Source>
inline void multiply(const float* const* a, const Source& source, int64_t begin, int64_t end, Vec (&acc)[kM][kN]) {
  for (int64_t k = begin; k < end; k += kLanes) {
    Vec w[kN];
    for (int r = 0; r < kN; ++r) w[r] = source(r, k);
    for (int i = 0; i < kM; ++i) {
      const Vec x = load(a[i] + k);
      for (int r = 0; r < kN; ++r) acc[i][r] = fma(x, w[r], acc[i][r]);
    }
  }
}

// One pass over kN weight rows for kM rows of a, decoding in registers.
template <int kM, int kN, class Weight, class Store>
void stream_tile(const float* const* a, const Weight& weight, int64_t j, int64_t k, const Store& store) {
  Vec acc[kM][kN];
  for (auto& row : acc)
    for (Vec& v : row) v = zero();
  for (int64_t block = 0; block < k; block += kScaleBlock) {
    const int64_t end = block + kScaleBlock < k ? block + kScaleBlock : k, whole = end - end % kLanes;
    Vec scale[kN];
    for (int r = 0; r < kN; ++r) scale[r] = weight.scale(j + r, block);
    for (int r = 0; r < kN; ++r) weight.prefetch(j + r, block);
    multiply<kM, kN>(a, [&](int r, int64_t c) { return weight.load(j + r, c, scale[r]); }, block, whole, acc);
    if (whole < end) {
      const int rest = int(end - whole);
      multiply<kM, kN>(
          a, [&](int r, int64_t c) { return weight.load_part(j + r, c, rest, scale[r]); }, whole, whole + kLanes, acc);
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kN; ++r) store(i, j + r, sum(acc[i][r]));
}

template <int kN, class Weight, class Store>
void stream_rows(const float* const* a, int m, const Weight& weight, int64_t j, int64_t k, const Store& store) {
  switch (m) {
    case 1:
      return stream_tile<1, kN>(a, weight, j, k, store);
    case 2:
      return stream_tile<2, kN>(a, weight, j, k, store);
#if defined(DSK_AVX512) || defined(DSK_AVX2)
    case 3:
      return stream_tile<3, kN>(a, weight, j, k, store);
#endif
#if defined(DSK_AVX512)
    case 4:
      return stream_tile<4, kN>(a, weight, j, k, store);
    case 5:
      return stream_tile<5, kN>(a, weight, j, k, store);
    case 6:
      return stream_tile<6, kN>(a, weight, j, k, store);
#endif
  }
}

// kM rows of a times kN decoded weight rows of `columns` in `tile`; sums continue in `partial`.
template <int kM, int kN>
void tile_step(const float* const* a, int64_t offset, const float* tile, int64_t columns, float* partial) {
  Vec acc[kM][kN];
  const float* rows[kM];
  for (int i = 0; i < kM; ++i) rows[i] = a[i] + offset;
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kN; ++r) acc[i][r] = load(partial + (i * kN + r) * kLanes);
  multiply<kM, kN>(rows, [&](int r, int64_t c) { return load(tile + r * kChunk + c); }, 0, columns, acc);
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kN; ++r) store(partial + (i * kN + r) * kLanes, acc[i][r]);
}

template <int kN, class Weight, class Store>
void chunked_rows(const float* const* a, int m, const Weight& weight, int64_t j, int64_t k, float* scratch,
                  const Store& store_result) {
  float* tile = scratch;
  float* partial = scratch + kTileN * kChunk;
  std::memset(partial, 0, sizeof(float) * size_t(m) * kN * kLanes);
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t end = begin + kChunk < k ? begin + kChunk : k;
    for (int r = 0; r < kN; ++r) {
      weight.prefetch(j + r, begin);
      for (int64_t c = begin; c < end; c += kLanes) {
        const Vec scale = weight.scale(j + r, c);
        const Vec w =
            c + kLanes <= end ? weight.load(j + r, c, scale) : weight.load_part(j + r, c, int(end - c), scale);
        store(tile + r * kChunk + (c - begin), w);
      }
    }
    const int64_t columns = padded(end - begin);
    int i = 0;
    for (; i + kTileM <= m; i += kTileM) tile_step<kTileM, kN>(a + i, begin, tile, columns, partial + i * kN * kLanes);
    for (; i < m; ++i) tile_step<1, kN>(a + i, begin, tile, columns, partial + i * kN * kLanes);
  }
  for (int i = 0; i < m; ++i)
    for (int r = 0; r < kN; ++r) store_result(i, j + r, sum(load(partial + (i * kN + r) * kLanes)));
}

// Weight rows [begin, end) for m <= kSliceRows rows of a. store(i, j, value) takes the results.
template <class Weight, class Store>
void rows_matmul(const float* const* a, int m, const Weight& weight, int64_t begin, int64_t end, int64_t k,
                 float* scratch, const Store& store) {
  int64_t j = begin;
  if (m <= kTileM) {
    for (; j + kTileN <= end; j += kTileN) stream_rows<kTileN>(a, m, weight, j, k, store);
    for (; j < end; ++j) stream_rows<1>(a, m, weight, j, k, store);
    return;
  }
  for (; j + kTileN <= end; j += kTileN) chunked_rows<kTileN>(a, m, weight, j, k, scratch, store);
  for (; j < end; ++j) chunked_rows<1>(a, m, weight, j, k, scratch, store);
}

}  // namespace
}  // namespace deepseek_kernels
