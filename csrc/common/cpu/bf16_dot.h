// The products of rows_matmul.h on processors with a fast bf16 dot product (VDPBF16PS) and byte permutes (VBMI).
//
// e4m3 is exact in bf16, and so is every product in fp32: only the order of the sum differs. Codes are decoded 64 at a
// time by two table look-ups; interleaving the bytes leaves them in another order, the same for both operands of a sum.
//
// Tiling:  kRowsN weight rows by kRowsM rows of a: a partial sum over the 128 columns that share scales, and a running
// total.
//          m <= kRowsM: the weight goes from memory through the decode into the dot products.
//          m >  kRowsM: kPanel rows by kColumns columns of it are decoded into L1 and used for every tile of a, whose
//          rows then stay in L1 for the whole panel.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/cpu/slice.h"

namespace deepseek_kernels {
namespace {

constexpr int kRowsM = 4, kRowsN = 4;           // 16 partial sums in registers; the totals are touched once a block
constexpr int64_t kPanel = 16, kColumns = 512;  // weight rows and columns decoded at a time: 16 KiB
constexpr int64_t kBlockColumns = 128, kStep = 64;
constexpr int64_t kPrefetch = 1024;  // bytes ahead

inline int64_t padded_columns(int64_t k) { return (k + kBlockColumns - 1) / kBlockColumns * kBlockColumns; }

// Floats of scratch that one thread needs for m rows.
inline int64_t dot_scratch(int64_t m) { return kPanel * kColumns / 2 + (slice_rows(m) + kRowsM) * kPanel * 16; }

// The bf16 of each non-negative e4m3 code, as its high and low bytes.
struct E4m3Tables {
  uint8_t high[128], low[128];
  constexpr E4m3Tables() : high(), low() {
    for (int code = 0; code < 128; ++code) {
      uint32_t bits = (uint32_t(code) << 20) + (120u << 23);
      if (code == 127) bits = 0x7FC00000;
      if (code < 8) {  // code * 2^-9
        const int top = code >= 4 ? 2 : code >= 2 ? 1 : 0;
        bits = code == 0 ? 0 : uint32_t(118 + top) << 23 | (uint32_t(code) << (23 - top) & 0x7FFFFF);
      }
      high[code] = uint8_t(bits >> 24), low[code] = uint8_t(bits >> 16);
    }
  }
};
constexpr E4m3Tables kTables;

struct E4m3Decoder {
  __m512i high0 = _mm512_loadu_si512(kTables.high), high1 = _mm512_loadu_si512(kTables.high + 64);
  __m512i low0 = _mm512_loadu_si512(kTables.low), low1 = _mm512_loadu_si512(kTables.low + 64);

