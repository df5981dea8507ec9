// weights, indices = the top_k experts of each token by score + bias, within the topk_groups best groups; the weights
// are the unbiased scores. Ties go to the lower index.
//
// One token at a time: scores and biased scores in a row of scratch (L1), the two best of each group, then top_k rounds
// of a maximum over all registers of the row and a search for its first place: no branch depends on the order of the
// scores. Scores are fp32 with this library's exp, within 2 steps of torch's: two experts closer than that may change
// places.
#include "moe_gate/cpu.h"

#include "common/cpu/parallel.h"
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

void scores_of(Score score, float* x, int64_t n) {
  const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;  // the row has room, and its tail is -inf
  if (score == Score::kSqrtSoftplus) {
    for (int64_t i = 0; i < n; ++i) x[i] = std::sqrt(softplus(x[i]));
    return;
  }
  if (score == Score::kSigmoid) {
    const Vec one = splat(1.f);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec v = load(x + i);
      // e^-|x| never overflows; for x < 0 the sigmoid is e^x / (1 + e^x)
      const Vec e = exp(zero() - abs(v));
      const Vec s = one / (one + e);
      store(x + i, where_less(v, zero(), e * s, s));
    }
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

// Takes the largest of x [n] out, the first of several: x becomes -inf there. -1 if all are -inf.
int64_t take_largest(float* x, int64_t n) {
  Vec a = splat(minus_infinity()), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) a = max(a, load(x + i)), b = max(b, load(x + i + kLanes));
  float top = largest(max(a, b));
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  if (top == minus_infinity()) return -1;
  const Vec most = splat(top);
  constexpr uint32_t kAll = kLanes == 16 ? 0xFFFF : 0xFF;
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const uint32_t found = ~greater(most, load(x + i)) & kAll;
    if (found == 0) continue;
    i += __builtin_ctz(found);
    x[i] = minus_infinity();
    return i;
  }
  for (; x[i] != top; ++i) continue;
  x[i] = minus_infinity();
  return i;
}

// The largest and the second largest of x [n], which differ in place, not always in value.
void top_two(const float* x, int64_t n, float& first, float& second) {
  Vec f = splat(minus_infinity()), s = f;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    s = max(s, min(f, v));
    f = max(f, v);
  }
  const auto fold = [&](Vec other_f, Vec other_s) {
    s = max(min(f, other_f), max(s, other_s));
    f = max(f, other_f);
  };
  if constexpr (kLanes == 16) fold(exchange<8>(f), exchange<8>(s));
  fold(exchange<4>(f), exchange<4>(s));
  fold(exchange<2>(f), exchange<2>(s));
  fold(exchange<1>(f), exchange<1>(s));
  alignas(64) float lane[kLanes];
  store(lane, f), first = lane[0];
  store(lane, s), second = lane[0];
  for (; i < n; ++i) {
    second = x[i] > first ? first : x[i] > second ? x[i] : second;
    first = x[i] > first ? x[i] : first;
  }
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
  float *scores = scratch, *selection = scratch + experts + 16, *group_score = scratch + 2 * (experts + 16);
  const char* row = static_cast<const char*>(p.logits) + t * p.ld_logits * (kDtype == Dtype::kFp32 ? 4 : 2);
  const Vec low = splat(minus_infinity());
  for (int64_t e = 0; e < experts; e += kLanes) {
    const int64_t count = experts - e;
    const char* from = row + e * (kDtype == Dtype::kFp32 ? 4 : 2);
    const Vec x = tame(count >= kLanes ? load_as<kDtype>(from) : load_part<kDtype>(from, int(count)));
    store(selection + e, x);
    store(scores + e, x);
  }
  for (int64_t e = experts; e < experts + 16; ++e) scores[e] = minus_infinity();
  scores_of(p.score, scores, experts);
  for (int64_t e = 0; e < experts; e += kLanes) {  // both rows have room for a whole last register
    const int64_t count = experts - e;
    Vec biased = load(scores + e);
    if (p.bias != nullptr) {
      biased = biased + (count >= kLanes ? load(p.bias + e) : load_part<Dtype::kFp32>(p.bias + e, int(count)));
    }
    store(selection + e, where_less(low, load(selection + e), tame(biased), low));
  }

  const bool grouped = p.topk_groups < p.num_groups;
  if (grouped) {
    for (int g = 0; g < p.num_groups; ++g) {
      float first, second;
      top_two(selection + g * per_group, per_group, first, second);
      group_score[g] = p.bias != nullptr && second > minus_infinity() ? first + second : first;
    }
  }
  // A group is allowed if fewer than topk_groups groups are better, or as good and before it.
  const auto allowed = [&](int g) {
    if (!grouped) return true;
    int better = 0;
    for (int o = 0; o < p.num_groups; ++o) {
      better += group_score[o] > group_score[g] || (group_score[o] == group_score[g] && o < g);
    }
    return better < p.topk_groups;
  };
  for (int g = 0; grouped && g < p.num_groups; ++g) {
    if (allowed(g)) continue;
    for (int64_t e = g * per_group; e < (g + 1) * per_group; ++e) selection[e] = minus_infinity();
  }
  int count = 0;
  for (int64_t e; count < p.top_k && (e = take_largest(selection, experts)) >= 0; ++count) indices[count] = e;
  for (int64_t e = 0; e < experts && count < p.top_k; ++e) {  // too few above -inf: the lowest unused ones
    bool used = !allowed(int(e / per_group));
    for (int k = 0; k < count; ++k) used |= indices[k] == e;
    if (!used) indices[count++] = e;
  }

  float total = 0.f;
  for (int k = 0; k < p.top_k; ++k) total += weights[k] = scores[indices[k]];
  const float factor = p.normalize ? p.scale / (total + kEpsilon) : p.scale;
  for (int k = 0; k < p.top_k; ++k) weights[k] *= factor;
}

}  // namespace

void moe_gate(const MoeGateCpuParams& p, int threads) {
  const int64_t row = 2 * (p.num_experts + 16) + p.num_groups;
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.num_tokens, 16, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t t = begin; t < end; ++t) gate<decltype(tag)::kDtype>(p, t, p.workspace + thread * row);
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
