// Host stand-in for CUDA and for the Hopper units behind csrc/common/sm90.cuh. Written from the PTX ISA, not from
// there.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>

// CUDA keywords: the CUDA headers make most of them vanish under g++.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
extern uint3 threadIdx, blockIdx;  // set at every switch of fiber
extern dim3 blockDim, gridDim;

// Outside namespace model, so that argument-dependent lookup never finds model:: functions from a kernel.
namespace model_types {
struct TensorMap {
  char* base;
  int rank;
  uint64_t size[3], stride[2];     // elements; bytes between rows, between matrices
  uint32_t elem, box[3], swizzle;  // swizzle: 0, 32, 64, 128 bytes
  uint32_t rows() const { return box[1] * box[2]; }
  uint32_t row_bytes() const { return box[0] * elem; }
  uint32_t bytes() const { return rows() * row_bytes(); }
};
}  // namespace model_types

namespace model {
using model_types::TensorMap;

struct Settings {
  uint64_t seed = 1;
  bool hazard_checks = true;    // false: hazards show only as wrong numbers
  bool wgmma_per_warp = true;   // false: one warp's wgmma_wait vouches for its whole warpgroup (CUTLASS relies on that)
  uint64_t bug = 0;             // bug_id of the planted bug
  bool strict = false;          // switches at plain accesses to shared memory too
  unsigned clusters_alive = 0;  // at once, at most; 0: 1 to 3, at random
};
extern Settings settings;

constexpr uint64_t bug_id(const char* name) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (; *name; ++name) hash = (hash ^ uint64_t(*name)) * 0x100000001b3u;
  return hash;
}

struct Launch {
  dim3 grid;
  unsigned threads = 128, cluster = 1;
  size_t smem = 0;
  bool dependent = false;
};
// "" or what went wrong.
std::string run(const Launch& launch, const std::function<void()>& thread_body);

// What happened last in the last launch, a line each.
std::string last_events(size_t lines);

struct Statistics {
  uint64_t launches = 0, switches = 0, async_steps = 0;
};
extern Statistics statistics;

// Global memory between guard pages, flush with the upper one; filled with NaN bytes.
void* alloc_global(size_t bytes, const std::string& name);
void free_global(void* p);

// Stands in for cuTensorMapEncodeTiled; throws where the driver would refuse. Innermost dimension first.
TensorMap make_tensor_map(int rank, const void* base, uint32_t elem_bytes, const std::array<int64_t, 3>& size,
                          const std::array<int64_t, 2>& stride_bytes, const std::array<int, 3>& box,
                          uint32_t swizzle_bytes);

// What sm90.cuh calls.
uint8_t* dynamic_smem();
uint32_t smem_addr(const void* p);
void debug_name(const void* p, const char* name, int i);
void mbarrier_init(uint64_t* bar, uint32_t count);
void mbarrier_arrive(uint64_t* bar);
void mbarrier_arrive_cluster(uint64_t* bar, uint32_t rank);
void store_cluster(float* p, uint32_t rank, float value);
void mbarrier_arrive_and_expect_tx(uint64_t* bar, uint32_t bytes);
void mbarrier_wait(uint64_t* bar, uint32_t parity);
void fence_barrier_init();
void fence_proxy_async();
void cp_async(void* dst, const void* src, uint32_t bytes, uint32_t valid_bytes);
void cp_async_mbarrier_arrive(uint64_t* bar);
using Corner = std::array<int, 3>;
void tma_load(int rank, void* dst, const TensorMap& map, uint64_t* bar, const Corner& corner, uint16_t multicast_mask);
void tma_store(int rank, const void* src, const TensorMap& map, const Corner& corner, bool add);
void tma_store_commit();
void tma_store_wait(int n);
void stmatrix(int count, bool transposed, void* row, const std::array<uint32_t, 4>& registers);
void grid_dependency_wait();
void grid_dependency_launch();
// Where a thread of a warpgroup holds what: element i of a wgmma accumulator; of a bf16 A in registers.
struct Place {
  int row, column;
};
inline Place accumulator_place(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}
inline Place register_a_place(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}
// Where a wgmma with that descriptor looks for an element of its operand.
uint32_t operand_address(uint64_t descriptor, bool mn_major, int mn, int k, int element_bytes);
enum Type { E4M3, BF16, F16 };
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int n, std::initializer_list<float*> read_afterwards);
void wgmma(Type t, int n, float* d, const uint32_t* a_regs, uint64_t desc_a, uint64_t desc_b, int scale_d, int ta,
           int tb);
void setmaxnreg(int n, bool increase);
void named_barrier_sync(int id, int threads);
void cluster_sync();
uint32_t cluster_rank();
bool elect_one();
uint64_t shuffle(uint32_t mask, uint64_t v, int src_lane);  // warp rendezvous; returns the value of src_lane
uint32_t ballot(uint32_t mask, bool vote);
uint32_t reduce_max(uint32_t mask, uint32_t v);
uint32_t reduce_add(uint32_t mask, uint32_t v);
void syncwarp(uint32_t mask);  // of these five the only one that orders memory
void atomic_access(void* p, size_t bytes);
[[noreturn]] void fail(const char* fmt, ...) __attribute__((format(printf, 1, 2)));
}  // namespace model

inline void __syncthreads() { model::named_barrier_sync(0, int(blockDim.x)); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { model::syncwarp(mask); }
template <class T>
T model_shfl(uint32_t mask, T v, int src) {
  static_assert(sizeof(T) <= 8);
  uint64_t u = 0;
  __builtin_memcpy(&u, &v, sizeof v);
  u = model::shuffle(mask, u, src);
  __builtin_memcpy(&v, &u, sizeof v);
  return v;
}
template <class T>
T __shfl_sync(uint32_t m, T v, int src) {
  return model_shfl(m, v, src & 31);
}
template <class T>
T __shfl_xor_sync(uint32_t m, T v, int x) {
  return model_shfl(m, v, int(threadIdx.x % 32) ^ x);
}
template <class T>
T __shfl_up_sync(uint32_t m, T v, int d) {
  const int lane = threadIdx.x % 32;
  return model_shfl(m, v, lane >= d ? lane - d : lane);
}
template <class T>
T __shfl_down_sync(uint32_t m, T v, int d) {
  const int lane = threadIdx.x % 32;
  return model_shfl(m, v, lane + d < 32 ? lane + d : lane);
}
inline uint32_t __ballot_sync(uint32_t m, int vote) { return model::ballot(m, vote != 0); }
inline int __any_sync(uint32_t m, int vote) { return model::ballot(m, vote != 0) != 0; }
inline int __all_sync(uint32_t m, int vote) { return model::ballot(m, vote == 0) == 0; }
inline uint32_t __reduce_max_sync(uint32_t m, uint32_t v) { return model::reduce_max(m, v); }
inline int __reduce_add_sync(uint32_t m, int v) { return int(model::reduce_add(m, uint32_t(v))); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stwb(T* p, T v) {
  *p = v;
}
// Out of sight of the compiler's sanitizer, which would call it a load and a store.
template <class T>
__attribute__((noinline, no_sanitize_thread)) T atomicAdd(T* p, T v) {
  model::atomic_access(p, sizeof(T));
  const T old = *p;
  *p += v;
  return old;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // built with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
