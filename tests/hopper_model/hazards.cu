// Small kernels with one mistake each to switch on, for what no kernel of the library shows: the model must see it.
// All of them write floats that test_hopper_model.py knows.
#include "hazards.h"

#include "common/launch.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.cuh"

namespace hazards {
using namespace deepseek_kernels;
using namespace sm90;

namespace {

constexpr int kRows = 16, kWidth = 32, kThreads = 128;  // a box: 16 rows of 128 bytes

struct Smem {
  alignas(1024) float box[kRows * kWidth];
  alignas(1024) float other[kRows * kWidth];
  alignas(8) uint64_t full;
  int ticket;
  float exchange[kThreads];
};

DEVICE_FN float* in_box(float* box, int i) {
  return reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(box) + swizzled_offset(i / kWidth, i % kWidth * 4, 128));
}

// CTAs take tiles by tickets and add each tile's number to the matrix tile % 2, at row tile % 8.
__global__ void tiles(const __grid_constant__ TensorMap map, float* out, int* tickets, int count) {
  DYNAMIC_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  for (;;) {
    if (threadIdx.x == 0) {
      if (BUG(ticket_not_atomic)) {
        const int ticket = *tickets;
        fence_proxy_async();  // anything that takes time
        *tickets = ticket + 1;
        s.ticket = ticket;
      } else {
        s.ticket = atomicAdd(tickets, 1);
      }
    }
    if (!BUG(ticket_not_waited_for)) __syncthreads();
    const int tile = s.ticket;
    __syncthreads();
    if (tile >= count) break;
    for (int i = threadIdx.x; i < kRows * kWidth; i += kThreads) *in_box(s.box, i) = float(tile + 1);
    if (!BUG(fence_by_issuer_only) && !BUG(fence_after_barrier)) fence_proxy_async();
    __syncthreads();
    if (BUG(fence_after_barrier) || (BUG(fence_by_issuer_only) && threadIdx.x == 0)) fence_proxy_async();
    if (BUG(added_by_hand)) {
      for (int i = threadIdx.x; i < kRows * kWidth; i += kThreads) {
        float* p = out + (tile % 2 * 32 + tile % 8) * kWidth + i;
        const float sum = *p + *in_box(s.box, i);
        __syncwarp();  // anything that takes time
        *p = sum;
      }
    } else if (threadIdx.x == 0) {
      tma_reduce_add_3d(s.box, map, 0, BUG(row_before_the_first) ? tile % 8 - 1 : tile % 8,
                        BUG(matrix_of_next_tile) ? (tile + 1) % 2 : tile % 2);
      tma_store_commit();
      if (!BUG(reduction_not_waited_for)) tma_store_wait<0>();
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) tma_store_wait<0>();
}

// Warp 1 uses what TMA brings to warp 0's order, twice.
__global__ void loads(const __grid_constant__ TensorMap map, float* out) {
  DYNAMIC_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(&s.full, 1);
    debug_name(&s.full, "full", 0), debug_name(s.box, "box", 0);
    fence_barrier_init();
  }
  if (BUG(zeroed_before_load)) s.box[threadIdx.x] = 0.f;
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_and_expect_tx(&s.full, kRows * kWidth * 4);
      if (BUG(map_of_other_rank)) {
        tma_load_2d(s.box, map, &s.full, 0, round);
      } else {
        tma_load_3d(s.box, map, &s.full, 0, round, 0);
      }
    }
    if (warp == 1) {
      if (!BUG(load_not_waited_for)) mbarrier_wait(&s.full, round);
      float sum = 0.f;
      for (int row = 0; row < kRows; ++row) sum += *in_box(s.box, row * kWidth + lane);
      out[round * 32 + lane] = sum;
    }
    if (!BUG(loaded_over_readers)) __syncthreads();
  }
  if (BUG(loaded_over_readers)) __syncthreads();
}

// Lanes hand values to their neighbours: through shared memory, by warps and by CTAs.
__global__ void exchange(float* out) {
  DYNAMIC_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  s.exchange[threadIdx.x] = float(threadIdx.x);
  if (BUG(too_few_registers_asked_for)) reg_inc<160>();
  if (BUG(shuffle_for_syncwarp)) {
    __shfl_sync(0xffffffffu, 0, 0);
  } else {
    __syncwarp();
  }
  float value = s.exchange[threadIdx.x ^ 1];
  if (!BUG(exchange_overwritten)) __syncthreads();
  s.exchange[kThreads - 1 - threadIdx.x] = value;
  __syncthreads();
  out[threadIdx.x] = s.exchange[threadIdx.x + (BUG(past_the_end) ? kThreads : 0)];
}

