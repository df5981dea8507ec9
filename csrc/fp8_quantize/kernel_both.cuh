// Row and column quantisation of x in one pass, for training:  q, scale as 1x128;  q_t, scale_t as 128x1, transposed.
//
//   q_t[c, t] = saturate_e4m3(x[row(t), c] / scale_t[c, t / 128])
//
// Column t of q_t is row t of x, or, where rows belong to experts, the rows of expert e are the columns from
// 128 * sum(ceil(rows_i / 128) for i < e): a block of 128 columns is of one expert. Columns of no row are
// zeros, quantised with their block.
//
// Tiling:   one CTA per block of 128 columns of q_t x 128 columns of x. The tile is read once and stays in registers
//           (tile.cuh). More blocks hold the rows of no expert, which have a place in q only.
// Pipeline: | step                     | after                                             |
//           | ------------------------ | ------------------------------------------------- |
//           | find the rows            | (only with experts) one warp, shared memory       |
//           | load the tile            |                                                   |
//           | maxima of the columns    | among the warp's rows; shared memory, one per warp |
//           | scales of the columns    | one thread each, while the rows are written to q  |
//           | codes of the columns     | into shared memory, transposed                    |
//           | write the rows of q_t    | eight lanes a row, 16 bytes each                  |
// Transpose: a thread's four codes of a column are a word of row c of the transposed tile. Eight lanes write to rows 16
//           apart, all of which begin in bank 0, so the 16-byte chunks of row c are permuted by c / 16: the 32 words of
//           a warp's store lie in 32 banks, and so do the eight chunks of a row that eight lanes read.
// Bytes:    m * k * (sizeof(x) + 2) + 4 per block.  m = 4096, k = 7168, bf16: 119 MB, 27.7 us at 4.3 TB/s.
#pragma once
#include "params.h"
#include "tile.cuh"

namespace deepseek_kernels::fp8_quantize {

struct Rows {
  int64_t begin, end;  // of x; at most 128 of them are meant
  bool of_expert;
};

template <class T>
struct BothSmem {
  uint8_t codes[kTile][kTile];  // transposed
  ColumnAmax<T> columns;
  ColumnDivisors divisors;
  Rows rows;
};

// Where chunk `chunk` of 16 tokens is in the row of a column that is among the columns of octet lane `lane`.
DEVICE_FN int chunk_at(int chunk, int lane) { return (chunk ^ lane) * 16; }

// The rows of the `block`-th block of 128: first the experts' blocks, one expert after another, then the rows before
// the first expert, then those after the last. Offsets are clamped to [0, m] and raised where they decrease. For one
// warp, each lane of which looks at a run of experts.
DEVICE_FN Rows find_rows(const Fp8QuantizeBothParams& p, int block) {
  const int lane = threadIdx.x % 32, num_experts = p.num_experts;
  const int limit = int(p.m < INT32_MAX ? p.m : INT32_MAX);
  auto offset = [&](int e) {
    const int value = __ldg(p.expert_offsets + e);
    return value < 0 ? 0 : value > limit ? limit : value;
  };
  const int share = ceil_div(num_experts, 32);
  const int first = lane * share < num_experts ? lane * share : num_experts;
  const int last = first + share < num_experts ? first + share : num_experts;

  int highest = 0;
  for (int e = first; e < last; ++e) highest = offset(e) > highest ? offset(e) : highest;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int left = __shfl_up_sync(0xffffffffu, highest, distance);
    if (lane >= distance && left > highest) highest = left;
  }
  int before = __shfl_up_sync(0xffffffffu, highest, 1);  // the largest offset of the lanes before
  if (lane == 0) before = 0;
  auto for_each_expert = [&](const auto& body) {  // body(begin, end, blocks)
    int end = before;
    for (int e = first; e < last; ++e) {
      const int begin = offset(e) > end ? offset(e) : end;
      end = offset(e + 1) > begin ? offset(e + 1) : begin;
      body(begin, end, int(ceil_div<uint32_t>(end - begin, kTile)));
    }
  };

  int blocks = 0;
  for_each_expert([&](int, int, int count) { blocks += count; });
  int end_block = blocks;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int left = __shfl_up_sync(0xffffffffu, end_block, distance);
    if (lane >= distance) end_block += left;
  }
  const int total = __shfl_sync(0xffffffffu, end_block, 31);
  const int here = block - (end_block - blocks);  // from this lane's first block
  int begin = 0, end = 0, passed = 0;
  if (here >= 0 && here < blocks) {
    for_each_expert([&](int expert_begin, int expert_end, int count) {
      if (passed <= here && here < passed + count) begin = expert_begin + (here - passed) * kTile, end = expert_end;
      passed += count;
    });
  }
  const uint32_t found = __ballot_sync(0xffffffffu, here >= 0 && here < blocks);
  if (found) {
    const int owner = __ffs(int(found)) - 1;
    return {__shfl_sync(0xffffffffu, begin, owner), __shfl_sync(0xffffffffu, end, owner), true};
  }
  const int early = offset(0), early_blocks = int(ceil_div<uint32_t>(early, kTile));
  const int most = __shfl_sync(0xffffffffu, highest, 31),
            late = offset(num_experts) > most ? offset(num_experts) : most;
  const int stranger = block - total;
  if (stranger < early_blocks) return {int64_t(stranger) * kTile, early, false};
  return {late + int64_t(stranger - early_blocks) * kTile, p.m, false};
}

