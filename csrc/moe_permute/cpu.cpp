// The maths of kernel.cuh, for CPU tensors.
//
// permute:   row-parallel: each thread fills a run of output rows from pos_to_token_topk, so every byte of the output
//            is written once, in order, by one thread (fresh pages are faulted in by the thread that writes them).
// unpermute: token-parallel: a chunk of columns of one token is summed in registers over k, then stored.
// Bytes:     as in kernel.cuh; at R*H*b of 128 MiB the time is page faults if the output is fresh.
#include "moe_permute/cpu.h"

#include "common/cpu/parallel.h"
#include "common/cpu/vec.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

constexpr int64_t kBytesPerRun = 64 * 1024;  // less than this is not worth waking a thread for

inline int64_t rows_per_run(int64_t row_bytes) {
  return row_bytes >= kBytesPerRun ? 1 : kBytesPerRun / (row_bytes + 1) + 1;
}

template <Dtype kDtype>
void sum_rows(const MoeUnpermuteParams& p, int64_t t) {
  constexpr int kUnroll = 4, kChunk = kUnroll * kLanes;
  constexpr int kBytes = kDtype == Dtype::kFp32 ? 4 : 2;
  const int32_t* pos = p.maps.token_topk_to_pos + t * p.maps.top_k;
  const float* weights = p.weights == nullptr ? nullptr : p.weights + t * p.maps.top_k;
  const char* y = static_cast<const char*>(p.y);
  char* out = static_cast<char*>(p.out) + t * p.ld_out * kBytes;
  const auto weight = [&](int k) { return splat(weights == nullptr ? 1.f : weights[k]); };
  int64_t column = 0;
  for (; column + kChunk <= p.hidden; column += kChunk) {
    Vec total[kUnroll];
    for (Vec& v : total) v = zero();
    for (int k = 0; k < p.maps.top_k; ++k) {
      if (pos[k] < 0 || pos[k] >= p.maps.num_rows) continue;
      const char* row = y + (int64_t(pos[k]) * p.ldy + column) * kBytes;
      const Vec w = weight(k);
      for (int i = 0; i < kUnroll; ++i) total[i] = fma(w, load_as<kDtype>(row + i * kLanes * kBytes), total[i]);
    }
    for (int i = 0; i < kUnroll; ++i) store_as<kDtype>(out + (column + i * kLanes) * kBytes, total[i]);
  }
  for (; column < p.hidden; column += kLanes) {
    const int count = int(p.hidden - column < kLanes ? p.hidden - column : kLanes);
    Vec total = zero();
    for (int k = 0; k < p.maps.top_k; ++k) {
      if (pos[k] < 0 || pos[k] >= p.maps.num_rows) continue;
      total = fma(weight(k), load_part<kDtype>(y + (int64_t(pos[k]) * p.ldy + column) * kBytes, count), total);
    }
    store_part<kDtype>(out + column * kBytes, total, count);
  }
}

}  // namespace

void moe_permute(const MoePermuteParams& p, int threads) {
  const int64_t entries = p.maps.num_tokens * p.maps.top_k;
  parallel_runs(p.maps.num_rows, rows_per_run(p.row_bytes), threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      char* out = static_cast<char*>(p.out) + r * p.ld_out_bytes;
      float* out_scale = p.out_scale + r * p.out_scale_stride_r;
      const int32_t entry = p.maps.pos_to_token_topk[r];
      if (entry < 0 || entry >= entries) {
        std::memset(out, 0, size_t(p.row_bytes));
        for (int64_t s = 0; s < p.scale_columns; ++s) out_scale[s * p.out_scale_stride_s] = 0.f;
        continue;
      }
      const int64_t t = entry / p.maps.top_k;
      std::memcpy(out, static_cast<const char*>(p.x) + t * p.ldx_bytes, size_t(p.row_bytes));
      for (int64_t s = 0; s < p.scale_columns; ++s) {
        out_scale[s * p.out_scale_stride_s] = p.scale[t * p.scale_stride_t + s * p.scale_stride_s];
      }
    }
  });
}

void moe_unpermute(const MoeUnpermuteParams& p, int threads) {
  const int64_t row_bytes = p.hidden * element_bytes(p.dtype) * (p.maps.top_k + 1);
  with_dtype(p.dtype, [&](auto tag) {
    parallel_runs(p.maps.num_tokens, rows_per_run(row_bytes), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) sum_rows<decltype(tag)::kDtype>(p, t);
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
