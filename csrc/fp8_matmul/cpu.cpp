// d[m, n] = (sum over k of scale_a * a[m, k] * scale_b * b[n, k]) + bias[n], for CPU tensors.
//
// a is decoded and scaled to fp32 once (m is small); the threads share the rows of b. See common/cpu/rows_matmul.h.
#include "fp8_matmul/cpu.h"

#include "common/cpu/parallel.h"
#include "common/cpu/put.h"
#include "common/cpu/rows_matmul.h"

namespace deepseek_kernels::DSK_ISA {
void fp8_matmul(const Fp8MatmulCpuParams& p, int threads) {
  const int64_t width = padded(p.k);
  parallel_runs(p.m, 4, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const E4m3Weight a{p.a + i * p.lda, p.scale_a + i * p.scale_a_stride_m, 0, 0, p.scale_a_stride_k};
      decode_row(a.row(0), p.k, p.workspace + i * width);
    }
  });
  float* scratch = p.workspace + p.m * width;
  const E4m3Weight weight{p.b, p.scale_b, p.ldb, p.scale_b_stride_n, p.scale_b_stride_k};
  const int64_t tiles = (p.n + kTileN - 1) / kTileN;
  parallel_runs(tiles, 4, threads, [&](int64_t begin, int64_t end, int thread) {
    const float* rows[kSliceRows];
    const int64_t last = end * kTileN < p.n ? end * kTileN : p.n;
    for (int64_t first = 0; first < p.m; first += kSliceRows) {
      const int count = int(slice_rows(p.m - first));
      for (int i = 0; i < count; ++i) rows[i] = p.workspace + (first + i) * width;
      float* mine = scratch + thread * rows_matmul_scratch(p.m);
      rows_matmul(rows, count, weight, begin * kTileN, last, p.k, mine, [&](int i, int64_t j, float value) {
        put(p.out_dtype, p.d, (first + i) * p.ldd + j, p.bias == nullptr ? value : value + p.bias[j], p.accumulate);
      });
    }
  });
}

}  // namespace deepseek_kernels::DSK_ISA
