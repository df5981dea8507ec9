// The model's layouts and those of csrc/common/sm90.cuh against CuTe's, element by element, on the host.    cute
// Prints what differs; needs the headers of nvidia-cutlass, of which nothing else is used.
#include <cstdio>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <string>

#include "common/launch.cuh"
#include "common/sm90.cuh"

namespace {

using namespace cute;
using Major = SM90::GMMA::Major;
int g_compared = 0, g_different = 0;

void same(const std::string& what, int64_t ours, int64_t theirs) {
  ++g_compared;
  if (ours != theirs && ++g_different <= 20)
    printf("%s: %ld here, %ld in CuTe\n", what.c_str(), long(ours), long(theirs));
}

// Runs in a kernel, where our helpers may ask for shared memory addresses.
template <class F>
void in_kernel(F body) {
  deepseek_kernels::LaunchConfig config{};
  config.grid_x = 1, config.threads = 32, config.smem = 64 * 1024;
  deepseek_kernels::launch(+[](const F& f) { f(model::dynamic_smem()); }, config, body);
}

constexpr uint64_t kStart = 0x3FFF, kLeading = uint64_t(0x3FFF) << 16;  // fields of a descriptor

// CuTe's descriptor (its start address has no meaning on a host) read by the model names the bytes of CuTe's layout;
// so does `ours`, made by sm90.cuh, if there is one. kMN x kK elements, atoms in that order.
template <Major kMajor, class T, int kMN, int kK, class Order = Step<_1, _2>, class Atom>
void operand(const std::string& name, Atom atom, uint64_t ours = 0) {
  constexpr int kStep = 32 / sizeof(T);  // of k in one wgmma
  constexpr uint32_t kBase = 0x2000;
  alignas(1024) static T buffer[kMN * kK];
  Tensor whole = make_tensor(make_smem_ptr(buffer), tile_to_shape(atom, Shape<Int<kMN>, Int<kK>>{}, Order{}));
  const auto offset = [&](int mn, int k) { return uint32_t((&whole(mn, k) - &whole(0, 0)) * sizeof(T)); };
  auto theirs = SM90::GMMA::make_gmma_desc<kMajor>(local_tile(whole, Shape<Int<kMN>, Int<kStep>>{}, make_coord(0, 0)));
  for (int i = 0; i < (ours ? 2 : 1); ++i) {
    const uint64_t descriptor = ((i ? ours : uint64_t(theirs)) & ~kStart) | kBase >> 4;
    for (int k = 0; k < kK; ++k) {
      // Where a step of k begins in CuTe's layout, the descriptor is moved to.
      const uint64_t moved = descriptor + (offset(0, k / kStep * kStep) >> 4);
      for (int mn = 0; mn < kMN; ++mn)
        same(name + (i ? ", descriptor of sm90.cuh" : ""),
             model::operand_address(moved, kMajor == Major::MN, mn, k % kStep, sizeof(T)), kBase + offset(mn, k));
    }
  }
  if (ours) {  // the leading offset counts for swizzled operands only where they are MN-major
    const uint64_t counts = ~kStart & ~(kMajor == Major::K ? kLeading : 0);
    same(name + ", fields", int64_t(ours & counts), int64_t(uint64_t(theirs) & counts));
  }
}

template <class T, class Atom>
void swizzle(const std::string& name, Atom atom, int row_bytes) {
  const auto layout = tile_to_shape(atom, make_shape(Int<64>{}, Int<decltype(size<1>(atom))::value>{}));
  alignas(1024) static T buffer[64 * 128];
  Tensor whole = make_tensor(make_smem_ptr(buffer), layout);
  for (int row = 0; row < 64; ++row)
    for (int i = 0; i < row_bytes / int(sizeof(T)); ++i)
      same(name, sm90::swizzled_offset(row, i * int(sizeof(T)), row_bytes),
           (&whole(row, i) - &whole(0, 0)) * int(sizeof(T)));
}

template <class Traits, int kN, class Layout = typename Traits::CLayout>
void accumulator(const std::string& name) {
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < kN / 2; ++i) {
      const model::Place at = model::accumulator_place(thread, i);
      same(name, at.row + 64 * at.column, Layout{}(thread, i));
    }
}

template <class Operation, int kCount>
void stmatrix(const std::string& name, void (*store)(void*, uint32_t, uint32_t, uint32_t, uint32_t)) {
  in_kernel([=](uint8_t* memory) {
    const uint32_t lane = threadIdx.x;
    uint32_t r[4];
    for (uint32_t i = 0; i < 4; ++i) r[i] = (lane * 8 + i * 2) | (lane * 8 + i * 2 + 1) << 16;
    store(memory + lane * 16, r[0], r[1], r[2], r[3]);  // row after row, as CuTe numbers the bits of the destination
    __syncwarp();
    if (lane == 0)
      for (uint32_t t = 0; t < 32; ++t)
        for (uint32_t half = 0; half < 2 * kCount; ++half) {
          const uint32_t bit = typename Copy_Traits<Operation>::SrcLayout{}(int(t), int(half * 16));
          same(name, reinterpret_cast<const uint16_t*>(memory)[bit / 16], t * 8 + half);
        }
  });
}

}  // namespace

