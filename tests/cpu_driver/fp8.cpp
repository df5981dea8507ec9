#include <algorithm>

#include "driver.h"
#include "fp8_quantize/cpu.h"
#include "swiglu/cpu.h"

namespace deepseek_kernels::driver {
namespace {

// The scale of a block by its definition, in fp32 as the kernels compute it.
float scale_of(double amax, bool pow2) {
  const float scale = float(std::max(amax, double(1e-4f))) / 448.f;
  return pow2 ? float(std::exp2(std::ceil(std::log2(scale)))) : scale;
}

// e4m3 of x / scale is within half a step: 1/16 of the value, or 2^-10.
void expect_quantized(const char* what, int64_t r, int64_t c, double code, double x, double scale) {
  expect_close(what, r, c, code, x / scale, 1.0 / 16 + 1e-5, 0x1p-10 + 1e-7);
}

void quantize(Random& random, Format format, int block_m, int block_k, int64_t m, int64_t k, bool pow2, int threads) {
  Matrix x = Matrix(format, m, k, 3).fill(random), q(Format::kE4m3, m, k, 1);
  Matrix scale(Format::kFp32, (m + block_m - 1) / block_m, (k + block_k - 1) / block_k);
  fp8_quantize_cpu({.x = x.data(),
                    .q = q.data(),
                    .scale = scale.floats(),
                    .m = m,
                    .k = k,
                    .dtype = dtype(format),
                    .block_m = block_m,
                    .block_k = block_k,
                    .ldx = x.ld,
                    .ldq = q.ld,
                    .scale_stride_m = scale.ld,
                    .scale_stride_k = 1,
                    .pow2_scale = pow2,
                    .stream = nullptr},
                   threads);
  for (int64_t i = 0; i < scale.rows; ++i) {
    for (int64_t j = 0; j < scale.columns; ++j) {
      double amax = 0;
      const int64_t r_end = std::min<int64_t>(m, (i + 1) * block_m), c_end = std::min<int64_t>(k, (j + 1) * block_k);
      for (int64_t r = i * block_m; r < r_end; ++r)
        for (int64_t c = j * block_k; c < c_end; ++c) amax = std::max(amax, std::fabs(x(r, c)));
      expect_close("fp8_quantize scale", i, j, scale(i, j), scale_of(amax, pow2), 0, 0);
      for (int64_t r = i * block_m; r < r_end; ++r)
        for (int64_t c = j * block_k; c < c_end; ++c)
          expect_quantized("fp8_quantize", r, c, q(r, c), x(r, c), scale(i, j));
    }
  }
  Matrix out(format, m, k, 2);
  fp8_dequantize_cpu({.q = q.data(),
                      .scale = scale.floats(),
                      .out = out.data(),
                      .m = m,
                      .k = k,
                      .ldq = q.ld,
                      .ld_out = out.ld,
                      .scale_stride_m = scale.ld,
                      .scale_stride_k = 1,
                      .block_m = block_m,
                      .block_k = block_k,
                      .dtype = dtype(format)},
                     threads);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      expect_close("fp8_dequantize", r, c, out(r, c), q(r, c) * scale(r / block_m, c / block_k), rounding(format),
                   1e-7);
    }
  }
}

void activate(Random& random, Format format, int64_t rows, int64_t columns, bool quantized, bool mapped, int threads) {
  Matrix gate_up = Matrix(format, rows, 2 * columns, 3).fill(random);
  Matrix weights = Matrix(Format::kFp32, 1, rows).fill(random);
  Matrix out(quantized ? Format::kE4m3 : format, rows, columns), scale(Format::kFp32, rows, (columns + 127) / 128);
  std::vector<int32_t> entries;
  for (int64_t r = 0; r < rows; ++r) entries.push_back(int32_t(random.below(rows + 2) - 1));  // some do not exist
  swiglu_cpu({.gate_up = gate_up.data(),
              .weights = weights.floats(),
              .pos_to_token_topk = mapped ? entries.data() : nullptr,
              .out = out.data(),
              .scale_out = quantized ? scale.floats() : nullptr,
              .num_rows = rows,
              .intermediate = columns,
              .num_weights = rows,
              .ld = gate_up.ld,
              .clamp = mapped ? 0.75f : INFINITY,
              .dtype = dtype(format)},
             threads);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t entry = mapped ? entries[r] : r;
    const bool exists = entry >= 0 && entry < rows;
    std::vector<double> expected;
    for (int64_t c = 0; c < columns; ++c) {
      double gate = gate_up(r, c), up = gate_up(r, columns + c);
      if (mapped) gate = std::min(gate, 0.75), up = std::clamp(up, -0.75, 0.75);
      expected.push_back(exists ? gate / (1 + std::exp(-gate)) * up * weights(0, entry) : 0);
    }
    for (int64_t c = 0; c < columns; ++c) {
      if (!quantized) {
        expect_close("swiglu", r, c, out(r, c), expected[c], rounding(format), 1e-6);
        continue;
      }
      double amax = 0;
      for (int64_t o = c / 128 * 128; o < std::min(columns, c / 128 * 128 + 128); ++o)
        amax = std::max(amax, std::fabs(expected[o]));
      expect_close("swiglu scale", r, c, scale(r, c / 128), exists ? scale_of(amax, false) : 0, 1e-5, 0);
      if (exists)
        expect_quantized("swiglu", r, c, out(r, c), expected[c], scale(r, c / 128));
      else
        expect_close("swiglu", r, c, out(r, c), 0, 0, 0);
    }
  }
}

}  // namespace

void test_fp8(Random& random) {
  each_thread_count([&](int threads) {
    for (Format format : kFloats) {
      for (int64_t k : {1, 17, 300}) {
        quantize(random, format, 1, 128, 5, k, false, threads);
        quantize(random, format, 128, 128, 130, k, true, threads);
        quantize(random, format, 128, 1, 130, k, k == 17, threads);
      }
      for (int64_t columns : {1, 31, 161}) {
        activate(random, format, 5, columns, false, true, threads);
        activate(random, format, 5, columns, true, false, threads);
        activate(random, format, 300, columns, true, true, threads);
      }
    }
    quantize(random, Format::kBf16, 1, 128, 400, 200, false, threads);
    quantize(random, Format::kBf16, 1, 128, 0, 200, false, threads);
  });
}

}  // namespace deepseek_kernels::driver
