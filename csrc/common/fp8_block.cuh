// Sixteen neighbouring elements of a row on their way to e4m3; eight lanes hold one 1x128 block.
#pragma once
#include "copy.cuh"
#include "reduce.cuh"

namespace deepseek_kernels {

constexpr int kFp8Block = 128;
constexpr int kPackSize = 16;
constexpr int kLanesPerBlock = kFp8Block / kPackSize;

template <class T>
using SourcePack = Pack<T, kPackSize>;
using Fp8Pack = Pack<uint8_t, kPackSize>;

template <class T>
DEVICE_FN float pack_amax(const SourcePack<T>& x) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < kPackSize; ++i) amax = max_nan(amax, fabsf(to_float(x[i])));
  return amax;
}

template <class T>
DEVICE_FN float block_amax(const SourcePack<T>& x) {
  return warp_max_nan<kLanesPerBlock - 1>(pack_amax(x));
}

// divisor(i) is what element i is divided by.
template <class T, class DivisorOf>
DEVICE_FN Fp8Pack to_e4m3(const SourcePack<T>& x, const DivisorOf& divisor) {
  float q[kPackSize];
#pragma unroll
  for (int i = 0; i < kPackSize; ++i) q[i] = divisor(i).divide(to_float(x[i]));
  Fp8Pack result;
  result.words[0] = make_uint4(to_e4m3x4(q[0], q[1], q[2], q[3]), to_e4m3x4(q[4], q[5], q[6], q[7]),
                               to_e4m3x4(q[8], q[9], q[10], q[11]), to_e4m3x4(q[12], q[13], q[14], q[15]));
  return result;
}

}  // namespace deepseek_kernels
