// The host side of what the bf16 matmuls of Hopper have in common.
#pragma once
#include "bf16_sm90.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"

namespace deepseek_kernels::bf16 {

// [count, rows, columns] with `ld` elements between rows and `between` from one matrix to the next.
struct Matrices {
  const void* data;
  int64_t count, rows, columns, ld, between;

  // In swizzled boxes of 64 columns.
  TensorMap map(int box_rows) const {
    return tensor_map_3d(data, {Element::kBf16, columns, rows, count, ld, count == 1 ? ld * rows : between, kTileK,
                                box_rows, 1, Swizzle::k128});
  }
};

template <class C>
LaunchConfig launch_config(int ctas, int smem, void* stream) {
  LaunchConfig config{};
  config.grid_x = ctas;
  config.threads = C::kThreads;
  config.stream = stream;
  config.smem = smem;
  config.cluster = C::kCluster;
  config.dependent = true;
  return config;
}

}  // namespace deepseek_kernels::bf16
