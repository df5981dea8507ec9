#include "common/launch.cuh"
#include "kernel.cuh"

namespace deepseek_kernels {
namespace {

using namespace moe_sort;

template <class Index, int kRounds>
void launch_rounds(const MoeSortParams& p) {
  LaunchConfig config{};
  config.grid_x = p.ctas;
  config.threads = p.warps * 32;
  config.stream = p.stream;
  config.cluster = 1;
  constexpr int kWord = sizeof(int32_t);
  const int experts = p.num_local, columns = ceil_div(p.num_local, 4) * 4;
  if (p.ctas == 1) {
    const int64_t tile = int64_t(config.threads) * kRounds;
    DSK_CHECK(p.num_entries <= tile, "num_entries = ", p.num_entries, " with a tile of ", tile);
    config.smem = (p.warps * experts + 2 * experts + 1 + kWarps) * kWord;
    return launch(sort_in_one<Index, kRounds>, config, p);
  }
  config.smem = (p.warps * experts + experts) * kWord;
  launch(moe_sort::rank<Index, kRounds>, config, p);
  config.smem = (2 * columns + experts + 1 + kWarps) * kWord;
  config.dependent = p.dependent;
  launch(place<Index, kRounds>, config, p);
}

template <class Index>
void launch_index(const MoeSortParams& p) {
  switch (p.rounds) {
    case 1:
      return launch_rounds<Index, 1>(p);
    case 2:
      return launch_rounds<Index, 2>(p);
    case 4:
      return launch_rounds<Index, 4>(p);
    case 8:
      return launch_rounds<Index, 8>(p);
  }
  raise(__FILE__, __LINE__, "no instance for ", p.rounds, " rounds");
}

}  // namespace

void launch_moe_sort(const MoeSortParams& p) {
  DSK_CHECK(p.warps >= kWarpStep && p.warps <= kWarps && p.warps % kWarpStep == 0, "warps = ", p.warps);
  DSK_CHECK(p.ctas == 1 || p.num_local == 0 || p.counts != nullptr, "ctas = ", p.ctas, " without counts");
  return p.wide ? launch_index<int64_t>(p) : launch_index<int32_t>(p);
}

}  // namespace deepseek_kernels
