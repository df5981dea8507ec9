// The only place that touches Hopper hardware. Every wrapper has two bodies: inline PTX (nvcc, sm_90a) and a call into
// the model (g++). Nothing else uses asm, cvta or CUDA intrinsics that the model lacks.
#pragma once
#include "device.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#define SM90_DO(ptx, mod) ptx
#else
#define SM90_DO(ptx, mod) mod
#endif

namespace sm90 {

enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };  // value = wgmma descriptor field [62:63]

#if defined(__CUDACC__)
struct TensorMap {
  CUtensorMap map;
};
#include "sm90_wgmma.inc"
__device__ __forceinline__ uint32_t smem_u32(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#else
using TensorMap = model::TensorMap;
inline uint32_t smem_u32(const void* p) { return model::smem_addr(p); }
#endif

// ---- mbarrier ----
// The name under which the model reports a barrier.
DEVICE_FN void debug_name(const void* p, const char* name, int i) {
  SM90_DO((void)p; (void)name; (void)i, model::debug_name(p, name, i));
}
DEVICE_FN void mbarrier_init(uint64_t* bar, uint32_t count) {
  SM90_DO(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(count) : "memory"),
          model::mbarrier_init(bar, count));
}
DEVICE_FN void mbarrier_arrive(uint64_t* bar) {
  SM90_DO(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(bar)) : "memory"),
          model::mbarrier_arrive(bar));
}
// Arrives on the barrier at the same offset in the CTA of that rank in the cluster.
DEVICE_FN void mbarrier_arrive_cluster(uint64_t* bar, uint32_t cta_rank) {
  SM90_DO(asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1;\n"
                       "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }" ::"r"(smem_u32(bar)),
                       "r"(cta_rank) : "memory"),
          model::mbarrier_arrive_cluster(bar, cta_rank));
}
// The same by a thread that has only read what the barrier guards. It publishes no writes to the other CTAs, which
// would cost a fence of all of the GPU's memory at every call; nor does the waiting side need mbarrier_wait_cluster
// then, which empties L1.
DEVICE_FN void mbarrier_arrive_cluster_after_reads(uint64_t* bar, uint32_t cta_rank) {
  SM90_DO(asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1;\n"
                       "mbarrier.arrive.shared::cluster.b64 _, [a]; }" ::"r"(smem_u32(bar)),
                       "r"(cta_rank) : "memory"),
          model::mbarrier_arrive_cluster(bar, cta_rank));
}
DEVICE_FN void mbarrier_arrive_and_expect_tx(uint64_t* bar, uint32_t bytes) {
  SM90_DO(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(bar)),
                       "r"(bytes) : "memory"),
          model::mbarrier_arrive_and_expect_tx(bar, bytes));
}
// Returns once the phase of that parity has completed (so a fresh barrier lets parity 1 through at once).
DEVICE_FN void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  SM90_DO(asm volatile("{ .reg .pred p;\n"
                       "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                       "@p bra DONE;\n"
                       "bra WAIT;\n"
                       "DONE: }" ::"r"(smem_u32(bar)),
                       "r"(parity) : "memory"),
          model::mbarrier_wait(bar, parity));
}
// As mbarrier_wait, for barriers that threads of other CTAs of the cluster arrive on.
DEVICE_FN void mbarrier_wait_cluster(uint64_t* bar, uint32_t parity) {
  SM90_DO(asm volatile("{ .reg .pred p;\n"
                       "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
                       "@p bra DONE;\n"
                       "bra WAIT;\n"
                       "DONE: }" ::"r"(smem_u32(bar)),
                       "r"(parity) : "memory"),
          model::mbarrier_wait(bar, parity));
}
// Makes this thread's mbarrier_init visible to the other CTAs of the cluster and to the asynchronous units.
DEVICE_FN void fence_barrier_init() {
  SM90_DO(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"), model::fence_barrier_init());
}
// Makes this thread's earlier plain writes to shared memory visible to TMA and wgmma.
DEVICE_FN void fence_proxy_async() {
  SM90_DO(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"), model::fence_proxy_async());
}

// To the place of `p` in the CTA of that rank in the cluster. mbarrier_arrive_cluster publishes it.
DEVICE_FN void store_cluster(float* p, uint32_t cta_rank, float value) {
  SM90_DO(asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1;\n"
                       "st.shared::cluster.f32 [a], %2; }" ::"r"(smem_u32(p)),
                       "r"(cta_rank), "f"(value) : "memory"),
          model::store_cluster(p, cta_rank, value));
}

// ---- cp.async ----
// Copies 4 bytes, zeros unless `valid`; src must be a legal address even then.
DEVICE_FN void cp_async_4(void* dst, const void* src, bool valid) {
  SM90_DO(asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_u32(dst)), "l"(src),
                       "r"(valid ? 4 : 0) : "memory"),
          model::cp_async(dst, src, 4, valid ? 4 : 0));
}
// Arrives, as one of the barrier's expected arrivals, when this thread's earlier cp_async have landed.
DEVICE_FN void cp_async_mbarrier_arrive(uint64_t* bar) {
  SM90_DO(asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_u32(bar)) : "memory"),
          model::cp_async_mbarrier_arrive(bar));
}

