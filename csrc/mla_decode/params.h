#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace deepseek_kernels {

struct MlaDecodeParams {
  const void* q;               // [b, s_q, h_q, 576]; a sequence's s_q * h_q rows lie equally far apart
  const void* kv_cache;        // [num_pages, page_size, 576], of q's dtype
  const int32_t* block_table;  // [b, max_pages]
  const int32_t* seqlens_kv;   // [b]
  const float* sink;           // [h_q] or nullptr
  void* out;                   // [b, s_q, h_q, 512], of q's dtype
  float* lse;                  // [b, h_q, s_q]
  float* part_out;             // [2 * parts, s_q * h_q, 512]; scratch, as the two below, of more than one part
  float* part_lse;             // [2 * parts, s_q * h_q], base 2
  int32_t* heads;              // [parts, 2]
  int b, s_q, h_q;
  int num_pages, page_size, max_pages;
  int64_t q_stride_b, q_stride_row, page_stride, row_stride;  // in elements
  float scale;
  bool causal;
  Dtype dtype;  // kBf16 or kFp16
  int parts;    // that the cached tokens of all sequences are shared out to; each has a CTA for every 64 query rows
  int cluster;  // of those CTAs, 1 or 2: how many fetch the cache together
  void* stream;

  // Made by the launcher.
  int rows = 0;            // s_q * h_q
  int tiles = 0;           // of 64 of them
  int capacity = 0;        // tokens that a row of the block table has room for
  int box_log2 = 0;        // tokens that a TMA load fetches: the most that surely lie in one page and are one CTA's
  float scale_log2 = 0.f;  // of scores in base 2
};

void launch_mla_decode(const MlaDecodeParams& params);

}  // namespace deepseek_kernels
