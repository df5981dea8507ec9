// Every primitive the kernels use, alone in a tiny kernel: what it does is written, byte for byte, to DIR/<name>.bin.
// Built by nvcc it runs on the GPU, built by g++ in the model; the files must be the same.
//     primitives DIR [NAME ...]    leaves out those of these names: after an error the GPU takes no more of a process
#include <cstdio>
#include <fstream>
#include <set>
#include <vector>

#include "common/fp8_block.cuh"
#include "common/launch.cuh"
#include "common/tensor_map.cuh"

using namespace deepseek_kernels;
using namespace sm90;

namespace {

constexpr int kBytes = 1 << 16;  // of each output
std::string g_folder, g_running;
std::set<std::string> g_left_out;

// Memory of the device, and what the host fills it with: what it writes before data() is asked for.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, int fill = 0) : host_(count) {
    memset(static_cast<void*>(host_.data()), fill, bytes());
#if defined(__CUDACC__)
    DSK_CUDA_CHECK(cudaMalloc(&data_, bytes()));
#else
    data_ = static_cast<T*>(model::alloc_global(bytes(), "buffer"));
#endif
  }
  T* data() {
    if (!copied_) {
#if defined(__CUDACC__)
      DSK_CUDA_CHECK(cudaMemcpy(data_, host_.data(), bytes(), cudaMemcpyHostToDevice));
#else
      memcpy(static_cast<void*>(data_), host_.data(), bytes());
#endif
    }
    copied_ = true;
    return data_;
  }
  const std::vector<T>& back() {
#if defined(__CUDACC__)
    DSK_CUDA_CHECK(cudaMemcpy(host_.data(), data_, bytes(), cudaMemcpyDeviceToHost));
#else
    memcpy(static_cast<void*>(host_.data()), data_, bytes());
#endif
    return host_;
  }
  size_t size() const { return host_.size(); }
  size_t bytes() const { return host_.size() * sizeof(T); }
  T& operator[](size_t i) { return host_[i]; }

 private:
  std::vector<T> host_;
  T* data_;
  bool copied_ = false;
};

void write_file(const std::string& name, Buffer<uint8_t>& data) {
  std::ofstream(g_folder + "/" + name + ".bin", std::ios::binary)
      .write(reinterpret_cast<const char*>(data.back().data()), std::streamsize(data.size()));
}

LaunchConfig config_of(int ctas, int threads, int cluster) {
  LaunchConfig config{};
  config.grid_x = ctas;
  config.threads = threads;
  config.cluster = cluster;
  config.smem = 96 * 1024;
  return config;
}

template <class... Params, class... Arguments>
void record(const std::string& name, void (*kernel)(uint8_t*, Params...), int ctas, int threads, int cluster,
            const Arguments&... arguments) {
  if (g_left_out.count(name)) return;
  g_running = name;
  Buffer<uint8_t> out(kBytes, 0xCC);
  launch(kernel, config_of(ctas, threads, cluster), out.data(), arguments...);
#if defined(__CUDACC__)
  DSK_CUDA_CHECK(cudaDeviceSynchronize());
#endif
  write_file(name, out);
}

struct Shared {
  alignas(1024) uint8_t a[32 * 1024];
  alignas(1024) uint8_t b[32 * 1024];
  alignas(8) uint64_t bar[2];
};

DEVICE_FN Shared& shared_with_barrier(uint8_t* raw, uint32_t count) {
  Shared& s = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar[0], count);
    mbarrier_init(&s.bar[1], count);
    fence_barrier_init();
  }
  __syncthreads();
  return s;
}

DEVICE_FN float one_nan(float x) { return x != x ? __uint_as_float(0x7FC00000u) : x; }

// Copies: box of 32 rows x kBoxBytes, at three corners of a 40-row matrix, as it lies and in logical order.
template <int kBoxBytes>
__global__ void tma_load(uint8_t* out, const __grid_constant__ TensorMap map) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  const int corners[3][2] = {{0, 0}, {16, 24}, {-16, -3}};
  for (int c = 0; c < 3; ++c) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_and_expect_tx(&s.bar[0], 32 * kBoxBytes);
      tma_load_2d(s.a, map, &s.bar[0], corners[c][0], corners[c][1]);
    }
    mbarrier_wait(&s.bar[0], c & 1);
    for (int i = threadIdx.x; i < 32 * kBoxBytes; i += blockDim.x) {
      out[(2 * c) * 32 * kBoxBytes + i] = s.a[i];
      out[(2 * c + 1) * 32 * kBoxBytes + i] = s.a[swizzled_offset(i / kBoxBytes, i % kBoxBytes, kBoxBytes)];
    }
    __syncthreads();
  }
}

