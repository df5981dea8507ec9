// What every CPU kernel of mla_decode shares: the softmax, the division of the tokens over threads, the merge.
//
// Work:    the cached tokens of all sequences, in blocks of the kernel's kTokens, are cut into one equal run per
//          thread, so that ragged batches balance.
// Merge:   a sequence that lies in several runs leaves one partial (output, maximum, sum) per run; they are merged in
//          the order of the tokens. Results depend on the number of threads in the last bits, on nothing else.
#pragma once
#include "common/cpu/count.h"
#include "common/cpu/parallel.h"
#include "common/cpu/vec.h"
#include "mla_decode/cpu.h"

namespace deepseek_kernels {
namespace {

inline float minus_infinity() { return as_float(0xFF800000); }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
// e^(peak - top) that never forms inf - inf.
inline float share(float peak, float top) { return peak == top ? 1.f : std::exp(peak - top); }

struct State {                // of all rows of one sequence
  float *out, *peak, *total;  // peak: NaN once a score was; total is NaN then, and where a score was infinite
  float* mass;  // [rows][kMlaMasses], for the kernel that needs them: sums of weights as they were applied
  State(float* p, int64_t rows, int64_t width)
      : out(p), peak(p + rows * width), total(peak + rows), mass(total + rows) {}
};

// One thread's part of the workspace: the running state, two partial results, scores, and what the kernel needs.
struct MlaWork {
  const MlaDecodeCpuParams& p;
  const int64_t rows, value_width;
  State state;
  float *partials, *alpha, *scores, *scratch;

  MlaWork(const MlaDecodeCpuParams& p, float* w, int64_t tokens)
      : p(p),
        rows(p.s_q * p.h_q),
        value_width(mla_align(p.d_latent)),
        state(w, rows, value_width),
        partials(w + mla_state(rows, p.d_latent)),
        alpha(partials + 2 * mla_state(rows, p.d_latent)),
        scores(alpha + rows),
        scratch(scores + rows * tokens) {}

  State partial(int which) const { return State(partials + which * mla_state(rows, p.d_latent), rows, value_width); }
  int64_t length(int64_t b) const {
    const int64_t n = p.seqlens_kv[b], most = p.max_pages * p.page_size;
    return n < 0 ? 0 : n < most ? n : most;
  }

  void clear() const {
    std::memset(state.out, 0, sizeof(float) * size_t(mla_state(rows, p.d_latent)));
    for (int64_t i = 0; i < rows; ++i) state.peak[i] = minus_infinity();
  }

  const char* query(int64_t b, int64_t i) const {
    return static_cast<const char*>(p.q) +
           (b * p.q_stride_b + i / p.h_q * p.q_stride_s + i % p.h_q * p.q_stride_h) * element_bytes(p.dtype);
  }
  // Cached token `t` of sequence b, or nullptr if its page does not exist.
  const char* token(int64_t b, int64_t t) const {
    const int64_t page = p.block_table[b * p.max_pages + t / p.page_size];
    if (page < 0 || page >= p.num_pages) return nullptr;
    return static_cast<const char*>(p.kv_cache) + page * p.page_bytes + t % p.page_size * p.row_bytes;
  }

  // Turns the scores [rows][kTokens] of tokens begin .. begin + count into weights, 0 for those that are absent, not
  // visible or past `count`; alpha is what the output so far is to be multiplied by. absent: nullptr if none is.
  template <int kTokens>
  void soften(int64_t b, int64_t begin, int64_t count, const bool* absent) const {
    const int64_t len = length(b);
    for (int64_t first = 0; first < rows; first += kLanes) {
      const int n = int(smaller(kLanes, rows - first));
      float base[kLanes], fall[kLanes] = {};
      for (int r = 0; r < n; ++r) {
        const int64_t i = first + r;
        float* s = scores + i * kTokens;
        // query i / h_q of s_q sees the tokens up to and including len - s_q + i / h_q
        const int64_t visible = p.causal ? smaller(len - p.s_q + i / p.h_q + 1 - begin, count) : count;
        for (int64_t t = visible < 0 ? 0 : visible; t < kTokens; ++t) s[t] = minus_infinity();
        if (absent != nullptr) {
          for (int64_t t = 0; t < count; ++t) s[t] = absent[t] ? minus_infinity() : s[t];
        }
        Vec peak = splat(state.peak[i]);
        bool nan = false;
        for (int64_t t = 0; t < kTokens; t += kLanes) {
          const Vec v = load(s + t);
          peak = max(v, peak);
          nan |= any_nan(v);  // does not show in `peak`
        }
        const float top = nan ? as_float(0x7FC00000) : largest(peak);
        const bool none = top == minus_infinity();
        base[r] = none ? 0.f : top;
        fall[r] = none ? 0.f : state.peak[i] - top;
        state.peak[i] = top;
      }
      store(fall, exp(load(fall)));
      for (int r = 0; r < n; ++r) {
        const int64_t i = first + r;
        float* s = scores + i * kTokens;
        Vec total = zero();
        for (int64_t t = 0; t < kTokens; t += kLanes) {
          const Vec e = exp(load(s + t) - splat(base[r]));
          store(s + t, e);
          total = total + e;
        }
        alpha[i] = fall[r];
        state.total[i] = state.total[i] * fall[r] + sum(total);
      }
    }
  }

