// ids = the top_k largest of score(logits) + bias, among the topk_groups best groups; weights = score(logits)[ids],
// normalised and scaled. fp32 throughout; ties go to the lower id; no id twice, whatever the logits hold.
//
// Tiling:  a warp has a token at a time. A group of experts has group_lanes lanes, and each lane kPerLane experts of it
//          in a row, so that lanes, and a lane's experts, are in the order of ids. Nothing but the chosen is written.
// Choice:  keys are the bits of the selection scores, mapped so that they order as integers do: one instruction finds
//          the largest of a warp. Each lane sorts its keys. Group scores come from the first two of each lane; then
//          top_k times the first lane with the largest head gives it away. Which expert of that lane it was is looked
//          up afterwards, for all of the chosen at once.
// Scores:  2 to 3 fp32 steps, also far from 0, where the plain instructions lose digits that decide between experts.
// Bytes:   T*E*b read, 12*T*K written. T = 8192, E = 256, fp32: 9.2 MB, 2 us at 4.3 TB/s; bound by instructions.
#pragma once
#include "common/numeric.cuh"
#include "params.h"

namespace deepseek_kernels::moe_gate {

constexpr int kWarps = 8;  // of a CTA, at most
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLargest = 3.402823466e38f;
constexpr float kEpsilon = 1e-20f;
constexpr uint32_t kNothing = 0;  // below every key

DEVICE_FN uint32_t key_of(float x) {
  const int32_t bits = int32_t(__float_as_uint(x));
  return uint32_t(bits) ^ (uint32_t(bits >> 31) | 0x80000000u);
}
DEVICE_FN float of_key(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// log(1 + u) of u in [0, 1]: the series of 2 atanh(u / (2 + u)).
DEVICE_FN float log1p_unit(float u) {
  const float s = __fmul_rn(u, reciprocal_near(2.f + u)), q = s * s;
  float series = 1.f / 15;
#pragma unroll
  for (int n = 13; n >= 3; n -= 2) series = __fmaf_rn(series, q, 1.f / n);
  return __fmaf_rn(2.f * s * q, series, 2.f * s);
}

DEVICE_FN float sigmoid(float x) {
  const float e = exp_negative(-fabsf(x)), r = reciprocal_near(1.f + e);
  return x < 0 ? __fmul_rn(e, r) : r;  // not to be contracted with the bias
}

DEVICE_FN float sqrt_softplus(float x) {
  x = fminf(x, kLargest);
  return __fsqrt_rn(fmaxf(x, 0.f) + log1p_unit(exp_negative(-fabsf(x))));
}

// An expert with such a logit scores 0, and is chosen after all others. The functions of scores return something finite
// for it, so that nothing branches.
DEVICE_FN bool is_dead(float x) { return !(x > -INFINITY); }

struct Softmax {
  float largest, inverse;  // of the row's logits; of its sum of exponentials
  DEVICE_FN float operator()(float x) const {
    return __fmul_rn(exp_negative(fminf(fmaxf(x, -INFINITY), kLargest) - largest), inverse);
  }
};

template <int kPerLane>
DEVICE_FN Softmax softmax_of(const float (&x)[kPerLane]) {
  float largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) largest = is_dead(x[j]) ? largest : fmaxf(largest, fminf(x[j], kLargest));
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, bit));
  Softmax softmax{largest == -INFINITY ? 0.f : largest, 1.f};
  float total = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) total += softmax(x[j]);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) total += __shfl_xor_sync(kAll, total, bit);
  softmax.inverse = total > 0 ? __fdiv_rn(1.f, total) : 1.f;
  return softmax;
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

template <int kPerLane, class T>
DEVICE_FN void load_logits(const T* p, int valid, bool whole, float (&x)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] = NAN;
  if (whole) {
    if (valid <= 0) return;
    constexpr int kBytes = kPerLane * sizeof(T) < 16 ? kPerLane * sizeof(T) : 16;
    using Word = typename WordOf<kBytes>::type;
    alignas(16) T raw[kPerLane];
#pragma unroll
    for (int w = 0; w < int(kPerLane * sizeof(T)) / kBytes; ++w)
      reinterpret_cast<Word*>(raw)[w] = __ldg(reinterpret_cast<const Word*>(p) + w);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) x[j] = to_float(raw[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (j < valid) x[j] = to_float(p[j]);
  }
}

