// out = softmax(scale * q k^T) v over a paged cache whose rows are keys, and values in their first d_latent columns.
//
// Tiling:  a block of kMlaTokens cached tokens is decoded to fp32 once (L2) and used by every row of s_q * h_q queries.
//          Both products are sums of outer products in registers, kTileQ rows by two registers:
//          scores:  the lanes are tokens, so nothing is added up across lanes; kMlaColumns columns of the block are
//                   transposed into L1 at a time, and the scores accumulate in L1.
//          output:  the lanes are columns; two registers of columns of every token stay in L1 for all rows.
// Floor:   bytes of the cache for few heads; 2 * s_q * h_q * (d_qk + d_latent) flops a token for many.
#include "mla_decode/cpu_work.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

#if defined(DSK_AVX512)
constexpr int kTileQ = 8;  // 16 accumulators of 32 registers
#elif defined(DSK_AVX2)
constexpr int kTileQ = 6;  // 12 of 16
#else
constexpr int kTileQ = 2;
#endif
constexpr int64_t kPair = 2 * kLanes;

// c [kM, kPair] = factor[i] * c + a [kM, k] b [k, kPair]; no factor: 1.
template <int kM>
inline void add_product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c, int64_t ldc,
                        const float* factor) {
  Vec acc[kM][2];
  for (int i = 0; i < kM; ++i) {
    const Vec f = splat(factor == nullptr ? 1.f : factor[i]);
    acc[i][0] = load(c + i * ldc) * f;
    acc[i][1] = load(c + i * ldc + kLanes) * f;
  }
  for (int64_t t = 0; t < k; ++t) {
    const Vec low = load(b + t * ldb), high = load(b + t * ldb + kLanes);
    for (int i = 0; i < kM; ++i) {
      const Vec x = splat(a[i * lda + t]);
      acc[i][0] = fma(x, low, acc[i][0]);
      acc[i][1] = fma(x, high, acc[i][1]);
    }
  }
  for (int i = 0; i < kM; ++i) {
    store(c + i * ldc, acc[i][0]);
    store(c + i * ldc + kLanes, acc[i][1]);
  }
}

// The same for any number of rows.
inline void add_products(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c,
                         int64_t ldc, const float* factor) {
  for (int64_t i = 0; i < rows; i += kTileQ) {
    with_count<kTileQ>(int(smaller(rows - i, kTileQ)), [&](auto tag) {
      add_product<decltype(tag)::kCount>(a + i * lda, lda, b, ldb, k, c + i * ldc, ldc,
                                         factor == nullptr ? nullptr : factor + i);
    });
  }
}

template <Dtype kDtypeOf>
struct Fp32Kernel : MlaWork {
  static constexpr Dtype kDtype = kDtypeOf;
  static constexpr int kTokens = kMlaTokens, kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const int64_t width;
  float *queries, *tile, *panel;

  Fp32Kernel(const MlaDecodeCpuParams& p, float* w)
      : MlaWork(p, w, kTokens),
        width(mla_align(p.d_latent + p.d_rope)),
        queries(scratch),
        tile(queries + rows * width),
        panel(tile + kTokens * width) {}

  Vec value(const State& from, int64_t i, int64_t c) const { return load(from.out + i * value_width + c); }

  void start(int64_t b) const {
    const int64_t d_qk = p.d_latent + p.d_rope;
    const Vec scale = splat(p.scale);
    for (int64_t i = 0; i < rows; ++i) {
      const char* from = query(b, i);
      float* to = queries + i * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        store(to + c, load_some<kDtype>(from + c * kBytes, d_qk - c < 0 ? 0 : d_qk - c) * scale);
      }
    }
    clear();
  }

  void decode(const char* row, float* to) const {
    const int64_t d_qk = p.d_latent + p.d_rope;
    if (p.fp8) {  // 512 e4m3 | 4 fp32 scales | 64 bf16
      for (int64_t c = 0; c < 512; c += kLanes) {
        float scale;
        std::memcpy(&scale, row + 512 + c / 128 * 4, 4);
        store(to + c, load_e4m3(reinterpret_cast<const uint8_t*>(row) + c) * splat(scale));
      }
      for (int64_t c = 0; c < 64; c += kLanes) store(to + 512 + c, load_as<Dtype::kBf16>(row + 528 + c * 2));
      return;
    }
    int64_t c = 0;
    for (; c + kLanes <= d_qk; c += kLanes) store(to + c, load_as<kDtype>(row + c * kBytes));
    if (c < d_qk) store(to + c, load_part<kDtype>(row + c * kBytes, int(d_qk - c))), c += kLanes;
    for (; c < width; c += kLanes) store(to + c, zero());
  }

  // panel [kMlaColumns, kTokens] = columns [begin, begin + kMlaColumns) of the tile, transposed.
  void transpose_columns(int64_t begin) const {
    for (int64_t t = 0; t < kTokens; t += kLanes) {
      for (int64_t c = 0; c < kMlaColumns; c += kLanes) {
        Vec v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load(tile + (t + i) * width + begin + c);
        transpose(v);
        for (int i = 0; i < kLanes; ++i) store(panel + (c + i) * kTokens + t, v[i]);
      }
    }
  }

  void attend(int64_t b, int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    bool absent[kTokens] = {}, any_absent = false;
    for (int64_t t = 0; t < kTokens; ++t) {
      const char* row = t < count ? token(b, begin + t) : nullptr;
      absent[t] = row == nullptr;
      any_absent |= absent[t] && t < count;
      if (absent[t])
        std::memset(tile + t * width, 0, sizeof(float) * size_t(width));
      else
        decode(row, tile + t * width);
    }
    std::memset(scores, 0, sizeof(float) * size_t(rows * kTokens));
    for (int64_t c = 0; c < width; c += kMlaColumns) {
      transpose_columns(c);
      for (int64_t t = 0; t < count; t += kPair) {
        add_products(rows, queries + c, width, panel + t, kTokens, kMlaColumns, scores + t, kTokens, nullptr);
      }
    }
    soften<kTokens>(b, begin, count, any_absent ? absent : nullptr);
    for (int64_t c = 0; c < value_width; c += kPair) {
      add_products(rows, scores, kTokens, tile + c, width, count, state.out + c, value_width, alpha);
    }
  }
};

}  // namespace

void mla_decode(const MlaDecodeCpuParams& p, int threads) {
  if (p.b * p.s_q * p.h_q == 0) return;
  with_dtype(p.dtype, [&](auto tag) { decode_all<Fp32Kernel<decltype(tag)::kDtype>>(p, threads); });
}

}  // namespace deepseek_kernels::DSK_ISA
