#pragma once

namespace deepseek_kernels {

enum class GateScore : int { kSigmoid = 0, kSoftmax = 1, kSqrtSoftplus = 2 };

}  // namespace deepseek_kernels
