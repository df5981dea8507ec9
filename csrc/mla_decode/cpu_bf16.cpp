// mla_decode of bf16 queries on the bf16 dot product: the maths of cpu.cpp, over rows as they lie in the cache.
//
// Scores:  queries and keys are exact in bf16, and so are their products in fp32; the softmax is fp32.
// Output:  a dot product adds two tokens at a time to a column, so that the weights are rounded to bf16. It is divided
//          by the fp32 sum of the rounded weights: what they have in common, all of it for a row that sees one token,
//          cancels, and the error is up to a third smaller than over the sum of the unrounded ones, which only the
//          log-sum-exp takes.
// FP8:     codes are exact in bf16 and decoded once a block; the scale of 128 columns of a row goes to the fp32 sums of
//          those columns in the scores, and to the weights, before they are rounded, in the output; so there is a sum
//          for each 128.
// Tiling:  blocks of kTokens cached tokens, used by every row of s_q * h_q queries. Scores: kBlock columns of the block
//          are transposed into L1, so that the lanes of a register are tokens (nothing to add up across lanes, and a
//          scale is one more multiply-add in 64); kTileQ queries by kTokens tokens in registers. Output: 32 columns of
//          the block in L1, kTileW queries by the two registers that interleaving two tokens gives; the output stays
//          in that order of columns until it is written.
// Floor:   as in cpu.cpp; the dot product does twice the flops of fp32 in the same time.
#include "common/cpu/bf16_dot.h"
#include "mla_decode/cpu_work.h"

namespace deepseek_kernels::avx512_bf16 {
namespace {

constexpr int kTileQ = 4, kTileW = 8;
constexpr int64_t kBlock = 128;  // columns that share a scale in an FP8 row

// to[j][i] = dword j of row i, for 16 rows.
inline void transpose(const uint16_t* const* row, int64_t c, __m512i* to, int64_t stride) {
  Vec v[16];
  for (int i = 0; i < 16; ++i) v[i] = {_mm512_castsi512_ps(_mm512_loadu_si512(row[i] + c))};
  deepseek_kernels::transpose(v);
  for (int j = 0; j < 16; ++j) to[j * stride] = _mm512_castps_si512(v[j].v);
}

template <bool kFp8>
struct Bf16Kernel : MlaWork {
  static constexpr Dtype kDtype = Dtype::kBf16;
  static constexpr int kTokens = kMlaTokens;
  static constexpr int kScales = 5;  // of an FP8 row; the last, of its rotated part, is 1
  const int64_t d_qk;
  uint16_t *weights, *tile;

  Bf16Kernel(const MlaDecodeCpuParams& p, float* w)
      : MlaWork(p, w, kTokens),
        d_qk(p.d_latent + p.d_rope),
        weights(reinterpret_cast<uint16_t*>(scratch)),
        tile(weights + rows * kTokens) {}

  struct Block {
    const uint16_t* row[kTokens];                              // of zeros for tokens that are past the last or absent
    float scale[kScales][kTokens], inverse[kScales][kTokens];  // inverse: 0 for a scale that has none
    bool absent[kTokens], any_absent;
  };

  // In the order of the columns, as if the weights had not been rounded.
  Vec value(const State& from, int64_t i, int64_t c) const {
    alignas(64) static constexpr int32_t kOrder[2][16] = {
        {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23},
        {8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31}};
    const float* pair = from.out + i * value_width + c / 32 * 32;
    const __m512 v = _mm512_permutex2var_ps(_mm512_loadu_ps(pair), _mm512_load_si512(kOrder[c / 16 % 2]),
                                            _mm512_loadu_ps(pair + 16));
    const float mass = from.mass[i * kMlaMasses + (kFp8 ? c / kBlock : 0)];
    return Vec{v} * splat(mass == 0.f ? 1.f : from.total[i] / mass);
  }

  void start(int64_t) const { clear(); }

