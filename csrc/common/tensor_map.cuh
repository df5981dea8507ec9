// Tensor maps, made on the host. The driver's encoder is looked up at run time: nothing links to libcuda.
#pragma once
#include "check.h"
#include "sm90.cuh"

namespace deepseek_kernels {

enum class Element { kE4m3, kBf16, kFp32 };

struct TensorMapShape {
  Element element;
  int64_t inner, outer;  // elements, rows
  int64_t ld;            // elements between rows
  int box_inner, box_outer;
  sm90::Swizzle swizzle;
};
struct TensorMapShape3d {
  Element element;
  int64_t inner, outer, batch;  // elements, rows, matrices
  int64_t ld, batch_stride;     // elements between rows, between matrices
  int box_inner, box_outer, box_batch;
  sm90::Swizzle swizzle;
};

inline int size_of(Element element) { return element == Element::kE4m3 ? 1 : element == Element::kBf16 ? 2 : 4; }

#if defined(__CUDACC__)
inline auto tensor_map_encoder() {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static const Encoder encoder = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    DSK_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found));
#else
    DSK_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &found));
#endif
    DSK_CHECK(found == cudaDriverEntryPointSuccess, "no cuTensorMapEncodeTiled in this driver: ", int(found));
    return reinterpret_cast<Encoder>(address);
  }();
  return encoder;
}
#endif

// Of `rank` dimensions, 2 or 3: a load outside the tensor gives zeros, a store there is dropped.
inline sm90::TensorMap tensor_map(int rank, const void* base, const TensorMapShape3d& s) {
  const int64_t size = size_of(s.element), strides_in_bytes[] = {s.ld * size, s.batch_stride * size};
#if defined(__CUDACC__)
  static constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                                   CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  static constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                                     CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  const cuuint64_t sizes[] = {cuuint64_t(s.inner), cuuint64_t(s.outer), cuuint64_t(s.batch)};
  const cuuint64_t strides[] = {cuuint64_t(strides_in_bytes[0]), cuuint64_t(strides_in_bytes[1])};
  const cuuint32_t box[] = {cuuint32_t(s.box_inner), cuuint32_t(s.box_outer), cuuint32_t(s.box_batch)};
  const cuuint32_t steps[] = {1, 1, 1};
  sm90::TensorMap result;
  const CUresult status =
      tensor_map_encoder()(&result.map, kTypes[int(s.element)], cuuint32_t(rank), const_cast<void*>(base), sizes,
                           strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[int(s.swizzle)],
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  DSK_CHECK(status == CUDA_SUCCESS, "CUresult ", int(status), " for a tensor map of ", s.batch, " x ", s.outer, " x ",
            s.inner, " elements, ", strides_in_bytes[0], " bytes between rows, ", strides_in_bytes[1],
            " between matrices, at ", base);
  return result;
#else
  static constexpr uint32_t kSpans[] = {0, 128, 64, 32};
  return model::make_tensor_map(rank, base, uint32_t(size), {s.inner, s.outer, s.batch},
                                {strides_in_bytes[0], strides_in_bytes[1]}, {s.box_inner, s.box_outer, s.box_batch},
                                kSpans[int(s.swizzle)]);
#endif
}
inline sm90::TensorMap tensor_map_2d(const void* base, const TensorMapShape& s) {
  return tensor_map(2, base, {s.element, s.inner, s.outer, 1, s.ld, 0, s.box_inner, s.box_outer, 1, s.swizzle});
}
inline sm90::TensorMap tensor_map_3d(const void* base, const TensorMapShape3d& s) { return tensor_map(3, base, s); }

}  // namespace deepseek_kernels
