#include "common/launch.cuh"
#include "common/tensor_map.cuh"
#include "kernel_sm90.cuh"

namespace deepseek_kernels {
namespace {

using namespace fp8_matmul;

template <class C>
void launch_instance(const Fp8MatmulParams& p) {
  using Out = typename C::Out;
  constexpr int kSmem = sizeof(typename C::Smem);
  static_assert(kSmem <= 232448);
  constexpr Swizzle kStoreSwizzle = C::kBoxBytes == 128  ? Swizzle::k128
                                    : C::kBoxBytes == 64 ? Swizzle::k64
                                                         : Swizzle::k32;
  constexpr Element kOut = sizeof(Out) == 2 ? Element::kBf16 : Element::kFp32;
  const TensorMaps maps = {
      tensor_map_2d(p.a, {Element::kE4m3, p.k, p.m, p.lda, kTileK, C::kTileM, Swizzle::k128}),
      tensor_map_2d(p.b, {Element::kE4m3, p.k, p.n, p.ldb, kTileK, C::kRowsB, Swizzle::k128}),
      tensor_map_2d(p.d, {kOut, p.n, p.m, p.ldd, C::kBoxN, kGroupM, kStoreSwizzle}),
  };
  LaunchConfig config{};
  config.grid_x = p.ctas;
  config.threads = C::kThreads;
  config.stream = p.stream;
  config.smem = kSmem;
  config.cluster = C::kCluster;
  launch(kernel<C>, config, maps, p);
}

template <class C>
constexpr Fp8MatmulInstance instance_of() {
  return {sizeof(typename C::Out) == 2 ? Dtype::kBf16 : Dtype::kFp32, C::kTileM, C::kTileN, C::kStages, C::kCluster};
}

template <class C>
bool launch_if_asked_for(const Fp8MatmulParams& p) {
  constexpr Fp8MatmulInstance i = instance_of<C>();
  if (p.out_dtype != i.out_dtype || p.tile_m != i.tile_m || p.tile_n != i.tile_n || p.stages != i.stages ||
      p.cluster != i.cluster)
    return false;
  launch_instance<C>(p);
  return true;
}

template <class... Configs>
struct Compiled {
  static std::vector<Fp8MatmulInstance> instances() { return {instance_of<Configs>()...}; }
  static bool launch(const Fp8MatmulParams& p) { return (launch_if_asked_for<Configs>(p) || ...); }
};

using Bf16 = __nv_bfloat16;
// out, tile_m, tile_n, stages, cluster
using Instances = Compiled<Config<Bf16, 128, 128, 5, 1>, Config<Bf16, 128, 128, 5, 2>,    //
                           Config<Bf16, 64, 128, 8, 1>, Config<Bf16, 64, 64, 10, 1>,      //
                           Config<Bf16, 64, 32, 12, 1>, Config<Bf16, 64, 16, 12, 1>,      //
                           Config<float, 128, 128, 4, 1>, Config<float, 128, 128, 4, 2>,  //
                           Config<float, 64, 64, 10, 1>>;

}  // namespace

std::vector<Fp8MatmulInstance> fp8_matmul_instances() { return Instances::instances(); }

void launch_fp8_matmul(const Fp8MatmulParams& p) {
  if (p.m == 0 || p.n == 0) return;
  DSK_CHECK(p.k > 0 && p.k % 16 == 0, "k = ", p.k);
  DSK_CHECK(p.n % 8 == 0, "n = ", p.n);
  DSK_CHECK(p.raster >= 1, "raster = ", p.raster);
  DSK_CHECK(p.cluster >= 1 && p.ctas >= 1 && p.ctas % p.cluster == 0, "ctas = ", p.ctas, ", cluster = ", p.cluster);
  constexpr int64_t kLargest = int64_t(1) << 30;  // coordinates of a tensor map are 32-bit
  DSK_CHECK(p.m < kLargest && p.n < kLargest && p.k < kLargest, "m, n, k = ", p.m, ", ", p.n, ", ", p.k);
  DSK_CHECK(ceil_div<int64_t>(p.m, p.tile_m) * ceil_div<int64_t>(p.n, p.tile_n) < kLargest, "tiles of ", p.tile_m, "x",
            p.tile_n, " for ", p.m, "x", p.n);
  DSK_CHECK(Instances::launch(p), "no instance for out_dtype ", int(p.out_dtype), ", tile ", p.tile_m, "x", p.tile_n,
            ", ", p.stages, " stages, cluster ", p.cluster);
}

}  // namespace deepseek_kernels
