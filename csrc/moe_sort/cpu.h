#pragma once
#include <cstdint>

#include "common/cpu/isa.h"

namespace deepseek_kernels {

struct MoeSortCpuParams {
  const void* indices;         // [num_entries] int32 or int64
  int32_t* token_topk_to_pos;  // [num_entries]
  int32_t* pos_to_token_topk;  // [num_rows]
  int32_t* expert_offsets;     // [expert_end - expert_begin + 1]
  int32_t* workspace;          // [threads, expert_end - expert_begin]
  int64_t num_entries, num_rows, expert_begin, expert_end, alignment;
  bool wide;  // indices are int64
};

DSK_CPU_KERNEL(moe_sort, MoeSortCpuParams)

}  // namespace deepseek_kernels
