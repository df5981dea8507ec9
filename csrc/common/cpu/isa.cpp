#include "common/cpu/isa.h"

#include <pthread.h>

#include <cstdlib>
#include <cstring>

#include "common/check.h"

namespace deepseek_kernels {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBase;
#else
  return Isa::kBase;
#endif
}

Isa choose() {
  const char* wanted = std::getenv("DEEPSEEK_KERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  for (Isa isa : {Isa::kBase, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(wanted, name(isa)) != 0) continue;
    DSK_CHECK(isa <= best(), "DEEPSEEK_KERNELS_CPU_ISA=", wanted, " on a processor whose best is ", name(best()));
    return isa;
  }
  raise(__FILE__, __LINE__, "DEEPSEEK_KERNELS_CPU_ISA: wanted base, avx2 or avx512, got ", wanted);
}

[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { cpu_forked = true; });

}  // namespace

bool cpu_forked = false;

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "base"; }

}  // namespace deepseek_kernels
