// fp8_matmul for CPU tensors on the bf16 dot product: the maths of cpu.cpp, both operands exact in bf16. See
// common/cpu/bf16_dot.h.
#include "common/cpu/bf16_dot.h"
#include "common/cpu/parallel.h"
#include "common/cpu/put.h"
#include "fp8_matmul/cpu.h"

namespace deepseek_kernels::avx512_bf16 {
void fp8_matmul(const Fp8MatmulCpuParams& p, int threads) {
  const int64_t width = padded_columns(p.k);
  uint16_t* values = reinterpret_cast<uint16_t*>(p.workspace);
  parallel_runs(p.m, 4, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) decode_row(p.a + i * p.lda, p.k, values + i * width);
  });
  float* scratch = p.workspace + p.m * (width / 2);
  const E4m3Rows rows{p.b, p.scale_b, p.ldb, p.scale_b_stride_n, p.scale_b_stride_k, p.scale_a_stride_k, p.k};
  const int64_t tiles = (p.n + kRowsN - 1) / kRowsN;
  parallel_runs(tiles, 4, threads, [&](int64_t begin, int64_t end, int thread) {
    DotRow a[kSliceRows];
    const int64_t last = end * kRowsN < p.n ? end * kRowsN : p.n;
    for (int64_t first = 0; first < p.m; first += kSliceRows) {
      const int count = int(slice_rows(p.m - first));
      for (int i = 0; i < count; ++i) {
        a[i] = {values + (first + i) * width, p.scale_a + (first + i) * p.scale_a_stride_m};
      }
      dot_rows(rows, a, count, begin * kRowsN, last, scratch + thread * dot_scratch(p.m),
               [&](int i, int64_t j, float value) {
                 put(p.out_dtype, p.d, (first + i) * p.ldd + j, p.bias == nullptr ? value : value + p.bias[j],
                     p.accumulate);
               });
    }
  });
}

}  // namespace deepseek_kernels::avx512_bf16
