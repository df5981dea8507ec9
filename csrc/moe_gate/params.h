#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "score.h"

namespace deepseek_kernels {

struct MoeGateParams {
  const void* logits;   // [num_tokens, num_experts] of dtype, rows ld_logits apart
  const float* bias;    // [num_experts]; may be nullptr
  const uint8_t* mask;  // [num_tokens], 0 for a token that does not count; may be nullptr
  float* weights;       // [num_tokens, top_k]
  int64_t* indices;     // [num_tokens, top_k]
  int64_t num_tokens, ld_logits;
  int num_experts, top_k;
  int num_groups, topk_groups;  // 1 and 1 where every group may be used
  GateScore score;
  Dtype dtype;
  bool normalize;
  float scale;
  // The experts of a group are held by `group_lanes` lanes (a power of two, 32 at most among all groups) in runs of
  // `per_lane` (2, 4, 8 or 16).
  int group_lanes, per_lane;
  int warps, ctas;
  void* stream;
  // Found out by the launcher.
  int members = 0;     // experts of a group
  int group_bits = 0;  // log2 of group_lanes
  bool whole = false;  // lanes may load all of their logits at once, 16 bytes at a time
};

void launch_moe_gate(const MoeGateParams& params);

}  // namespace deepseek_kernels
