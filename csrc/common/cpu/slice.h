// How many rows of a the CPU matmuls take at a time: it bounds the scratch of a thread, and a weight decoded once for
// that many rows costs next to nothing.
#pragma once
#include <cstdint>

namespace deepseek_kernels {

constexpr int64_t kSliceRows = 256;

inline int64_t slice_rows(int64_t m) { return m < kSliceRows ? m : kSliceRows; }

// Floats of scratch for one thread, enough for every instruction set.
inline int64_t matmul_scratch(int64_t m) { return 4 * 1024 + (slice_rows(m) + 6) * 16 * 16; }

}  // namespace deepseek_kernels
