// What the cases share: matrices in exactly the memory they need, so that AddressSanitizer sees every step outside,
// random contents, and comparison with plain loops in double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common/dtype.h"

namespace deepseek_kernels::driver {

enum class Format { kFp32, kFp16, kBf16, kE4m3 };  // the first three are codes of Dtype

inline Dtype dtype(Format format) { return Dtype(format); }
inline int64_t bytes_of(Format format) { return format == Format::kFp32 ? 4 : format == Format::kE4m3 ? 1 : 2; }
inline const char* name(Format format) {
  constexpr const char* kNames[] = {"fp32", "fp16", "bf16", "e4m3"};
  return kNames[int(format)];
}
constexpr Format kFloats[] = {Format::kFp32, Format::kFp16, Format::kBf16};
// Half the distance of neighbouring values, relative, with room for fp32 sums in another order.
inline double rounding(Format format) {
  constexpr double kRounding[] = {2e-6, 1.0 / 1024, 1.0 / 128, 1.0 / 8};
  return kRounding[int(format)];
}

// By the definition of the format, in place of the kernels' bit patterns.
inline double decode(Format format, const void* p) {
  float f;
  if (format == Format::kFp32) return std::memcpy(&f, p, 4), f;
  uint16_t bits = 0;
  std::memcpy(&bits, p, size_t(bytes_of(format)));
  if (format == Format::kBf16) {
    const uint32_t wide = uint32_t(bits) << 16;
    return std::memcpy(&f, &wide, 4), f;
  }
  const int mantissa_bits = format == Format::kFp16 ? 10 : 3, bias = format == Format::kFp16 ? 15 : 7;
  const int sign = bits >> (8 * bytes_of(format) - 1), magnitude = bits & (format == Format::kFp16 ? 0x7FFF : 0x7F);
  const int exponent = magnitude >> mantissa_bits, mantissa = magnitude & ((1 << mantissa_bits) - 1);
  const double value = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                     : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return sign ? -value : value;
}

struct Random {
  uint64_t state = 1;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  int64_t below(int64_t n) { return bits() % n; }
  float uniform() { return float(bits() >> 8) * 0x1p-23f - 1.f; }  // [-1, 1)
};

// [rows, columns] with a leading stride; nothing follows the last element.
struct Matrix {
  Format format;
  int64_t rows, columns, ld;
  std::vector<uint8_t> bytes;

  Matrix(Format format, int64_t rows, int64_t columns, int64_t gap = 0)
      : format(format),
        rows(rows),
        columns(columns),
        ld(columns + gap),
        bytes(rows * columns == 0 ? 0 : size_t(((rows - 1) * ld + columns) * bytes_of(format)), 0xFF) {}

  // Values of magnitude below 2, finite.
  Matrix& fill(Random& random) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        uint8_t* p = at(r, c);
        const float f = 2 * random.uniform();
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        const uint16_t half = uint16_t(bits >> 16), fp16 = uint16_t((bits >> 31) << 15 | random.below(0x4000));
        const uint8_t e4m3 = uint8_t((bits >> 31) << 7 | random.below(0x40));
        if (format == Format::kFp32) std::memcpy(p, &f, 4);
        if (format == Format::kBf16) std::memcpy(p, &half, 2);
        if (format == Format::kFp16) std::memcpy(p, &fp16, 2);
        if (format == Format::kE4m3) *p = e4m3;
      }
    }
    return *this;
  }
  uint8_t* data() { return bytes.data(); }
  uint8_t* at(int64_t r, int64_t c) { return bytes.data() + (r * ld + c) * bytes_of(format); }
  double operator()(int64_t r, int64_t c) const {
    return decode(format, bytes.data() + (r * ld + c) * bytes_of(format));
  }
  float* floats() { return reinterpret_cast<float*>(bytes.data()); }
};

[[noreturn]] inline void fail(const char* what, int64_t row, int64_t column, double actual, double expected) {
  std::printf("%s [%lld, %lld]: %.9g where %.9g was expected\n", what, (long long)row, (long long)column, actual,
              expected);
  std::exit(1);
}

inline void expect_close(const char* what, int64_t row, int64_t column, double actual, double expected, double relative,
                         double absolute) {
  if (actual == expected || std::fabs(actual - expected) <= relative * std::fabs(expected) + absolute) return;
  fail(what, row, column, actual, expected);
}

template <class Body>
void each_thread_count(const Body& body) {
  for (int threads : {1, 3}) body(threads);
}

void test_routing(Random& random);
void test_fp8(Random& random);
void test_matmuls(Random& random);
void test_latent(Random& random);

}  // namespace deepseek_kernels::driver
