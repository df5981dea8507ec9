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
DEVICE_FN uint32_t pack_max_magnitudes(const SourcePack<T>& x) {
  uint32_t most = 0;
#pragma unroll
  for (int w = 0; w < SourcePack<T>::kWords * 4; ++w) most = max_magnitudes<T>(most, magnitudes_of<T>(x.word(w)));
  return most;
}

template <class T>
DEVICE_FN float pack_amax(const SourcePack<T>& x) {
  return largest_magnitude<T>(pack_max_magnitudes(x));
}

template <class T>
DEVICE_FN float block_amax(const SourcePack<T>& x) {
  return largest_magnitude<T>(warp_max_magnitudes<T, kLanesPerBlock - 1>(pack_max_magnitudes(x)));
}

// divisor(i) is what element i is divided by.
template <class T, class DivisorOf>
DEVICE_FN Fp8Pack to_e4m3(const SourcePack<T>& x, const DivisorOf& divisor) {
  float q[kPackSize];
#pragma unroll
  for (int i = 0; i < kPackSize; ++i) q[i] = divisor(i).divide(x[i]);
  Fp8Pack result;
  result.words[0] = make_uint4(to_e4m3x4(q[0], q[1], q[2], q[3]), to_e4m3x4(q[4], q[5], q[6], q[7]),
                               to_e4m3x4(q[8], q[9], q[10], q[11]), to_e4m3x4(q[12], q[13], q[14], q[15]));
  return result;
}

}  // namespace deepseek_kernels