__global__ void tma_load_multicast(uint8_t* out, const __grid_constant__ TensorMap map) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  cluster_sync();
  const int rank = int(cluster_rank());
  if (threadIdx.x == 0) {
    mbarrier_arrive_and_expect_tx(&s.bar[0], 2 * 32 * 128);
    tma_load_2d_multicast(s.a + rank * 32 * 128, map, &s.bar[0], 0, rank * 8, 3);
  }
  mbarrier_wait_cluster(&s.bar[0], 0);
  for (int i = threadIdx.x; i < 2 * 32 * 128; i += blockDim.x) out[rank * 2 * 32 * 128 + i] = s.a[i];
  cluster_sync();
}

template <int kBoxBytes>
__global__ void tma_store(uint8_t* out, const __grid_constant__ TensorMap map) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  for (int i = threadIdx.x; i < 32 * kBoxBytes; i += blockDim.x)
    s.a[swizzled_offset(i / kBoxBytes, i % kBoxBytes, kBoxBytes)] = uint8_t(i * 7 + i / kBoxBytes);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(s.a, map, 16, 24);
    tma_store_commit();
    tma_store_wait<0>();
    out[0] = 1;
  }
}

// Three dimensions: boxes of 8 rows of 2 matrices.
DEVICE_FN int batch_corner(int c, int dimension) {
  constexpr int corners[4][3] = {{0, 0, 0}, {0, 3, 2}, {64, -2, -1}, {-32, 7, 1}};
  return corners[c][dimension];
}

__global__ void tma_load_3d(uint8_t* out, const __grid_constant__ TensorMap map) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  for (int c = 0; c < 4; ++c) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_and_expect_tx(&s.bar[0], 2 * 8 * 128);
      sm90::tma_load_3d(s.a, map, &s.bar[0], batch_corner(c, 0), batch_corner(c, 1), batch_corner(c, 2));
    }
    mbarrier_wait(&s.bar[0], c & 1);
    for (int i = threadIdx.x; i < 2 * 8 * 128; i += blockDim.x)
      out[c * 2 * 8 * 128 + i] = s.a[swizzled_offset(i / 128, i % 128, 128)];
    __syncthreads();
  }
}

__global__ void tma_load_3d_multicast(uint8_t* out, const __grid_constant__ TensorMap map) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  cluster_sync();
  const int rank = int(cluster_rank());
  if (threadIdx.x == 0) {
    mbarrier_arrive_and_expect_tx(&s.bar[0], 2 * 2 * 8 * 128);
    sm90::tma_load_3d_multicast(s.a + rank * 2 * 8 * 128, map, &s.bar[0], 0, rank, rank, 3);
  }
  mbarrier_wait_cluster(&s.bar[0], 0);
  for (int i = threadIdx.x; i < 2 * 2 * 8 * 128; i += blockDim.x) out[rank * 2 * 2 * 8 * 128 + i] = s.a[i];
  cluster_sync();
}

// kReduce: adds what it would store.
template <bool kReduce, int kRank>
__global__ void tma_store_floats(uint8_t* out, const __grid_constant__ TensorMap map) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  for (int i = threadIdx.x; i < 2 * 8 * 32; i += blockDim.x)
    *reinterpret_cast<float*>(s.a + swizzled_offset(i / 32, i % 32 * 4, 128)) = float(i) * 0.25f;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int c = 0; c < 2; ++c) {  // those that are not negative
      const int x = batch_corner(c, 0) / 4, y = batch_corner(c, 1), z = batch_corner(c, 2);
      if constexpr (kRank == 2) {
        tma_reduce_add_2d(s.a, map, x, y);
      } else if constexpr (kReduce) {
        tma_reduce_add_3d(s.a, map, x, y, z);
      } else {
        tma_store_3d(s.a, map, x, y, z);
      }
      tma_store_commit();
    }
    tma_store_wait<0>();
    out[0] = 1;
  }
}

