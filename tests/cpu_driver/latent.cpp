#include <algorithm>

#include "driver.h"
#include "merge_states/cpu.h"
#include "mla_cache_write/cpu.h"
#include "mla_decode/cpu.h"

namespace deepseek_kernels::driver {
namespace {

constexpr int64_t kPositions = 6;

struct Cache {  // pages of rows; uint8 FP8 rows are 512 e4m3 | 4 fp32 scales | 64 bf16, with a gap of 16 bytes
  bool fp8;
  Format format;
  int64_t pages, page_size, d_latent, d_rope;
  int64_t row_bytes = fp8 ? 656 + 16 : (d_latent + d_rope + 1) * bytes_of(format);
  int64_t page_bytes = page_size * row_bytes + (fp8 ? 16 : 3 * bytes_of(format));
  std::vector<uint8_t> bytes = std::vector<uint8_t>(size_t((pages - 1) * page_bytes + (page_size - 1) * row_bytes +
                                                           (fp8 ? 656 : (d_latent + d_rope) * bytes_of(format))));

  uint8_t* row(int64_t slot) { return bytes.data() + slot / page_size * page_bytes + slot % page_size * row_bytes; }
  double at(int64_t slot, int64_t c) {
    if (!fp8) return decode(format, row(slot) + c * bytes_of(format));
    if (c >= 512) return decode(Format::kBf16, row(slot) + 528 + (c - 512) * 2);
    return decode(Format::kE4m3, row(slot) + c) * decode(Format::kFp32, row(slot) + 512 + c / 128 * 4);
  }
  void fill(Random& random) {
    for (int64_t s = 0; s < pages * page_size; ++s) {
      Matrix latent = Matrix(fp8 ? Format::kE4m3 : format, 1, d_latent).fill(random);
      Matrix scale = Matrix(Format::kFp32, 1, 4).fill(random);
      Matrix rope = Matrix(fp8 ? Format::kBf16 : format, 1, d_rope).fill(random);
      std::memcpy(row(s), latent.data(), latent.bytes.size());
      if (fp8) std::memcpy(row(s) + 512, scale.data(), 16);
      std::memcpy(row(s) + latent.bytes.size() + (fp8 ? 16 : 0), rope.data(), rope.bytes.size());
    }
  }
};

struct Rotation {
  Matrix cos_sin;
  std::vector<int64_t> positions;
  bool interleaved, inverse;

