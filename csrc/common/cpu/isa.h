// Instruction sets of the CPU kernels. Every csrc/<op>/cpu.cpp is compiled once for each, with DSK_ISA naming the
// namespace its kernels go into; the set is chosen once, at the first call.
//
// In such a file: nothing from the standard library that is a template (the linker may keep the AVX-512 copy for
// everybody), no static with a constructor (it would run at load), tables constexpr.
#pragma once

namespace deepseek_kernels {

// kAvx512Bf16 is AVX-512 with a bf16 dot product that runs at twice the rate of fp32 (AMD from Zen 4; on Intel without
// AMX it runs at half that rate and is not used). Kernels that gain nothing from it are those of kAvx512.
enum class Isa { kBase, kAvx2, kAvx512, kAvx512Bf16 };

// The best this processor and operating system offer, or DEEPSEEK_KERNELS_CPU_ISA (base, avx2, avx512, avx512_bf16).
// Throws Error if that names an unknown set, or one that the processor lacks.
Isa cpu_isa();
const char* name(Isa isa);

// True in a process forked from one that had this module: OpenMP's threads did not come along, so kernels run serially.
extern bool cpu_forked;

}  // namespace deepseek_kernels

// Declares `void function(const Params&, int threads)` for every instruction set and function_cpu, which picks one.
// DSK_CPU_KERNEL_BF16 is for the folders that have a cpu_bf16.cpp.
#define DSK_CPU_DECLARE(set, function, Params)      \
  namespace set {                                   \
  void function(const Params& params, int threads); \
  }
#if defined(__x86_64__)
#define DSK_CPU_DISPATCH(function, Params, bf16)                  \
  DSK_CPU_DECLARE(base, function, Params)                         \
  DSK_CPU_DECLARE(avx2, function, Params)                         \
  DSK_CPU_DECLARE(avx512, function, Params)                       \
  DSK_CPU_DECLARE(avx512_bf16, function, Params)                  \
  inline void function##_cpu(const Params& params, int threads) { \
    switch (cpu_isa()) {                                          \
      case Isa::kAvx512Bf16:                                      \
        return bf16::function(params, threads);                   \
      case Isa::kAvx512:                                          \
        return avx512::function(params, threads);                 \
      case Isa::kAvx2:                                            \
        return avx2::function(params, threads);                   \
      default:                                                    \
        return base::function(params, threads);                   \
    }                                                             \
  }
#else
#define DSK_CPU_DISPATCH(function, Params, bf16) \
  DSK_CPU_DECLARE(base, function, Params)        \
  inline void function##_cpu(const Params& params, int threads) { base::function(params, threads); }
#endif
#define DSK_CPU_KERNEL(function, Params) DSK_CPU_DISPATCH(function, Params, avx512)
#if defined(DEEPSEEK_KERNELS_NO_AVX512_BF16)  // an old compiler
#define DSK_CPU_KERNEL_BF16(function, Params) DSK_CPU_DISPATCH(function, Params, avx512)
#else
#define DSK_CPU_KERNEL_BF16(function, Params) DSK_CPU_DISPATCH(function, Params, avx512_bf16)
#endif
