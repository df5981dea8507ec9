// d[r] = a[r] @ b[e]^T for expert_offsets[e] <= r < expert_offsets[e + 1], for CPU tensors; rows of no expert are zero.
//
// a becomes fp32 once, scales applied; the experts that have rows, times the tiles of n, are cut into equal runs, one a
// thread: while rows are few, the time is that of reading those experts' weights. See common/cpu/rows_matmul.h.
// With pos_to_token_topk the rows are gathered by pointer: no permuted copy of a exists.
#include "grouped_matmul/cpu.h"

#include "common/cpu/put.h"
#include "common/cpu/rows_matmul.h"
#include "grouped_matmul/cpu_groups.h"

namespace deepseek_kernels::DSK_ISA {
void grouped_matmul(const GroupedMatmulCpuParams& p, int threads) {
  const int64_t width = padded(p.k);
  const bool fp8 = p.scale_a != nullptr;
  parallel_runs(p.num_tokens, 4, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = p.workspace + i * width;
      if (fp8) {
        const uint8_t* a = static_cast<const uint8_t*>(p.a) + i * p.lda;
        decode_row(E4m3Weight{a, p.scale_a + i * p.scale_a_stride_m, 0, 0, p.scale_a_stride_k}.row(0), p.k, out);
        continue;
      }
      with_dtype(p.dtype, [&](auto tag) {
        using Rows = FloatWeight<decltype(tag)::kDtype>;
        decode_row(Rows{static_cast<const char*>(p.a) + i * p.lda * Rows::kBytes, 0}.row(0), p.k, out);
      });
    }
  });

  std::memset(p.workspace + p.num_tokens * width, 0, size_t(width) * 4);  // the row of those without an entry
  float* scratch = p.workspace + (p.num_tokens + 1) * width;
  float* rest = scratch + threads * rows_matmul_scratch(p.num_rows);
  if ((rest - p.workspace) % 2 != 0) ++rest;  // the pointers are 8 bytes
  const float** rows = reinterpret_cast<const float**>(rest);
  const Groups groups = find_groups(p, reinterpret_cast<int32_t*>(rest + 2 * p.num_rows));
  for (int64_t r = groups.first(); r < groups.rows; ++r) rows[r] = p.workspace + source_row(p, r) * width;

  const auto run = [&](const auto& make_weight) {
    for_each_tile(
        p, groups, kTileN, threads, [&](int64_t row, int count, int32_t e, int64_t begin, int64_t end, int t) {
          rows_matmul(
              rows + row, count, make_weight(e), begin, end, p.k, scratch + t * rows_matmul_scratch(p.num_rows),
              [&](int i, int64_t j, float value) { put(p.out_dtype, p.d, (row + i) * p.ldd + j, value, false); });
        });
  };
  if (fp8) {
    run([&](int64_t e) {
      return E4m3Weight{static_cast<const uint8_t*>(p.b) + e * p.b_stride_e, p.scale_b + e * p.scale_b_stride_e, p.ldb,
                        p.scale_b_stride_n, p.scale_b_stride_k};
    });
    return;
  }
  with_dtype(p.dtype, [&](auto in) {
    using Weight = FloatWeight<decltype(in)::kDtype>;
    run([&](int64_t e) { return Weight{static_cast<const char*>(p.b) + e * p.b_stride_e * Weight::kBytes, p.ldb}; });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