  Rotation(Random& random, int64_t tokens, int64_t d_rope, bool interleaved, bool inverse)
      : cos_sin(Matrix(Format::kFp32, kPositions, d_rope).fill(random)), interleaved(interleaved), inverse(inverse) {
    for (int64_t t = 0; t < tokens; ++t) positions.push_back(random.below(kPositions + 4) - 2);  // some out of range
  }
  RotationCpu params() {
    return {.cos_sin = cos_sin.floats(),
            .positions = positions.data(),
            .max_positions = kPositions,
            .d_rope = cos_sin.columns,
            .wide_positions = true,
            .interleaved = interleaved,
            .inverse = inverse};
  }
  // Element c of the rotated row r of x.
  double operator()(const Matrix& x, int64_t r, int64_t t, int64_t c) const {
    const int64_t half = x.columns / 2, row = std::clamp<int64_t>(positions[t], 0, kPositions - 1);
    const int64_t pair = interleaved ? c / 2 : c % half, first = interleaved ? c / 2 * 2 : pair;
    const int64_t second = interleaved ? first + 1 : pair + half;
    const double cos = cos_sin(row, pair), sin = cos_sin(row, half + pair) * (inverse ? -1 : 1);
    return c == first ? x(r, first) * cos - x(r, second) * sin : x(r, second) * cos + x(r, first) * sin;
  }
};

void cache_write(Random& random, Format format, bool fp8, int64_t tokens, int64_t d_latent, int64_t d_rope, bool norm,
                 bool interleaved, int threads) {
  Cache cache{.fp8 = fp8, .format = format, .pages = 13, .page_size = 3, .d_latent = d_latent, .d_rope = d_rope};
  cache.fill(random);
  Cache before = cache;
  Matrix c_kv = Matrix(format, tokens, d_latent, 5).fill(random);
  Matrix k_rope = Matrix(Format::kFp16, tokens, d_rope, 1).fill(random);
  Matrix weight = Matrix(Format::kBf16, 1, d_latent).fill(random);
  Rotation rotation(random, tokens, d_rope, interleaved, false);
  std::vector<int32_t> slots;
  for (int64_t t = 0; t < tokens; ++t) slots.push_back(int32_t(random.below(42) - 1));  // some twice, some nowhere
  mla_cache_write_cpu({.rotation = rotation.params(),
                       .c_kv = c_kv.data(),
                       .k_rope = k_rope.data(),
                       .norm_weight = norm ? weight.data() : nullptr,
                       .kv_cache = cache.bytes.data(),
                       .slots = slots.data(),
                       .num_tokens = tokens,
                       .d_latent = d_latent,
                       .num_pages = cache.pages,
                       .page_size = cache.page_size,
                       .ld_c_kv = c_kv.ld,
                       .ld_k_rope = k_rope.ld,
                       .page_bytes = cache.page_bytes,
                       .row_bytes = cache.row_bytes,
                       .eps = 1e-6f,
                       .c_kv_dtype = dtype(format),
                       .k_rope_dtype = Dtype::kFp16,
                       .norm_dtype = Dtype::kBf16,
                       .cache_dtype = dtype(format),
                       .wide_slots = false,
                       .fp8 = fp8},
                      threads);
  for (int64_t s = 0; s < cache.pages * cache.page_size; ++s) {
    const int64_t t = tokens - 1 - (std::find(slots.rbegin(), slots.rend(), s) - slots.rbegin());  // the last one
    double squares = 0;
    for (int64_t c = 0; t >= 0 && c < d_latent; ++c) squares += c_kv(t, c) * c_kv(t, c);
    const double factor = norm ? 1 / std::sqrt(squares / double(d_latent) + 1e-6) : 1;
    for (int64_t c = 0; c < d_latent + d_rope; ++c) {
      const double actual = cache.at(s, c);
      if (t < 0) {
        expect_close("mla_cache_write elsewhere", s, c, actual, before.at(s, c), 0, 0);
      } else if (c >= d_latent) {
        expect_close("mla_cache_write rope", s, c, actual, rotation(k_rope, t, t, c - d_latent),
                     rounding(fp8 ? Format::kBf16 : format), 1e-6);
      } else {
        const double expected = c_kv(t, c) * factor * (norm ? weight(0, c) : 1);
        expect_close("mla_cache_write", s, c, actual, expected, fp8 ? 1.0 / 16 + 1e-5 : rounding(format),
                     fp8 ? 1e-4 : 1e-6);
      }
    }
  }
}

void rotate(Random& random, Format format, int64_t tokens, int64_t heads, int64_t d_rope, bool interleaved,
            bool inverse, int threads) {
  Matrix x = Matrix(format, tokens * heads, d_rope, 3).fill(random), out(format, tokens * heads, d_rope);
  Rotation rotation(random, tokens, d_rope, interleaved, inverse);
  mla_rope_cpu({.rotation = rotation.params(),
                .x = x.data(),
                .out = out.data(),
                .num_tokens = tokens,
                .heads = heads,
                .x_stride_t = heads * x.ld,
                .x_stride_h = x.ld,
                .dtype = dtype(format)},
               threads);
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < d_rope; ++c)
      expect_close("mla_rope", r, c, out(r, c), rotation(x, r, r / heads, c), rounding(format), 1e-6);
}

void attend(Random& random, Format format, bool fp8, int64_t s_q, int64_t h_q, int64_t d_latent, int64_t d_rope,
            bool causal, bool with_sink, int threads) {
  const std::vector<int32_t> lengths = {70, 0, 3, 200, -4, 33};
  const int64_t b = int64_t(lengths.size()), max_pages = 30, d_qk = d_latent + d_rope, rows = s_q * h_q;
  Cache cache{.fp8 = fp8, .format = format, .pages = 11, .page_size = 3, .d_latent = d_latent, .d_rope = d_rope};
  cache.fill(random);
  Matrix q = Matrix(format, b * rows, d_qk, 5).fill(random), out(format, b * rows, d_latent);
  Matrix lse(Format::kFp32, b * h_q, s_q), sink = Matrix(Format::kFp32, 1, h_q).fill(random);
  std::vector<int32_t> table;
  for (int64_t i = 0; i < b * max_pages; ++i) table.push_back(int32_t(random.below(13) - 1));  // some do not exist
  std::vector<float> workspace(size_t(mla_decode_workspace(rows, d_latent, d_rope, threads)));
  const float scale = 0.15f;
  mla_decode_cpu({.q = q.data(),
                  .kv_cache = cache.bytes.data(),
                  .block_table = table.data(),
                  .seqlens_kv = lengths.data(),
                  .sink = with_sink ? sink.floats() : nullptr,
                  .out = out.data(),
                  .lse = lse.floats(),
                  .workspace = workspace.data(),
                  .b = b,
                  .s_q = s_q,
                  .h_q = h_q,
                  .d_latent = d_latent,
                  .d_rope = d_rope,
                  .num_pages = cache.pages,
                  .page_size = cache.page_size,
                  .max_pages = max_pages,
                  .q_stride_b = rows * q.ld,
                  .q_stride_s = h_q * q.ld,
                  .q_stride_h = q.ld,
                  .page_bytes = cache.page_bytes,
                  .row_bytes = cache.row_bytes,
                  .scale = scale,
                  .dtype = dtype(format),
                  .causal = causal,
                  .fp8 = fp8},
                 threads);
  // The bf16 dot product takes weights of 8 bits, and divides by their sum.
  const bool rounded_weights = cpu_isa() == Isa::kAvx512Bf16 && format == Format::kBf16;
  for (int64_t r = 0; r < b * rows; ++r) {
    const int64_t i = r / rows, query = r % rows / h_q, head = r % h_q;
    const int64_t length = std::clamp<int64_t>(lengths[i], 0, max_pages * 3);
    const int64_t visible = causal ? std::min(length, length - s_q + query + 1) : length;
    std::vector<double> mean(size_t(d_latent), 0), magnitude = mean;
    double total = 0;
    for (int64_t t = 0; t < visible; ++t) {
      const int64_t page = table[i * max_pages + t / 3], slot = page * 3 + t % 3;
      if (page < 0 || page >= cache.pages) continue;
      double dot = 0;
      for (int64_t c = 0; c < d_qk; ++c) dot += q(r, c) * cache.at(slot, c);
      const double weight = std::exp(dot * scale);
      total += weight;
      for (int64_t c = 0; c < d_latent; ++c) {
        mean[c] += weight * cache.at(slot, c);
        magnitude[c] += weight * std::abs(cache.at(slot, c));
      }
    }
    expect_close("mla_decode lse", r, 0, lse(i * h_q + head, query), std::log(total), 1e-5, 1e-5);
    const double divisor = total + (with_sink ? std::exp(sink(0, head)) : 0);
    for (int64_t c = 0; c < d_latent; ++c) {
      const double expected = total == 0 ? 0 : mean[c] / divisor;
      const double of_weights = rounded_weights && total != 0 ? magnitude[c] / divisor / 128 : 0;
      expect_close("mla_decode", r, c, out(r, c), expected, rounding(format), 2e-5 + of_weights);
    }
  }
}

void merge(Random& random, Format format, int64_t b, int64_t s_q, int64_t h_q, int64_t d_v, int threads) {
  const int64_t rows = b * s_q * h_q;
  Matrix out_a = Matrix(format, rows, d_v).fill(random), out_b = Matrix(format, rows, d_v).fill(random);
  Matrix lse_a = Matrix(Format::kFp32, b * h_q, s_q).fill(random), lse_b = Matrix(Format::kFp32, b * h_q, s_q);
  lse_b.fill(random);
  if (rows > 2) lse_a.floats()[0] = lse_b.floats()[0] = lse_b.floats()[2] = -INFINITY;
  Matrix out(format, rows, d_v), lse(Format::kFp32, b * h_q, s_q);
  merge_states_cpu({.out_a = out_a.data(),
                    .out_b = out_b.data(),
                    .lse_a = lse_a.floats(),
                    .lse_b = lse_b.floats(),
                    .out = out.data(),
                    .lse = lse.floats(),
                    .b = b,
                    .s_q = s_q,
                    .h_q = h_q,
                    .d_v = d_v,
                    .dtype = dtype(format)},
                   threads);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r / h_q / s_q * h_q + r % h_q, query = r / h_q % s_q;
    const double a = std::exp(lse_a(row, query)), other = std::exp(lse_b(row, query)), total = a + other;
    expect_close("merge_states lse", r, 0, lse(row, query), std::log(total), 1e-5, 1e-6);
    for (int64_t c = 0; c < d_v; ++c) {
      const double expected = total == 0 ? 0 : (a * out_a(r, c) + other * out_b(r, c)) / total;
      expect_close("merge_states", r, c, out(r, c), expected, rounding(format), 1e-6);
    }
  }
}

}  // namespace

void test_latent(Random& random) {
  each_thread_count([&](int threads) {
    for (Format format : kFloats) {
      cache_write(random, format, false, 7, 1, 2, true, true, threads);
      cache_write(random, format, false, 100, 131, 150, false, false, threads);
      cache_write(random, format, true, 100, 512, 64, format != Format::kFp32, true, threads);
      rotate(random, format, 3, 2, 6, true, true, threads);
      rotate(random, format, 20, 16, 150, false, false, threads);
      attend(random, format, false, 1, 2, 5, 3, true, false, threads);
      attend(random, format, false, 3, 5, 72, 16, true, true, threads);
      attend(random, format, false, 3, 6, 96, 32, true, true, threads);
      attend(random, format, true, 2, 3, 512, 64, false, true, threads);
      merge(random, format, 2, 3, 5, 19, threads);
      merge(random, format, 1, 1, 70, 512, threads);
      merge(random, format, 2, 1, 3, 0, threads);
    }
    attend(random, Format::kBf16, false, 2, 40, 40, 8, true, false, threads);
    cache_write(random, Format::kBf16, false, 0, 16, 8, true, true, threads);
  });
}

}  // namespace deepseek_kernels::driver
