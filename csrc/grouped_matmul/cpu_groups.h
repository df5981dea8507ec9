// What both CPU kernels of the grouped matmul share: which expert has which rows, and the tiles of work.
#pragma once
#include <cstring>

#include "common/cpu/parallel.h"
#include "common/cpu/vec.h"
#include "grouped_matmul/cpu.h"

namespace deepseek_kernels {
namespace {

struct Groups {  // experts with rows, one after another
  int32_t *expert, *begin;
  int64_t count = 0, rows = 0;

  int64_t first() const { return count > 0 ? begin[0] : rows; }
};

// Offsets are clamped to [0, num_rows] and raised where they decrease; rows of no expert are cleared.
// `storage`: 2 * num_experts integers.
inline Groups find_groups(const GroupedMatmulCpuParams& p, int32_t* storage) {
  Groups groups;
  groups.expert = storage;
  groups.begin = storage + p.num_experts;
  const int64_t out_bytes = element_bytes(p.out_dtype);
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::memset(static_cast<char*>(p.d) + r * p.ldd * out_bytes, 0, size_t(p.n * out_bytes));
    }
  };
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
  return groups;
}

// The row of a that row r of d comes from; num_tokens where its entry does not exist.
inline int64_t source_row(const GroupedMatmulCpuParams& p, int64_t r) {
  if (p.pos_to_token_topk == nullptr) return r;
  const int64_t entry = p.pos_to_token_topk[r];
  return entry >= 0 && entry < p.num_tokens * p.top_k ? entry / p.top_k : p.num_tokens;
}

// body(first row, rows (at most kSliceRows), expert, first column, last column, thread): the busy experts times the
// tiles of n, cut into one equal run a thread.
template <class Body>
inline void for_each_tile(const GroupedMatmulCpuParams& p, const Groups& groups, int64_t tile_n, int threads,
                          const Body& body) {
  const int64_t tiles = (p.n + tile_n - 1) / tile_n;
  parallel_runs(groups.count * tiles, 8, threads, [&](int64_t first, int64_t last, int thread) {
    for (int64_t at = first; at < last;) {
      const int64_t g = at / tiles, end = last < (g + 1) * tiles ? last : (g + 1) * tiles;
      const int64_t row = groups.begin[g];
      const int64_t count = (g + 1 < groups.count ? groups.begin[g + 1] : groups.rows) - row;
      const int64_t n_end = (end - g * tiles) * tile_n < p.n ? (end - g * tiles) * tile_n : p.n;
      for (int64_t first = 0; first < count; first += kSliceRows) {
        body(row + first, int(slice_rows(count - first)), groups.expert[g], (at - g * tiles) * tile_n, n_end, thread);
      }
      at = end;
    }
  });
}

}  // namespace
}  // namespace deepseek_kernels