template <int kCount, bool kTransposed>
__global__ void stmatrix(uint8_t* out) {
  DYNAMIC_SMEM(raw);
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) raw[i] = 0;
  __syncwarp();
  uint32_t r[4];
  for (uint32_t i = 0; i < 4; ++i) r[i] = threadIdx.x * 2 + i * 256 + ((threadIdx.x * 2 + 1 + i * 256) << 16);
  uint8_t* row = raw + (31 - threadIdx.x) * 32;
  if constexpr (kCount == 4) {
    kTransposed ? stmatrix_x4_trans(row, r[0], r[1], r[2], r[3]) : stmatrix_x4(row, r[0], r[1], r[2], r[3]);
  } else {
    kTransposed ? stmatrix_x2_trans(row, r[0], r[1]) : stmatrix_x2(row, r[0], r[1]);
  }
  __syncwarp();
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) out[i] = raw[i];
}

// A chain of kernels, each of which may start while the one before still runs.
__global__ void next_in_chain(uint8_t* out, uint32_t* value) {
  grid_dependency_launch();
  grid_dependency_wait();
  if (threadIdx.x == 0) value[blockIdx.x] = value[blockIdx.x] * 3 + blockIdx.x;
  out[0] = 1;
}

__global__ void cp_async(uint8_t* out, const uint8_t* in) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 128);
  cp_async_4(s.a + threadIdx.x * 4, in + (127 - threadIdx.x) * 4, threadIdx.x % 3 != 0);
  cp_async_mbarrier_arrive(&s.bar[0]);
  mbarrier_wait(&s.bar[0], 0);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = s.a[(127 - threadIdx.x) * 4 + i];
}

// Who waits for whom.
__global__ void mbarrier_across_cluster(uint8_t* out) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 64 + 1);
  cluster_sync();
  const uint32_t rank = cluster_rank();
  if (threadIdx.x < 64) mbarrier_arrive_cluster(&s.bar[0], rank ^ 1);
  if (threadIdx.x == 0) mbarrier_arrive(&s.bar[0]);
  mbarrier_wait_cluster(&s.bar[1], 1);  // a fresh barrier: the phase before the first counts as complete
  mbarrier_wait_cluster(&s.bar[0], 0);
  out[rank * 128 + threadIdx.x] = uint8_t(rank);
  cluster_sync();
}

// Each CTA fills the other's shared memory.
__global__ void stores_across_cluster(uint8_t* out) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 128);
  cluster_sync();
  const uint32_t rank = cluster_rank();
  store_cluster(reinterpret_cast<float*>(s.a) + threadIdx.x, rank ^ 1, float(threadIdx.x * 2 + rank));
  mbarrier_arrive_cluster(&s.bar[0], rank ^ 1);
  mbarrier_wait_cluster(&s.bar[0], 0);
  reinterpret_cast<float*>(out)[rank * 128 + threadIdx.x] = reinterpret_cast<const float*>(s.a)[127 - threadIdx.x];
  cluster_sync();
}

__global__ void named_barriers(uint8_t* out) {
  DYNAMIC_SMEM(raw);
  const int half = threadIdx.x / 64, slot = threadIdx.x % 64;
  raw[threadIdx.x] = uint8_t(threadIdx.x * 3);
  named_barrier_sync(1 + half, 64);
  out[threadIdx.x] = raw[half * 64 + 63 - slot];
}

__global__ void elect(uint8_t* out) {
  const uint32_t elected = __ballot_sync(0xffffffffu, elect_one());
  out[threadIdx.x] = uint8_t(__popc(elected));
}

__global__ void reduce(uint8_t* out) {
  const uint32_t mine = (threadIdx.x * 37 + threadIdx.x / 32) % 64 * 0x03FFFFFFu;
  const uint32_t largest = __reduce_max_sync(0xffffffffu, mine);
  out[threadIdx.x] = uint8_t(largest >> 24) ^ uint8_t(__clz(int(mine)));
  out[128 + threadIdx.x] = uint8_t(__reduce_add_sync(0xffffffffu, int(threadIdx.x) - 70));
}

// 168 a thread at the start.
__global__ void __launch_bounds__(384, 1) registers(uint8_t* out) {
  if (threadIdx.x < 128) {
    reg_dec<56>();
  } else {
    reg_inc<224>();
  }
  out[threadIdx.x] = uint8_t(threadIdx.x);
}

// wgmma: operands of small integers, so that every sum is exact.
template <int R>
DEVICE_FN void write_fragment(uint8_t* out, const float (&d)[R]) {
  for (int i = 0; i < R; ++i) reinterpret_cast<float*>(out)[threadIdx.x * R + i] = d[i];
}

