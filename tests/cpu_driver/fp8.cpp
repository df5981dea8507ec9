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
                      .dtype = dtype(format),
                      .stream = nullptr},
                     threads);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      expect_close("fp8_dequantize", r, c, out(r, c), q(r, c) * scale(r / block_m, c / block_k), rounding(format),
                   1e-7);
    }
  }
}

// `offsets`: of experts, in order; none without experts. Every row has an expert.
void quantize_both(Random& random, Format format, int64_t m, int64_t k, std::vector<int32_t> offsets, int threads) {
  std::vector<int64_t> token;  // of each column of q_t, -1 for none
  const std::vector<int32_t> ends = offsets.empty() ? std::vector<int32_t>{0, int32_t(m)} : offsets;
  for (size_t e = 1; e < ends.size(); ++e) {
    for (int64_t t = ends[e - 1]; t < ends[e]; ++t) token.push_back(t);
    while (token.size() % 128 != 0) token.push_back(-1);
  }
  token.resize(token.size() + 128, -1);
  const int64_t width = int64_t(token.size());
  Matrix x = Matrix(format, m, k, 3).fill(random), q(Format::kE4m3, m, k, 1), q_t(Format::kE4m3, k, width, 5);
  Matrix scale(Format::kFp32, m, (k + 127) / 128), scale_t(Format::kFp32, k, width / 128);
  fp8_quantize_both_cpu({.x = x.data(),
                         .expert_offsets = offsets.empty() ? nullptr : offsets.data(),
                         .q = q.data(),
                         .scale = scale.floats(),
                         .q_t = q_t.data(),
                         .scale_t = scale_t.floats(),
                         .m = m,
                         .k = k,
                         .width = width,
                         .row_tiles = width / 128,
                         .num_experts = offsets.empty() ? 0 : int(offsets.size()) - 1,
                         .dtype = dtype(format),
                         .ldx = x.ld,
                         .ldq = q.ld,
                         .ldq_t = q_t.ld,
                         .scale_stride_m = scale.ld,
                         .scale_stride_k = 1,
                         .scale_t_stride_k = scale_t.ld,
                         .scale_t_stride_w = 1,
                         .pow2_scale = false,
                         .stream = nullptr},
                        threads);
  for (int64_t c = 0; c < k; ++c) {
    for (int64_t t = 0; t < width; ++t) {
      double amax = 0;
      for (int64_t o = t / 128 * 128; o < t / 128 * 128 + 128; ++o)
        if (token[o] >= 0) amax = std::max(amax, std::fabs(x(token[o], c)));
      expect_close("fp8_quantize_both scale_t", c, t, scale_t(c, t / 128), scale_of(amax, false), 0, 0);
      expect_quantized("fp8_quantize_both q_t", c, t, q_t(c, t), token[t] < 0 ? 0 : x(token[t], c),
                       scale_t(c, t / 128));
    }
  }
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < k; ++c) expect_quantized("fp8_quantize_both q", r, c, q(r, c), x(r, c), scale(r, c / 128));
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

void activate_backward(Random& random, Format format, int64_t rows, int64_t columns, bool mapped, int threads) {
  Matrix gate_up = Matrix(format, rows, 2 * columns, 3).fill(random),
         grad = Matrix(format, rows, columns, 1).fill(random);
  Matrix weights = Matrix(Format::kFp32, 1, rows).fill(random), of_weights(Format::kFp32, 1, rows);
  Matrix of_gate_up(format, rows, 2 * columns);
  for (int64_t r = 0; r < rows; ++r) of_weights.floats()[r] = 7;
  std::vector<int32_t> entries;
  for (int64_t r = 0; r < rows; ++r) entries.push_back(int32_t(rows - r));  // the first does not exist
  swiglu_backward_cpu({.grad = grad.data(),
                       .gate_up = gate_up.data(),
                       .weights = weights.floats(),
                       .pos_to_token_topk = mapped ? entries.data() : nullptr,
                       .grad_gate_up = of_gate_up.data(),
                       .grad_weights = of_weights.floats(),
                       .num_rows = rows,
                       .intermediate = columns,
                       .num_weights = rows,
                       .ld_grad = grad.ld,
                       .ld = gate_up.ld,
                       .clamp = mapped ? 0.75f : INFINITY,
                       .dtype = dtype(format)},
                      threads);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t entry = mapped ? entries[r] : r;
    const bool exists = entry < rows;
    double dot = 0, magnitude = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const double raw_gate = gate_up(r, c), raw_up = gate_up(r, columns + c), limit = mapped ? 0.75 : INFINITY;
      const double gate = std::min(raw_gate, limit), up = std::clamp(raw_up, -limit, limit);
      const double s = 1 / (1 + std::exp(-gate)), d = exists ? grad(r, c) * weights(0, entry) : 0;
      const double of_gate = raw_gate > limit ? 0 : d * up * s * (1 + gate * (1 - s));
      const double of_up = std::fabs(raw_up) > limit ? 0 : d * gate * s;
      expect_close("swiglu_backward gate", r, c, of_gate_up(r, c), of_gate, rounding(format), 1e-6);
      expect_close("swiglu_backward up", r, c, of_gate_up(r, columns + c), of_up, rounding(format), 1e-6);
      dot += grad(r, c) * gate * s * up, magnitude += std::fabs(grad(r, c) * gate * s * up);
    }
    if (exists) expect_close("swiglu_backward weight", r, 0, of_weights(0, entry), dot, 0, 1e-6 * magnitude + 1e-7);
  }
  if (mapped) expect_close("swiglu_backward entry without a row", 0, 0, of_weights(0, 0), 7, 0, 0);
}

}  // namespace

void test_fp8(Random& random) {
  each_thread_count([&](int threads) {
    for (Format format : kFloats) {
      for (int64_t k : {1, 17, 300}) {
        quantize(random, format, 1, 128, 5, k, false, threads);
        quantize(random, format, 128, 128, 130, k, true, threads);
        quantize(random, format, 128, 1, 130, k, k == 17, threads);
        quantize_both(random, format, 130, k, {}, threads);
        quantize_both(random, format, 140, k, {0, 3, 3, 135, 140}, threads);
      }
      for (int64_t columns : {1, 31, 161}) {
        activate(random, format, 5, columns, false, true, threads);
        activate(random, format, 5, columns, true, false, threads);
        activate(random, format, 300, columns, true, true, threads);
        activate_backward(random, format, 150, columns, true, threads);
        activate_backward(random, format, 5, columns, false, threads);
      }
    }
    quantize(random, Format::kBf16, 1, 128, 400, 200, false, threads);
    quantize(random, Format::kBf16, 1, 128, 0, 200, false, threads);
  });
}

}  // namespace deepseek_kernels::driver
