// Work over threads. The caller passes torch's own thread count, so that there is one pool and one setting.
#pragma once
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/cpu/isa.h"

namespace deepseek_kernels {
namespace {

// body(begin, end, thread) over [0, count) in equal runs of at least `grain`; serial where one thread does.
template <class Body>
inline void parallel_runs(int64_t count, int64_t grain, int threads, const Body& body) {
  if (count <= 0) return;
  const int64_t most = (count + grain - 1) / grain;
  const int team = int(most < threads ? most : threads);
#if defined(_OPENMP)
  if (team > 1 && !cpu_forked && !omp_in_parallel()) {
#pragma omp parallel num_threads(team)
    {
      // The runtime may give fewer threads than asked for.
      const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
      const int64_t begin = count * i / n, end = count * (i + 1) / n;
      if (begin < end) body(begin, end, int(i));
    }
    return;
  }
#endif
  (void)team;
  body(int64_t(0), count, 0);
}

}  // namespace
}  // namespace deepseek_kernels
