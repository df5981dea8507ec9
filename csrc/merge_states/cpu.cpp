// out = the mean of out_a and out_b weighted by exp(lse), lse = log(exp(lse_a) + exp(lse_b)), a row at a time.
// A side without weight is not read into the result, whatever it holds.
// Bytes: 2 * rows * (d_v * b + 4) read, half of that written.
#include "merge_states/cpu.h"

#include "common/cpu/parallel.h"
#include "common/cpu/vec.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

// e^(lse - top) that never forms inf - inf.
inline float mass(float lse, float top) { return lse == top ? 1.f : std::exp(lse - top); }

inline float larger(float a, float b) { return a > b || a != a ? a : b; }

template <Dtype kDtype>
void merge(const MergeStatesCpuParams& p, int64_t row) {
  const int64_t head = row % p.h_q, query = row / p.h_q % p.s_q, b = row / p.h_q / p.s_q;
  const int64_t at = (b * p.h_q + head) * p.s_q + query;
  const float lse_a = p.lse_a[at], lse_b = p.lse_b[at], top = larger(lse_a, lse_b);
  const bool empty = top == as_float(0xFF800000);
  const float mass_a = empty ? 0.f : mass(lse_a, top), mass_b = empty ? 0.f : mass(lse_b, top);
  const float total = empty ? 1.f : mass_a + mass_b;
  p.lse[at] = top + std::log(total);

  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const int64_t offset = row * p.d_v * kBytes;
  const char* out_a = static_cast<const char*>(p.out_a) + offset;
  const char* out_b = static_cast<const char*>(p.out_b) + offset;
  char* out = static_cast<char*>(p.out) + offset;
  const float weight_a = mass_a / total, weight_b = mass_b / total;
  for (int64_t c = 0; c < p.d_v; c += kLanes) {
    Vec sum = zero();
    if (weight_a != 0.f) sum = splat(weight_a) * load_some<kDtype>(out_a + c * kBytes, p.d_v - c);
    if (weight_b != 0.f) sum = sum + splat(weight_b) * load_some<kDtype>(out_b + c * kBytes, p.d_v - c);
    store_some<kDtype>(out + c * kBytes, sum, p.d_v - c);
  }
}

}  // namespace

void merge_states(const MergeStatesCpuParams& p, int threads) {
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.b * p.s_q * p.h_q, 16384 / (p.d_v + 1) + 1, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) merge<decltype(tag)::kDtype>(p, row);
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
