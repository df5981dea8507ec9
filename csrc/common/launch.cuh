// One way to start a kernel, on the GPU or in the model.
#pragma once
#include "check.h"
#include "device.cuh"

namespace deepseek_kernels {

struct LaunchConfig {
  int64_t grid_x;
  int64_t grid_y = 1;
  int threads;
  void* stream;
  int smem = 0;     // bytes of dynamic shared memory
  int cluster = 1;  // CTAs, along x
  bool dependent =
      false;  // may start before the kernel before it ends: sm_90, and the kernel calls grid_dependency_wait
};

template <class... Params, class... Arguments>
void launch(void (*kernel)(Params...), const LaunchConfig& c, const Arguments&... arguments) {
  DSK_CHECK(c.grid_x >= 1 && c.grid_x <= 0x7fffffff && c.grid_y >= 1 && c.grid_y <= 65535, "grid ", c.grid_x, " x ",
            c.grid_y);
#if defined(__CUDACC__)
  if (c.smem > 48 * 1024)
    DSK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c.smem));
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (c.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = unsigned(c.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (c.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(c.grid_x), unsigned(c.grid_y));
  config.blockDim = dim3(unsigned(c.threads));
  config.dynamicSmemBytes = size_t(c.smem);
  config.stream = static_cast<cudaStream_t>(c.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  DSK_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
#else
  model::Launch config;
  config.grid = dim3(unsigned(c.grid_x), unsigned(c.grid_y));
  config.threads = unsigned(c.threads);
  config.cluster = unsigned(c.cluster);
  config.smem = size_t(c.smem);
  config.dependent = c.dependent;
  const std::string report = model::run(config, [&] { kernel(arguments...); });
  if (!report.empty()) throw Error(report);
#endif
}

}  // namespace deepseek_kernels
