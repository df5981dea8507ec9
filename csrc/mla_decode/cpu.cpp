// out = softmax(scale * q k^T) v over a paged cache whose rows are keys, and values in their first d_latent columns.
//
// Tiling:  the cached tokens of all sequences, in blocks of kMlaTokens, are cut into one equal run per thread, so that
// ragged
//          batches balance. A block is decoded to fp32 once (L2) and used by every row of s_q * h_q queries: scores by
//          dot products of kTileM queries with kTileN tokens, then the weighted sum kTileM queries by 4 registers of
//          columns.
// Merge:   a sequence that lies in several runs leaves one partial (output, maximum, sum) per run; they are merged in
// the
//          order of the tokens. Results depend on the number of threads in the last bits, on nothing else.
// Floor:   bytes of the cache for few heads; 2 * s_q * h_q * (d_qk + d_latent) flops a token for many.
#include "mla_decode/cpu.h"

#include "common/cpu/parallel.h"
#include "common/cpu/rows_matmul.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

inline float minus_infinity() { return as_float(0xFF800000); }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct State {  // of all rows of one sequence
  float *out, *peak, *total;
  State(float* p, int64_t rows, int64_t width) : out(p), peak(p + rows * width), total(peak + rows) {}
};

struct Worker {
  const MlaDecodeCpuParams& p;
  const int64_t rows, width, value_width;
  float *query, *scores, *alpha, *tile;
  State state;
  float* partials;

  Worker(const MlaDecodeCpuParams& p, float* w)
      : p(p),
        rows(p.s_q * p.h_q),
        width(mla_align(p.d_latent + p.d_rope)),
        value_width(mla_align(p.d_latent)),
        query(w),
        scores(query + rows * width),
        alpha(scores + rows * kMlaTokens),
        tile(alpha + rows),
        state(tile + (kMlaTokens + 4) * width, rows, value_width),
        partials(state.out + rows * (value_width + 2)) {}

  State partial(int which) const { return State(partials + which * rows * (value_width + 2), rows, value_width); }
  int64_t length(int64_t b) const {
    const int64_t n = p.seqlens_kv[b], most = p.max_pages * p.page_size;
    return n < 0 ? 0 : n < most ? n : most;
  }

