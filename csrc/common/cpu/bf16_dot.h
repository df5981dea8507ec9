// The products of rows_matmul.h on processors with a fast bf16 dot product (VDPBF16PS) and byte permutes (VBMI).
//
// e4m3 is exact in bf16, and so is every product in fp32: only the order of the sum differs. Codes are decoded 64 at a
// time by two table look-ups; interleaving the bytes leaves them in another order, the same for both operands of a sum.
//
// Tiling:  m <= kRowsM: the weight goes from memory through the decode into the dot products, kRowsN rows at a time; a
//          register holds 16 partial sums over the 128 columns that share scales, and another the running total.
//          m >  kRowsM: kPanel rows by kColumns columns of it are decoded into L1 and used for every tile of kTileM
//          rows of a. A register holds 8 columns of four weight rows, which meet 8 columns of a row of a in all of its
//          lanes of 128 bits: one sum for four rows, so few are scaled. What is decoded next is asked for line by line
//          meanwhile: memory and dot products are about as slow at m = 16.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/cpu/count.h"
#include "common/cpu/slice.h"

namespace deepseek_kernels {
namespace {

constexpr int kRowsM = 4, kRowsN = 4;           // 16 partial sums in registers; the totals are touched once a block
constexpr int64_t kPanel = 16, kColumns = 512;  // weight rows and columns decoded at a time: 16 KiB
constexpr int kTileM = 6, kFours = kPanel / 4;  // rows of a, and fours of weight rows, that meet in registers
constexpr int64_t kBlockColumns = 128, kStep = 64;
constexpr int64_t kPrefetch = 1024;  // bytes ahead

inline int64_t padded_columns(int64_t k) { return (k + kBlockColumns - 1) / kBlockColumns * kBlockColumns; }

// Floats of scratch that one thread needs for m rows.
inline int64_t dot_scratch(int64_t m) { return kPanel * kColumns / 2 + slice_rows(m) * kPanel * 4; }

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

// x[i] becomes the lanes i (128 bits) of the four.
inline void transpose_lanes(__m512i (&x)[4]) {
  const __m512i low01 = _mm512_shuffle_i32x4(x[0], x[1], 0x44), high01 = _mm512_shuffle_i32x4(x[0], x[1], 0xEE);
  const __m512i low23 = _mm512_shuffle_i32x4(x[2], x[3], 0x44), high23 = _mm512_shuffle_i32x4(x[2], x[3], 0xEE);
  x[0] = _mm512_shuffle_i32x4(low01, low23, 0x88), x[1] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
  x[2] = _mm512_shuffle_i32x4(high01, high23, 0x88), x[3] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
}

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
  static constexpr int kBytes = 1;
  const uint8_t* b;
  const float* scale_b;
  int64_t ldb, scale_stride_n, scale_stride_k, scale_a_stride_k, k;

  float scale(const DotRow& a, int64_t j, int64_t block) const {
    return a.scale == nullptr ? 0.f
                              : a.scale[block * scale_a_stride_k] *
                                    scale_b[j / kBlockColumns * scale_stride_n + block * scale_stride_k];
  }
  const void* at(int64_t j, int64_t c) const { return b + j * ldb + c; }
  void load(const E4m3Decoder& decode, int64_t j, int64_t c, __m512i (&out)[2]) const {
    const uint8_t* p = b + j * ldb + c;
    // past the end of a row comes the same column of the next tile: the rows between are being read
    __builtin_prefetch(p + (c + kPrefetch < k ? kPrefetch : kPrefetch - k + kRowsN * ldb));
    decode(load_bytes(p, k - c), out);
  }
  void load_four(const E4m3Decoder& decode, const int64_t (&j)[4], int64_t c, __m512i (&out)[8]) const {
    __m512i x[4];
    for (int r = 0; r < 4; ++r) x[r] = load_bytes(at(j[r], c), k - c);
    transpose_lanes(x);
    for (int i = 0; i < 4; ++i) {
      __m512i halves[2];
      decode(x[i], halves);
      out[i] = halves[0], out[4 + i] = halves[1];  // as decode_row has them
    }
  }
};

// bf16 rows without scales.
struct Bf16Rows {
  static constexpr int kBytes = 2;
  const uint16_t* b;
  int64_t ldb, k;

