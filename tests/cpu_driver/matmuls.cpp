#include <algorithm>

#include "driver.h"
#include "fp8_matmul/cpu.h"
#include "grouped_matmul/cpu.h"

namespace deepseek_kernels::driver {
namespace {

struct Operand {  // values, and for e4m3 a scale for each block
  Matrix value, scale;
  int64_t block;

  Operand(Random& random, Format format, int64_t rows, int64_t k, int64_t block)
      : value(Matrix(format, rows, k, 7).fill(random)),
        scale(Matrix(Format::kFp32, (rows + block - 1) / block, (k + 127) / 128, 1).fill(random)),
        block(block) {}
  double operator()(int64_t r, int64_t c) const {
    return value(r, c) * (value.format == Format::kE4m3 ? scale(r / block, c / 128) : 1);
  }
};

// The sum, and what rounding each product to fp32 may do to it.
struct Dot {
  double sum = 0, magnitude = 0;
  Dot(const Operand& a, int64_t i, const Operand& b, int64_t j) {
    for (int64_t c = 0; c < a.value.columns; ++c) {
      const double product = a(i, c) * b(j, c);
      sum += product, magnitude += std::fabs(product);
    }
  }
};

void fp8_product(Random& random, Format out, int64_t m, int64_t n, int64_t k, bool accumulate, int threads) {
  Operand a(random, Format::kE4m3, m, k, 1), b(random, Format::kE4m3, n, k, 128);
  Matrix bias = Matrix(Format::kFp32, 1, n).fill(random), d = Matrix(out, m, n, 3).fill(random);
  const Matrix before = d;
  std::vector<float> workspace(size_t(fp8_matmul_workspace(m, k, threads)));
  fp8_matmul_cpu({.a = a.value.data(),
                  .scale_a = a.scale.floats(),
                  .b = b.value.data(),
                  .scale_b = b.scale.floats(),
                  .bias = accumulate ? nullptr : bias.floats(),
                  .d = d.data(),
                  .workspace = workspace.data(),
                  .m = m,
                  .n = n,
                  .k = k,
                  .lda = a.value.ld,
                  .ldb = b.value.ld,
                  .ldd = d.ld,
                  .scale_a_stride_m = a.scale.ld,
                  .scale_a_stride_k = 1,
                  .scale_b_stride_n = b.scale.ld,
                  .scale_b_stride_k = 1,
                  .out_dtype = dtype(out),
                  .accumulate = accumulate},
                 threads);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const Dot dot(a, i, b, j);
      const double other = accumulate ? before(i, j) : bias(0, j);
      expect_close("fp8_matmul", i, j, d(i, j), dot.sum + other, rounding(out), 1e-6 * dot.magnitude + 1e-6);
    }
  }
}

// Experts with 0, 1, 9 and 2 rows; the rows before the first and after the last belong to nobody.
void grouped_product(Random& random, Format format, Format out, int64_t n, int64_t k, bool gather, int threads) {
  const std::vector<int32_t> offsets = {1, 1, 2, 11, 13};
  const int64_t experts = int64_t(offsets.size()) - 1, rows = 15, top_k = 3, tokens = gather ? 4 : rows;
  const bool fp8 = format == Format::kE4m3;
  Operand a(random, format, tokens, k, 1);
  std::vector<Operand> weights;
  for (int64_t e = 0; e < experts; ++e) weights.emplace_back(random, format, n, k, 128);
  std::vector<uint8_t> b;
  std::vector<float> scale_b;
  const int64_t b_stride = int64_t(weights[0].value.bytes.size()) / bytes_of(format);
  const int64_t scale_stride = int64_t(weights[0].scale.bytes.size()) / 4;
  for (Operand& w : weights) {
    b.insert(b.end(), w.value.bytes.begin(), w.value.bytes.end());
    scale_b.insert(scale_b.end(), w.scale.floats(), w.scale.floats() + scale_stride);
  }
  b.shrink_to_fit(), scale_b.shrink_to_fit();
  std::vector<int32_t> entries;
  for (int64_t r = 0; r < rows; ++r) entries.push_back(int32_t(random.below(tokens * top_k)));
  entries[1] = -1, entries[4] = -1, entries[5] = 1 << 30;  // padding between experts, and nonsense
  Matrix d(out, rows, n, 3);
  std::vector<float> workspace(size_t(grouped_matmul_workspace(tokens, rows, k, experts, threads)));
  grouped_matmul_cpu({.a = a.value.data(),
                      .scale_a = fp8 ? a.scale.floats() : nullptr,
                      .b = b.data(),
                      .scale_b = fp8 ? scale_b.data() : nullptr,
                      .expert_offsets = offsets.data(),
                      .pos_to_token_topk = gather ? entries.data() : nullptr,
                      .d = d.data(),
                      .workspace = workspace.data(),
                      .num_tokens = tokens,
                      .num_rows = rows,
                      .n = n,
                      .k = k,
                      .num_experts = experts,
                      .lda = a.value.ld,
                      .ldb = weights[0].value.ld,
                      .ldd = d.ld,
                      .b_stride_e = b_stride,
                      .scale_a_stride_m = a.scale.ld,
                      .scale_a_stride_k = 1,
                      .scale_b_stride_e = scale_stride,
                      .scale_b_stride_n = weights[0].scale.ld,
                      .scale_b_stride_k = 1,
                      .top_k = int(top_k),
                      .dtype = fp8 ? Dtype::kFp32 : dtype(format),
                      .out_dtype = dtype(out)},
                     threads);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t e = std::upper_bound(offsets.begin(), offsets.end(), r) - offsets.begin() - 1;
    const int64_t token = gather ? (entries[r] < 0 ? -1 : entries[r] / top_k) : r;
    const bool empty = e < 0 || e >= experts || token < 0 || token >= tokens;
    for (int64_t j = 0; j < n; ++j) {
      if (empty) {
        expect_close("grouped_matmul empty row", r, j, d(r, j), 0, 0, 0);
        continue;
      }
      const Dot dot(a, token, weights[e], j);
      expect_close("grouped_matmul", r, j, d(r, j), dot.sum, rounding(out), 1e-6 * dot.magnitude + 1e-6);
    }
  }
}

}  // namespace

void test_matmuls(Random& random) {
  each_thread_count([&](int threads) {
    for (int64_t m : {0, 1, 2, 3, 4, 6, 13}) {
      for (int64_t k : {8, 131, 1100}) fp8_product(random, kFloats[(m + k) % 3], m, 131, k, m % 2, threads);
    }
    fp8_product(random, Format::kFp32, 3, 5, 0, false, threads);
    fp8_product(random, Format::kFp32, 2, 0, 8, false, threads);
    for (Format format : {Format::kFp32, Format::kFp16, Format::kBf16, Format::kE4m3}) {
      for (int64_t k : {9, 1100}) {
        grouped_product(random, format, kFloats[k % 3], 7, k, false, threads);
        grouped_product(random, format, Format::kFp32, 131, k, true, threads);
      }
    }
    for (Format format : {Format::kBf16, Format::kE4m3}) {  // long rows pass several chunks
      grouped_product(random, format, Format::kFp32, 3, 2500, true, threads);
    }
  });
}

}  // namespace deepseek_kernels::driver