// ---- TMA ----
DEVICE_FN void prefetch_tensor_map(const TensorMap& map) {
  SM90_DO(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"), (void)map);
}
DEVICE_FN void tma_load_2d(void* dst, const TensorMap& map, uint64_t* bar, int x, int y) {
  SM90_DO(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                       " [%0], [%1, {%3, %4}], [%2];" ::"r"(smem_u32(dst)),
                       "l"(&map), "r"(smem_u32(bar)), "r"(x), "r"(y) : "memory"),
          model::tma_load(2, dst, map, bar, {x, y, 0}, 0));
}
DEVICE_FN void tma_load_3d(void* dst, const TensorMap& map, uint64_t* bar, int x, int y, int z) {
  SM90_DO(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                       " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_u32(dst)),
                       "l"(&map), "r"(smem_u32(bar)), "r"(x), "r"(y), "r"(z) : "memory"),
          model::tma_load(3, dst, map, bar, {x, y, z}, 0));
}
// Into the same offset of every CTA named in `mask`, completing on each one's own barrier.
DEVICE_FN void tma_load_2d_multicast(void* dst, const TensorMap& map, uint64_t* bar, int x, int y, uint16_t mask) {
  SM90_DO(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                       " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_u32(dst)),
                       "l"(&map), "r"(smem_u32(bar)), "r"(x), "r"(y), "h"(mask) : "memory"),
          model::tma_load(2, dst, map, bar, {x, y, 0}, mask));
}
DEVICE_FN void tma_load_3d_multicast(void* dst, const TensorMap& map, uint64_t* bar, int x, int y, int z,
                                     uint16_t mask) {
  SM90_DO(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                       " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem_u32(dst)),
                       "l"(&map), "r"(smem_u32(bar)), "r"(x), "r"(y), "r"(z), "h"(mask) : "memory"),
          model::tma_load(3, dst, map, bar, {x, y, z}, mask));
}
DEVICE_FN void tma_store_2d(const void* src, const TensorMap& map, int x, int y) {
  SM90_DO(
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%1, {%2, %3}], [%0];" ::"r"(smem_u32(src)),
                   "l"(&map), "r"(x), "r"(y) : "memory"),
      model::tma_store(2, src, map, {x, y, 0}, false));
}
DEVICE_FN void tma_store_3d(const void* src, const TensorMap& map, int x, int y, int z) {
  SM90_DO(asm volatile(
              "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%1, {%2, %3, %4}], [%0];" ::"r"(smem_u32(src)),
              "l"(&map), "r"(x), "r"(y), "r"(z) : "memory"),
          model::tma_store(3, src, map, {x, y, z}, false));
}
// Adds an fp32 box to what lies there, with one rounding an element. In bulk groups, as a store is.
DEVICE_FN void tma_reduce_add_2d(const void* src, const TensorMap& map, int x, int y) {
  SM90_DO(asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%1, {%2, %3}], [%0];" ::"r"(
                           smem_u32(src)),
                       "l"(&map), "r"(x), "r"(y) : "memory"),
          model::tma_store(2, src, map, {x, y, 0}, true));
}
DEVICE_FN void tma_reduce_add_3d(const void* src, const TensorMap& map, int x, int y, int z) {
  SM90_DO(
      asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%1, {%2, %3, %4}], [%0];" ::"r"(
                       smem_u32(src)),
                   "l"(&map), "r"(x), "r"(y), "r"(z) : "memory"),
      model::tma_store(3, src, map, {x, y, z}, true));
}
DEVICE_FN void tma_store_commit() {
  SM90_DO(asm volatile("cp.async.bulk.commit_group;" :: : "memory"), model::tma_store_commit());
}
// Until at most N store groups of this thread still read shared memory.
template <int N>
DEVICE_FN void tma_store_wait() {
  SM90_DO(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"), model::tma_store_wait(N));
}

// ---- stmatrix ----
// Stores 8x8 matrices of 16-bit elements. Lane 8 * i + j passes where row j of matrix i goes (16 bytes, aligned; the
// lanes past 8 * count pass anything); register i of lane l holds elements 2 * (l % 4) and + 1 of row l / 4 of matrix
// i, as a wgmma accumulator does. _trans stores each matrix transposed: the registers then hold column l / 4.
DEVICE_FN void stmatrix_x2(void* row, uint32_t r0, uint32_t r1) {
  SM90_DO(asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(smem_u32(row)), "r"(r0),
                       "r"(r1) : "memory"),
          model::stmatrix(2, false, row, {r0, r1}));
}
DEVICE_FN void stmatrix_x2_trans(void* row, uint32_t r0, uint32_t r1) {
  SM90_DO(asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(smem_u32(row)), "r"(r0),
                       "r"(r1) : "memory"),
          model::stmatrix(2, true, row, {r0, r1}));
}
DEVICE_FN void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  SM90_DO(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_u32(row)), "r"(r0),
                       "r"(r1), "r"(r2), "r"(r3) : "memory"),
          model::stmatrix(4, false, row, {r0, r1, r2, r3}));
}
DEVICE_FN void stmatrix_x4_trans(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  SM90_DO(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_u32(row)),
                       "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory"),
          model::stmatrix(4, true, row, {r0, r1, r2, r3}));
}

