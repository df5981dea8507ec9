// grouped_matmul for CPU tensors on the bf16 dot product: FP8 operands, exact in bf16, or bf16 ones. See cpu.cpp and
// common/cpu/bf16_dot.h.
#include "common/cpu/bf16_dot.h"
#include "common/cpu/parallel.h"
#include "common/cpu/put.h"
#include "grouped_matmul/cpu.h"
#include "grouped_matmul/cpu_groups.h"

namespace deepseek_kernels::avx512_bf16 {

void grouped_matmul(const GroupedMatmulCpuParams& p, int threads) {
  const bool fp8 = p.scale_a != nullptr;
  if (!fp8 && p.dtype != Dtype::kBf16) return avx512::grouped_matmul(p, threads);
  const int64_t width = padded_columns(p.k);
  uint16_t* values = reinterpret_cast<uint16_t*>(p.workspace);
  parallel_runs(p.num_tokens, 4, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      uint16_t* to = values + i * width;
      if (fp8) {
        decode_row(static_cast<const uint8_t*>(p.a) + i * p.lda, p.k, to);
      } else {
        std::memcpy(to, static_cast<const uint16_t*>(p.a) + i * p.lda, size_t(p.k) * 2);
        std::memset(to + p.k, 0, size_t(width - p.k) * 2);
      }
    }
  });
  std::memset(values + p.num_tokens * width, 0, size_t(width) * 2);  // the row of those without an entry
  float* scratch = p.workspace + (p.num_tokens + 1) * (width / 2);
  float* rest = scratch + threads * dot_scratch(p.num_rows);
  if ((rest - p.workspace) % 2 != 0) ++rest;  // the pointers are 8 bytes
  DotRow* rows = reinterpret_cast<DotRow*>(rest);
  const Groups groups = find_groups(p, reinterpret_cast<int32_t*>(rest + 4 * p.num_rows));
  for (int64_t r = groups.first(); r < groups.rows; ++r) {
    const int64_t token = source_row(p, r);
    rows[r] = {values + token * width, fp8 && token < p.num_tokens ? p.scale_a + token * p.scale_a_stride_m : nullptr};
  }

  const auto run = [&](const auto& make_rows) {
    for_each_tile(
        p, groups, kRowsN, threads, [&](int64_t row, int count, int32_t e, int64_t begin, int64_t end, int t) {
          dot_rows(make_rows(e), rows + row, count, begin, end, scratch + t * dot_scratch(p.num_rows),
                   [&](int i, int64_t j, float value) { put(p.out_dtype, p.d, (row + i) * p.ldd + j, value, false); });
        });
  };
  if (fp8) {
    run([&](int64_t e) {
      return E4m3Rows{static_cast<const uint8_t*>(p.b) + e * p.b_stride_e,
                      p.scale_b + e * p.scale_b_stride_e,
                      p.ldb,
                      p.scale_b_stride_n,
                      p.scale_b_stride_k,
                      p.scale_a_stride_k,
                      p.k};
    });
  } else {
    run([&](int64_t e) { return Bf16Rows{static_cast<const uint16_t*>(p.b) + e * p.b_stride_e, p.ldb, p.k}; });
  }
}

}  // namespace deepseek_kernels::avx512_bf16