  float scale(const DotRow&, int64_t, int64_t) const { return 1.f; }
  const void* at(int64_t j, int64_t c) const { return b + j * ldb + c; }
  void load(const E4m3Decoder&, int64_t j, int64_t c, __m512i (&out)[2]) const {
    const uint16_t* p = b + j * ldb + c;
    __builtin_prefetch(p + 512);
    __builtin_prefetch(p + 544);
    out[0] = load_bytes(p, (k - c) * 2);
    out[1] = load_bytes(p + 32, (k - c - 32) * 2);
  }
  void load_four(const E4m3Decoder&, const int64_t (&j)[4], int64_t c, __m512i (&out)[8]) const {
    for (int h = 0; h < 2; ++h) {
      __m512i x[4];
      for (int r = 0; r < 4; ++r) x[r] = load_bytes(at(j[r], c + 32 * h), (k - c - 32 * h) * 2);
      transpose_lanes(x);
      for (int i = 0; i < 4; ++i) out[4 * h + i] = x[i];
    }
  }
};

// kN weight rows from j for kM rows of a.
template <int kM, int kN, class Rows, class Store>
void dot_stream(const Rows& rows, const DotRow* a, int64_t j, const Store& store) {
  const E4m3Decoder decode;
  __m512 totals[kM][kN];
  for (auto& row : totals)
    for (__m512& v : row) v = _mm512_setzero_ps();
  for (int64_t block = 0; block < rows.k; block += kBlockColumns) {
    __m512 sums[kM][kN];
    for (auto& row : sums)
      for (__m512& v : row) v = _mm512_setzero_ps();
    const int64_t stop = block + kBlockColumns < rows.k ? block + kBlockColumns : rows.k;
    for (int64_t c = block; c < stop; c += kStep) {
      __m512i x[kM][2];
      for (int i = 0; i < kM; ++i) {
        x[i][0] = _mm512_loadu_si512(a[i].value + c);
        x[i][1] = _mm512_loadu_si512(a[i].value + c + 32);
      }
      for (int r = 0; r < kN; ++r) {
        __m512i w[2];
        rows.load(decode, j + r, c, w);
        for (int i = 0; i < kM; ++i) sums[i][r] = dot(dot(sums[i][r], x[i][0], w[0]), x[i][1], w[1]);
      }
    }
    for (int i = 0; i < kM; ++i) {
      const __m512 scale = _mm512_set1_ps(rows.scale(a[i], j, block / kBlockColumns));
      for (int r = 0; r < kN; ++r) totals[i][r] = _mm512_fmadd_ps(sums[i][r], scale, totals[i][r]);
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kN; ++r) store(i, j + r, _mm512_reduce_add_ps(totals[i][r]));
}

// A panel's decoded columns [begin, end). A vector holds 8 columns of four weight rows; those of a four follow each
// other in the order in which the values of a are.
struct Panel {
  int64_t j, begin, end;  // its first weight row
  const uint16_t* values;
};

// What is decoded next, asked for line by line while this is multiplied.
template <class Rows>
struct Ahead {
  static constexpr int kLine = 64 / Rows::kBytes, kLines = int(kColumns) / kLine;  // values of a line, lines of a row
  const Rows& rows;
  int64_t j, c;
  int line, end;  // of kPanel * kLines, those yet to ask for

  void ask() {
    if (line < end) __builtin_prefetch(rows.at(j + line / kLines, c + line % kLines * kLine));
    ++line;
  }
};

// partial += the scaled products of kM rows of a with the panel: four weight rows times four parts of the sum a vector.
// `asked` lines are asked for every kStep columns. Not inlined: the loop needs every register.
template <int kM, class Rows>
[[gnu::noinline]] void dot_panel(const Rows& rows, const DotRow* a, const Panel& panel, int asked, Ahead<Rows>& ahead,
                                 float* partial) {
  const uint16_t* x[kM];
  for (int i = 0; i < kM; ++i) x[i] = a[i].value;
  const uint16_t* w = panel.values;
  for (int64_t block = panel.begin; block < panel.end; block += kBlockColumns) {
    __m512 sums[kM][kFours];
    for (auto& row : sums)
      for (__m512& v : row) v = _mm512_setzero_ps();
    for (int64_t step = block; step < block + kBlockColumns; step += kStep) {
      for (int l = 0; l < asked; ++l) ahead.ask();
      for (int64_t c = step; c < step + kStep; c += 8, w += 32) {
        __m512i v[kFours];
        for (int f = 0; f < kFours; ++f) v[f] = _mm512_loadu_si512(w + f * kColumns * 4);
        for (int i = 0; i < kM; ++i) {
          const __m512i eight = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x[i] + c)));
          for (int f = 0; f < kFours; ++f) sums[i][f] = dot(sums[i][f], eight, v[f]);
        }
      }
    }
    for (int i = 0; i < kM; ++i) {
      const __m512 scale = _mm512_set1_ps(rows.scale(a[i], panel.j, block / kBlockColumns));
      float* total = partial + i * kFours * 16;
      for (int f = 0; f < kFours; ++f, total += 16)
        _mm512_storeu_ps(total, _mm512_fmadd_ps(sums[i][f], scale, _mm512_loadu_ps(total)));
    }
  }
}

