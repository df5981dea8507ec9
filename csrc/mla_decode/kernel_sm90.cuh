// s_rj = scale q_r . row_j      lse_r = log sum_j exp(s_rj)      out_r = sum_j exp(s_rj - lse_r) row_j[:512]
//
// for the s_q * h_q query rows r of a sequence, and the rows j of its cache that r may see.
//
// Tiling:   64 query rows a CTA; the sums, 64 x 512 in fp32, are half of the registers of a multiprocessor, so there is
//           one such tile on it, whose columns two math warpgroups share. Tokens come in pairs of blocks of 64, 0 and
//           1; both buffers of shared memory have rows of 576 as nine panels 64 wide. A block is loaded once: its rows
//           are keys, and the same bytes seen MN-major are values. 72 KB of queries, twice 72 KB of cache, 8 KB of
//           weights.
// Schedule: the pairs of all sequences, one after the other, are cut into equal parts, on the device, which alone knows
//           the lengths. A part has a CTA for each tile of query rows; those run side by side and have the cache in
//           common in L2, or two of them in a cluster, where each fetches half of the rows of a block for both. What a
//           part has of a sequence is a piece. A piece that is a whole sequence is stored as the result, any other as a
//           partial one, of which a part has at most two; kernel_merge.cuh adds those up.
// Pipeline: warpgroup g has the scores of block g, and half g (0: left, 1: right) of the columns of all sums. A pair:
//
//             warpgroup 0                                      warpgroup 1
//             S0 = Q K0^T                                      S1 = Q K1^T
//             maximum a, scale0, P0 = exp2(S0 - a)  ready[0]->
//             O_l = scale0 O_l + P0 V0_l                       O_r = scale0 O_r + P0 V0_r
//                                                 <-ready[1]   maximum b of a and of S1, scale1, P1 = exp2(S1 - b)
//             O_l = scale1 O_l + P1 V1_l                       O_r = scale1 O_r + P1 V1_r
//
//           One's softmax runs under products of the other one: that of S0 under S1, that of S1 under those with V0.
//           The next K0 is loaded under the products with V1, the next K1 under the next S0. Each warpgroup takes its
//           own weights from registers, the other's from shared memory: P0 lies where K0's last panel was (the rotary
//           part, which is no value), P1 in a place of its own.
//             who                    waits for        does                                signals
//             loading warp (g, half) empty[g][half]   loads panels 0-3 or 4-8 of block g  full[g][panel] (bytes)
//             loading warp (0, 0)    q_empty          loads the queries of a piece        q_full (bytes)
//             math warpgroup g       full[g][0..8]    S_g                                 q_empty after the last pair
//             math warpgroup g       ready[1 - g]     sums from half g of both blocks     empty[0..1][g]
//           In a cluster full counts the bytes that both CTAs load, and empty is signalled to both.
//           A page that does not exist is loaded from outside the tensor, which gives zeros, and its scores are masked;
//           so is a second block that the last pair of a sequence does not have. Rows of a page past the sequence's
//           end may hold anything and are zeroed before they are values: 0 times NaN is NaN.
// Bytes:    b*s_q*h_q*(2*512+64)*2 + sum(seqlens_kv)*1152, and 4 KB and a little for a row of a partial result.
//           b=128 s_q=1 h_q=128 s_kv=4096: 0.64 GB, 133 us at 4.8 TB/s, against 146 GFLOP, 147 us at 989 TFLOP/s.
#pragma once
#include "kernel_merge.cuh"