// bf16 pairs by stmatrix into a swizzled box of 16 rows x 128 bytes, and out by TMA.
__global__ void fragments(const __grid_constant__ TensorMap map) {
  DYNAMIC_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t r[4];  // of matrices: rows 0-7 and 8-15 of columns 16 * warp + 0-7, then of the 8 columns after
  for (int i = 0; i < 4; ++i) {
    const int row = i % 2 * 8 + lane / 4, column = warp * 16 + i / 2 * 8 + lane % 4 * 2;
    const __nv_bfloat162 pair = __floats2bfloat162_rn(float(row * 4), float(row * 4 + column));
    r[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  const int row = BUG(rows_of_lanes_swapped) ? lane / 2 : lane % 16, byte = warp * 32 + lane / 16 * 16;
  stmatrix_x4(raw + (BUG(stmatrix_not_swizzled) ? row * 128 + byte : swizzled_offset(row, byte, 128)), r[0], r[1], r[2],
              r[3]);
  if (!BUG(stmatrix_not_fenced)) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(s.box, map, 0, 0);
    tma_store_commit();
    tma_store_wait<0>();
  }
}

// 64 x 128 ones times 8 x 128 fours, in e4m3 that plain stores wrote.
__global__ void product(float* out) {
  DYNAMIC_SMEM(raw);
  uint8_t *a = raw, *b = raw + 8192;
  memset(a + threadIdx.x * 64, 0x38, 64);
  memset(b + threadIdx.x * 8, 0x48, 8);
  if (!BUG(operands_not_fenced)) fence_proxy_async();
  if (!BUG(operands_not_waited_for)) __syncthreads();
  float d[4] = {};
  wgmma_fence(d);
  for (int k = 0; k < 4; ++k) wgmma_e4m3<8>(d, desc_k_b128(a) + k * 2, desc_k_b128(b) + k * 2, k != 0);
  if (!BUG(products_not_committed)) wgmma_commit();
  if (BUG(operand_overwritten)) a[threadIdx.x] = 0;
  wgmma_wait<0>(d);
  out[threadIdx.x] = d[threadIdx.x % 4];
}

// Each thread takes a float of its right neighbour, through cp.async.
__global__ void copies(float* out, const float* in) {
  DYNAMIC_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  if (threadIdx.x == 0) mbarrier_init(&s.full, kThreads);
  __syncthreads();
  cp_async_4(&s.exchange[threadIdx.x], in + threadIdx.x, true);
  if (!BUG(copies_not_arrived_for)) cp_async_mbarrier_arrive(&s.full);
  if (!BUG(copies_not_waited_for) && !BUG(copies_not_arrived_for)) mbarrier_wait(&s.full, 0);
  if (!BUG(copies_not_arrived_for)) out[threadIdx.x] = s.exchange[(threadIdx.x + 1) % kThreads];
}

// The second kernel of a chain.
__global__ void dependent(float* values) {
  grid_dependency_launch();
  float value = BUG(read_before_dependency) ? values[threadIdx.x] : 0.f;
  if (!BUG(dependency_not_waited_for)) grid_dependency_wait();
  if (!BUG(read_before_dependency) && !BUG(dependency_not_waited_for)) value = values[threadIdx.x];
  if (!BUG(dependency_not_waited_for)) values[threadIdx.x] = value + 1.f;
}

// CTA 0 waits for a plain store of CTA 1.
__global__ void waits_for_other_cta(volatile float* out) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 1) out[1] = 1.f;
  while (blockIdx.x == 0 && out[1] != 1.f) {
  }
  out[blockIdx.x * 2] = 2.f;
}

LaunchConfig config_of(int ctas) {
  LaunchConfig config{};
  config.grid_x = ctas;
  config.threads = kThreads;
  config.smem = sizeof(Smem);
  return config;
}

}  // namespace

void run(const std::string& name, float* out, int* tickets) {
  const TensorMap map =
      tensor_map_3d(out, {Element::kFp32, kWidth, 24, 2, kWidth, 32 * kWidth, kWidth, kRows, 1, Swizzle::k128});
  if (name == "tiles") launch(tiles, config_of(3), map, out, tickets, 12);
  if (name == "loads") launch(loads, config_of(1), map, out + 32 * kWidth);
  if (name == "exchange") launch(exchange, config_of(1), out);
  if (name == "fragments")
    launch(fragments, config_of(1), tensor_map_2d(out, {Element::kBf16, 64, 16, 64, 64, 16, Swizzle::k128}));
  if (name == "product") {
    LaunchConfig config = config_of(1);
    config.smem = 8192 + 1024;
    launch(product, config, out);
  }
  if (name == "copies") launch(copies, config_of(1), out, static_cast<const float*>(out + 32 * kWidth));
  if (name == "dependent") {
    LaunchConfig config = config_of(1);
    config.dependent = true;
    launch(dependent, config, out);
  }
  if (name == "waits_for_other_cta") launch(waits_for_other_cta, config_of(2), out);
}

}  // namespace hazards
