// d[r] = a[r] @ b[e]^T for expert_offsets[e] <= r < expert_offsets[e + 1], for CPU tensors; rows of no expert are zero.
//
// a becomes fp32 once, scales applied; the experts that have rows, times the tiles of n, are cut into equal runs, one a
// thread: while rows are few, the time is that of reading those experts' weights. See common/cpu/rows_matmul.h.
// With pos_to_token_topk the rows are gathered by pointer: no permuted copy of a exists.
#include "grouped_matmul/cpu.h"

#include "common/cpu/parallel.h"
#include "common/cpu/rows_matmul.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

template <class Weight>
void decode_row(const Weight& weight, int64_t k, float* out) {
  int64_t c = 0;
  for (; c + kLanes <= k; c += kLanes) store(out + c, weight.load(0, c, weight.scale(0, c)));
  if (c < k) store(out + c, weight.load_part(0, c, int(k - c), weight.scale(0, c)));
}

template <Dtype kOut>
inline void put(void* d, int64_t at, float value) {
  if constexpr (kOut == Dtype::kFp32) static_cast<float*>(d)[at] = value;
  if constexpr (kOut == Dtype::kBf16) static_cast<uint16_t*>(d)[at] = to_bf16(value);
  if constexpr (kOut == Dtype::kFp16) static_cast<uint16_t*>(d)[at] = to_fp16(value);
}

struct Groups {  // experts with rows, one after another
  int32_t *expert, *begin;
  int64_t count = 0, rows = 0;
};

template <Dtype kOut, class MakeWeight>
void run(const GroupedMatmulCpuParams& p, const float* const* rows, const Groups& groups, float* scratch, int threads,
         const MakeWeight& make_weight) {
  const int64_t tiles = (p.n + kTileN - 1) / kTileN;
  parallel_runs(groups.count * tiles, 8, threads, [&](int64_t first, int64_t last, int thread) {
    for (int64_t at = first; at < last;) {
      const int64_t g = at / tiles, end = last < (g + 1) * tiles ? last : (g + 1) * tiles;
      const int64_t row = groups.begin[g];
      const int64_t count = (g + 1 < groups.count ? groups.begin[g + 1] : groups.rows) - row;
      const int64_t n_end = (end - g * tiles) * kTileN < p.n ? (end - g * tiles) * kTileN : p.n;
      rows_matmul(rows + row, int(count), make_weight(groups.expert[g]), (at - g * tiles) * kTileN, n_end, p.k,
                  scratch + thread * rows_matmul_scratch(p.num_rows),
                  [&](int i, int64_t j, float value) { put<kOut>(p.d, (row + i) * p.ldd + j, value); });
      at = end;
    }
  });
}

}  // namespace

void grouped_matmul(const GroupedMatmulCpuParams& p, int threads) {
  const int64_t width = padded(p.k);
  const bool fp8 = p.scale_a != nullptr;
  parallel_runs(p.num_tokens, 4, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = p.workspace + i * width;
      if (fp8) {
        const uint8_t* a = static_cast<const uint8_t*>(p.a) + i * p.lda;
        decode_row(E4m3Weight{a, p.scale_a + i * p.scale_a_stride_m, 0, 0, p.scale_a_stride_k}, p.k, out);
        continue;
      }
      with_dtype(p.dtype, [&](auto tag) {
        using Row = FloatWeight<decltype(tag)::kDtype>;
        decode_row(Row{static_cast<const char*>(p.a) + i * p.lda * Row::kBytes, 0}, p.k, out);
      });
    }
  });

  float* scratch = p.workspace + p.num_tokens * width;
  float* rest = scratch + threads * rows_matmul_scratch(p.num_rows);
  if ((rest - p.workspace) % 2 != 0) ++rest;  // the pointers are 8 bytes
  const float** rows = reinterpret_cast<const float**>(rest);
  Groups groups;
  groups.expert = reinterpret_cast<int32_t*>(rest + 2 * p.num_rows);
  groups.begin = groups.expert + p.num_experts;

  const int64_t out_bytes = element_bytes(p.out_dtype);
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::memset(static_cast<char*>(p.d) + r * p.ldd * out_bytes, 0, size_t(p.n * out_bytes));
    }
  };
  // Offsets are clamped to [0, num_rows] and raised where they decrease.
  const auto offset = [&](int64_t e, int64_t least) {
    const int64_t o = p.expert_offsets[e] < p.num_rows ? p.expert_offsets[e] : p.num_rows;
    return o > least ? o : least;
  };
  int64_t next = offset(0, 0);
  clear(0, next);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const int64_t end = offset(e + 1, next);
    if (next == end) continue;
    groups.expert[groups.count] = int32_t(e), groups.begin[groups.count++] = int32_t(next);
    next = end;
  }
  groups.rows = next;
  clear(next, p.num_rows);
  for (int64_t r = groups.count > 0 ? groups.begin[0] : next; r < next; ++r) {
    const int64_t token = p.pos_to_token_topk == nullptr ? r : int64_t(p.pos_to_token_topk[r]) / p.top_k;
    rows[r] = p.workspace + token * width;
  }

  with_dtype(p.out_dtype, [&](auto out) {
    constexpr Dtype kOut = decltype(out)::kDtype;
    if (fp8) {
      run<kOut>(p, rows, groups, scratch, threads, [&](int64_t e) {
        return E4m3Weight{static_cast<const uint8_t*>(p.b) + e * p.b_stride_e, p.scale_b + e * p.scale_b_stride_e,
                          p.ldb, p.scale_b_stride_n, p.scale_b_stride_k};
      });
      return;
    }
    with_dtype(p.dtype, [&](auto in) {
      using Weight = FloatWeight<decltype(in)::kDtype>;
      run<kOut>(p, rows, groups, scratch, threads, [&](int64_t e) {
        return Weight{static_cast<const char*>(p.b) + e * p.b_stride_e * Weight::kBytes, p.ldb};
      });
    });
  });
}

}  // namespace deepseek_kernels::DSK_ISA