template <int kN>
__global__ void wgmma_fp8(uint8_t* out, const __grid_constant__ TensorMap map_a,
                          const __grid_constant__ TensorMap map_b) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_and_expect_tx(&s.bar[0], (64 + kN) * 128);
    tma_load_2d(s.a, map_a, &s.bar[0], 0, 0);
    tma_load_2d(s.b, map_b, &s.bar[0], 0, 0);
  }
  mbarrier_wait(&s.bar[0], 0);
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = 1e30f;  // not to be seen again
  wgmma_fence(d);
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_e4m3<kN>(d, desc_k_b128(s.a) + k * 2, desc_k_b128(s.b) + k * 2, k != 0);
  wgmma_commit();
  wgmma_wait<0>(d);
  write_fragment(out, d);
}

// kRegisterA: A from registers; kTransB: B stored as [k][n].
template <class T, bool kRegisterA, int kTransB>
__global__ void wgmma_16bit(uint8_t* out, const __grid_constant__ TensorMap map_a,
                            const __grid_constant__ TensorMap map_b) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_and_expect_tx(&s.bar[0], 2 * 64 * 128);
    tma_load_2d(s.a, map_a, &s.bar[0], 0, 0);
    tma_load_2d(s.b, map_b, &s.bar[0], 0, 0);
  }
  mbarrier_wait(&s.bar[0], 0);
  float d[32] = {};
  uint32_t a[4][4];
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8;
      const int column = k * 16 + threadIdx.x % 4 * 2 + i / 2 * 8;
      a[k][i] = *reinterpret_cast<const uint32_t*>(s.a + swizzled_offset(row, column * 2, 128));
    }
  wgmma_fence(d);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t desc_b = kTransB ? desc_mn_b128(s.b, 64 * 128) + k * (16 * 128 >> 4) : desc_k_b128(s.b) + k * 2;
    const uint64_t desc_a = desc_k_b128(s.a) + k * 2;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if constexpr (kRegisterA) {
        wgmma_bf16_rs<64, kTransB>(d, a[k], desc_b, 1);
      } else {
        wgmma_bf16<64, 0, kTransB>(d, desc_a, desc_b, 1);
      }
    } else {
      if constexpr (kRegisterA) {
        wgmma_f16_rs<64, kTransB>(d, a[k], desc_b, 1);
      } else {
        wgmma_f16<64, 0, kTransB>(d, desc_a, desc_b, 1);
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  write_fragment(out, d);
}

// B stored as [k][n], kTransA: A as [k][m], in blocks of 64 columns.
template <int kTransA, int kN>
__global__ void wgmma_mn_major(uint8_t* out, const __grid_constant__ TensorMap map_a,
                               const __grid_constant__ TensorMap map_b) {
  DYNAMIC_SMEM(raw);
  Shared& s = shared_with_barrier(raw, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_and_expect_tx(&s.bar[0], (64 + kN) * 128);
    tma_load_2d(s.a, map_a, &s.bar[0], 0, 0);
    for (int n = 0; n < kN; n += 64) tma_load_2d(s.b + n * 128, map_b, &s.bar[0], n, 0);
  }
  mbarrier_wait(&s.bar[0], 0);
  float d[kN / 2];
  wgmma_fence(d);
  constexpr uint64_t kStepMn = 16 * 128 >> 4;
  const uint64_t desc_a = kTransA ? desc_mn_b128(s.a, 64 * 128) : desc_k_b128(s.a);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma_bf16<kN, kTransA, 1>(d, desc_a + k * (kTransA ? kStepMn : 2), desc_mn_b128(s.b, 64 * 128) + k * kStepMn,
                               k != 0);
  wgmma_commit();
  wgmma_wait<0>(d);
  write_fragment(out, d);
}

DEVICE_FN float bf16_of(int pattern) { return __uint_as_float(uint32_t(pattern) << 16); }

__global__ void e4m3_of_every_bf16(uint8_t* out) {
  for (int i = int(threadIdx.x) * 4; i < 1 << 16; i += int(blockDim.x) * 4)
    *reinterpret_cast<uint32_t*>(out + i) = to_e4m3x4(bf16_of(i), bf16_of(i + 1), bf16_of(i + 2), bf16_of(i + 3));
}

__global__ void scales_and_quotients(uint8_t* out) {
  float* result = reinterpret_cast<float*>(out);
  for (int i = int(threadIdx.x); i < 1 << 12; i += int(blockDim.x)) {
    const float amax = fabsf(bf16_of(i * 16 + 5)), scale = fp8_scale(amax, i & 1);
    result[i * 4] = one_nan(scale);
    result[i * 4 + 1] = one_nan(Fp8Divisor(scale).divide(amax * 0.7f));
    result[i * 4 + 2] = one_nan(Fp8Divisor(scale).divide(-amax));
    result[i * 4 + 3] = one_nan(max_nan(amax, 3.f));
  }
}

TensorMap map_of(Element element, const void* p, int64_t inner, int64_t outer, int box_inner, int box_outer,
                 Swizzle swizzle) {
  return tensor_map_2d(p, {element, inner, outer, inner, box_inner, box_outer, swizzle});
}

void run_3d() {
  Buffer<uint8_t> bytes(3 * 10 * 128 + 2 * 64);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i * 37 + i / 128);
  const TensorMap map =
      tensor_map_3d(bytes.data(), {Element::kE4m3, 128, 10, 3, 128, 10 * 128 + 64, 128, 8, 2, Swizzle::k128});
  record("tma_load_3d", ::tma_load_3d, 1, 128, 1, map);
  record("tma_load_3d_multicast", ::tma_load_3d_multicast, 2, 128, 2, map);
}