namespace deepseek_kernels::mla_decode {
using namespace sm90;

constexpr int kRows = 64;    // of queries a CTA
constexpr int kTokens = 64;  // of a block
constexpr int kPair = 2 * kTokens;
constexpr int kLatent = 512, kWidth = 576;
constexpr int kPanels = kWidth / 64, kHalfPanels = kLatent / 2 / 64, kRope = kPanels - 1;
constexpr int kPanelBytes = 64 * 128;  // 64 rows of 128 bytes, swizzled
constexpr int kGroupThreads = 128;
constexpr int kMathThreads = 2 * kGroupThreads;
constexpr int kThreads = 3 * kGroupThreads;
constexpr float kLowest = -1e30f;  // a maximum of nothing; finite, so that differences are numbers

// Where this part's share of the work begins and ends. Sequence i takes up pairs (at least one) and `overhead` units.
struct Schedule {
  int64_t total, begin, end;  // in units
  int64_t before;             // units of the sequences before the first one
  int sequence;               // the first one
  int parts;                  // that have work
  int overhead;               // units that a sequence costs beside its pairs
};

struct Smem {
  alignas(1024) uint8_t q[kPanels][kPanelBytes];
  alignas(1024) uint8_t kv[2][kPanels][kPanelBytes];
  alignas(1024) uint8_t weights[kPanelBytes];  // of block 1; those of block 0 are in kv[0][kRope]
  float2 scales[2][kRows];  // by each warpgroup: the maximum, and what older sums are to be scaled by
  float mass[2][kRows];
  alignas(8) uint64_t full[2][kPanels];
  uint64_t empty[2][2];
  uint64_t q_full, q_empty;
  uint64_t ready[2];
  int present[2];  // of each block: bit i, whether its tokens [i << box_log2, (i + 1) << box_log2) have a page
  Schedule schedule;
};
static_assert(sizeof(Smem) <= 232448);

DEVICE_FN int length_of(const MlaDecodeParams& p, int sequence) {
  const int length = __ldg(p.seqlens_kv + sequence);
  if (BUG(length_not_clamped)) return length;
  return length < 0 ? 0 : length < p.capacity ? length : p.capacity;
}
DEVICE_FN int units_of(const MlaDecodeParams& p, int sequence) {
  const int pairs = ceil_div(length_of(p, sequence), kPair);
  return pairs > 0 ? pairs : 1;
}

// By one whole warp. Every lane adds up a run of neighbouring sequences.
DEVICE_FN void find_part(Schedule& s, const MlaDecodeParams& p, int part) {
  const int lane = threadIdx.x % 32, each = ceil_div(p.b, 32);
  const int first = lane * each < p.b ? lane * each : p.b, last = first + each < p.b ? first + each : p.b;
  int64_t units = 0;
  for (int i = first; i < last; ++i) units += units_of(p, i);
  int64_t through = units;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, through, distance);
    if (lane >= distance) through += other;
  }
  int64_t total = __shfl_sync(0xffffffffu, through, 31);
  // Where a part has several pairs, what a piece costs beside them is counted too.
  const int overhead = total > 4 * int64_t(p.parts) ? 1 : 0;
  total += overhead * p.b;
  const int parts = total < p.parts ? int(total) : p.parts;
  const int64_t begin = part < parts ? total * part / parts : total;
  const int64_t end = part < parts ? total * (part + 1) / parts : total;
  if (lane == 0) s.total = total, s.begin = begin, s.end = end, s.parts = parts, s.overhead = overhead;
  int64_t before = through - units + overhead * first;
  if (begin < before || begin >= through + overhead * last) return;
  for (int i = first; i < last; ++i) {
    const int64_t after = before + units_of(p, i) + overhead;
    if (begin < after) {
      s.sequence = i, s.before = before;
      return;
    }
    before = after;
  }
}

// The pieces of a part: pairs [first, last) of `pairs` of a sequence.
class Work {
 public:
  DEVICE_FN Work(const Schedule& s, const MlaDecodeParams& p)
      : p_(p), begin_(s.begin), end_(s.end), overhead_(s.overhead) {
    done_ = begin_ >= end_;
    if (done_) return;
    sequence = s.sequence, before_ = s.before;
    find();
  }
  DEVICE_FN bool done() const { return done_; }
  DEVICE_FN void next() {
    step();
    find();
  }
  DEVICE_FN bool begins() const { return first == 0; }
  DEVICE_FN bool ends() const { return last == pairs; }
  // How many parts after this one have pairs of the sequence.
  DEVICE_FN int parts_after(const Schedule& s, int part) const {
    return int(ceil_div((before_ + overhead_ + pairs) * s.parts, s.total)) - 1 - part;
  }

  int sequence, length, pairs, first, last;

