#include "common/launch.cuh"
#include "kernel.cuh"

namespace deepseek_kernels {
namespace {

using namespace moe_permute;

// One thread for each `per_thread` of `row`; `rows` and the grid's second dimension are never empty.
LaunchConfig grid_of(int64_t rows, int64_t row, int64_t per_thread, void* stream) {
  LaunchConfig config{};
  config.grid_x = rows;
  config.grid_y = ceil_div<int64_t>(row > 0 ? row : 1, per_thread * kThreads);
  config.threads = kThreads;
  config.stream = stream;
  config.cluster = 1;
  return config;
}

int64_t permute_ctas(const MoeMaps& maps) { return maps.num_tokens + ceil_div<int64_t>(maps.num_rows, kRowsPerCta); }

template <class T>
void launch_quantize(const MoePermuteQuantizeParams& p) {
  const bool whole =
      p.hidden % kPackSize == 0 && is_aligned16(p.x, p.ldx * int64_t(sizeof(T))) && is_aligned16(p.out, p.ld_out);
  launch(whole ? permute_quantize<T, true> : permute_quantize<T, false>,
         grid_of(permute_ctas(p.maps), p.hidden, kPackSize, p.stream), p);
}

template <class T>
void launch_unpermute(const MoeUnpermuteParams& p) {
  constexpr int64_t size = sizeof(T);
  const bool whole =
      p.hidden * size % 16 == 0 && is_aligned16(p.y, p.ldy * size) && is_aligned16(p.out, p.ld_out * size);
  launch(whole ? unpermute<T, true> : unpermute<T, false>, grid_of(p.maps.num_tokens, p.hidden, 16 / size, p.stream),
         p);
}

}  // namespace

void launch_moe_permute(const MoePermuteParams& p) {
  if (p.maps.num_rows == 0 || (p.row_bytes == 0 && p.scale_columns == 0)) return;
  if (is_aligned16(p.x, p.ldx_bytes) && is_aligned16(p.out, p.ld_out_bytes)) {
    launch(permute<uint4>, grid_of(permute_ctas(p.maps), p.row_bytes, sizeof(uint4), p.stream), p);
  } else {
    launch(permute<uint8_t>, grid_of(permute_ctas(p.maps), p.row_bytes, 1, p.stream), p);
  }
}

void launch_moe_permute_quantize(const MoePermuteQuantizeParams& p) {
  if (p.maps.num_rows == 0 || p.hidden == 0) return;
  switch (p.dtype) {
    case Dtype::kFp32:
      return launch_quantize<float>(p);
    case Dtype::kFp16:
      return launch_quantize<__half>(p);
    case Dtype::kBf16:
      return launch_quantize<__nv_bfloat16>(p);
  }
  raise(__FILE__, __LINE__, "no instance for dtype ", int(p.dtype));
}

void launch_moe_unpermute(const MoeUnpermuteParams& p) {
  if (p.maps.num_tokens == 0 || p.hidden == 0) return;
  switch (p.dtype) {
    case Dtype::kFp32:
      return launch_unpermute<float>(p);
    case Dtype::kFp16:
      return launch_unpermute<__half>(p);
    case Dtype::kBf16:
      return launch_unpermute<__nv_bfloat16>(p);
  }
  raise(__FILE__, __LINE__, "no instance for dtype ", int(p.dtype));
}

}  // namespace deepseek_kernels