void run_reductions() {
  auto filled = [](int fill) { return Buffer<uint8_t>(3 * 10 * 32 * 4, fill); };
  auto map = [](Buffer<uint8_t>& x) {
    return tensor_map_3d(x.data(), {Element::kFp32, 32, 10, 3, 32, 10 * 32, 32, 8, 2, Swizzle::k128});
  };
  auto map_rows = [](Buffer<uint8_t>& x) { return map_of(Element::kFp32, x.data(), 32, 30, 32, 16, Swizzle::k128); };
  Buffer<uint8_t> stored = filled(0), added = filled(0), rows = filled(0);
  record("tma_store_3d", tma_store_floats<false, 3>, 1, 128, 1, map(stored));
  record("tma_reduce_add_3d", tma_store_floats<true, 3>, 1, 128, 1, map(added));
  record("tma_reduce_add_2d", tma_store_floats<true, 2>, 2, 128, 1, map_rows(rows));
  write_file("tma_stored_3d", stored);
  write_file("tma_reduced_3d", added);
  write_file("tma_reduced_2d", rows);
}

void run_stmatrix() {
  record("stmatrix_x2", ::stmatrix<2, false>, 1, 32, 1);
  record("stmatrix_x2_trans", ::stmatrix<2, true>, 1, 32, 1);
  record("stmatrix_x4", ::stmatrix<4, false>, 1, 32, 1);
  record("stmatrix_x4_trans", ::stmatrix<4, true>, 1, 32, 1);
}

void run_dependent_launch() {
  if (g_left_out.count("dependent_launches")) return;
  g_running = "dependent_launches";
  Buffer<uint8_t> values(64 * 4, 1), out(1);
  LaunchConfig config = config_of(64, 32, 1);
  for (int i = 0; i < 20; ++i) {
    config.dependent = i > 0;
    launch(next_in_chain, config, out.data(), reinterpret_cast<uint32_t*>(values.data()));
  }
#if defined(__CUDACC__)
  DSK_CUDA_CHECK(cudaDeviceSynchronize());
#endif
  write_file("dependent_launches", values);
}