// The `count` weight rows from j, for m > kRowsM rows of a: in tiles as equal as can be. More come before `last_row`.
template <class Rows, class Store>
void dot_many(const Rows& rows, const DotRow* a, int m, int64_t j, int64_t count, int64_t last_row, float* scratch,
              const Store& store) {
  const E4m3Decoder decode;
  uint16_t* values = reinterpret_cast<uint16_t*>(scratch);
  float* partial = scratch + kPanel * kColumns / 2;
  std::memset(partial, 0, sizeof(float) * size_t(m * kFours) * 16);
  const int tiles = (m + kTileM - 1) / kTileM;
  for (int64_t begin = 0; begin < rows.k; begin += kColumns) {
    const int64_t end = padded_columns(rows.k - begin < kColumns ? rows.k : begin + kColumns);
    const Panel panel{j, begin, end, values};
    for (int64_t four = 0; four < kPanel; four += 4) {
      int64_t row[4];  // past the last it comes again, for nobody
      for (int r = 0; r < 4; ++r) row[r] = j + (four + r < count ? four + r : count - 1);
      uint16_t* to = values + four * kColumns;
      for (int64_t c = begin; c < panel.end; c += kStep, to += 4 * kStep) {
        __m512i w[8];
        rows.load_four(decode, row, c, w);
        for (int i = 0; i < 8; ++i) _mm512_storeu_si512(to + i * 32, w[i]);
      }
    }
    const bool more = panel.end < rows.k;
    Ahead<Rows> ahead{rows, more ? j : j + kPanel, more ? panel.end : 0, 0, int(kPanel) * Ahead<Rows>::kLines};
    if (!more && j + count >= last_row) ahead.end = 0;
    const int steps = int(panel.end - begin) / int(kStep) * tiles;
    const int asked = (ahead.end + steps - 1) / steps;
    for (int t = 0; t < tiles; ++t) {
      const int first = m * t / tiles, last = m * (t + 1) / tiles;
      with_count<kTileM>(last - first, [&](auto tag) {
        dot_panel<decltype(tag)::kCount>(rows, a + first, panel, asked, ahead, partial + first * kFours * 16);
      });
    }
  }
  for (int i = 0; i < m; ++i) {
    for (int64_t r = 0; r < count; r += 4) {
      const __m512 v = _mm512_loadu_ps(partial + (i * kFours + r / 4) * 16);
      const __m512 pairs = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));  // within lanes of 128 bits
      float sums[16];
      _mm512_storeu_ps(sums, _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4E)));
      for (int64_t q = 0; q < 4 && r + q < count; ++q) store(i, j + r + q, sums[q * 4]);
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
      dot_many(rows, a, m, j, stop - j, end, scratch, store);
      j = stop;
    }
    return;
  }
  int64_t j = begin;
  with_count<kRowsM>(m, [&](auto tag) {
    constexpr int kM = decltype(tag)::kCount;
    for (; j + kRowsN <= end; j += kRowsN) dot_stream<kM, kRowsN>(rows, a, j, store);
    for (; j < end; ++j) dot_stream<kM, 1>(rows, a, j, store);
  });
}

}  // namespace
}  // namespace deepseek_kernels