  template <Dtype kDtype>
  void start(int64_t b) const {
    constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
    const int64_t d_qk = p.d_latent + p.d_rope;
    const Vec scale = splat(p.scale);
    for (int64_t i = 0; i < rows; ++i) {
      const char* from = static_cast<const char*>(p.q) +
                         (b * p.q_stride_b + i / p.h_q * p.q_stride_s + i % p.h_q * p.q_stride_h) * kBytes;
      float* to = query + i * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t left = d_qk - c;
        const Vec x = left >= kLanes ? load_as<kDtype>(from + c * kBytes)
                                     : load_part<kDtype>(from + c * kBytes, int(left > 0 ? left : 0));
        store(to + c, x * scale);
      }
      state.peak[i] = minus_infinity(), state.total[i] = 0.f;
    }
    std::memset(state.out, 0, sizeof(float) * size_t(rows * value_width));
  }

  // Cached token `t` of sequence b, or nullptr if its page does not exist.
  const char* token(int64_t b, int64_t t) const {
    const int64_t page = p.block_table[b * p.max_pages + t / p.page_size];
    if (page < 0 || page >= p.num_pages) return nullptr;
    return static_cast<const char*>(p.kv_cache) + page * p.page_bytes + t % p.page_size * p.row_bytes;
  }

  template <Dtype kDtype>
  void decode(const char* row, float* to) const {
    constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
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

  template <int kM>
  void dot(int64_t i, int64_t count) const {
    const float* a[kM];
    for (int r = 0; r < kM; ++r) a[r] = query + (i + r) * width;
    for (int64_t t = 0; t < count; t += kTileN) {
      Vec acc[kM][kTileN];
      for (auto& row : acc)
        for (Vec& v : row) v = zero();
      multiply<kM, kTileN>(a, [&](int r, int64_t c) { return load(tile + (t + r) * width + c); }, 0, width, acc);
      for (int r = 0; r < kM; ++r)
        for (int n = 0; n < kTileN && t + n < kMlaTokens; ++n) scores[(i + r) * kMlaTokens + t + n] = sum(acc[r][n]);
    }
  }

  template <int kM>
  void weigh(int64_t i, int64_t count) const {
    constexpr int kColumns = 4;
    for (int64_t c = 0; c < value_width; c += kColumns * kLanes) {
      Vec acc[kM][kColumns];
      for (int r = 0; r < kM; ++r)
        for (int n = 0; n < kColumns; ++n) {
          acc[r][n] = load(state.out + (i + r) * value_width + c + n * kLanes) * splat(alpha[i + r]);
        }
      for (int64_t t = 0; t < count; ++t) {
        Vec v[kColumns];
        for (int n = 0; n < kColumns; ++n) v[n] = load(tile + t * width + c + n * kLanes);
        for (int r = 0; r < kM; ++r) {
          const Vec w = splat(scores[(i + r) * kMlaTokens + t]);
          for (int n = 0; n < kColumns; ++n) acc[r][n] = fma(w, v[n], acc[r][n]);
        }
      }
      for (int r = 0; r < kM; ++r)
        for (int n = 0; n < kColumns; ++n) store(state.out + (i + r) * value_width + c + n * kLanes, acc[r][n]);
    }
  }

  static bool has_nan(const float* scores) {
    bool nan = false;
    for (int64_t t = 0; t < kMlaTokens; t += kLanes) nan |= any_nan(load(scores + t));
    return nan;
  }

  template <Dtype kDtype>
  void attend(int64_t b, int64_t begin, int64_t end) const {
    const int64_t count = end - begin, len = length(b);
    bool absent[kMlaTokens] = {};
    for (int64_t t = 0; t < count; ++t) {
      const char* row = token(b, begin + t);
      absent[t] = row == nullptr;
      if (absent[t])
        std::memset(tile + t * width, 0, sizeof(float) * size_t(width));
      else
        decode<kDtype>(row, tile + t * width);
    }
    std::memset(tile + count * width, 0,
                sizeof(float) * size_t(width) * 4);  // a tile of tokens may reach past the last
    int64_t i = 0;
    for (; i + kTileM <= rows; i += kTileM) dot<kTileM>(i, count);
    for (; i < rows; ++i) dot<1>(i, count);

    for (i = 0; i < rows; ++i) {
      float* s = scores + i * kMlaTokens;
      // query i / h_q of s_q sees the tokens up to and including len - s_q + i / h_q
      const int64_t visible = p.causal ? len - p.s_q + i / p.h_q + 1 - begin : count;
      for (int64_t t = 0; t < kMlaTokens; ++t) {
        if (t >= count || t >= visible || absent[t]) s[t] = minus_infinity();
      }
      Vec peak = splat(state.peak[i]);
      for (int64_t t = 0; t < kMlaTokens; t += kLanes) peak = max(load(s + t), peak);
      const float top = largest(peak);
      if (top == minus_infinity() && !has_nan(s)) {  // NaN does not show in `top`
        alpha[i] = 1.f;
        std::memset(s, 0, sizeof(float) * kMlaTokens);
        continue;
      }
      Vec total = zero();
      for (int64_t t = 0; t < kMlaTokens; t += kLanes) {
        const Vec e = exp(load(s + t) - splat(top));
        store(s + t, e);
        total = total + e;
      }
      alpha[i] = std::exp(state.peak[i] - top);
      state.peak[i] = top;
      state.total[i] = state.total[i] * alpha[i] + sum(total);
    }
    for (i = 0; i + kTileM <= rows; i += kTileM) weigh<kTileM>(i, count);
    for (; i < rows; ++i) weigh<1>(i, count);
  }

  template <Dtype kDtype>
  void write(int64_t b, int64_t i, const float* out, float peak, float total) const {
    constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
    const bool empty = total == 0.f;
    p.lse[(b * p.h_q + i % p.h_q) * p.s_q + i / p.h_q] = empty ? minus_infinity() : peak + std::log(total);
    const float divisor = p.sink == nullptr ? total : total + std::exp(p.sink[i % p.h_q] - peak);
    const Vec factor = splat(empty ? 0.f : 1.f / divisor);
    char* to = static_cast<char*>(p.out) + (b * rows + i) * p.d_latent * kBytes;
    for (int64_t c = 0; c < p.d_latent; c += kLanes) {
      store_some<kDtype>(to + c * kBytes, load(out + c) * factor, p.d_latent - c);
    }
  }
};

