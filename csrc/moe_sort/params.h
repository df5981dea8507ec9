#pragma once
#include <cstdint>

namespace deepseek_kernels {

// All contiguous.
struct MoeSortParams {
  const void* indices;         // [num_entries] int32 or int64
  int32_t* token_topk_to_pos;  // [num_entries]
  int32_t* pos_to_token_topk;  // [num_rows]
  int32_t* expert_offsets;     // [num_local + 1]
  int32_t* counts;             // [ctas, num_local rounded up to 4], 16-byte aligned; may be nullptr with one CTA
  int64_t num_entries, num_rows, expert_begin;
  int num_local;
  uint32_t alignment;
  bool wide;  // indices are int64
  // A CTA looks at tiles of warps * rounds * 32 entries: warps 4 to 32, in fours; rounds 1, 2, 4 or 8.
  int warps, rounds, ctas;  // one CTA takes a single tile
  bool dependent;           // the second of two launches may start early: sm_90
  void* stream;
};

void launch_moe_sort(const MoeSortParams& params);

}  // namespace deepseek_kernels