  void operator()(__m512i codes, __m512i (&out)[2]) const {
    const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
    const __m512i low = _mm512_permutex2var_epi8(low0, codes, low1);  // looks at the lower 7 bits
    const __m512i high = _mm512_permutex2var_epi8(high0, codes, high1);
    const __m512i signed_high = _mm512_ternarylogic_epi32(high, codes, sign, 0xF8);  // high | (codes & sign)
    out[0] = _mm512_unpacklo_epi8(low, signed_high);
    out[1] = _mm512_unpackhi_epi8(low, signed_high);
  }
};

inline __m512i load_bytes(const void* p, int64_t count) {
  if (count >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(count <= 0 ? 0 : (uint64_t(1) << count) - 1, p);
}

inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// e4m3 [k] -> bf16 [padded_columns(k)] in the decoder's order, zero past k.
inline void decode_row(const uint8_t* from, int64_t k, uint16_t* to) {
  const E4m3Decoder decode;
  for (int64_t c = 0; c < padded_columns(k); c += kStep) {
    __m512i out[2];
    decode(load_bytes(from + c, k - c), out);
    _mm512_storeu_si512(to + c, out[0]);
    _mm512_storeu_si512(to + c + 32, out[1]);
  }
}

struct DotRow {  // of a: bf16 [padded_columns(k)], and the scale of each 128 columns (nullptr: none, or a row of zeros)
  const uint16_t* value;
  const float* scale;
};

// e4m3 rows with a scale for each 128 x 128; a tile of kRowsN rows lies within one block of rows.
struct E4m3Rows {
  const uint8_t* b;
  const float* scale_b;
  int64_t ldb, scale_stride_n, scale_stride_k, scale_a_stride_k, k;
  static constexpr bool kDecoded = true;

  float scale(const DotRow& a, int64_t j, int64_t block) const {
    return a.scale == nullptr ? 0.f
                              : a.scale[block * scale_a_stride_k] *
                                    scale_b[j / kBlockColumns * scale_stride_n + block * scale_stride_k];
  }
  void load(const E4m3Decoder& decode, int64_t j, int64_t c, __m512i (&out)[2]) const {
    const uint8_t* p = b + j * ldb + c;
    // past the end of a row comes the same column of the next tile: the rows between are being read
    __builtin_prefetch(p + (c + kPrefetch < k ? kPrefetch : kPrefetch - k + kRowsN * ldb));
    decode(load_bytes(p, k - c), out);
  }
};

// bf16 rows without scales.
struct Bf16Rows {
  const uint16_t* b;
  int64_t ldb, k;
  static constexpr bool kDecoded = false;

  float scale(const DotRow&, int64_t, int64_t) const { return 1.f; }
  void load(const E4m3Decoder&, int64_t j, int64_t c, __m512i (&out)[2]) const {
    const uint16_t* p = b + j * ldb + c;
    __builtin_prefetch(p + 512);
    __builtin_prefetch(p + 544);
    out[0] = load_bytes(p, (k - c) * 2);
    out[1] = load_bytes(p + 32, (k - c - 32) * 2);
  }
};

// totals[i][r] += the scaled sums of rows i of a and j + r of the weight over columns [begin, end), whole blocks.
// source(r, c, out) gives 64 columns of weight row r.
template <int kM, int kN, class Source, class Scale>
inline void dot_blocks(const DotRow* a, int64_t begin, int64_t end, const Source& source, const Scale& scale_of,
                       __m512 (&totals)[kM][kN]) {
  for (int64_t block = begin; block < end; block += kBlockColumns) {
    __m512 sums[kM][kN];
    for (auto& row : sums)
      for (__m512& v : row) v = _mm512_setzero_ps();
    const int64_t stop = block + kBlockColumns < end ? block + kBlockColumns : end;
    for (int64_t c = block; c < stop; c += kStep) {
      __m512i x[kM][2];
      for (int i = 0; i < kM; ++i) {
        x[i][0] = _mm512_loadu_si512(a[i].value + c);
        x[i][1] = _mm512_loadu_si512(a[i].value + c + 32);
      }
      for (int r = 0; r < kN; ++r) {
        __m512i w[2];
        source(r, c, w);
        for (int i = 0; i < kM; ++i) sums[i][r] = dot(dot(sums[i][r], x[i][0], w[0]), x[i][1], w[1]);
      }
    }
    for (int i = 0; i < kM; ++i) {
      const __m512 scale = _mm512_set1_ps(scale_of(i, block));
      for (int r = 0; r < kN; ++r) totals[i][r] = _mm512_fmadd_ps(sums[i][r], scale, totals[i][r]);
    }
  }
}

template <int kM, int kN, class Rows, class Store>
void dot_stream(const Rows& rows, const DotRow* a, int64_t j, const Store& store) {
  const E4m3Decoder decode;
  __m512 totals[kM][kN];
  for (auto& row : totals)
    for (__m512& v : row) v = _mm512_setzero_ps();
  dot_blocks<kM, kN>(
      a, 0, rows.k, [&](int r, int64_t c, __m512i(&w)[2]) { rows.load(decode, j + r, c, w); },
      [&](int i, int64_t block) { return rows.scale(a[i], j, block / kBlockColumns); }, totals);
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kN; ++r) store(i, j + r, _mm512_reduce_add_ps(totals[i][r]));
}

template <int kN, class Rows, class Store>
void dot_few(const Rows& rows, const DotRow* a, int m, int64_t j, const Store& store) {
  switch (m) {
    case 1:
      return dot_stream<1, kN>(rows, a, j, store);
    case 2:
      return dot_stream<2, kN>(rows, a, j, store);
    case 3:
      return dot_stream<3, kN>(rows, a, j, store);
    default:
      return dot_stream<4, kN>(rows, a, j, store);
  }
}

using PanelScales = float[kRowsM][kColumns / kBlockColumns];  // of a tile's rows of a with the panel, block by block

template <int kM, int kN>
void dot_tile(const DotRow* a, int64_t begin, int64_t end, const uint16_t* tile, const PanelScales& scales,
              float* partial) {
  __m512 totals[kM][kN];
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kN; ++r) totals[i][r] = _mm512_loadu_ps(partial + (i * kN + r) * 16);
  dot_blocks<kM, kN>(
      a, begin, end,
      [&](int r, int64_t c, __m512i(&w)[2]) {
        const uint16_t* p = tile + r * kColumns + (c - begin);
        w[0] = _mm512_loadu_si512(p), w[1] = _mm512_loadu_si512(p + 32);
      },
      [&](int i, int64_t block) { return scales[i][(block - begin) / kBlockColumns]; }, totals);
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kN; ++r) _mm512_storeu_ps(partial + (i * kN + r) * 16, totals[i][r]);
}

