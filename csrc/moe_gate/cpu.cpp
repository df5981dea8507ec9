// weights, indices = the top_k experts of each token by score + bias, within the topk_groups best groups; the weights
// are the unbiased scores. Ties go to the lower index.
//
// One token at a time: scores and biased scores in rows of scratch (L1), the scores of the groups, and the choice by
// ranks. Scores are fp32 with this library's exp, within 2 steps of torch's: two experts closer than that may change
// places.
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

constexpr int64_t kMostRanked = 64;  // the time that ranks take grows with the square
constexpr float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// rank[i] = how many of x[0 .. n) are greater than x[i], or equal and before it. Whole registers are read and written.
void ranks_of(const float* x, int64_t n, float* rank) {
  const Vec one = splat(1.f);
  for (int64_t o = 0; o < n; o += kLanes) {
    const Vec mine = load(x + o), place = load(kCount) + splat(float(o));
    Vec count = zero();
    for (int64_t j = 0; j < n; ++j) {
      const Vec other = splat(x[j]);
      const Vec tie = where_less(splat(float(j)), place, one, zero());
      count = count + where_less(mine, other, one, where_less(other, mine, zero(), tie));
    }
    store(rank + o, count);
  }
}

// The places of the top_k largest of x above -inf, best first, and how many there are; ties go to the lower place.
//
// Nothing here waits for the choice before it: 2 * top_k or more columns of x have a largest element each, the top_k-th
// of these is a bound that top_k elements reach, and few others do; each of those finds its rank among them. Many reach
// it where they are equal, or the best lie in few columns: those take their places one after the other.
int choose(const float* x, int64_t n, int top_k, float* room, int64_t* places) {
  const int64_t width = (2 * top_k + kLanes - 1) / kLanes * kLanes;
  float *peaks = room, *rank = room + width, *value = rank + n + 64;
  int32_t* place = reinterpret_cast<int32_t*>(value + n + 64);
  const Vec low = splat(minus_infinity());
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec peak = low;
    for (int64_t i = c; i < n; i += width) peak = max(peak, load(x + i));
    store(peaks + c, peak);
  }
  Vec bound = splat(-kLargest);
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec peak = load(peaks + c);
    Vec reached = zero();
    for (int64_t j = 0; j < width; ++j) reached = reached + where_less(splat(peaks[j]), peak, zero(), splat(1.f));
    bound = max(bound, where_less(reached, splat(float(top_k)), low, peak));
  }
  bound = splat(largest(bound));
  int64_t found = 0;
  for (int64_t begin = 0; begin < n; begin += 64) {
    uint64_t reach = 0;
    for (int l = 0; l < 64; l += kLanes) {
      reach |= uint64_t(~greater(bound, load(x + begin + l)) & ((1u << kLanes) - 1)) << l;
    }
    for (; reach != 0; reach &= reach - 1, ++found) {
      place[found] = int32_t(begin + __builtin_ctzll(reach));
      value[found] = x[place[found]];
    }
  }
  if (found > kMostRanked) {
    float* best = peaks;
    int count = 0;
    for (int64_t i = 0; i < found; ++i) {
      int at = count;
      while (at > 0 && value[i] > best[at - 1]) --at;
      if (at == top_k) continue;
      if (count < top_k) ++count;
      for (int k = count - 1; k > at; --k) best[k] = best[k - 1], places[k] = places[k - 1];
      best[at] = value[i], places[at] = place[i];
    }
    return count;
  }
  ranks_of(value, found, rank);
  for (int64_t i = 0; i < found; ++i) {
    if (rank[i] < float(top_k)) places[int(rank[i])] = place[i];
  }
  return int(found < top_k ? found : top_k);
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

template <Dtype kDtype>
void gate(const MoeGateCpuParams& p, int64_t t, float* scratch) {
  float* weights = p.weights + t * p.top_k;
  int64_t* indices = p.indices + t * p.top_k;
  if (p.mask != nullptr && !p.mask[t]) {
    for (int k = 0; k < p.top_k; ++k) weights[k] = 0.f, indices[k] = -1;
    return;
  }
  const int64_t experts = p.num_experts, per_group = experts / p.num_groups;
  float *scores = scratch, *selection = scores + experts + 64, *group_score = selection + experts + 64;
  float *group_rank = group_score + p.num_groups + 16, *room = group_rank + p.num_groups + 16;
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
  for (int64_t e = experts; e < experts + 64; ++e) selection[e] = minus_infinity();

  const bool grouped = p.topk_groups < p.num_groups;
  if (grouped) {
    top_two(selection, p.num_groups, per_group, group_score, group_rank);
    for (int64_t g = 0; g < p.num_groups; g += kLanes) {
      const Vec one = load(group_score + g), two = load(group_rank + g);
      store(group_score + g, p.bias == nullptr ? one : where_less(low, two, one + two, one));
    }
    ranks_of(group_score, p.num_groups, group_rank);
    for (int g = 0; g < p.num_groups; ++g) {
      if (group_rank[g] < float(p.topk_groups)) continue;
      float* group = selection + g * per_group;
      int64_t e = 0;
      for (; e + kLanes <= per_group; e += kLanes) store(group + e, low);
      for (; e < per_group; ++e) group[e] = minus_infinity();
    }
  }
  int count = choose(selection, experts, p.top_k, room, indices);
  for (int64_t e = 0; e < experts && count < p.top_k; ++e) {  // too few above -inf: the lowest unused ones
    bool used = grouped && group_rank[e / per_group] >= float(p.topk_groups);
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
  const int64_t row = moe_gate_workspace(p.num_experts, p.num_groups, p.top_k, 1);
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.num_tokens, 16, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t t = begin; t < end; ++t) gate<decltype(tag)::kDtype>(p, t, p.workspace + thread * row);
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
