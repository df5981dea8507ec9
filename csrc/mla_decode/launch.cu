#include "common/launch.cuh"
#include "common/tensor_map.cuh"
#include "kernel_sm90.cuh"

namespace deepseek_kernels {
namespace {

using namespace mla_decode;

template <class T>
void launch_dtype(const MlaDecodeParams& p) {
  const Swizzle swizzle = Swizzle::k128;
  Maps maps;
  maps.q = tensor_map_3d(p.q, {Element::kBf16, kWidth, p.rows, p.b, p.q_stride_row,
                               p.b > 1 ? p.q_stride_b : p.rows * p.q_stride_row, 64, kRows, 1, swizzle});
  // Without pages no sequence has tokens, and nothing is loaded.
  const int64_t page_stride = p.num_pages > 1 ? p.page_stride : p.page_size * p.row_stride;
  maps.kv = p.num_pages == 0 ? maps.q
                             : tensor_map_3d(p.kv_cache, {Element::kBf16, kWidth, p.page_size, p.num_pages,
                                                          p.row_stride, page_stride, 64, 1 << p.box_log2, 1, swizzle});
  LaunchConfig config{};
  config.grid_x = int64_t(p.parts) * ceil_div(p.rows, kRows);
  config.threads = kThreads;
  config.stream = p.stream;
  config.smem = sizeof(Smem);
  config.dependent = true;
  launch(kernel<T>, config, maps, p);
  if (p.parts == 1 || p.capacity <= kPair) return;  // no sequence is cut
  LaunchConfig merging{};
  merging.grid_x = p.parts;
  merging.grid_y = p.rows < 65535 ? p.rows : 65535;
  merging.threads = kMergeThreads;
  merging.stream = p.stream;
  merging.dependent = true;
  launch(merge<T>, merging, p);
}

}  // namespace

void launch_mla_decode(const MlaDecodeParams& params) {
  MlaDecodeParams p = params;
  if (p.b == 0 || p.s_q == 0 || p.h_q == 0) return;
  constexpr int64_t kLargest = int64_t(1) << 30;  // rows, tokens and CTAs are 32-bit
  DSK_CHECK(p.b > 0 && p.s_q > 0 && p.h_q > 0 && int64_t(p.s_q) * p.h_q < kLargest, "b, s_q, h_q = ", p.b, ", ", p.s_q,
            ", ", p.h_q);
  DSK_CHECK(p.page_size > 0 && p.page_size % 8 == 0, "page_size = ", p.page_size);
  DSK_CHECK(p.num_pages >= 0 && p.max_pages >= 0, "num_pages, max_pages = ", p.num_pages, ", ", p.max_pages);
  p.rows = p.s_q * p.h_q;
  const int64_t room = p.num_pages == 0 ? 0 : int64_t(p.max_pages) * p.page_size;
  p.capacity = int(room < kLargest ? room : kLargest);
  p.box_log2 = 3;
  while (p.box_log2 < 6 && p.page_size % (2 << p.box_log2) == 0) ++p.box_log2;
  p.scale_log2 = p.scale * kLog2E;
  const bool scratch = p.part_out != nullptr && p.part_lse != nullptr && p.heads != nullptr;
  DSK_CHECK(p.parts >= 1 && (p.parts == 1 || scratch), "parts = ", p.parts, scratch ? "" : " without scratch");
  DSK_CHECK(p.parts * ceil_div<int64_t>(p.rows, kRows) < kLargest, "parts, rows = ", p.parts, ", ", p.rows);
  if (p.dtype == Dtype::kBf16) return launch_dtype<__nv_bfloat16>(p);
  if (p.dtype == Dtype::kFp16) return launch_dtype<__half>(p);
  raise(__FILE__, __LINE__, "no instance for dtype ", int(p.dtype));
}

}  // namespace deepseek_kernels