 private:
  DEVICE_FN void step() {
    before_ += overhead_ + (pairs > 0 ? pairs : 1);
    ++sequence;
  }
  DEVICE_FN int cut(int64_t units) const {
    const int64_t pair = units - before_ - overhead_;
    return int(pair < 0 ? 0 : pair < pairs ? pair : pairs);
  }
  DEVICE_FN void find() {
    for (; sequence < p_.b && before_ < end_; step()) {
      length = length_of(p_, sequence);
      pairs = ceil_div(length, kPair);
      first = cut(begin_), last = cut(end_);
      if (pairs > 0 ? first < last : begin_ <= before_) return;
    }
    done_ = true;
  }
  const MlaDecodeParams& p_;
  int64_t begin_, end_, before_ = 0;
  int overhead_;
  bool done_;
};

// ---- loading ----

struct Maps {
  TensorMap q;   // [b, rows, 576]
  TensorMap kv;  // [num_pages, page_size, 576]
};

DEVICE_FN void load_queries(Smem& s, const Maps& maps, int sequence, int row0) {
  mbarrier_arrive_and_expect_tx(&s.q_full, kPanels * kPanelBytes);
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel)
    tma_load_3d(s.q[panel], maps.q, &s.q_full, panel * 64, BUG(queries_of_first_tile) ? 0 : row0,
                BUG(queries_of_first_sequence) ? 0 : sequence);
}

// By a whole warp, for one half of the panels of block `buffer` of every pair. Lane i fetches box i of a block, if it
// is one of this CTA's.
template <int kCluster>
DEVICE_FN void load(Smem& s, const Maps& maps, const MlaDecodeParams& p, int buffer, int side, int row0) {
  const int lane = threadIdx.x % 32, box = 1 << p.box_log2, boxes = kTokens >> p.box_log2;
  const int first_panel = side == 0 ? 0 : kHalfPanels, last_panel = side == 0 ? kHalfPanels : kPanels;
  const bool fetches = lane < boxes && (kCluster == 1 || lane / (boxes / kCluster) == int(cluster_rank()));
  uint32_t phase = 0, q_phase = 0;
  for (Work work(s.schedule, p); !work.done(); work.next()) {
    if (work.first == work.last) continue;
    if (buffer == 0 && side == 0) {
      if (!BUG(queries_overwritten)) mbarrier_wait(&s.q_empty, q_phase ^ 1);
      if (lane == 0) load_queries(s, maps, work.sequence, row0);
      q_phase ^= 1;
    }
    const int32_t* table = p.block_table + int64_t(work.sequence) * p.max_pages;
    // Of this lane's box; -1 where there is none. A block table has entries to look at only up to the length.
    auto page_of = [&](int pair) {
      const int token = pair * kPair + buffer * kTokens + lane * box;
      if (pair >= work.last || lane >= boxes || (token >= work.length && !BUG(table_read_past_the_length))) return -1;
      const int page = __ldg(table + token / p.page_size);
      return uint32_t(page) < uint32_t(p.num_pages) || BUG(pages_not_checked) ? page : -1;
    };
    int page = page_of(work.first);
#pragma unroll 1
    for (int pair = work.first; pair < work.last; ++pair) {
      const int present = int(__ballot_sync(0xffffffffu, page >= 0)), here = page;
      const int row = (pair * kPair + buffer * kTokens + lane * box) % p.page_size;
      page = page_of(pair + 1);  // on its way while the buffer is awaited
      if (!BUG(loaded_over_readers)) mbarrier_wait(&s.empty[buffer][side], phase ^ 1);
      if (lane == 0) {
        if (side == buffer) s.present[buffer] = present;
        for (int panel = first_panel; panel < last_panel; ++panel)
          mbarrier_arrive_and_expect_tx(&s.full[buffer][panel], kPanelBytes);
      }
      __syncwarp();
      if (fetches)
        for (int panel = first_panel; panel < last_panel; ++panel) {
          uint8_t* const rows = s.kv[buffer][panel] + lane * box * 128;
          uint64_t* const full = &s.full[buffer][panel];
          if constexpr (kCluster == 1) {
            tma_load_3d(rows, maps.kv, full, panel * 64, row, here);
          } else {
            const uint16_t everyone = (1 << kCluster) - 1;
            tma_load_3d_multicast(rows, maps.kv, full, panel * 64, row, here,
                                  BUG(multicast_to_self_only) ? uint16_t(1 << cluster_rank()) : everyone);
          }
        }
      phase ^= 1;
    }
  }
}