template <class Use>
DEVICE_FN void with_dtype(Dtype dtype, const Use& use) {
  if (dtype == Dtype::kFp32)
    use(static_cast<const float*>(nullptr));
  else if (dtype == Dtype::kFp16)
    use(static_cast<const __half*>(nullptr));
  else
    use(static_cast<const __nv_bfloat16*>(nullptr));
}

// The first `valid` of kPerLane logits from `expert` on, NaN after. Where p.whole, valid is at least kPerLane, or 0
// or less.
template <int kPerLane>
DEVICE_FN void load_logits(const MoeGateParams& p, int64_t token, int expert, int valid, float (&x)[kPerLane]) {
  with_dtype(p.dtype, [&](auto* type) {
    using Pointer = decltype(type);
    load_logits(static_cast<Pointer>(p.logits) + token * p.ld_logits + expert, valid, p.whole, x);
  });
}

DEVICE_FN float load_logit(const MoeGateParams& p, int64_t token, int expert) {
  float x;
  with_dtype(p.dtype, [&](auto* type) {
    using Pointer = decltype(type);
    x = to_float(__ldg(static_cast<Pointer>(p.logits) + token * p.ld_logits + expert));
  });
  return x;
}

DEVICE_FN uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
DEVICE_FN uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Sorted runs of kRun become sorted runs of twice that, descending: Batcher's network.
template <int kRun, int kDistance, int kPerLane>
DEVICE_FN void merge_runs(uint32_t (&a)[kPerLane]) {
  constexpr int kFirst = kDistance % kRun;
#pragma unroll
  for (int i = kFirst; i + kDistance < kPerLane; ++i)
    if ((i - kFirst) / kDistance % 2 == 0 && i / (2 * kRun) == (i + kDistance) / (2 * kRun)) {
      const uint32_t high = larger(a[i], a[i + kDistance]);
      a[i + kDistance] = smaller(a[i], a[i + kDistance]);
      a[i] = high;
    }
  if constexpr (kDistance > 1) merge_runs<kRun, kDistance / 2>(a);
}
template <int kRun = 1, int kPerLane>
DEVICE_FN void sort(uint32_t (&a)[kPerLane]) {
  if constexpr (kRun < kPerLane) {
    merge_runs<kRun, kRun>(a);
    sort<kRun * 2>(a);
  }
}

// Whether the group of this lane is among the best.
template <int kPerLane>
DEVICE_FN bool in_best_groups(const MoeGateParams& p, const uint32_t (&sorted)[kPerLane], int group) {
  uint32_t first = sorted[0], second = kPerLane > 1 ? sorted[kPerLane > 1] : kNothing;
  for (int bit = 1; bit < p.group_lanes; bit *= 2) {
    const uint32_t other = __shfl_xor_sync(kAll, first, bit), other_second = __shfl_xor_sync(kAll, second, bit);
    second = larger(smaller(first, other), larger(second, other_second));
    first = larger(first, other);
  }
  float score = of_key(first);
  if (p.bias && second > key_of(-INFINITY) && !BUG(group_of_one)) score += of_key(second);
  uint32_t key = group < p.num_groups ? key_of(score) : kNothing;
  const uint32_t groups_before = (1u << (group << p.group_bits)) - 1;
  bool best = false;
  for (int i = 0; i < p.topk_groups; ++i) {
    const uint32_t largest = __reduce_max_sync(kAll, key);
    if (!(__ballot_sync(kAll, key == largest) & groups_before) && key == largest) best = true, key = kNothing;
  }
  return best;
}