// kM rows of a times the `count` weight rows of a panel, whose partial sums are kept row by row of the panel.
template <int kM, class Rows>
void dot_panel(const Rows& rows, const DotRow* a, int64_t j, int64_t count, int64_t begin, int64_t end,
               const uint16_t* tile, float* partial) {
  PanelScales scales;
  for (int i = 0; i < kM; ++i) {
    for (int64_t c = begin; c < end; c += kBlockColumns) {
      scales[i][(c - begin) / kBlockColumns] = rows.scale(a[i], j, c / kBlockColumns);
    }
  }
  int64_t r = 0;
  for (; r + kRowsN <= count; r += kRowsN) {
    dot_tile<kM, kRowsN>(a, begin, end, tile + r * kColumns, scales, partial + r * kM * 16);
  }
  for (; r < count; ++r) dot_tile<kM, 1>(a, begin, end, tile + r * kColumns, scales, partial + r * kM * 16);
}

template <class Rows, class Store>
void dot_many(const Rows& rows, const DotRow* a, int m, int64_t j, int64_t count, float* scratch, const Store& store) {
  const E4m3Decoder decode;
  uint16_t* tile = reinterpret_cast<uint16_t*>(scratch);
  float* partial = scratch + kPanel * kColumns / 2;
  std::memset(partial, 0, sizeof(float) * size_t(m * count) * 16);
  for (int64_t begin = 0; begin < rows.k; begin += kColumns) {
    const int64_t end = begin + kColumns < rows.k ? begin + kColumns : rows.k;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = begin; c < end; c += kStep) {
        __m512i w[2];
        rows.load(decode, j + r, c, w);
        uint16_t* p = tile + r * kColumns + (c - begin);
        _mm512_storeu_si512(p, w[0]);
        _mm512_storeu_si512(p + 32, w[1]);
      }
    }
    int i = 0;
    for (; i + kRowsM <= m; i += kRowsM) {
      dot_panel<kRowsM>(rows, a + i, j, count, begin, end, tile, partial + i * count * 16);
    }
    float* rest = partial + i * count * 16;
    if (m - i == 3) dot_panel<3>(rows, a + i, j, count, begin, end, tile, rest);
    if (m - i == 2) dot_panel<2>(rows, a + i, j, count, begin, end, tile, rest);
    if (m - i == 1) dot_panel<1>(rows, a + i, j, count, begin, end, tile, rest);
  }
  for (int i = 0; i < m; i += kRowsM) {
    const int rows_here = m - i < kRowsM ? m - i : kRowsM;
    for (int64_t r = 0; r < count; ++r) {
      // a tile of kRowsN weight rows keeps [row of a][weight row]; a single weight row keeps [row of a]
      const int64_t first = r / kRowsN * kRowsN, width = first + kRowsN <= count ? kRowsN : 1;
      const float* tile_sums = partial + i * count * 16 + (width == 1 ? r : first) * rows_here * 16;
      for (int q = 0; q < rows_here; ++q) {
        const float* v = tile_sums + (q * width + (width == 1 ? 0 : r - first)) * 16;
        store(i + q, j + r, _mm512_reduce_add_ps(_mm512_loadu_ps(v)));
      }
    }
  }
}

// Weight rows [begin, end), `begin` a multiple of kRowsN, for m <= kSliceRows rows of a. store(i, j, value) takes the
// results.
template <class Rows, class Store>
void dot_rows(const Rows& rows, const DotRow* a, int m, int64_t begin, int64_t end, float* scratch,
              const Store& store) {
  if (m > kRowsM) {
    for (int64_t j = begin; j < end;) {  // a panel may not cross into the next block of rows: it has other scales
      const int64_t block_end = (j / kBlockColumns + 1) * kBlockColumns;
      int64_t stop = j + kPanel < end ? j + kPanel : end;
      stop = stop < block_end ? stop : block_end;
      dot_many(rows, a, m, j, stop - j, scratch, store);
      j = stop;
    }
    return;
  }
  int64_t j = begin;
  for (; j + kRowsN <= end; j += kRowsN) dot_few<kRowsN>(rows, a, m, j, store);
  for (; j < end; ++j) dot_few<1>(rows, a, m, j, store);
}

}  // namespace
}  // namespace deepseek_kernels
