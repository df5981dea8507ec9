#include "launch.cuh"

namespace deepseek_kernels {

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
  p.tiles = (p.rows + mla_decode::kRows - 1) / mla_decode::kRows;
  DSK_CHECK(p.cluster == 1 || (p.cluster == 2 && p.tiles % 2 == 0), "cluster = ", p.cluster, " for ", p.tiles,
            " tiles");
  // The CTAs of a cluster have a box each of every block.
  const int largest_box = p.cluster == 1 ? 6 : 5;
  p.box_log2 = 3;
  while (p.box_log2 < largest_box && p.page_size % (2 << p.box_log2) == 0) ++p.box_log2;
  p.scale_log2 = p.scale * mla_decode::kLog2E;
  const bool scratch = p.part_out != nullptr && p.part_lse != nullptr && p.heads != nullptr;
  DSK_CHECK(p.parts >= 1 && (p.parts == 1 || scratch), "parts = ", p.parts, scratch ? "" : " without scratch");
  DSK_CHECK(int64_t(p.parts) * p.tiles < kLargest, "parts, tiles = ", p.parts, ", ", p.tiles);
  switch (p.dtype) {
    case Dtype::kBf16:
      return mla_decode::launch_bf16(p);
    case Dtype::kFp16:
      return mla_decode::launch_fp16(p);
    default:
      raise(__FILE__, __LINE__, "no instance for dtype ", int(p.dtype));
  }
}

}  // namespace deepseek_kernels
