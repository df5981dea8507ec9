#include "common/launch.cuh"
#include "kernel.cuh"
#include "kernel_both.cuh"
#include "kernel_dequantize.cuh"

namespace deepseek_kernels {
namespace {

using namespace fp8_quantize;

// body(T()) for the type of dtype.
template <class Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFp32:
      return body(float());
    case Dtype::kFp16:
      return body(__half());
    case Dtype::kBf16:
      return body(__nv_bfloat16());
  }
  raise(__FILE__, __LINE__, "no instance for dtype ", int(dtype));
}

LaunchConfig tiles(int64_t row_tiles, int64_t k, size_t smem, void* stream) {
  LaunchConfig config{};
  config.grid_x = row_tiles * ceil_div<int64_t>(k, kTile);
  config.threads = kThreads;
  config.stream = stream;
  config.smem = int(smem);
  return config;
}

template <class T>
bool is_whole(int64_t k, const void* wide, int64_t ld_wide, const void* q, int64_t ldq) {
  return k % kPackSize == 0 && is_aligned16(wide, ld_wide * int64_t(sizeof(T))) && is_aligned16(q, ldq);
}

template <class T, int kBlockM, int kBlockK>
void launch_instance(const Fp8QuantizeParams& p) {
  const LaunchConfig config = tiles(ceil_div<int64_t>(p.m, kTile), p.k, kBlockM == 1 ? 0 : sizeof(Smem<T>), p.stream);
  const bool whole = is_whole<T>(p.k, p.x, p.ldx, p.q, p.ldq);
  launch(whole ? kernel<T, kBlockM, kBlockK, true> : kernel<T, kBlockM, kBlockK, false>, config, p);
}

}  // namespace

void launch_fp8_quantize(const Fp8QuantizeParams& p) {
  if (p.m == 0 || p.k == 0) return;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.block_m == 1 && p.block_k == 128) return launch_instance<T, 1, 128>(p);
    if (p.block_m == 128 && p.block_k == 128) return launch_instance<T, 128, 128>(p);
    if (p.block_m == 128 && p.block_k == 1) return launch_instance<T, 128, 1>(p);
    raise(__FILE__, __LINE__, "no instance for blocks of ", p.block_m, "x", p.block_k);
  });
}

void launch_fp8_quantize_both(const Fp8QuantizeBothParams& p) {
  if (p.m == 0 || p.k == 0) return;
  DSK_CHECK(p.width == 0 || is_aligned16(p.q_t, p.ldq_t), "rows ", p.ldq_t, " bytes apart");
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const LaunchConfig config = tiles(p.row_tiles, p.k, sizeof(BothSmem<T>), p.stream);
    launch(is_whole<T>(p.k, p.x, p.ldx, p.q, p.ldq) ? both_kernel<T, true> : both_kernel<T, false>, config, p);
  });
}

void launch_fp8_dequantize(const Fp8DequantizeParams& p) {
  if (p.m == 0 || p.k == 0) return;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const LaunchConfig config = tiles(ceil_div<int64_t>(p.m, kTile), p.k, 0, p.stream);
    const bool whole = is_whole<T>(p.k, p.out, p.ld_out, p.q, p.ldq);
    if (p.block_m == 128 && p.block_k == 1)
      launch(whole ? dequantize_kernel<T, true, true> : dequantize_kernel<T, true, false>, config, p);
    else if ((p.block_m == 1 || p.block_m == 128) && p.block_k == 128)
      launch(whole ? dequantize_kernel<T, false, true> : dequantize_kernel<T, false, false>, config, p);
    else
      raise(__FILE__, __LINE__, "no instance for blocks of ", p.block_m, "x", p.block_k);
  });
}

}  // namespace deepseek_kernels
