// out = sum_i 2^(lse_i - lse) part_i, lse = log2 sum_i 2^lse_i, over the pieces i of a sequence that several parts
// share
//
// Tiling:  CTA (part, row): the sequence that begins in a part and ends in a later one, one of its query rows; a thread
//          has 4 of 512 columns. The first piece is in slot parts + part, the next ones in the slots of the parts
//          after. Pieces are added up in order.
// Bytes:   pieces * rows * (512 * 4 + 4) read, sequences * rows * (512 * 2 + 4) written, nearly all in L2.
#pragma once
#include "common/numeric.cuh"
#include "common/sm90.cuh"
#include "params.h"

namespace deepseek_kernels::mla_decode {

constexpr int kMergeThreads = 128;
constexpr int kMergeColumns = 4;
constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f;

// What the sink leaves to a row: exp(lse) / (exp(lse) + exp(sink)).
DEVICE_FN float share_of(float lse, float sink) { return 1.f / (1.f + exp2_near((sink - lse) * kLog2E)); }

template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge(const __grid_constant__ MlaDecodeParams p) {
  if (!BUG(merge_does_not_wait)) sm90::grid_dependency_wait();
  const int part = blockIdx.x, lane = threadIdx.x % 32;
  const int64_t sequence = p.heads[2 * part];
  if (sequence < 0) return;
  const int pieces = 1 + p.heads[2 * part + 1];
  auto slot = [&](int piece) { return int64_t(piece == 0 ? p.parts + part : part + piece); };
  for (int row = blockIdx.y; row < p.rows; row += int(gridDim.y)) {
    float top = -INFINITY, mass = 0.f;
    for (int i = lane; i < pieces; i += 32) top = fmaxf(top, p.part_lse[slot(i) * p.rows + row]);
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, bit));
    if (top == -INFINITY) top = 0.f;  // nobody has seen anything
    for (int i = lane; i < pieces; i += 32) mass += exp2_near(p.part_lse[slot(i) * p.rows + row] - top);
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) mass += __shfl_xor_sync(0xffffffffu, mass, bit);

    const int head = row % p.h_q, query = row / p.h_q, column = int(threadIdx.x) * kMergeColumns;
    const bool seen = mass != 0.f;
    const float lse = seen ? (top + log2f(mass)) * kLn2 : -INFINITY;
    float factor = seen ? 1.f / mass : 0.f;
    if (p.sink != nullptr && seen) factor *= share_of(lse, p.sink[head]);
    float sum[kMergeColumns] = {};
#pragma unroll 8
    for (int i = 0; i < pieces; ++i) {
      const int64_t at = slot(i) * p.rows + row;
      const float weight = exp2_near(p.part_lse[at] - top) * factor;
      const float4 x = *reinterpret_cast<const float4*>(p.part_out + at * 512 + column);
      sum[0] += weight * x.x, sum[1] += weight * x.y, sum[2] += weight * x.z, sum[3] += weight * x.w;
    }
    const int64_t first = sequence * p.rows;
    if (threadIdx.x == 0) p.lse[first + head * p.s_q + query] = lse;
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + (first + row) * 512 + column) =
        make_uint2(to_word<T>(sum), to_word<T>(sum + 2));
  }
}

}  // namespace deepseek_kernels::mla_decode