// ---- wgmma ----
// Keeps the compiler from moving register accesses over the wgmma instructions around it.
template <int R>
DEVICE_FN void pin(float (&d)[R]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
#else
  (void)d;
#endif
}
// The same of registers that wgmma takes A from: before wgmma_fence, for they are to be written by then, and after the
// wait, until when they may not be used for anything else.
template <int R>
DEVICE_FN void pin(uint32_t (&a)[R][4]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < 4 * R; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
#else
  (void)a;
#endif
}
// Name every accumulator (and call before the first wgmma that uses it after a plain access).
template <class... D>
DEVICE_FN void wgmma_fence(D&... d) {
  (pin(d), ...);
  SM90_DO(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"), model::wgmma_fence());
}
DEVICE_FN void wgmma_commit() {
  SM90_DO(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"), model::wgmma_commit());
}
// Until at most N groups are in flight. Name every accumulator that may be read afterwards.
template <int N, class... D>
DEVICE_FN void wgmma_wait(D&... d) {
  SM90_DO(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"), model::wgmma_wait(N, {&d[0]...}));
  (pin(d), ...);
}
// d (64 x N) = a (64 x 32) * b (N x 32)^T + (scale_d ? d : 0); both K-major e4m3 in shared memory.
template <int N>
DEVICE_FN void wgmma_e4m3(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, int scale_d) {
  SM90_DO(Wgmma_e4m3_ss<N>::mma(d, desc_a, desc_b, scale_d),
          model::wgmma(model::E4M3, N, d, nullptr, desc_a, desc_b, scale_d, 0, 0));
}
// bf16, K = 16; kTransA / kTransB = 1: that operand is MN-major in shared memory.
template <int N, int kTransA = 0, int kTransB = 0>
DEVICE_FN void wgmma_bf16(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, int scale_d) {
  SM90_DO((Wgmma_bf16_ss<N>::template mma<kTransA, kTransB>(d, desc_a, desc_b, scale_d)),
          model::wgmma(model::BF16, N, d, nullptr, desc_a, desc_b, scale_d, kTransA, kTransB));
}
// bf16 with A from registers (the accumulator's own fragment layout, packed in pairs).
template <int N, int kTransB = 0>
DEVICE_FN void wgmma_bf16_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, int scale_d) {
  SM90_DO(Wgmma_bf16_rs<N>::template mma<kTransB>(d, a, desc_b, scale_d),
          model::wgmma(model::BF16, N, d, a, 0, desc_b, scale_d, 0, kTransB));
}
// The same of fp16.
template <int N, int kTransA = 0, int kTransB = 0>
DEVICE_FN void wgmma_f16(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, int scale_d) {
  SM90_DO((Wgmma_f16_ss<N>::template mma<kTransA, kTransB>(d, desc_a, desc_b, scale_d)),
          model::wgmma(model::F16, N, d, nullptr, desc_a, desc_b, scale_d, kTransA, kTransB));
}
template <int N, int kTransB = 0>
DEVICE_FN void wgmma_f16_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, int scale_d) {
  SM90_DO(Wgmma_f16_rs<N>::template mma<kTransB>(d, a, desc_b, scale_d),
          model::wgmma(model::F16, N, d, a, 0, desc_b, scale_d, 0, kTransB));
}

// Shared memory descriptor. Byte offsets; all multiples of 16.
DEVICE_FN uint64_t smem_desc(const void* p, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return uint64_t((smem_u32(p) & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(int(swizzle)) << 62;
}
// K-major, 128-byte rows, 8-row groups 1024 bytes apart. Step K by adding (bytes >> 4) to the descriptor.
DEVICE_FN uint64_t desc_k_b128(const void* p, uint32_t group_stride = 1024) {
  return smem_desc(p, 16, group_stride, Swizzle::k128);
}
// MN-major: 64 bf16 of MN per 128-byte row, one row per k; `mn_stride` between 64-wide MN blocks, 8 k apart 1024.
DEVICE_FN uint64_t desc_mn_b128(const void* p, uint32_t mn_stride) {
  return smem_desc(p, mn_stride, 1024, Swizzle::k128);
}
// Where a byte of a box with rows of `row_bytes` (32, 64, 128: also the swizzle's span) lies from the box's start,
// which is a multiple of 1024.
DEVICE_FN int swizzled_offset(int row, int byte, int row_bytes) {
  const int offset = row * row_bytes + byte;
  return offset ^ ((offset >> 7 & (row_bytes / 16 - 1)) << 4);
}

// ---- the kernels before and after in the stream (LaunchConfig::dependent) ----
// Until the kernels before have completed and their writes are visible. A dependent launch touches no global memory
// before this, neither reading nor writing. Both are nothing before sm_90, where no launch is dependent.
DEVICE_FN void grid_dependency_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  SM90_DO(asm volatile("griddepcontrol.wait;" :: : "memory"), model::grid_dependency_wait());
#endif
}
// The dependent kernel after may start once every CTA has called this or exited.
DEVICE_FN void grid_dependency_launch() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  SM90_DO(asm volatile("griddepcontrol.launch_dependents;" :: : "memory"), model::grid_dependency_launch());
#endif
}

// ---- threads ----
template <int N>
DEVICE_FN void reg_inc() {
  SM90_DO(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)), model::setmaxnreg(N, true));
}
template <int N>
DEVICE_FN void reg_dec() {
  SM90_DO(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)), model::setmaxnreg(N, false));
}
DEVICE_FN void named_barrier_sync(int id, int threads) {
  SM90_DO(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"), model::named_barrier_sync(id, threads));
}
DEVICE_FN void cluster_sync() {
  SM90_DO(asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" :: : "memory"),
          model::cluster_sync());
}
DEVICE_FN uint32_t cluster_rank() {
#if defined(__CUDACC__)
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return model::cluster_rank();
#endif
}
// True in exactly one lane of a converged warp; which one is not specified.
DEVICE_FN bool elect_one() {
#if defined(__CUDACC__)
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
#else
  return model::elect_one();
#endif
}

}  // namespace sm90