// ---- products ----

template <class T, int N, int kTransB>
DEVICE_FN void wgmma_16(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, int scale_d) {
  if constexpr (std::is_same_v<T, __half>) {
    wgmma_f16<N, 0, kTransB>(d, desc_a, desc_b, scale_d);
  } else {
    wgmma_bf16<N, 0, kTransB>(d, desc_a, desc_b, scale_d);
  }
}
template <class T, int N, int kTransB>
DEVICE_FN void wgmma_16_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, int scale_d) {
  if constexpr (std::is_same_v<T, __half>) {
    wgmma_f16_rs<N, kTransB>(d, a, desc_b, scale_d);
  } else {
    wgmma_bf16_rs<N, kTransB>(d, a, desc_b, scale_d);
  }
}

// This thread's first row of the tile; it has that one and the eighth after it.
DEVICE_FN int tile_row() { return int(threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4); }

// score = q k^T of block kGroup, as its panels arrive.
template <class T, int kGroup>
DEVICE_FN void start_scores(Smem& s, uint32_t phase, float (&score)[kTokens / 2]) {
  const uint64_t q = desc_k_b128(s.q), k = desc_k_b128(s.kv[kGroup]);
  wgmma_fence(score);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int offset = panel * (kPanelBytes >> 4);
    if (!BUG(keys_not_awaited)) mbarrier_wait(&s.full[kGroup][panel], phase);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma_16<T, kTokens, 0>(score, q + offset + step * 2, k + offset + step * 2, panel + step != 0);
  }
  wgmma_commit();
}

using Weights = uint32_t[kTokens / 16][4];  // as wgmma takes A from registers: 16 tokens each

// The values of half kGroup of a block.
template <int kGroup>
DEVICE_FN uint64_t values(Smem& s, int buffer) {
  return desc_mn_b128(s.kv[buffer][kGroup * kHalfPanels], BUG(values_stride_halved) ? kPanelBytes / 2 : kPanelBytes);
}
constexpr int kValueStep = 16 * 128 >> 4;  // 16 tokens further

template <class T, int kGroup>
DEVICE_FN void start_own(Smem& s, Weights& weight, float (&out)[kLatent / 4]) {
  const uint64_t v = values<kGroup>(s, kGroup);
  pin(weight);
  wgmma_fence(out);
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step)
    wgmma_16_rs<T, kLatent / 2, 1>(out, weight[step], v + step * kValueStep, 1);
  wgmma_commit();
}
template <class T, int kGroup>
DEVICE_FN void start_other(Smem& s, const uint8_t* weights, float (&out)[kLatent / 4]) {
  const uint64_t w = desc_k_b128(weights), v = values<kGroup>(s, 1 - kGroup);
  wgmma_fence(out);
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step)
    wgmma_16<T, kLatent / 2, 1>(out, w + step * 2, v + step * kValueStep, 1);
  wgmma_commit();
}

template <class T>
DEVICE_FN void pack(const float (&score)[kTokens / 2], Weights& weight) {
#pragma unroll
  for (int i = 0; i < kTokens / 2; i += 2) weight[i / 8][i / 2 % 4] = to_word<T>(&score[i]);
}
// To 64 swizzled rows of 64 tokens, for the other warpgroup's product.
DEVICE_FN void stage(uint8_t* weights, const Weights& weight) {
  const int lane = threadIdx.x % 32;
  const int row = int(threadIdx.x % kGroupThreads / 32) * 16 + lane % 16, byte = lane / 16 * 16;
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step)
    stmatrix_x4(weights + (BUG(weights_not_swizzled) ? row * 128 + byte + step * 32
                                                     : swizzled_offset(row, byte + step * 32, 128)),
                weight[step][0], weight[step][1], weight[step][2], weight[step][3]);
  if (!BUG(fence_proxy_async_missing)) fence_proxy_async();
}

