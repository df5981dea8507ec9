// The host side of what fp8_matmul and fp8_grouped_matmul have in common on Hopper: tensor maps, and the instance that
// was asked for among those that are compiled. `Params` has tile_m, tile_n, cluster_m, cluster_n, cluster_k, swap,
// out_dtype, ctas and stream.
#pragma once
#include <vector>

#include "fp8_sm90_store.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"

namespace deepseek_kernels::fp8 {

// [rows, columns] with `ld` elements between rows.
struct Matrix {
  const void* data;
  int64_t rows, columns, ld;
};

// fp32 [matrices, rows, blocks] with these strides in elements.
struct RowScales {
  const float* data;
  int64_t matrices, rows, blocks, stride_matrix, stride_row, stride_block;

  bool can_be_mapped() const {
    const bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_block % 4 == 0 && stride_matrix % 4 == 0;
    return stride_row == 1 && whole && stride_block >= rows && (matrices == 1 || stride_matrix >= rows);
  }
  TensorMap map(int box) const {
    const int64_t between = matrices == 1 ? stride_block * blocks : stride_matrix;
    return tensor_map_3d(data,
                         {Element::kFp32, rows, blocks, matrices, stride_block, between, box, 1, 1, Swizzle::kNone});
  }
};

template <class C>
OperandMaps operand_maps(const Matrix& x, const Matrix& y) {
  OperandMaps maps{};
  maps.x = tensor_map_2d(x.data, {Element::kE4m3, x.columns, x.rows, x.ld, kTileK, C::kBoxX, Swizzle::k128});
  maps.y = tensor_map_2d(y.data, {Element::kE4m3, y.columns, y.rows, y.ld, kTileK, C::kBoxY, Swizzle::k128});
  return maps;
}

template <class C>
MatmulMaps matmul_maps(const Matrix& a, const RowScales& scale_a, const Matrix& b, const Matrix& d) {
  constexpr Element kOut = C::kSize == 2 ? Element::kBf16 : Element::kFp32;
  MatmulMaps maps = {operand_maps<C>(C::kSwap ? b : a, C::kSwap ? a : b),
                     tensor_map_2d(d.data, {kOut, d.columns, d.rows, d.ld, C::kBoxN, C::kBoxM, C::kSwizzle})};
  if (scale_a.can_be_mapped()) {
    maps.operands.scales = true;
    (C::kSwap ? maps.operands.scale_y : maps.operands.scale_x) = scale_a.map(C::kTileM);
  }
  return maps;
}

template <class C, class Params>
LaunchConfig launch_config(const Params& p, int smem) {
  LaunchConfig config{};
  config.grid_x = p.ctas;
  config.threads = C::kThreads;
  config.stream = p.stream;
  config.smem = smem;
  config.cluster = C::kCluster;
  config.dependent = true;
  return config;
}

template <class C>
constexpr Dtype kOutDtype = C::kSize == 2 ? Dtype::kBf16 : Dtype::kFp32;

template <class C, class Params>
bool is_asked_for(const Params& p) {
  return p.out_dtype == kOutDtype<C> && p.tile_m == C::kTileM && p.tile_n == C::kTileN && p.cluster_m == C::kClusterM &&
         p.cluster_n == C::kClusterN && p.cluster_k == C::kClusterK && p.swap == C::kSwap;
}

// launch_instance<Config>(params) of the first of `Configs` that is asked for.
template <class... Configs>
struct Compiled {
  template <class Instance>
  static void list(std::vector<Instance>& into) {
    (into.push_back({kOutDtype<Configs>, Configs::kTileM, Configs::kTileN, Configs::kClusterM, Configs::kClusterN,
                     Configs::kSwap, Configs::kClusterK, Configs::kStages}),
     ...);
  }
  template <class Params, class Launch>
  static bool launch(const Params& p, const Launch& launch_instance) {
    return ((is_asked_for<Configs>(p) && (launch_instance.template operator()<Configs>(p), true)) || ...);
  }
};

}  // namespace deepseek_kernels::fp8
