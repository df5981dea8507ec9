// The dtype codes that cross the binding.
#pragma once

namespace deepseek_kernels {

enum class Dtype : int { kFp32 = 0, kFp16 = 1, kBf16 = 2 };

}  // namespace deepseek_kernels