  static void decode(const char* row, uint16_t* to) {
    const E4m3Decoder decoder;
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the decoder's
    for (int c = 0; c < 512; c += 64) {
      __m512i out[2];
      decoder(_mm512_permutexvar_epi64(order, _mm512_loadu_si512(row + c)), out);
      _mm512_storeu_si512(to + c, out[0]);
      _mm512_storeu_si512(to + c + 32, out[1]);
    }
    std::memcpy(to + 512, row + 528, 128);
  }

  void gather(int64_t b, int64_t begin, int64_t count, Block& block) const {
    std::memset(tile, 0, sizeof(uint16_t) * size_t(d_qk));
    block.any_absent = false;
    for (int64_t t = 0; t < kTokens; ++t) {
      const char* row = t < count ? token(b, begin + t) : nullptr;
      block.absent[t] = row == nullptr;
      block.any_absent |= t < count && row == nullptr;
      block.row[t] = row == nullptr ? tile : reinterpret_cast<const uint16_t*>(row);
      if (!kFp8) continue;
      for (int s = 0; s < kScales; ++s) block.scale[s][t] = block.inverse[s][t] = 1.f;
      if (row == nullptr) continue;
      for (int s = 0; s < kScales - 1; ++s) {
        float scale;
        std::memcpy(&scale, row + 512 + 4 * s, 4);
        block.scale[s][t] = scale;
        block.inverse[s][t] = std::isnormal(scale) ? 1.f / scale : 0.f;
      }
      uint16_t* to = tile + (t + 1) * d_qk;
      decode(row, to);
      block.row[t] = to;
    }
  }

  // scores (+)= scale * products of kTileQ queries from i with kN * 16 tokens over the columns of `panel`.
  template <int kN>
  void dot_tile(int64_t b, int64_t i, int64_t begin, int64_t columns, const __m512i* panel, const __m512* scale) const {
    const char* a[kTileQ];
    for (int r = 0; r < kTileQ; ++r) a[r] = query(b, smaller(i + r, rows - 1)) + begin * 2;
    __m512 acc[kTileQ][kN];
    for (auto& row : acc)
      for (__m512& v : row) v = _mm512_setzero_ps();
    for (int64_t c = 0; c < columns / 2; ++c) {
      for (int r = 0; r < kTileQ; ++r) {
        int32_t two;
        std::memcpy(&two, a[r] + c * 4, 4);
        const __m512i x = _mm512_set1_epi32(two);
        for (int n = 0; n < kN; ++n) acc[r][n] = dot(acc[r][n], x, panel[c * kN + n]);
      }
    }
    for (int r = 0; r < kTileQ && i + r < rows; ++r) {
      for (int n = 0; n < kN; ++n) {
        float* s = scores + (i + r) * kTokens + n * 16;
        _mm512_storeu_ps(s, begin == 0 ? _mm512_mul_ps(acc[r][n], scale[n])
                                       : _mm512_fmadd_ps(acc[r][n], scale[n], _mm512_loadu_ps(s)));
      }
    }
  }

  template <int kN>
  void dot_all(int64_t b, const Block& block) const {
    __m512i panel[kBlock / 2 * kN];
    for (int64_t begin = 0; begin < d_qk; begin += kBlock) {
      const int64_t columns = smaller(kBlock, d_qk - begin);
      for (int64_t c = 0; c < columns; c += 32) {
        for (int n = 0; n < kN; ++n) transpose(block.row + n * 16, begin + c, panel + c / 2 * kN + n, kN);
      }
      __m512 scale[kN];
      for (int n = 0; n < kN; ++n) {
        scale[n] = _mm512_set1_ps(p.scale);
        if (kFp8) scale[n] = _mm512_mul_ps(scale[n], _mm512_loadu_ps(block.scale[begin / kBlock] + n * 16));
      }
      for (int64_t i = 0; i < rows; i += kTileQ) dot_tile<kN>(b, i, begin, columns, panel, scale);
    }
  }

