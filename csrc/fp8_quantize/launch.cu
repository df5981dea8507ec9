#include "common/launch.cuh"
#include "kernel.cuh"

namespace deepseek_kernels {
namespace {

template <class T, int kBlockM, int kBlockK>
void launch_instance(const Fp8QuantizeParams& p) {
  using namespace fp8_quantize;
  LaunchConfig config{};
  config.grid_x = ceil_div<int64_t>(p.m, kTile) * ceil_div<int64_t>(p.k, kTile);
  config.grid_y = 1;
  config.threads = kThreads;
  config.stream = p.stream;
  config.smem = kBlockM == 1 ? 0 : int(sizeof(Smem));
  config.cluster = 1;
  const bool whole = p.k % kPackSize == 0 && is_aligned16(p.x, p.ldx * int64_t(sizeof(T))) && is_aligned16(p.q, p.ldq);
  launch(whole ? kernel<T, kBlockM, kBlockK, true> : kernel<T, kBlockM, kBlockK, false>, config, p);
}

template <class T>
void launch_granularity(const Fp8QuantizeParams& p) {
  if (p.block_m == 1 && p.block_k == 128) return launch_instance<T, 1, 128>(p);
  if (p.block_m == 128 && p.block_k == 128) return launch_instance<T, 128, 128>(p);
  if (p.block_m == 128 && p.block_k == 1) return launch_instance<T, 128, 1>(p);
  raise(__FILE__, __LINE__, "no instance for blocks of ", p.block_m, "x", p.block_k);
}

}  // namespace

void launch_fp8_quantize(const Fp8QuantizeParams& p) {
  if (p.m == 0 || p.k == 0) return;
  switch (p.dtype) {
    case Dtype::kFp32:
      return launch_granularity<float>(p);
    case Dtype::kFp16:
      return launch_granularity<__half>(p);
    case Dtype::kBf16:
      return launch_granularity<__nv_bfloat16>(p);
  }
  raise(__FILE__, __LINE__, "no instance for dtype ", int(p.dtype));
}

}  // namespace deepseek_kernels
