// out[r] = silu(min(gate, c)) * clamp(up, -c, c) * w[r], optionally quantised 1x128; rows without an entry are zero.
//
// Row-parallel, 128 columns at a time through a buffer in L1, where the block's amax is taken before it is encoded.
// Bytes: 2*R*I*b read, R*I*b written.
//
// backward: with s = sigmoid(gate), grad_gate = grad * w * up * s * (1 + gate * (1 - s)), zero where gate > c;
//           grad_up = grad * w * gate * s, zero where |up| > c; grad_w = sum over the row of grad * gate * s * up.
//           Row-parallel, in registers. Bytes: 3*R*I*b read, 2*R*I*b written.
#include "swiglu/cpu.h"

#include "common/cpu/fp8_block.h"
#include "common/cpu/parallel.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

constexpr int64_t kBlock = 128;

// min that keeps a NaN in x.
inline Vec at_most(Vec x, Vec limit) { return min(limit, x); }
inline Vec at_least(Vec x, Vec limit) { return max(limit, x); }

template <Dtype kDtype>
void row(const SwigluCpuParams& p, int64_t r) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const int64_t blocks = (p.intermediate + kBlock - 1) / kBlock;
  char* out = static_cast<char*>(p.out) + r * p.intermediate * (p.scale_out == nullptr ? kBytes : 1);
  float* scales = p.scale_out == nullptr ? nullptr : p.scale_out + r * blocks;
  const int64_t entry = p.pos_to_token_topk == nullptr ? r : p.pos_to_token_topk[r];
  if (entry < 0 || (p.weights != nullptr && entry >= p.num_weights)) {
    std::memset(out, 0, size_t(p.intermediate * (scales == nullptr ? kBytes : 1)));
    for (int64_t i = 0; scales != nullptr && i < blocks; ++i) scales[i] = 0.f;
    return;
  }
  const char* gate = static_cast<const char*>(p.gate_up) + r * p.ld * kBytes;
  const char* up = gate + p.intermediate * kBytes;
  const Vec weight = splat(p.weights == nullptr ? 1.f : p.weights[entry]), one = splat(1.f);
  const bool clamped = p.clamp < as_float(0x7F800000);
  const Vec high = splat(p.clamp), low = splat(-p.clamp);
  alignas(64) float buffer[kBlock];
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * kBlock, count = p.intermediate - begin < kBlock ? p.intermediate - begin : kBlock;
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec g = load_some<kDtype>(gate + (begin + i) * kBytes, count - i);
      Vec u = load_some<kDtype>(up + (begin + i) * kBytes, count - i);
      if (clamped) g = at_most(g, high), u = at_least(at_most(u, high), low);
      store(buffer + i, g / (one + exp(zero() - g)) * u * weight);
    }
    if (scales != nullptr) {
      scales[b] = fp8_scale(amax_of(buffer, count, 0.f), false);
      encode(buffer, count, scales[b], reinterpret_cast<uint8_t*>(out) + begin);
      continue;
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      store_some<kDtype>(out + (begin + i) * kBytes, load(buffer + i), count - i);
    }
  }
}

template <Dtype kDtype>
void row_backward(const SwigluBackwardCpuParams& p, int64_t r) {
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  char* grad_gate = static_cast<char*>(p.grad_gate_up) + r * 2 * p.intermediate * kBytes;
  char* grad_up = grad_gate + p.intermediate * kBytes;
  const int64_t entry = p.pos_to_token_topk == nullptr ? r : p.pos_to_token_topk[r];
  if (entry < 0 || (p.weights != nullptr && entry >= p.num_weights)) {
    std::memset(grad_gate, 0, size_t(2 * p.intermediate * kBytes));
    return;
  }
  const char* grad = static_cast<const char*>(p.grad) + r * p.ld_grad * kBytes;
  const char* gate = static_cast<const char*>(p.gate_up) + r * p.ld * kBytes;
  const char* up = gate + p.intermediate * kBytes;
  const Vec weight = splat(p.weights == nullptr ? 1.f : p.weights[entry]), one = splat(1.f);
  const Vec high = splat(p.clamp), low = splat(-p.clamp);
  Vec total = zero();
  for (int64_t c = 0; c < p.intermediate; c += kLanes) {
    const int64_t left = p.intermediate - c;
    const Vec raw_gate = load_some<kDtype>(gate + c * kBytes, left), raw_up = load_some<kDtype>(up + c * kBytes, left);
    const Vec g = at_most(raw_gate, high), u = at_least(at_most(raw_up, high), low);
    const Vec d = load_some<kDtype>(grad + c * kBytes, left);
    const Vec s = one / (one + exp(zero() - g)), silu = g * s, dw = d * weight;
    total = total + d * silu * u;  // past the end d and silu are 0
    const Vec of_gate = where_less(high, raw_gate, zero(), dw * u * (s * (one + g * (one - s))));
    const Vec of_up = where_less(high, abs(raw_up), zero(), dw * silu);
    store_some<kDtype>(grad_gate + c * kBytes, of_gate, left);
    store_some<kDtype>(grad_up + c * kBytes, of_up, left);
  }
  if (p.weights != nullptr) p.grad_weights[entry] = sum(total);
}

inline int64_t rows_per_run(int64_t intermediate) { return 16384 / (intermediate + 1) + 1; }

}  // namespace

void swiglu_backward(const SwigluBackwardCpuParams& p, int threads) {
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.num_rows, rows_per_run(p.intermediate), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) row_backward<decltype(tag)::kDtype>(p, r);
    });
  });
}

void swiglu(const SwigluCpuParams& p, int threads) {
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.num_rows, rows_per_run(p.intermediate), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) row<decltype(tag)::kDtype>(p, r);
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