void run_all() {
  Buffer<uint8_t> bytes(40 * 128);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i * 37 + i / 128);
  auto bytes_map = [&](int box, Swizzle s) { return map_of(Element::kE4m3, bytes.data(), 128, 40, box, 32, s); };
  record("tma_load_128", tma_load<128>, 1, 128, 1, bytes_map(128, Swizzle::k128));
  record("tma_load_64", tma_load<64>, 1, 128, 1, bytes_map(64, Swizzle::k64));
  record("tma_load_32", tma_load<32>, 1, 128, 1, bytes_map(32, Swizzle::k32));
  record("tma_load_plain", tma_load<16>, 1, 128, 1, bytes_map(16, Swizzle::kNone));
  record("tma_load_multicast", tma_load_multicast, 2, 128, 2, bytes_map(128, Swizzle::k128));
  record("cp_async", cp_async, 1, 128, 1, static_cast<const uint8_t*>(bytes.data()));
  Buffer<uint8_t> stored(40 * 128, 0x11);
  record("tma_store_128", tma_store<128>, 1, 128, 1,
         map_of(Element::kE4m3, stored.data(), 128, 40, 128, 32, Swizzle::k128));
  record("tma_store_32", tma_store<32>, 1, 128, 1, map_of(Element::kBf16, stored.data(), 64, 40, 16, 32, Swizzle::k32));
  write_file("tma_stored", stored);
  run_3d();
  run_reductions();
  run_stmatrix();
  run_dependent_launch();

  record("mbarrier_across_cluster", mbarrier_across_cluster, 2, 128, 2);
  record("stores_across_cluster", stores_across_cluster, 2, 128, 2);
  record("named_barriers", named_barriers, 1, 128, 1);
  record("elect", elect, 1, 128, 1);
  record("reduce", reduce, 1, 128, 1);
  record("registers", registers, 1, 384, 1);

  Buffer<uint8_t> a(128 * 128), b(128 * 128);
  const float values[] = {0, 1, -1, 2, -2, 0.5f, 3, -4};
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = __nv_fp8_e4m3(values[(i * 5 + i / 128) % 8]).__x;
    b[i] = __nv_fp8_e4m3(values[(i * 3 + i / 64 + i / 7) % 8]).__x;
  }
  auto fp8_map = [](Buffer<uint8_t>& x, int rows) {
    return map_of(Element::kE4m3, x.data(), 128, 128, 128, rows, Swizzle::k128);
  };
  record("wgmma_e4m3_16", wgmma_fp8<16>, 1, 128, 1, fp8_map(a, 64), fp8_map(b, 16));
  record("wgmma_e4m3_32", wgmma_fp8<32>, 1, 128, 1, fp8_map(a, 64), fp8_map(b, 32));
  record("wgmma_e4m3_64", wgmma_fp8<64>, 1, 128, 1, fp8_map(a, 64), fp8_map(b, 64));
  record("wgmma_e4m3_128", wgmma_fp8<128>, 1, 128, 1, fp8_map(a, 64), fp8_map(b, 128));

  Buffer<__nv_bfloat16> c(64 * 64), d(64 * 64);
  Buffer<__half> e(64 * 64), f(64 * 64);
  for (size_t i = 0; i < c.size(); ++i) {
    const float left = values[(i * 5 + i / 64) % 8], right = values[(i * 3 + i / 32 + i / 7) % 8];
    c[i] = __float2bfloat16_rn(left), d[i] = __float2bfloat16_rn(right);
    e[i] = __float2half_rn(left), f[i] = __float2half_rn(right);
  }
  auto map_16bit = [](const void* p) { return map_of(Element::kBf16, p, 64, 64, 64, 64, Swizzle::k128); };
  const TensorMap map_c = map_16bit(c.data()), map_d = map_16bit(d.data());
  record("wgmma_bf16", wgmma_16bit<__nv_bfloat16, false, 0>, 1, 128, 1, map_c, map_d);
  record("wgmma_bf16_b_mn_major", wgmma_16bit<__nv_bfloat16, false, 1>, 1, 128, 1, map_c, map_d);
  record("wgmma_bf16_a_in_registers", wgmma_16bit<__nv_bfloat16, true, 0>, 1, 128, 1, map_c, map_d);
  Buffer<__nv_bfloat16> wide(64 * 256);
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = __float2bfloat16_rn(values[(i * 3 + i / 32 + i / 7) % 8]);
  const TensorMap map_wide = map_of(Element::kBf16, wide.data(), 256, 64, 64, 64, Swizzle::k128);
  record("wgmma_bf16_b_mn_major_256", wgmma_mn_major<0, 256>, 1, 128, 1, map_c, map_wide);
  record("wgmma_bf16_mn_major_128", wgmma_mn_major<1, 128>, 1, 128, 1, map_c, map_wide);
  record("wgmma_bf16_mn_major_256", wgmma_mn_major<1, 256>, 1, 128, 1, map_c, map_wide);
  const TensorMap map_e = map_16bit(e.data()), map_f = map_16bit(f.data());
  record("wgmma_f16", wgmma_16bit<__half, false, 0>, 1, 128, 1, map_e, map_f);
  record("wgmma_f16_b_mn_major", wgmma_16bit<__half, false, 1>, 1, 128, 1, map_e, map_f);
  record("wgmma_f16_a_in_registers", wgmma_16bit<__half, true, 0>, 1, 128, 1, map_e, map_f);

  record("e4m3_of_every_bf16", e4m3_of_every_bf16, 1, 128, 1);
  record("scales_and_quotients", scales_and_quotients, 1, 128, 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return fprintf(stderr, "usage: primitives DIR [NAME ...]\n"), 2;
  g_folder = argv[1];
  g_left_out.insert(argv + 2, argv + argc);
  try {
    run_all();
  } catch (const std::exception& error) {
    return fprintf(stderr, "%s: %s\n", g_running.c_str(), error.what()), 1;
  }
  return 0;
}
