#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "score.h"

namespace deepseek_kernels {

struct MoeGateCpuParams {
  const void* logits;  // [num_tokens, num_experts] of dtype
  const float* bias;   // [num_experts]; may be nullptr
  const bool* mask;    // [num_tokens]; may be nullptr
  float* weights;      // [num_tokens, top_k]
  int64_t* indices;    // [num_tokens, top_k]
  float* workspace;    // moe_gate_workspace floats
  int64_t num_tokens, num_experts, ld_logits;
  int top_k, num_groups, topk_groups;
  GateScore score;
  Dtype dtype;
  bool normalize;
  float scale;
};

// Floats: two rows of experts, two of groups, the peaks, and values, ranks and places of those that are ranked, with
// slack for whole registers.
inline int64_t moe_gate_workspace(int64_t num_experts, int64_t num_groups, int64_t top_k, int threads) {
  return threads * (5 * (num_experts + 64) + 2 * (num_groups + 16) + 2 * top_k + 16);
}

struct MoeGateBackwardCpuParams {
  const float* grad_weights;  // [num_tokens, top_k]
  const void* logits;         // [num_tokens, num_experts] of dtype
  const void* indices;        // [num_tokens, top_k] int32 or int64; those out of range have no gradient
  void* grad_logits;          // [num_tokens, num_experts] of dtype
  float* workspace;           // moe_gate_backward_workspace floats
  int64_t num_tokens, num_experts, ld_logits;
  int top_k;
  GateScore score;
  Dtype dtype;
  bool wide;  // indices are int64
  bool normalize;
  float scale;
};

// Floats: the scores of a row, and for each choice its logit, its score and its gradient, with slack for registers.
inline int64_t moe_gate_backward_workspace(int64_t num_experts, int64_t top_k, int threads) {
  return threads * (num_experts + 32 + 3 * (top_k + 16));
}

DSK_CPU_KERNEL(moe_gate, MoeGateCpuParams)
DSK_CPU_KERNEL(moe_gate_backward, MoeGateBackwardCpuParams)

}  // namespace deepseek_kernels
