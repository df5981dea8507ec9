// weights, indices = the top_k experts of each token by score + bias, within the topk_groups best groups; the weights
// are the unbiased scores. Ties go to the lower index.
//
// One token at a time: scores and biased scores in a row of scratch (L1), and the best of each chunk of experts, which
// is a group where groups are chosen; then top_k rounds of a maximum over the chunks, a search for its first place in
// the first chunk that has it, and a new best of that chunk. Scores are fp32 with this library's exp, within 2 steps of
// torch's: two experts closer than that may change places.
#include "moe_gate/cpu.h"

#include "common/cpu/parallel.h"
#include "common/cpu/put.h"
#include "common/cpu/vec.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

constexpr float kLargest = 3.402823466e38f;
constexpr float kEpsilon = 1e-20f;

inline float minus_infinity() { return as_float(0xFF800000); }

// NaN counts as -inf, +inf as the largest finite number.
inline Vec tame(Vec x) {
  const Vec low = splat(minus_infinity());
  return where_less(low, x, min(x, splat(kLargest)), low);
}

// ln(1 + e^x); log is libm's: this score is rare and E is small.
inline float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

inline Vec sigmoid(Vec x) {
  const Vec one = splat(1.f);
  // e^-|x| never overflows; for x < 0 the sigmoid is e^x / (1 + e^x)
  const Vec e = exp(zero() - abs(x));
  const Vec s = one / (one + e);
  return where_less(x, zero(), e * s, s);
}

void scores_of(GateScore score, float* x, int64_t n) {
  const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;  // the row has room, and its tail is -inf
  if (score == GateScore::kSqrtSoftplus) {
    for (int64_t i = 0; i < n; ++i) x[i] = std::sqrt(softplus(x[i]));
    return;
  }
  Vec peak = splat(minus_infinity());
  for (int64_t i = 0; i < whole; i += kLanes) peak = max(peak, load(x + i));
  const float top = largest(peak);
  if (top == minus_infinity()) {  // a row of -inf has no probabilities
    std::memset(x, 0, size_t(n) * sizeof(float));
    return;
  }
  Vec total = zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec e = exp(load(x + i) - splat(top));
    store(x + i, e);
    total = total + e;
  }
  const Vec inverse = splat(1.f / sum(total));
  for (int64_t i = 0; i < whole; i += kLanes) store(x + i, load(x + i) * inverse);
}

template <Dtype kDtype>
inline float from(const void* row, int64_t at) {
  if (kDtype == Dtype::kFp32) return static_cast<const float*>(row)[at];
  const uint16_t bits = static_cast<const uint16_t*>(row)[at];
  return kDtype == Dtype::kFp16 ? from_fp16(bits) : from_bf16(bits);
}