// kTopK: top_k, or 0 for any up to 32. Without a wanted number of CTAs, ptxas spills for the sake of more.
template <int kPerLane, int kTopK, GateScore kScore>
__global__ void __launch_bounds__(kWarps * 32, 2) gate(const MoeGateParams p) {
  const int lane = int(threadIdx.x) % 32, top_k = kTopK ? kTopK : p.top_k;
  const int group = lane >> p.group_bits;
  const int member = (lane & (p.group_lanes - 1)) * kPerLane, first_expert = group * p.members + member;
  const int valid = group < p.num_groups ? p.members - member : 0;  // may be more than kPerLane, or negative
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);

  float bias[kPerLane];  // NaN counts as -inf, +inf as the largest finite number; a score added changes neither
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    bias[j] = p.bias && j < valid ? fminf(fmaxf(__ldg(p.bias + first_expert + j), -INFINITY), kLargest) : 0.f;

  for (int64_t token = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; token < p.num_tokens;
       token += warps) {
    if (p.mask && !p.mask[token]) {
      if (lane < top_k) p.weights[token * top_k + lane] = 0.f, p.indices[token * top_k + lane] = -1;
      continue;
    }
    float x[kPerLane];
    load_logits(p, token, first_expert, valid, x);
    Softmax softmax{0.f, 1.f};
    if constexpr (kScore == GateScore::kSoftmax) softmax = softmax_of(x);
    auto score = [&](float logit) {
      if constexpr (kScore == GateScore::kSigmoid) return sigmoid(logit);
      if constexpr (kScore == GateScore::kSoftmax) return softmax(logit);
      return sqrt_softplus(logit);
    };
    uint32_t keys[kPerLane], sorted[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      keys[j] = key_of(__fadd_rn(score(x[j]), is_dead(x[j]) ? -INFINITY : bias[j]));
      if (j >= valid) keys[j] = kNothing;
      sorted[j] = keys[j];
    }
    sort(sorted);
    if (p.num_groups > 1 && !in_best_groups(p, sorted, group) && !BUG(every_group_allowed)) sorted[0] = kNothing;

    // Lane k keeps the k-th best: its key, and the lanes that had it, the first of which gives it away.
    uint32_t chosen = kNothing, holders = 0;
    const uint32_t lanes_before = BUG(last_of_ties) ? ~((2u << lane) - 1) : (1u << lane) - 1;
    auto choose = [&](int k) {
      const uint32_t best = __reduce_max_sync(kAll, sorted[0]);
      const uint32_t having = __ballot_sync(kAll, sorted[0] == best);
      if (lane == k) chosen = best, holders = having;
      if (!(having & lanes_before) && sorted[0] == best) {
#pragma unroll
        for (int j = 0; j + 1 < kPerLane; ++j)
          if (!kTopK || j + k + 1 < kTopK) sorted[j] = sorted[j + 1];
        if (!kTopK || kPerLane + k < kTopK) sorted[kPerLane - 1] = kNothing;
      }
    };
    if constexpr (kTopK > 0) {
#pragma unroll
      for (int k = 0; k < kTopK; ++k) choose(k);
    } else {
      for (int k = 0; k < top_k; ++k) choose(k);
    }

    const int from = (BUG(last_of_ties) ? 31 - __clz(int(holders)) : __ffs(int(holders)) - 1) & 31;

    // Equal keys of one lane were given away one after the other: the n-th of them is its n-th expert with that key.
    const uint32_t chosen_before = __shfl_up_sync(kAll, chosen, 1);
    const int from_before = __shfl_up_sync(kAll, from, 1);
    const bool repeated = lane > 0 && lane < top_k && chosen == chosen_before && from == from_before;
    const uint32_t begins = ~__ballot_sync(kAll, repeated) & ((2u << lane) - 1);
    int skip = BUG(equal_keys_forgotten) ? 0 : lane - (31 - __clz(int(begins)));
    uint32_t having = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) having |= uint32_t(__shfl_sync(kAll, keys[j], from) == chosen) << j;
    for (; skip > 0; --skip) having &= having - 1;
    const int expert =
        (from >> p.group_bits) * p.members + (from & (p.group_lanes - 1)) * kPerLane + __ffs(int(having)) - 1;

    float weight = 0;
    if (lane < top_k) {
      const float logit = load_logit(p, token, expert);
      weight = is_dead(logit) ? 0.f : score(logit);
    }
    if (p.normalize) {
      float total = weight;
      for (int bit = 1; bit < top_k; bit *= 2) total += __shfl_xor_sync(kAll, total, bit);
      weight = __fdiv_rn(weight, total + kEpsilon);
    }
    if (lane < top_k) {
      p.weights[token * top_k + lane] = weight * p.scale;
      p.indices[token * top_k + lane] = expert;
    }
  }
}

}  // namespace deepseek_kernels::moe_gate
