// The instances of the kernel, in two sources so that they compile side by side.
#pragma once
#include "common/launch.cuh"
#include "common/tensor_map.cuh"
#include "kernel_sm90.cuh"

namespace deepseek_kernels::mla_decode {

template <class T, int kCluster>
void launch_attention(const MlaDecodeParams& p) {
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
  config.grid_x = int64_t(p.parts) * p.tiles;
  config.threads = kThreads;
  config.stream = p.stream;
  config.smem = sizeof(Smem);
  config.cluster = kCluster;
  config.dependent = true;
  launch(kernel<T, kCluster>, config, maps, p);
}

template <class T>
void launch_merge(const MlaDecodeParams& p) {
  LaunchConfig config{};
  config.grid_x = p.parts;
  config.grid_y = p.rows < 65535 ? p.rows : 65535;
  config.threads = kMergeThreads;
  config.stream = p.stream;
  config.dependent = true;
  launch(merge<T>, config, p);
}

void launch_bf16(const MlaDecodeParams& p);
void launch_fp16(const MlaDecodeParams& p);

template <class T>
void launch_both(const MlaDecodeParams& p) {
  p.cluster == 1 ? launch_attention<T, 1>(p) : launch_attention<T, 2>(p);
  if (p.parts > 1 && p.capacity > kPair) launch_merge<T>(p);  // else no sequence is cut
}

}  // namespace deepseek_kernels::mla_decode
