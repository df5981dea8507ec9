#include "common/cpu/isa.h"

#include <pthread.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "common/check.h"

namespace deepseek_kernels {
namespace {

constexpr Isa kAll[] = {Isa::kBase, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

#if defined(__x86_64__)
// Compilers before gcc 11 do not know this name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

// What the processor and the operating system have.
Isa most() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(DEEPSEEK_KERNELS_NO_AVX512_BF16)
  const bool bf16 = false;
#else
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
#endif
  if (avx2 && avx512 && bf16) return Isa::kAvx512Bf16;
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBase;
#else
  return Isa::kBase;
#endif
}

Isa fastest() {
#if defined(__x86_64__)
  if (most() == Isa::kAvx512Bf16 && !__builtin_cpu_is("amd")) return Isa::kAvx512;
#endif
  return most();
}

Isa choose() {
  const char* wanted = std::getenv("DEEPSEEK_KERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return fastest();
  for (Isa isa : kAll) {
    if (std::strcmp(wanted, name(isa)) != 0) continue;
    DSK_CHECK(isa <= most(), "DEEPSEEK_KERNELS_CPU_ISA=", wanted, " on a processor that has ", name(most()));
    return isa;
  }
  raise(__FILE__, __LINE__, "DEEPSEEK_KERNELS_CPU_ISA: wanted base, avx2, avx512 or avx512_bf16, got ", wanted);
}

[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { cpu_forked = true; });

}  // namespace

bool cpu_forked = false;

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* name(Isa isa) {
  constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16"};
  return kNames[int(isa)];
}

}  // namespace deepseek_kernels
