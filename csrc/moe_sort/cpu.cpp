// A counting sort: histogram of each thread's run of entries, prefix over (expert, thread), then each thread writes its
// run. Entries of one expert keep their order, whatever the number of threads.
#include "moe_sort/cpu.h"

#include "common/cpu/parallel.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

template <class Index>
void sort(const MoeSortCpuParams& p, int threads) {
  const Index* indices = static_cast<const Index*>(p.indices);
  const int64_t experts = p.expert_end - p.expert_begin;
  const auto local = [&](int64_t i) {  // -1 where the entry is not ours
    const int64_t e = int64_t(indices[i]);
    return e >= p.expert_begin && e < p.expert_end ? e - p.expert_begin : int64_t(-1);
  };
  // The same split in both passes: `runs` runs, each counted and written on its own.
  const int64_t runs = p.num_entries < 4096 || threads < 2 ? 1 : threads;
  const auto bound = [&](int64_t run) { return p.num_entries * run / runs; };

  parallel_runs(runs, 1, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t run = first; run < last; ++run) {
      int32_t* count = p.workspace + run * experts;
      for (int64_t e = 0; e < experts; ++e) count[e] = 0;
      for (int64_t i = bound(run); i < bound(run + 1); ++i) {
        const int64_t e = local(i);
        if (e >= 0) ++count[e];
      }
    }
  });
  int64_t start = 0;
  for (int64_t e = 0; e < experts; ++e) {
    p.expert_offsets[e] = int32_t(start);
    int64_t next = start;
    for (int64_t run = 0; run < runs; ++run) {
      const int32_t count = p.workspace[run * experts + e];
      p.workspace[run * experts + e] = int32_t(next);
      next += count;
    }
    const int64_t end = start + (next - start + p.alignment - 1) / p.alignment * p.alignment;
    for (int64_t r = next; r < end; ++r) p.pos_to_token_topk[r] = -1;
    start = end;
  }
  p.expert_offsets[experts] = int32_t(start);
  parallel_runs(p.num_rows - start, 16384, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t r = start + first; r < start + last; ++r) p.pos_to_token_topk[r] = -1;
  });
  parallel_runs(runs, 1, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t run = first; run < last; ++run) {
      int32_t* next = p.workspace + run * experts;
      for (int64_t i = bound(run); i < bound(run + 1); ++i) {
        const int64_t e = local(i);
        const int32_t pos = e < 0 ? -1 : next[e]++;
        p.token_topk_to_pos[i] = pos;
        if (pos >= 0) p.pos_to_token_topk[pos] = int32_t(i);
      }
    }
  });
}

}  // namespace

void moe_sort(const MoeSortCpuParams& p, int threads) {
  if (p.wide) return sort<int64_t>(p, threads);
  return sort<int32_t>(p, threads);
}

}  // namespace deepseek_kernels::DSK_ISA