  // weights = scores, times scale number s of an FP8 row; their sum, the scale taken out again, is mass number s.
  void round_weights(const Block& block, int64_t s) const {
    for (int64_t i = 0; i < rows; ++i) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t t = 0; t < kTokens; t += 16) {
        const __m512 w = _mm512_loadu_ps(scores + i * kTokens + t);
        const __m512 scaled = kFp8 ? _mm512_mul_ps(w, _mm512_loadu_ps(block.scale[s] + t)) : w;
        const __m256i bits = (__m256i)_mm512_cvtneps_pbh(scaled);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i * kTokens + t), bits);
        __m512 applied = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        if (kFp8) {
          const __m512 inverse = _mm512_loadu_ps(block.inverse[s] + t);
          applied =
              _mm512_mask_mul_ps(w, _mm512_cmp_ps_mask(inverse, _mm512_setzero_ps(), _CMP_NEQ_OQ), applied, inverse);
        }
        sum = _mm512_add_ps(sum, applied);
      }
      float& mass = state.mass[i * kMlaMasses + s];
      mass = mass * alpha[i] + _mm512_reduce_add_ps(sum);
    }
  }

  template <int kM>
  void weigh(int64_t i, int64_t c, const Block& block, int64_t count) const {
    __m512 acc[kM][2];
    for (int r = 0; r < kM; ++r) {
      const float* out = state.out + (i + r) * value_width + c;
      const __m512 factor = _mm512_set1_ps(alpha[i + r]);
      acc[r][0] = _mm512_mul_ps(_mm512_loadu_ps(out), factor);
      acc[r][1] = _mm512_mul_ps(_mm512_loadu_ps(out + 16), factor);
    }
    const uint16_t* w = weights + i * kTokens;
    for (int64_t t = 0; t < count; t += 2) {
      const __m512i even = _mm512_loadu_si512(block.row[t] + c), odd = _mm512_loadu_si512(block.row[t + 1] + c);
      const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
      for (int r = 0; r < kM; ++r) {
        int32_t two;
        std::memcpy(&two, w + r * kTokens + t, 4);
        const __m512i x = _mm512_set1_epi32(two);
        acc[r][0] = dot(acc[r][0], low, x);
        acc[r][1] = dot(acc[r][1], high, x);
      }
    }
    for (int r = 0; r < kM; ++r) {
      float* out = state.out + (i + r) * value_width + c;
      _mm512_storeu_ps(out, acc[r][0]);
      _mm512_storeu_ps(out + 16, acc[r][1]);
    }
  }

  void attend(int64_t b, int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    Block block;
    gather(b, begin, count, block);
    switch ((count + 15) / 16) {
      case 1:
        dot_all<1>(b, block);
        break;
      case 2:
        dot_all<2>(b, block);
        break;
      case 3:
        dot_all<3>(b, block);
        break;
      default:
        dot_all<4>(b, block);
    }
    soften<kTokens>(b, begin, count, block.any_absent ? block.absent : nullptr);
    for (int64_t c = 0; c < p.d_latent; c += 32) {
      if (c == 0 || (kFp8 && c % kBlock == 0)) round_weights(block, c / kBlock);
      int64_t i = 0;
      for (; i + kTileW <= rows; i += kTileW) weigh<kTileW>(i, c, block, count);
      for (; i + 2 <= rows; i += 2) weigh<2>(i, c, block, count);
      for (; i < rows; ++i) weigh<1>(i, c, block, count);
    }
  }
};

}  // namespace

void mla_decode(const MlaDecodeCpuParams& p, int threads) {
  if (p.dtype != Dtype::kBf16 || p.d_latent % 32 != 0 || p.d_rope % 32 != 0) return avx512::mla_decode(p, threads);
  if (p.b * p.s_q * p.h_q == 0) return;
  p.fp8 ? decode_all<Bf16Kernel<true>>(p, threads) : decode_all<Bf16Kernel<false>>(p, threads);
}

}  // namespace deepseek_kernels::avx512_bf16