// Zeros into rows [from, 64) of half kGroup of a block, by all of a warpgroup, whose products with it begin after this.
template <int kGroup>
DEVICE_FN void zero_rows(Smem& s, int buffer, int from) {
  const int thread = threadIdx.x % kGroupThreads;
  uint8_t* const panel = s.kv[buffer][kGroup * kHalfPanels + thread / 32];
  if (!BUG(values_past_the_end_kept))
    for (int row = from + thread % 32 / 8; row < kTokens; row += 4)
      *reinterpret_cast<uint4*>(panel + row * 128 + thread % 8 * 16) = make_uint4(0, 0, 0, 0);
  fence_proxy_async();
  if (!BUG(zeros_not_awaited)) named_barrier_sync(2 + kGroup, kGroupThreads);
}

// By a warp that has done all that the barrier stands for.
DEVICE_FN void arrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

// By a warp whose products of that half of a block have been waited for. Every CTA that fills it is told.
template <int kCluster>
DEVICE_FN void release(uint64_t* empty) {
  if constexpr (kCluster == 1) {
    arrive(empty);
  } else {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (lane < kCluster && (!BUG(released_to_self_only) || lane == int(cluster_rank())))
      mbarrier_arrive_cluster_after_reads(empty, lane);
  }
}

// ---- softmax ----

// Among the four threads that share a row.
DEVICE_FN float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE_FN float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

DEVICE_FN void multiply_rows(float (&out)[kLatent / 4], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < kLatent / 4; ++i) out[i] *= by[i / 2 % 2];
}
// Whether a warp has to: after the first blocks a new maximum is rare.
DEVICE_FN bool any_to_rescale(const float (&by)[2]) { return __any_sync(0xffffffffu, by[0] != 1.f || by[1] != 1.f); }
DEVICE_FN void rescale(float (&out)[kLatent / 4], const float (&by)[2]) {
  if (any_to_rescale(by)) multiply_rows(out, by);
}

// How many of a sequence's last tokens rows do not see.
struct Ends {
  int behind[2];    // this thread's rows
  int most_behind;  // any row of the tile
};
DEVICE_FN Ends find_ends(const MlaDecodeParams& p, int row0) {
  Ends e;
  auto behind = [&](int row) {
    row = row < p.rows ? row : p.rows - 1;
    return p.causal ? p.s_q - 1 - row / p.h_q : 0;
  };
  e.behind[0] = behind(row0 + tile_row()), e.behind[1] = behind(row0 + tile_row() + 8);
  e.most_behind = BUG(mask_of_last_row) ? 0 : behind(row0);
  return e;
}

// Scores of one block from `token0`, in base 2, -inf where they are not seen, and raises top[] to the largest.
DEVICE_FN void scale_scores(float (&score)[kTokens / 2], float (&top)[2], const MlaDecodeParams& p, const Ends& ends,
                            int length, int token0, int present) {
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) score[i] *= p.scale_log2;
  const bool all_there = present == (1 << (kTokens >> p.box_log2)) - 1 || BUG(absent_pages_seen);
  if (token0 + kTokens > length - ends.most_behind || !all_there) {
    const int column = int(threadIdx.x) % 4 * 2;
    const int end[2] = {length - ends.behind[0] - token0, length - ends.behind[1] - token0};
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + column + i % 2;
      const bool there = present >> (token >> p.box_log2) & 1;
      if (token >= end[i / 2 % 2] || !(there || BUG(absent_pages_seen))) score[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = top[row];
#pragma unroll
    for (int i = 2 * row; i < kTokens / 2; i += 4) largest = fmaxf(largest, fmaxf(score[i], score[i + 1]));
    top[row] = row_max(largest);
  }
}

// score = exp2(score - top), and this thread's sum of it.
DEVICE_FN void weigh(float (&score)[kTokens / 2], const float (&top)[2], float (&sum)[2]) {
  sum[0] = sum[1] = 0.f;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    score[i] = exp2_flushed(score[i] - top[i / 2 % 2]);
    sum[i / 2 % 2] += score[i];
  }
}