float largest_of(const float* x, int64_t n) {
  Vec peak = splat(minus_infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) peak = max(peak, load(x + i));
  float top = largest(peak);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// The first place of `value`, the largest of the elements that x holds; kMoeGateChunk elements may be read past them.
int64_t find(const float* x, float value) {
  const Vec wanted = splat(value);
  for (int64_t i = 0;; i += 32) {  // the place is not to be foreseen, so no branch hangs on it
    uint32_t less = 0;
    for (int l = 0; l < 32; l += kLanes) less |= greater(wanted, load(x + i + l)) << l;
    if (~less != 0) return i + __builtin_ctz(~less);
  }
}

// The two largest of each of `groups` runs of x, which differ in place, not always in value; -inf where there are no
// two. Both outputs have room for a whole last register, and are -inf there.
void top_two(const float* x, int64_t groups, int64_t per_group, float* first, float* second) {
  const Vec low = splat(minus_infinity());
  for (int64_t begin = 0; begin < groups; begin += kLanes) {
    Vec f[kLanes], s[kLanes];  // of each lane of a group, then, transposed, of each group
    for (int l = 0; l < kLanes; ++l) {
      f[l] = s[l] = low;
      const float* group = x + (begin + l) * per_group;
      for (int64_t i = 0; begin + l < groups && i < per_group; i += kLanes) {
        Vec v;
        if (i + kLanes <= per_group) {
          v = load(group + i);
        } else {
          float part[kLanes];
          for (int j = 0; j < kLanes; ++j) part[j] = i + j < per_group ? group[i + j] : minus_infinity();
          v = load(part);
        }
        s[l] = max(s[l], min(f[l], v));
        f[l] = max(f[l], v);
      }
    }
    transpose(f), transpose(s);
    for (int l = 1; l < kLanes; ++l) {
      s[0] = max(min(f[0], f[l]), max(s[0], s[l]));
      f[0] = max(f[0], f[l]);
    }
    store(first + begin, f[0]);
    store(second + begin, s[0]);
  }
}

// Whether fewer than `most` groups are better than group g, or as good and before it.
bool among_best(const float* group_score, int groups, int g, int most) {
  constexpr uint32_t kAll = kLanes == 16 ? 0xFFFF : 0xFF;
  const Vec mine = splat(group_score[g]);
  int better = 0;
  for (int o = 0; o < groups; o += kLanes) {
    const Vec others = load(group_score + o);
    const uint32_t above = greater(others, mine), before = g - o >= kLanes ? kAll : g > o ? (1u << (g - o)) - 1 : 0;
    better += __builtin_popcount(above | (~greater(mine, others) & before));
  }
  return better < most;
}

template <Dtype kDtype>
void gate(const MoeGateCpuParams& p, int64_t t, float* scratch) {
  float* weights = p.weights + t * p.top_k;
  int64_t* indices = p.indices + t * p.top_k;
  if (p.mask != nullptr && !p.mask[t]) {
    for (int k = 0; k < p.top_k; ++k) weights[k] = 0.f, indices[k] = -1;
    return;
  }
  const int64_t experts = p.num_experts, per_group = experts / p.num_groups;
  float *scores = scratch, *selection = scores + experts + 32, *best = selection + experts + 32;
  float* group_score = scratch + moe_gate_workspace(experts, p.num_groups, 1) - p.num_groups - 16;
  const char* row = static_cast<const char*>(p.logits) + t * p.ld_logits * (kDtype == Dtype::kFp32 ? 4 : 2);
  const Vec low = splat(minus_infinity());
  for (int64_t e = 0; e < experts; e += kLanes) {  // both rows have room for a whole last register
    const Vec x = tame(load_some<kDtype>(row + e * (kDtype == Dtype::kFp32 ? 4 : 2), experts - e));
    store(selection + e, x);
    store(scores + e, p.score == GateScore::kSigmoid ? sigmoid(x) : x);
  }
  if (p.score != GateScore::kSigmoid) {
    for (int64_t e = experts; e < experts + 16; ++e) scores[e] = minus_infinity();
    scores_of(p.score, scores, experts);
  }
  for (int64_t e = 0; e < experts; e += kLanes) {
    Vec biased = load(scores + e);
    if (p.bias != nullptr) biased = biased + load_some<Dtype::kFp32>(p.bias + e, experts - e);
    store(selection + e, where_less(low, load(selection + e), tame(biased), low));
  }

  const bool grouped = p.topk_groups < p.num_groups;
  const int64_t chunk = grouped ? per_group : kMoeGateChunk, chunks = (experts + chunk - 1) / chunk;
  const auto size_of = [&](int64_t c) { return experts - c * chunk < chunk ? experts - c * chunk : chunk; };
  if (grouped) {
    top_two(selection, chunks, chunk, best, group_score);
    for (int64_t g = 0; g < chunks; g += kLanes) {
      const Vec first = load(best + g), second = load(group_score + g);
      store(group_score + g, p.bias == nullptr ? first : where_less(low, second, first + second, first));
    }
    for (int g = 0; g < p.num_groups; ++g) {
      if (!among_best(group_score, p.num_groups, g, p.topk_groups)) best[g] = minus_infinity();
    }
  } else {
    for (int64_t c = 0; c < chunks; ++c) best[c] = largest_of(selection + c * chunk, size_of(c));
  }
  int count = 0;
  for (; count < p.top_k; ++count) {
    const float top = largest_of(best, chunks);
    if (top == minus_infinity()) break;
    const int64_t c = find(best, top), e = c * chunk + find(selection + c * chunk, top);
    indices[count] = e;
    selection[e] = minus_infinity();
    best[c] = largest_of(selection + c * chunk, size_of(c));
  }
  for (int64_t e = 0; e < experts && count < p.top_k; ++e) {  // too few above -inf: the lowest unused ones
    bool used = grouped && !among_best(group_score, p.num_groups, int(e / per_group), p.topk_groups);
    for (int k = 0; k < count; ++k) used |= indices[k] == e;
    if (!used) indices[count++] = e;
  }

  float total = 0.f;
  for (int k = 0; k < p.top_k; ++k) total += weights[k] = scores[indices[k]];
  const float factor = p.normalize ? p.scale / (total + kEpsilon) : p.scale;
  for (int k = 0; k < p.top_k; ++k) weights[k] *= factor;
}

// With s = score(x) of the chosen experts and g the gradient of the weights times scale: normalised weights give
// g = (g - sum(g * s) / total) / total; then grad_x = g * s', s' = s * (1 - s) for sigmoid, sigmoid(x) / (2 * s) for
// sqrtsoftplus, and for softmax grad_x = s * (g - sum(g * s)) with g = 0 where an expert was not chosen.
template <Dtype kDtype>
void gate_backward(const MoeGateBackwardCpuParams& p, int64_t t, float* scratch) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const int64_t experts = p.num_experts, room = p.top_k + 16;
  float *scores = scratch, *x = scores + experts + 32, *s = x + room, *g = s + room;
  const char* row = static_cast<const char*>(p.logits) + t * p.ld_logits * kBytes;
  char* out = static_cast<char*>(p.grad_logits) + t * experts * kBytes;
  const auto index = [&](int k) {  // -1 where there is none
    const int64_t at = t * p.top_k + k;
    const int64_t e = p.wide ? static_cast<const int64_t*>(p.indices)[at] : static_cast<const int32_t*>(p.indices)[at];
    return e < 0 || e >= experts ? int64_t(-1) : e;
  };
  const bool softmax = p.score == GateScore::kSoftmax;
  if (softmax) {
    for (int64_t e = 0; e < experts; e += kLanes) {
      store(scores + e, tame(load_some<kDtype>(row + e * kBytes, experts - e)));
    }
    for (int64_t e = experts; e < experts + 16; ++e) scores[e] = minus_infinity();
    scores_of(p.score, scores, experts);
  }

  for (int k = 0; k < p.top_k; ++k) {
    const int64_t e = index(k);
    x[k] = e < 0 ? 0.f : from<kDtype>(row, e);
    g[k] = e < 0 ? 0.f : p.grad_weights[t * p.top_k + k] * p.scale;
    if (softmax) s[k] = e < 0 ? 0.f : scores[e];
  }
  for (int k = 0; !softmax && k < p.top_k; k += kLanes) {
    const Vec logit = tame(load(x + k));
    store(x + k, logit);
    store(s + k, sigmoid(logit));
  }
  if (p.score == GateScore::kSqrtSoftplus) {
    for (int k = 0; k < p.top_k; ++k) {
      const float slope = s[k];
      s[k] = std::sqrt(softplus(x[k])), x[k] = slope;
    }
  }
  float total = kEpsilon, weighted = 0.f;
  for (int k = 0; k < p.top_k; ++k) {
    if (index(k) < 0) s[k] = 0.f;
    total += s[k], weighted += g[k] * s[k];
  }
  float mean = 0.f;  // of the gradient of a softmax
  for (int k = 0; k < p.top_k; ++k) {
    if (p.normalize) g[k] = (g[k] - weighted / total) / total;
    if (index(k) >= 0) mean += g[k] * s[k];
  }

  if (softmax) {
    for (int64_t e = 0; e < experts; e += kLanes) {
      store_some<kDtype>(out + e * kBytes, load(scores + e) * splat(-mean), experts - e);
    }
  } else {
    std::memset(out, 0, size_t(experts * kBytes));
  }
  for (int k = 0; k < p.top_k; ++k) {
    const int64_t e = index(k);
    if (e < 0) continue;
    float d = g[k] * s[k] * (1.f - s[k]);
    if (softmax) d = s[k] * (g[k] - mean);
    if (p.score == GateScore::kSqrtSoftplus) d = s[k] > 0.f ? g[k] * x[k] / (2.f * s[k]) : 0.f;
    put(kDtype, out, e, d, false);
  }
}

}  // namespace

void moe_gate_backward(const MoeGateBackwardCpuParams& p, int threads) {
  const int64_t row = moe_gate_backward_workspace(p.num_experts, p.top_k, 1);
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.num_tokens, 64, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t t = begin; t < end; ++t) gate_backward<decltype(tag)::kDtype>(p, t, p.workspace + thread * row);
    });
  });
}

void moe_gate(const MoeGateCpuParams& p, int threads) {
  const int64_t row = moe_gate_workspace(p.num_experts, p.num_groups, 1);
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.num_tokens, 16, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t t = begin; t < end; ++t) gate<decltype(tag)::kDtype>(p, t, p.workspace + thread * row);
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
