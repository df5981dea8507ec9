// kv_cache[slot] = rmsnorm(c_kv[t]) * norm_weight ++ rope(k_rope[t]), and the same rotation for queries.
//
// A row passes through L1 in pieces of 128 columns (the FP8 layout's blocks): once for the mean square, once to be
// scaled, rotated and stored. The threads share the slots, not the tokens: of two tokens that name one slot the later
// is written, whatever the number of threads.
// Bytes: each row read and written once.
#include "mla_cache_write/cpu.h"

#include "common/cpu/fp8_block.h"
#include "common/cpu/parallel.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

constexpr int64_t kPiece = 128, kPairs = kPiece / 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t entry(const void* values, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
}
inline const char* element(const void* p, Dtype dtype, int64_t i) {
  return static_cast<const char*>(p) + i * element_bytes(dtype);
}
inline char* element(void* p, Dtype dtype, int64_t i) { return static_cast<char*>(p) + i * element_bytes(dtype); }

// `piece` has room for whole registers.
void widen(const char* from, Dtype dtype, int64_t count, float* piece) {
  with_dtype(dtype, [&](auto tag) {
    constexpr Dtype kDtype = decltype(tag)::kDtype;
    for (int64_t i = 0; i < count; i += kLanes) {
      store(piece + i, load_some<kDtype>(element(from, kDtype, i), count - i));
    }
  });
}
void narrow(const float* piece, Dtype dtype, int64_t count, char* to) {
  with_dtype(dtype, [&](auto tag) {
    constexpr Dtype kDtype = decltype(tag)::kDtype;
    for (int64_t i = 0; i < count; i += kLanes) {
      store_some<kDtype>(element(to, kDtype, i), load(piece + i), count - i);
    }
  });
}

// Rotates `pairs` <= kPairs of them: interleaved, or first elements and, kPairs later, second ones.
template <bool kInterleaved>
void rotate(float* x, const float* cos, const float* sin, int64_t pairs, float sign) {
  constexpr int64_t kStep = kInterleaved ? 2 : 1, kSecond = kInterleaved ? 1 : kPairs;
  for (int64_t i = 0; i < pairs; ++i) {
    const float first = x[i * kStep], second = x[i * kStep + kSecond], s = sign * sin[i];
    x[i * kStep] = first * cos[i] - second * s;
    x[i * kStep + kSecond] = second * cos[i] + first * s;
  }
}

void rope(const RotationCpu& r, int64_t t, const char* from, Dtype dtype, char* to, Dtype to_dtype) {
  const int64_t position = entry(r.positions, r.wide_positions, t), half = r.d_rope / 2;
  const int64_t row = position < 0 ? 0 : smaller(position, r.max_positions - 1);
  const float *cos = r.cos_sin + row * r.d_rope, *sin = cos + half, sign = r.inverse ? -1.f : 1.f;
  alignas(64) float piece[kPiece];
  for (int64_t i = 0; i < half; i += kPairs) {
    const int64_t pairs = smaller(kPairs, half - i);
    if (r.interleaved) {
      widen(element(from, dtype, 2 * i), dtype, 2 * pairs, piece);
      rotate<true>(piece, cos + i, sin + i, pairs, sign);
      narrow(piece, to_dtype, 2 * pairs, element(to, to_dtype, 2 * i));
    } else {
      widen(element(from, dtype, i), dtype, pairs, piece);
      widen(element(from, dtype, half + i), dtype, pairs, piece + kPairs);
      rotate<false>(piece, cos + i, sin + i, pairs, sign);
      narrow(piece, to_dtype, pairs, element(to, to_dtype, i));
      narrow(piece + kPairs, to_dtype, pairs, element(to, to_dtype, half + i));
    }
  }
}

// 1 / sqrt(mean of squares + eps)
float inverse_rms(const MlaCacheWriteCpuParams& p, const char* latent) {
  alignas(64) float piece[kPiece];
  Vec squares = zero();
  for (int64_t c = 0; c < p.d_latent; c += kPiece) {
    const int64_t count = smaller(kPiece, p.d_latent - c);
    widen(element(latent, p.c_kv_dtype, c), p.c_kv_dtype, count, piece);
    for (int64_t i = 0; i < count; i += kLanes) squares = fma(load(piece + i), load(piece + i), squares);
  }
  return 1.f / std::sqrt(sum(squares) / float(p.d_latent) + p.eps);
}

void write(const MlaCacheWriteCpuParams& p, int64_t t, int64_t slot) {
  char* row = static_cast<char*>(p.kv_cache) + slot / p.page_size * p.page_bytes + slot % p.page_size * p.row_bytes;
  const char* latent = element(p.c_kv, p.c_kv_dtype, t * p.ld_c_kv);
  const Vec factor = splat(p.norm_weight == nullptr ? 1.f : inverse_rms(p, latent));
  alignas(64) float piece[kPiece], weight[kPiece];
  for (int64_t c = 0; c < p.d_latent; c += kPiece) {
    const int64_t count = smaller(kPiece, p.d_latent - c);
    widen(element(latent, p.c_kv_dtype, c), p.c_kv_dtype, count, piece);
    if (p.norm_weight != nullptr) {
      widen(element(p.norm_weight, p.norm_dtype, c), p.norm_dtype, count, weight);
      for (int64_t i = 0; i < count; i += kLanes) store(piece + i, load(piece + i) * factor * load(weight + i));
    }
    if (!p.fp8) {
      narrow(piece, p.cache_dtype, count, element(row, p.cache_dtype, c));
      continue;
    }
    const float scale = fp8_scale(amax_of(piece, count, 0.f), false);
    encode(piece, count, scale, reinterpret_cast<uint8_t*>(row) + c);
    std::memcpy(row + p.d_latent + c / kPiece * 4, &scale, 4);
  }
  const Dtype rope_dtype = p.fp8 ? Dtype::kBf16 : p.cache_dtype;
  char* rope_row = p.fp8 ? row + p.d_latent + p.d_latent / kPiece * 4 : element(row, rope_dtype, p.d_latent);
  const char* k_rope = element(p.k_rope, p.k_rope_dtype, t * p.ld_k_rope);
  rope(p.rotation, t, k_rope, p.k_rope_dtype, rope_row, rope_dtype);
}

}  // namespace

void mla_cache_write(const MlaCacheWriteCpuParams& p, int threads) {
  const int64_t num_slots = p.num_pages * p.page_size, grain = 16384 / (p.d_latent + p.rotation.d_rope) + 1;
  const int64_t most = (p.num_tokens + grain - 1) / grain, runs = smaller(most, threads);
  parallel_runs(runs, 1, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      const int64_t slot = entry(p.slots, p.wide_slots, t);
      if (slot < 0 || slot >= num_slots) continue;
      const int64_t run = int64_t(uint64_t(slot) * 0x9E3779B97F4A7C15 >> 33) % runs;  // spreads any stride of slots
      if (run >= first && run < last) write(p, t, slot);
    }
  });
}

void mla_rope(const MlaRopeCpuParams& p, int threads) {
  const int64_t d_rope = p.rotation.d_rope;
  parallel_runs(p.num_tokens * p.heads, 16384 / (d_rope + 1) + 1, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / p.heads, h = i % p.heads;
      rope(p.rotation, t, element(p.x, p.dtype, t * p.x_stride_t + h * p.x_stride_h), p.dtype,
           element(p.out, p.dtype, i * d_rope), p.dtype);
    }
  });
}

}  // namespace deepseek_kernels::DSK_ISA