DEVICE_FN void publish(float2 (&scales)[kRows], const float (&top)[2], const float (&scale)[2]) {
  if (threadIdx.x % 4) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) scales[tile_row() + row * 8] = make_float2(top[row], scale[row]);
}

// ---- the math warpgroups ----

struct State {
  float out[kLatent / 4];
  float top[2], mass[2];  // mass: of this thread's columns of the blocks of this warpgroup
};

// Whether a block has rows past the sequence's end, of which `left` tokens remain.
DEVICE_FN bool is_ragged(int left) { return left > 0 && left < kTokens; }

// Of block `group` of a pair: its weights, the new maxima, and what older sums are to be scaled by, which is published.
template <class T>
DEVICE_FN void softmax(Smem& s, const MlaDecodeParams& p, const Ends& ends, int length, int token0, int group,
                       float (&score)[kTokens / 2], Weights& weight, float (&scale)[2], State& state) {
  const float older[2] = {state.top[0], state.top[1]};
  float sum[2];
  scale_scores(score, state.top, p, ends, length, token0, s.present[group]);
#pragma unroll
  for (int row = 0; row < 2; ++row) scale[row] = exp2_flushed(older[row] - state.top[row]);
  publish(s.scales[group], state.top, scale);
  weigh(score, state.top, sum);
  pack<T>(score, weight);
#pragma unroll
  for (int row = 0; row < 2; ++row) state.mass[row] = state.mass[row] * scale[row] + sum[row];
}

// A pair, by warpgroup 0.
template <class T, int kCluster>
DEVICE_FN void first_block(Smem& s, const MlaDecodeParams& p, const Ends& ends, const Work& work, int pair,
                           uint32_t phase, State& state) {
  const int token0 = pair * kPair, left = work.length - token0;
  float score[kTokens / 2], scale[2];
  Weights weight;
  start_scores<T, 0>(s, phase, score);
  wgmma_wait<0>(score);
  if (pair == work.last - 1) arrive(&s.q_empty);
  softmax<T>(s, p, ends, work.length, token0, 0, score, weight, scale, state);
  if (!BUG(weights_over_keys)) named_barrier_sync(2, kGroupThreads);  // no warp's product reads the last panel any more
  stage(s.kv[0][kRope], weight);
  arrive(&s.ready[0]);
  if (is_ragged(left)) zero_rows<0>(s, 0, left);
  rescale(state.out, scale);
  start_own<T, 0>(s, weight, state.out);

  wgmma_wait<0>(state.out);
  pin(weight);
  release<kCluster>(&s.empty[0][0]);
  if (!BUG(second_not_awaited)) mbarrier_wait(&s.ready[1], phase);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float2 newer = s.scales[1][tile_row() + row * 8];
    state.top[row] = newer.x, scale[row] = newer.y;
    state.mass[row] *= BUG(mass_not_scaled) ? 1.f : scale[row];
  }
  rescale(state.out, scale);
  if (is_ragged(left - kTokens)) zero_rows<0>(s, 1, left - kTokens);
  start_other<T, 0>(s, s.weights, state.out);
  wgmma_wait<0>(state.out);
  release<kCluster>(&s.empty[1][0]);
}