int main() try {
  using namespace SM90::GMMA;
  using B = cute::bfloat16_t;
  using F = cute::float_e4m3_t;
  uint64_t k_b128 = 0, mn_b128 = 0;
  in_kernel([&](uint8_t* memory) {
    k_b128 = sm90::desc_k_b128(memory);
    mn_b128 = sm90::desc_mn_b128(memory, 64 * 128);
  });
  operand<Major::K, F, 128, 128>("e4m3, K-major, 128 B", Layout_K_SW128_Atom<F>{}, k_b128);
  operand<Major::K, F, 128, 64>("e4m3, K-major, 64 B", Layout_K_SW64_Atom<F>{});
  operand<Major::K, F, 128, 32>("e4m3, K-major, 32 B", Layout_K_SW32_Atom<F>{});
  operand<Major::K, B, 128, 64>("bf16, K-major, 128 B", Layout_K_SW128_Atom<B>{}, k_b128);
  operand<Major::K, B, 128, 32>("bf16, K-major, 64 B", Layout_K_SW64_Atom<B>{});
  operand<Major::K, B, 128, 16>("bf16, K-major, 32 B", Layout_K_SW32_Atom<B>{});
  operand<Major::K, B, 64, 64>("bf16, K-major, not swizzled", Layout_K_INTER_Atom<B>{});
  operand<Major::MN, B, 128, 64, Step<_2, _1>>("bf16, MN-major, 128 B", Layout_MN_SW128_Atom<B>{}, mn_b128);
  operand<Major::MN, B, 128, 64>("bf16, MN-major, 128 B, MN first", Layout_MN_SW128_Atom<B>{});
  operand<Major::MN, B, 128, 64>("bf16, MN-major, 64 B", Layout_MN_SW64_Atom<B>{});
  operand<Major::MN, B, 128, 64>("bf16, MN-major, 32 B", Layout_MN_SW32_Atom<B>{});
  operand<Major::MN, B, 128, 64>("bf16, MN-major, not swizzled", Layout_MN_INTER_Atom<B>{});

  swizzle<F>("swizzled_offset, 128 B of e4m3", Layout_K_SW128_Atom<F>{}, 128);
  swizzle<F>("swizzled_offset, 64 B of e4m3", Layout_K_SW64_Atom<F>{}, 64);
  swizzle<F>("swizzled_offset, 32 B of e4m3", Layout_K_SW32_Atom<F>{}, 32);
  swizzle<B>("swizzled_offset, 128 B of bf16", Layout_K_SW128_Atom<B>{}, 128);
  swizzle<B>("swizzled_offset, 64 B of bf16", Layout_K_SW64_Atom<B>{}, 64);
  swizzle<B>("swizzled_offset, 32 B of bf16", Layout_K_SW32_Atom<B>{}, 32);

  accumulator<MMA_Traits<SM90::GMMA::MMA_64x8x32_F32E4M3E4M3_SS_TN<>>, 8>("accumulator of m64n8k32");
  accumulator<MMA_Traits<SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_SS_TN<>>, 64>("accumulator of m64n64k32");
  accumulator<MMA_Traits<SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_SS_TN<>>, 128>("accumulator of m64n128k32");
  accumulator<MMA_Traits<SM90::GMMA::MMA_64x256x32_F32E4M3E4M3_SS_TN<>>, 256>("accumulator of m64n256k32");
  using Bf16 = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::MN>;
  accumulator<MMA_Traits<Bf16>, 128>("accumulator of m64n128k16");
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < 8; ++i) {
      const model::Place at = model::register_a_place(thread, i);
      same("A in registers", at.row + 64 * at.column, ALayout_64x16{}(thread, i));
    }

  stmatrix<SM90_U32x4_STSM_N, 4>("stmatrix_x4", sm90::stmatrix_x4);
  stmatrix<SM90_U16x8_STSM_T, 4>("stmatrix_x4_trans", sm90::stmatrix_x4_trans);
  stmatrix<SM90_U32x2_STSM_N, 2>(
      "stmatrix_x2", [](void* row, uint32_t r0, uint32_t r1, uint32_t, uint32_t) { sm90::stmatrix_x2(row, r0, r1); });
  stmatrix<SM90_U16x4_STSM_T, 2>("stmatrix_x2_trans", [](void* row, uint32_t r0, uint32_t r1, uint32_t, uint32_t) {
    sm90::stmatrix_x2_trans(row, r0, r1);
  });
  printf("%d of %d differ\n", g_different, g_compared);
  return g_different != 0;
} catch (const std::exception& error) {
  printf("%s\n", error.what());
  return 2;
}