// kWhole: rows of x and q are multiples of 16 bytes apart, k is a multiple of 16. Those of q_t always are.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2) both_kernel(const Fp8QuantizeBothParams p) {
  DYNAMIC_SMEM(raw_smem);
  BothSmem<T>& smem = *reinterpret_cast<BothSmem<T>*>(raw_smem);
  const uint32_t k_tiles = uint32_t(ceil_div<int64_t>(p.k, kTile));
  const int64_t block = blockIdx.x / k_tiles, k_tile = blockIdx.x % k_tiles;
  const int lane = threadIdx.x % 32;

  Rows rows{block * kTile, p.m, true};
  if (p.expert_offsets != nullptr) {
    if (threadIdx.x < 32) {
      rows = find_rows(p, int(block));
      if (lane == 0) smem.rows = rows;
    }
    if (!BUG(rows_read_early)) __syncthreads();
    rows = smem.rows;
  }
  if (BUG(expert_end_ignored)) rows.end = p.m;
  const bool has_columns = block * kTile < p.width;
  if (rows.begin >= rows.end && !has_columns) return;

  const int64_t row = rows.begin + first_row();
  const int64_t column = k_tile * kTile + first_column();
  const int64_t columns_left = BUG(column_tail_unmasked) ? kTile : p.k - column;
  auto valid = [&](int i) { return row + i < rows.end || BUG(row_tail_unmasked) ? columns_left : int64_t(0); };
  SourcePack<T> x[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    x[i].template load<kWhole>(static_cast<const T*>(p.x) + (row + i) * p.ldx + column, valid(i));

  smem.columns.put(x);
  if (!BUG(amax_read_early)) __syncthreads();
  if (threadIdx.x < kTile) {
    const float amax = rows.of_expert || BUG(strangers_have_columns) ? smem.columns.get(threadIdx.x) : 0.f;
    const float scale = fp8_scale(amax, p.pow2_scale);
    smem.divisors.set(threadIdx.x, Fp8Divisor(scale));
    const int64_t c = k_tile * kTile + threadIdx.x;
    if (c < p.k && has_columns) p.scale_t[c * p.scale_t_stride_k + block * p.scale_t_stride_w] = scale;
  }

  const float scale = fp8_scale(row_amax(x), p.pow2_scale);
  const int64_t scale_row = row + threadIdx.x % kRows;
  if (writes_row_scale() && scale_row < rows.end)
    p.scale[scale_row * p.scale_stride_m + k_tile * p.scale_stride_k] = scale;
  const Fp8Divisor divisor(scale);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Fp8Divisor d = row_divisor(divisor, i);
    x[i].forget();
    to_e4m3(x[i], [&](int) {
      return d;
    }).template store<kWhole>(static_cast<uint8_t*>(p.q) + (row + i) * p.ldq + column, valid(i));
  }
  if (!has_columns) return;
  if (!BUG(scale_read_early)) __syncthreads();

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    x[i].forget();
    if (!rows.of_expert && !BUG(strangers_have_columns)) x[i] = SourcePack<T>{};
  }
  const int octet_lane = threadIdx.x % kLanesPerBlock;
  uint8_t* my_codes = smem.codes[first_column()] + chunk_at(first_row() / 16, octet_lane) + first_row() % 16;
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) {
    const Fp8Divisor d = smem.divisors.get(j);
    *reinterpret_cast<uint32_t*>(my_codes + j * kTile) =
        to_e4m3x4(d.divide(x[0][j]), d.divide(x[1][j]), d.divide(x[2][j]), d.divide(x[3][j]));
  }
  if (!BUG(codes_read_early)) __syncthreads();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int c = i * kQuads + quad();
    const uint8_t* codes = smem.codes[c] + chunk_at(octet_lane, BUG(chunks_in_order) ? 0 : c / kPackSize);
    const int64_t q_t_row = k_tile * kTile + c;
    if (q_t_row < p.k)
      store16(static_cast<uint8_t*>(p.q_t) + q_t_row * p.ldq_t + block * kTile + octet_lane * 16,
              *reinterpret_cast<const uint4*>(codes));
  }
}

}  // namespace deepseek_kernels::fp8_quantize