  // kernel.value(state, i, c): the weighted sum of row i in columns [c, c + kLanes), as the kernel keeps it.
  template <Dtype kDtype, class Kernel>
  void write(int64_t b, int64_t i, const State& from, const Kernel& kernel) const {
    constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
    const float peak = from.peak[i], total = from.total[i];
    const bool empty = total == 0.f;
    p.lse[(b * p.h_q + i % p.h_q) * p.s_q + i / p.h_q] = empty                       ? minus_infinity()
                                                         : peak == -minus_infinity() ? peak
                                                                                     : peak + std::log(total);
    const float divisor = p.sink == nullptr ? total : total + std::exp(p.sink[i % p.h_q] - peak);
    const Vec factor = splat(empty ? 0.f : 1.f / divisor);
    char* to = static_cast<char*>(p.out) + (b * rows + i) * p.d_latent * kBytes;
    for (int64_t c = 0; c < p.d_latent; c += kLanes) {
      store_some<kDtype>(to + c * kBytes, kernel.value(from, i, c) * factor, p.d_latent - c);
    }
  }
};

template <int kTokens>
inline int64_t blocks_of(int64_t length) {
  return length == 0 ? 1 : (length + kTokens - 1) / kTokens;
}

// Kernel: an MlaWork made of (p, workspace), with kDtype, kTokens, start(b), attend(b, begin, end) and value(state, i,
// c).
template <class Kernel>
void decode_all(const MlaDecodeCpuParams& p, int threads) {
  constexpr int kTokens = Kernel::kTokens;
  const int64_t rows = p.s_q * p.h_q;
  const int64_t per_thread = mla_decode_workspace(rows, p.d_latent, p.d_rope, 1);
  const Kernel any(p, p.workspace);
  int64_t blocks = 0;
  for (int64_t b = 0; b < p.b; ++b) blocks += blocks_of<kTokens>(any.length(b));

  constexpr int kMaxThreads = 256;
  int64_t piece_of[kMaxThreads][2];  // sequence whose partial result a thread holds in each of its two slots
  for (auto& pieces : piece_of) pieces[0] = pieces[1] = -1;
  const int team = threads < kMaxThreads ? threads : kMaxThreads;

  parallel_runs(blocks, 1, team, [&](int64_t first, int64_t last, int thread) {
    const Kernel w(p, p.workspace + thread * per_thread);
    int64_t b = 0, base = 0;  // block `base` is the first of sequence b
    while (first >= base + blocks_of<kTokens>(w.length(b))) base += blocks_of<kTokens>(w.length(b)), ++b;
    for (int64_t at = first; at < last; ++b) {
      const int64_t length = w.length(b), mine = blocks_of<kTokens>(length), end = smaller(last, base + mine);
      const bool whole = at == base && end == base + mine;
      w.start(b);
      for (; at < end; ++at) {
        const int64_t begin = (at - base) * kTokens;
        if (begin < length) w.attend(b, begin, smaller(begin + kTokens, length));
      }
      if (whole) {
        for (int64_t i = 0; i < rows; ++i) w.template write<Kernel::kDtype>(b, i, w.state, w);
      } else {
        const int slot = piece_of[thread][0] < 0 ? 0 : 1;
        piece_of[thread][slot] = b;
        std::memcpy(w.partial(slot).out, w.state.out, sizeof(float) * size_t(mla_state(rows, p.d_latent)));
      }
      base += mine;
    }
  });

  for (int from = 0; from < team; ++from) {
    for (int slot = 0; slot < 2; ++slot) {
      const int64_t b = piece_of[from][slot];
      if (b < 0) continue;
      const State into = Kernel(p, p.workspace + from * per_thread).partial(slot);
      parallel_runs(rows, 16, team, [&](int64_t begin, int64_t end, int) {
        const Kernel w(p, p.workspace);
        for (int other = from + 1; other < team; ++other) {
          for (int s = 0; s < 2; ++s) {
            if (piece_of[other][s] != b) continue;
            const State part = Kernel(p, p.workspace + other * per_thread).partial(s);
            for (int64_t i = begin; i < end; ++i) {
              const bool keep = into.peak[i] > part.peak[i] || into.peak[i] != into.peak[i];  // NaN stays
              const float top = keep ? into.peak[i] : part.peak[i];
              const float x = share(into.peak[i], top), y = share(part.peak[i], top);
              for (int64_t c = 0; c < w.value_width; c += kLanes) {
                float* o = into.out + i * w.value_width + c;
                store(o, fma(splat(y), load(part.out + i * w.value_width + c), splat(x) * load(o)));
              }
              into.peak[i] = top;
              into.total[i] = x * into.total[i] + y * part.total[i];
              for (int64_t m = i * kMlaMasses; m < (i + 1) * kMlaMasses; ++m) {
                into.mass[m] = x * into.mass[m] + y * part.mass[m];
              }
            }
          }
        }
        for (int64_t i = begin; i < end; ++i) w.template write<Kernel::kDtype>(b, i, into, w);
      });
      for (int other = from; other < team; ++other)
        for (int64_t& piece : piece_of[other])
          if (piece == b) piece = -1;
    }
  }
}

}  // namespace
}  // namespace deepseek_kernels