// e^(peak - top) that never forms inf - inf.
inline float share(float peak, float top) { return peak == top ? 1.f : std::exp(peak - top); }

inline int64_t blocks_of(int64_t length) { return length == 0 ? 1 : (length + kMlaTokens - 1) / kMlaTokens; }

template <Dtype kDtype>
void decode(const MlaDecodeCpuParams& p, int threads) {
  const int64_t rows = p.s_q * p.h_q;
  const int64_t per_thread = mla_decode_workspace(rows, p.d_latent, p.d_rope, 1);
  const Worker any(p, p.workspace);
  int64_t blocks = 0;
  for (int64_t b = 0; b < p.b; ++b) blocks += blocks_of(any.length(b));

  constexpr int kMaxThreads = 256;
  int64_t piece_of[kMaxThreads][2];  // sequence whose partial result a thread holds in each of its two slots
  for (auto& pieces : piece_of) pieces[0] = pieces[1] = -1;
  const int team = threads < kMaxThreads ? threads : kMaxThreads;

  parallel_runs(blocks, 1, team, [&](int64_t first, int64_t last, int thread) {
    const Worker w(p, p.workspace + thread * per_thread);
    int64_t b = 0, base = 0;  // block `base` is the first of sequence b
    while (first >= base + blocks_of(w.length(b))) base += blocks_of(w.length(b)), ++b;
    for (int64_t at = first; at < last; ++b) {
      const int64_t length = w.length(b), mine = blocks_of(length), end = smaller(last, base + mine);
      const bool whole = at == base && end == base + mine;
      w.start<kDtype>(b);
      for (; at < end; ++at) {
        const int64_t begin = (at - base) * kMlaTokens;
        if (begin < length) w.attend<kDtype>(b, begin, smaller(begin + kMlaTokens, length));
      }
      if (whole) {
        for (int64_t i = 0; i < rows; ++i) {
          w.write<kDtype>(b, i, w.state.out + i * w.value_width, w.state.peak[i], w.state.total[i]);
        }
      } else {
        const int slot = piece_of[thread][0] < 0 ? 0 : 1;
        piece_of[thread][slot] = b;
        std::memcpy(w.partial(slot).out, w.state.out, sizeof(float) * size_t(rows * (w.value_width + 2)));
      }
      base += mine;
    }
  });

  for (int from = 0; from < team; ++from) {
    for (int slot = 0; slot < 2; ++slot) {
      const int64_t b = piece_of[from][slot];
      if (b < 0) continue;
      const State into = Worker(p, p.workspace + from * per_thread).partial(slot);
      parallel_runs(rows, 16, team, [&](int64_t begin, int64_t end, int) {
        const Worker w(p, p.workspace);
        for (int other = from + 1; other < team; ++other) {
          for (int s = 0; s < 2; ++s) {
            if (piece_of[other][s] != b) continue;
            const State part = Worker(p, p.workspace + other * per_thread).partial(s);
            for (int64_t i = begin; i < end; ++i) {
              const float top = into.peak[i] > part.peak[i] ? into.peak[i] : part.peak[i];
              const float x = share(into.peak[i], top), y = share(part.peak[i], top);
              for (int64_t c = 0; c < w.value_width; c += kLanes) {
                float* o = into.out + i * w.value_width + c;
                store(o, fma(splat(y), load(part.out + i * w.value_width + c), splat(x) * load(o)));
              }
              into.peak[i] = top;
              into.total[i] = x * into.total[i] + y * part.total[i];
            }
          }
        }
        for (int64_t i = begin; i < end; ++i) {
          w.write<kDtype>(b, i, into.out + i * w.value_width, into.peak[i], into.total[i]);
        }
      });
      for (int other = from; other < team; ++other)
        for (int64_t& piece : piece_of[other])
          if (piece == b) piece = -1;
    }
  }
}

}  // namespace

void mla_decode(const MlaDecodeCpuParams& p, int threads) {
  if (p.b * p.s_q * p.h_q == 0) return;
  with_dtype(p.dtype, [&](auto tag) { decode<decltype(tag)::kDtype>(p, threads); });
}

}  // namespace deepseek_kernels::DSK_ISA
