#include "common/copy.cuh"
#include "common/launch.cuh"
#include "kernel.cuh"

namespace deepseek_kernels {
namespace {

using namespace moe_gate;

template <int kPerLane, int kTopK>
void launch_score(const MoeGateParams& p, const LaunchConfig& config) {
  switch (p.score) {
    case GateScore::kSigmoid:
      return launch(gate<kPerLane, kTopK, GateScore::kSigmoid>, config, p);
    case GateScore::kSoftmax:
      return launch(gate<kPerLane, kTopK, GateScore::kSoftmax>, config, p);
    case GateScore::kSqrtSoftplus:
      return launch(gate<kPerLane, kTopK, GateScore::kSqrtSoftplus>, config, p);
  }
  raise(__FILE__, __LINE__, "no instance for score ", int(p.score));
}

}  // namespace

void launch_moe_gate(const MoeGateParams& params) {
  MoeGateParams p = params;
  if (p.num_tokens == 0) return;
  p.members = p.num_experts / p.num_groups;
  DSK_CHECK(p.warps >= 1 && p.warps <= kWarps, "warps = ", p.warps);
  DSK_CHECK(p.top_k >= 1 && p.top_k <= 32, "top_k = ", p.top_k);
  DSK_CHECK(p.group_lanes >= 1 && (p.group_lanes & (p.group_lanes - 1)) == 0 && p.num_groups * p.group_lanes <= 32,
            "group_lanes = ", p.group_lanes, " and num_groups = ", p.num_groups);
  DSK_CHECK(p.group_lanes * p.per_lane >= p.members, "group_lanes = ", p.group_lanes, ", per_lane = ", p.per_lane,
            " for ", p.members, " experts of a group");
  const int64_t size = p.dtype == Dtype::kFp32 ? 4 : 2, bytes = p.per_lane * size < 16 ? p.per_lane * size : 16;
  while (1 << p.group_bits < p.group_lanes) ++p.group_bits;
  p.whole = p.members % p.per_lane == 0 && reinterpret_cast<uintptr_t>(p.logits) % uintptr_t(bytes) == 0 &&
            p.ld_logits * size % bytes == 0;
  LaunchConfig config{};
  config.grid_x = p.ctas;
  config.threads = p.warps * 32;
  config.stream = p.stream;
  config.cluster = 1;
  switch (p.per_lane) {
    case 2:
      return launch_score<2, 0>(p, config);
    case 4:
      return launch_score<4, 0>(p, config);
    case 8:
      return p.top_k == 8 ? launch_score<8, 8>(p, config) : launch_score<8, 0>(p, config);
    case 16:
      return launch_score<16, 0>(p, config);
  }
  raise(__FILE__, __LINE__, "no instance for ", p.per_lane, " experts a lane");
}

}  // namespace deepseek_kernels