// The same pair, by warpgroup 1. Its product with V0 queues up behind its scores.
template <class T, int kCluster>
DEVICE_FN void second_block(Smem& s, const MlaDecodeParams& p, const Ends& ends, const Work& work, int pair,
                            uint32_t phase, State& state) {
  const int token0 = pair * kPair + kTokens, left = work.length - token0;
  float score[kTokens / 2], scale[2];
  Weights weight;
  start_scores<T, 1>(s, phase, score);
  if (!BUG(first_not_awaited)) mbarrier_wait(&s.ready[0], phase);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float2 newer = s.scales[0][tile_row() + row * 8];
    state.top[row] = newer.x, scale[row] = BUG(first_scale_forgotten) ? 1.f : newer.y;
    state.mass[row] *= scale[row];
  }
  if (any_to_rescale(scale)) {
    wgmma_wait<0>(score);  // the compiler would put it here, for products under way bar it from all sums
    multiply_rows(state.out, scale);
  }
  if (is_ragged(left + kTokens)) zero_rows<1>(s, 0, left + kTokens);
  start_other<T, 1>(s, s.kv[0][kRope], state.out);

  wgmma_wait<1>(score);
  if (pair == work.last - 1) arrive(&s.q_empty);
  softmax<T>(s, p, ends, work.length, token0, 1, score, weight, scale, state);
  stage(s.weights, weight);
  arrive(&s.ready[1]);
  wgmma_wait<0>(state.out);
  if (!BUG(half_never_released)) release<kCluster>(&s.empty[0][1]);
  if (!BUG(second_scale_forgotten)) rescale(state.out, scale);
  if (is_ragged(left)) {
    named_barrier_sync(3, kGroupThreads);  // no warp's scores are under way any more
    zero_rows<1>(s, 1, left);
  }
  start_own<T, 1>(s, weight, state.out);
  wgmma_wait<0>(state.out);
  pin(weight);
  release<kCluster>(&s.empty[1][1]);
}

// One of this thread's rows of a result, into the 256 columns at `out`, by whole warps. Neighbouring lanes swap words,
// so that the four of a row write 32 bytes side by side.
template <class T>
DEVICE_FN void store_result(const State& state, int half, float factor, T* out, bool stored) {
  const bool odd = threadIdx.x % 2;
  out += (odd ? 8 : 0) + int(threadIdx.x) % 4 / 2 * 4;
#pragma unroll
  for (int i = 2 * half; i < kLatent / 4; i += 8) {
    const float x[] = {state.out[i] * factor, state.out[i + 1] * factor};
    const float y[] = {state.out[i + 4] * factor, state.out[i + 5] * factor};
    const uint32_t near = to_word<T>(x), far = to_word<T>(y);  // 8 columns further
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? near : far, 1);
    if (stored)
      *reinterpret_cast<uint2*>(out + (i - 2 * half) * 2) = odd ? make_uint2(other, far) : make_uint2(near, other);
  }
}
// The same of a partial result.
DEVICE_FN void store_part(const State& state, int half, float factor, float* out, bool stored) {
  out += int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 2 * half; i < kLatent / 4; i += 4)
    if (stored)
      *reinterpret_cast<float2*>(out + (i - 2 * half) * 2) =
          make_float2(state.out[i] * factor, state.out[i + 1] * factor);
}

template <class T, int kGroup>
DEVICE_FN void finish(Smem& s, const MlaDecodeParams& p, const Work& work, int part, int row0, State& state) {
  // The next piece that has pairs makes both warpgroups meet before it writes here again.
  const bool exchanges = work.first < work.last || BUG(empty_pieces_exchange);
  if (exchanges) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      state.mass[row] = row_sum(state.mass[row]);
      if (threadIdx.x % 4 == 0) s.mass[kGroup][tile_row() + row * 8] = state.mass[row];
    }
    if (!BUG(mass_not_awaited)) named_barrier_sync(1, kMathThreads);
  }
  const bool whole = work.begins() && work.ends();
  const int64_t slot = work.begins() ? p.parts + part : part;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + tile_row() + half * 8, head = row % p.h_q, query = row / p.h_q;
    const bool stored = row < p.rows || BUG(rows_unmasked);
    const bool stores_lse = stored && kGroup == 0 && threadIdx.x % 4 == 0;
    const float mass = exchanges ? state.mass[half] + s.mass[1 - kGroup][tile_row() + half * 8] : 0.f;
    const bool seen = mass != 0.f;                                       // NaN is seen
    const float lse = seen ? state.top[half] + log2f(mass) : -INFINITY;  // base 2
    float factor = seen ? 1.f / mass : 0.f;                              // of sums that are 0 then
    if (whole) {
      const float natural = lse * kLn2;
      if (stores_lse) p.lse[int64_t(work.sequence) * p.rows + head * p.s_q + query] = natural;
      if (p.sink != nullptr && seen) factor *= share_of(natural, __ldg(p.sink + head));
      T* const out = static_cast<T*>(p.out) + (int64_t(work.sequence) * p.rows + row) * kLatent;
      store_result(state, half, factor, out + kGroup * kLatent / 2, stored);
    } else {
      if (stores_lse) p.part_lse[slot * p.rows + row] = lse;
      float* const out = p.part_out + (slot * p.rows + row) * kLatent;
      store_part(state, half, factor, out + kGroup * kLatent / 2, stored);
    }
  }
}

