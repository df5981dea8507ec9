// permute:    out[token_topk_to_pos[t, k]] = x[t] for every entry; rows of out without an entry are zero.
// quantize:   the same with e4m3(x[t] / scale) and its 1x128 scales, the bits of fp8_quantize.
// unpermute:  out[t] = sum over k of weights[t, k] * y[token_topk_to_pos[t, k]], fp32 fused multiply-adds in order of
// k.
//
// Tiling:     grid (tokens, slices of a row), one 16-byte word (quantize: 16 elements) a thread. A row is read once and
//             written top_k times (unpermute: the other way round). In permute, CTAs past the last token look for rows
//             without an entry, kRowsPerCta each.
// Bytes:      permute T*H*s + R*H*s, unpermute R*H*s + T*H*s, plus 4 T*K of maps (R = T*K).
//             T = 4096, H = 7168, K = 8, bf16: 529 MB, 123 us at 4.3 TB/s.
// Positions outside [0, num_rows) are ignored. That no two entries share a position is the caller's contract.
#pragma once
#include "common/fp8_block.cuh"
#include "params.h"

namespace deepseek_kernels::moe_permute {

constexpr int kThreads = 256;
constexpr int kRowsPerCta = 32;
constexpr int kUnroll = 4;  // rows of y in flight

DEVICE_FN bool has_row(const MoeMaps& maps, int32_t pos) {
  return pos >= 0 && (pos < maps.num_rows || BUG(position_not_checked));
}

// write(row) for every position of a token.
template <class Write>
DEVICE_FN void for_each_position(const MoeMaps& maps, int64_t token, const Write& write) {
  for (int k = 0; k < maps.top_k - (BUG(last_expert_forgotten) ? 1 : 0); ++k) {
    const int32_t pos = __ldg(maps.token_topk_to_pos + token * maps.top_k + k);
    if (has_row(maps, pos)) write(int64_t(pos));
  }
}

// clear(row) for this CTA's share of the rows without an entry.
template <class Clear>
DEVICE_FN void for_each_empty_row(const MoeMaps& maps, const Clear& clear) {
  const int64_t first = (int64_t(blockIdx.x) - maps.num_tokens) * kRowsPerCta;
  const int64_t last = first + kRowsPerCta < maps.num_rows ? first + kRowsPerCta : maps.num_rows;
  for (int64_t row = first; row < last; ++row)
    if (__ldg(maps.pos_to_token_topk + row) == -1 && !BUG(empty_rows_kept)) clear(row);
}

template <class Word>
__global__ void __launch_bounds__(kThreads) permute(const MoePermuteParams p) {
  const int64_t thread = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.y) * kThreads;
  const int64_t words = p.row_bytes / int64_t(sizeof(Word));
  const int64_t tail = words * int64_t(sizeof(Word));  // the first byte that fills no word
  auto out = [&](int64_t row) { return static_cast<uint8_t*>(p.out) + row * p.ld_out_bytes; };
  auto out_scale = [&](int64_t row, int64_t s) -> float& {
    return p.out_scale[row * p.out_scale_stride_r + s * p.out_scale_stride_s];
  };

  if (blockIdx.x < p.maps.num_tokens) {
    const int64_t token = blockIdx.x;
    const uint8_t* x = static_cast<const uint8_t*>(p.x) + token * p.ldx_bytes;
    if (thread < words) {
      const Word word = __ldg(reinterpret_cast<const Word*>(x) + thread);
      for_each_position(p.maps, token, [&](int64_t row) { reinterpret_cast<Word*>(out(row))[thread] = word; });
    }
    if (tail + thread < p.row_bytes) {  // shorter than a word, so shorter than a CTA
      const uint8_t byte = x[tail + thread];
      for_each_position(p.maps, token, [&](int64_t row) { out(row)[tail + thread] = byte; });
    }
    for (int64_t s = thread; s < p.scale_columns; s += threads) {
      const float scale = p.scale[token * p.scale_stride_t + s * p.scale_stride_s];
      for_each_position(p.maps, token, [&](int64_t row) { out_scale(row, s) = scale; });
    }
  } else {
    for_each_empty_row(p.maps, [&](int64_t row) {
      if (thread < words) reinterpret_cast<Word*>(out(row))[thread] = Word{};
      if (tail + thread < p.row_bytes) out(row)[tail + thread] = 0;
      for (int64_t s = thread; s < p.scale_columns; s += threads) out_scale(row, s) = 0.f;
    });
  }
}

// kWhole, here and below: rows are multiples of 16 bytes apart and hold a whole number of packs.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) permute_quantize(const MoePermuteQuantizeParams p) {
  const int64_t column = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kPackSize;
  const int64_t block = column / kFp8Block;
  const bool writes_scale = column % kFp8Block == 0 && column < p.hidden;
  auto write = [&](int64_t row, const Fp8Pack& q, float scale) {
    q.store<kWhole>(static_cast<uint8_t*>(p.out) + row * p.ld_out + column, p.hidden - column);
    if (writes_scale) p.out_scale[row * p.out_scale_stride_r + block * p.out_scale_stride_s] = scale;
  };

  if (blockIdx.x < p.maps.num_tokens) {
    const int64_t token = blockIdx.x;
    SourcePack<T> x;
    x.template load<kWhole>(static_cast<const T*>(p.x) + token * p.ldx + column, p.hidden - column);
    const float scale = fp8_scale(BUG(lanes_not_reduced) ? pack_amax(x) : block_amax(x), p.pow2_scale);
    const Fp8Divisor divisor(scale);
    const Fp8Pack q = to_e4m3(x, [&](int) { return divisor; });
    for_each_position(p.maps, token, [&](int64_t row) { write(row, q, scale); });
  } else {
    Fp8Pack zero;
    zero.words[0] = make_uint4(0, 0, 0, 0);
    for_each_empty_row(p.maps, [&](int64_t row) { write(row, zero, 0.f); });
  }
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) unpermute(const MoeUnpermuteParams p) {
  constexpr int kCount = 16 / sizeof(T);
  const int64_t token = blockIdx.x;
  const int64_t column = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kCount;
  const int64_t columns_left = p.hidden - column;
  if (columns_left <= 0) return;
  const int32_t* positions = p.maps.token_topk_to_pos + token * p.maps.top_k;

  float sum[kCount] = {};
  for (int k0 = 0; k0 < p.maps.top_k; k0 += kUnroll) {
    Pack<T, kCount> y[kUnroll];
    bool present[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int32_t pos = k0 + i < p.maps.top_k ? __ldg(positions + k0 + i) : -1;
      present[i] = has_row(p.maps, pos);
      y[i].template load<kWhole>(static_cast<const T*>(p.y) + pos * p.ldy + column, present[i] ? columns_left : 0);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (!present[i]) continue;
      const float weight =
          p.weights ? __ldg(p.weights + token * p.maps.top_k + k0 + (BUG(weight_of_first) ? 0 : i)) : 1.f;
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] = __fmaf_rn(weight, to_float(y[i][j]), sum[j]);
    }
  }
  constexpr int kPerWord = 4 / sizeof(T);
  Pack<T, kCount> out;
  out.words[0] = make_uint4(to_word<T>(sum), to_word<T>(sum + kPerWord), to_word<T>(sum + 2 * kPerWord),
                            to_word<T>(sum + 3 * kPerWord));
  out.template store<kWhole>(static_cast<T*>(p.out) + token * p.ld_out + column, columns_left);
}

}  // namespace deepseek_kernels::moe_permute