template <class T, int kCluster, int kGroup>
DEVICE_FN void attend(Smem& s, const MlaDecodeParams& p, int part, int row0) {
  const Ends ends = find_ends(p, row0);
  uint32_t phase = 0, q_phase = 0;
  int head = -1, parts_after = 0;
  for (Work work(s.schedule, p); !work.done(); work.next()) {
    State state = {{}, {kLowest, kLowest}, {0.f, 0.f}};
    if (work.first < work.last) {
      if (!BUG(queries_not_awaited)) mbarrier_wait(&s.q_full, q_phase);
      q_phase ^= 1;
    }
#pragma unroll 1
    for (int pair = work.first; pair < work.last; ++pair) {
      if constexpr (kGroup == 0) {
        first_block<T, kCluster>(s, p, ends, work, pair, phase, state);
      } else {
        second_block<T, kCluster>(s, p, ends, work, pair, phase, state);
      }
      phase ^= BUG(phase_never_flipped) ? 0 : 1;
    }
    finish<T, kGroup>(s, p, work, part, row0, state);
    if (work.begins() && !work.ends()) head = work.sequence, parts_after = work.parts_after(s.schedule, part);
  }
  if (kGroup == 0 && threadIdx.x == 0 && row0 == 0 && p.heads != nullptr)
    p.heads[2 * part] = head, p.heads[2 * part + 1] = parts_after;
}

template <class T, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ Maps maps, const __grid_constant__ MlaDecodeParams p) {
  DYNAMIC_SMEM(raw_smem);
  auto& s = *reinterpret_cast<Smem*>(raw_smem);
  const int part = int(blockIdx.x) / p.tiles, row0 = int(blockIdx.x) % p.tiles * kRows;
  // From lane 0, so that the compiler knows it to be the same in a whole warp.
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  if (warp == 0 && elect_one()) {
    prefetch_tensor_map(maps.q), prefetch_tensor_map(maps.kv);
    for (int block = 0; block < 2; ++block) {
      for (int panel = 0; panel < kPanels; ++panel) {
        mbarrier_init(&s.full[block][panel], 1);
        debug_name(&s.full[block][panel], "full", block * kPanels + panel);
      }
      for (int side = 0; side < 2; ++side) {
        mbarrier_init(&s.empty[block][side], 4 * kCluster);
        debug_name(&s.empty[block][side], "empty", block * 2 + side);
      }
      mbarrier_init(&s.ready[block], 4), debug_name(&s.ready[block], "ready", block);
    }
    mbarrier_init(&s.q_full, 1), debug_name(&s.q_full, "q_full", 0);
    mbarrier_init(&s.q_empty, 8), debug_name(&s.q_empty, "q_empty", 0);
    if (!BUG(fence_barrier_init_missing)) fence_barrier_init();
  }
  if (!BUG(dependency_wait_missing)) grid_dependency_wait();
  if (warp == 1) find_part(s.schedule, p, part);
  if constexpr (kCluster > 1) {
    cluster_sync();
  } else {
    if (!BUG(syncthreads_missing)) __syncthreads();
  }

  if (warp / 4 == 2) {
    reg_dec<40>();
    load<kCluster>(s, maps, p, warp % 4 / 2, warp % 2, row0);
    grid_dependency_launch();
  } else {
    reg_inc<232>();
    if (warp / 4 == 0) {
      attend<T, kCluster, 0>(s, p, part, row0);
    } else {
      attend<T, kCluster, 1>(s, p, part, row0);
    }
  }
  // A CTA stays while its peer may still arrive on its barriers, and load into it.
  if constexpr (kCluster > 1) {
    __syncwarp();
    if (!BUG(last_cluster_sync_missing)) cluster_sync();
  }
}

}  // namespace deepseek_kernels::mla_decode
