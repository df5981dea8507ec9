#include <algorithm>

#include "driver.h"
#include "moe_gate/cpu.h"
#include "moe_permute/cpu.h"
#include "moe_sort/cpu.h"

namespace deepseek_kernels::driver {
namespace {

double score_of(GateScore score, const Matrix& logits, int64_t t, int64_t e) {
  const double x = logits(t, e);
  if (score == GateScore::kSigmoid) return 1 / (1 + std::exp(-x));
  if (score == GateScore::kSqrtSoftplus) return std::sqrt(std::log1p(std::exp(x)));
  double total = 0;
  for (int64_t o = 0; o < logits.columns; ++o) total += std::exp(logits(t, o));
  return std::exp(x) / total;
}

// The `count` largest of values, ties to the lower index.
std::vector<int64_t> largest(const std::vector<double>& values, int64_t count) {
  std::vector<int64_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  order.resize(size_t(count));
  return order;
}

void gate(Random& random, Format format, GateScore score, int64_t experts, int groups, int topk_groups, int top_k,
          bool with_bias, int threads) {
  const int64_t tokens = 37;
  Matrix logits = Matrix(format, tokens, experts, 3).fill(random),
         bias = Matrix(Format::kFp32, 1, experts).fill(random);
  Matrix weights(Format::kFp32, tokens, top_k);
  std::vector<int64_t> indices(size_t(tokens * top_k), -7);
  std::unique_ptr<bool[]> mask(new bool[tokens]);
  for (int64_t t = 0; t < tokens; ++t) mask[t] = t % 5 != 1;
  std::vector<float> workspace(size_t(moe_gate_workspace(experts, groups, top_k, threads)));
  moe_gate_cpu({.logits = logits.data(),
                .bias = with_bias ? bias.floats() : nullptr,
                .mask = mask.get(),
                .weights = weights.floats(),
                .indices = indices.data(),
                .workspace = workspace.data(),
                .num_tokens = tokens,
                .num_experts = experts,
                .ld_logits = logits.ld,
                .top_k = top_k,
                .num_groups = groups,
                .topk_groups = topk_groups,
                .score = score,
                .dtype = dtype(format),
                .normalize = true,
                .scale = 2.5f},
               threads);
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> scores, selection, group_scores;
    for (int64_t e = 0; e < experts; ++e) {
      scores.push_back(score_of(score, logits, t, e));
      selection.push_back(scores.back() + (with_bias ? bias(0, e) : 0));
    }
    const int64_t per_group = experts / groups;
    for (int64_t g = 0; g < groups; ++g) {
      std::vector<double> of(selection.begin() + g * per_group, selection.begin() + (g + 1) * per_group);
      std::sort(of.rbegin(), of.rend());
      group_scores.push_back(with_bias && per_group > 1 ? of[0] + of[1] : of[0]);
    }
    std::vector<bool> allowed(size_t(groups), false);
    for (int64_t g : largest(group_scores, topk_groups)) allowed[g] = true;
    for (int64_t e = 0; e < experts; ++e)
      if (!allowed[e / per_group]) selection[e] = -INFINITY;
    const std::vector<int64_t> chosen = largest(selection, top_k);
    double total = 1e-20;
    for (int64_t e : chosen) total += scores[e];
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t at = t * top_k + k;
      expect_close("moe_gate index", t, k, double(indices[at]), mask[t] ? double(chosen[k]) : -1, 0, 0);
      expect_close("moe_gate weight", t, k, weights(t, k), mask[t] ? 2.5 * scores[chosen[k]] / total : 0, 1e-5, 0);
    }
  }
}

// Logits of -inf have no score and no gradient; choices out of range have none either.
template <class Index>
void gate_backward(Random& random, Format format, GateScore score, bool normalize, int64_t experts, int top_k,
                   int threads) {
  const int64_t tokens = 150;
  Matrix logits = Matrix(format, tokens, experts, 3).fill(random), grad(format, tokens, experts);
  Matrix grad_weights = Matrix(Format::kFp32, tokens, top_k).fill(random);
  std::vector<Index> indices;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t first = random.below(experts);
    for (int64_t k = 0; k < top_k; ++k) indices.push_back(Index(k < experts ? (first + k) % experts : experts));
    if (t % 7 == 3) indices.back() = -1;
  }
  std::vector<float> workspace(size_t(moe_gate_backward_workspace(experts, top_k, threads)));
  moe_gate_backward_cpu({.grad_weights = grad_weights.floats(),
                         .logits = logits.data(),
                         .indices = indices.data(),
                         .grad_logits = grad.data(),
                         .workspace = workspace.data(),
                         .num_tokens = tokens,
                         .num_experts = experts,
                         .ld_logits = logits.ld,
                         .top_k = top_k,
                         .score = score,
                         .dtype = dtype(format),
                         .wide = sizeof(Index) == 8,
                         .normalize = normalize,
                         .scale = 2.5f},
                        threads);
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> of_score(experts, 0);  // the gradient of each score
    double total = 1e-20, weighted = 0, mean = 0;
    for (int k = 0; k < top_k; ++k) {
      const int64_t e = indices[t * top_k + k];
      if (e < 0 || e >= experts) continue;
      of_score[e] = 2.5 * grad_weights(t, k);
      total += score_of(score, logits, t, e), weighted += of_score[e] * score_of(score, logits, t, e);
    }
    for (int k = 0; k < top_k; ++k) {
      const int64_t e = indices[t * top_k + k];
      if (e < 0 || e >= experts) continue;
      if (normalize) of_score[e] = (of_score[e] - weighted / total) / total;
      mean += of_score[e] * score_of(score, logits, t, e);
    }
    for (int64_t e = 0; e < experts; ++e) {
      const double x = logits(t, e), s = score_of(score, logits, t, e), sigmoid = 1 / (1 + std::exp(-x));
      double expected = of_score[e] * s * (1 - s);
      if (score == GateScore::kSoftmax) expected = s * (of_score[e] - mean);
      if (score == GateScore::kSqrtSoftplus) expected = of_score[e] * sigmoid / (2 * s);
      expect_close("moe_gate_backward", t, e, grad(t, e), expected, rounding(format), 1e-5);
    }
  }
}

template <class Index>
void sort_and_permute(Random& random, Format format, int64_t tokens, int top_k, int64_t hidden, int64_t alignment,
                      int threads) {
  const int64_t begin = 2, end = 9, entries = tokens * top_k, rows = entries + (end - begin) * (alignment - 1);
  std::vector<Index> indices;
  for (int64_t i = 0; i < entries; ++i) indices.push_back(Index(random.below(12) - 1));  // some of them not ours
  std::vector<int32_t> to_pos(entries, -7), to_entry(rows, -7), offsets(end - begin + 1, -7);
  std::vector<int32_t> workspace(size_t(threads * (end - begin)));
  moe_sort_cpu({.indices = indices.data(),
                .token_topk_to_pos = to_pos.data(),
                .pos_to_token_topk = to_entry.data(),
                .expert_offsets = offsets.data(),
                .workspace = workspace.data(),
                .num_entries = entries,
                .num_rows = rows,
                .expert_begin = begin,
                .expert_end = end,
                .alignment = alignment,
                .wide = sizeof(Index) == 8},
               threads);
  std::vector<int32_t> expected(rows, -1);
  int64_t next = 0;
  for (int64_t e = begin; e < end; ++e) {
    expect_close("moe_sort offset", e, 0, offsets[e - begin], double(next), 0, 0);
    for (int64_t i = 0; i < entries; ++i)
      if (indices[i] == e) expected[next++] = int32_t(i);
    next = (next + alignment - 1) / alignment * alignment;
  }
  expect_close("moe_sort offset", end, 0, offsets[end - begin], double(next), 0, 0);
  for (int64_t r = 0; r < rows; ++r) expect_close("moe_sort row", r, 0, to_entry[r], expected[r], 0, 0);
  for (int64_t i = 0; i < entries; ++i) {
    const bool ours = indices[i] >= begin && indices[i] < end;
    expect_close("moe_sort position", i, 0, ours ? to_entry[to_pos[i]] : to_pos[i], ours ? double(i) : -1, 0, 0);
  }

  Matrix x = Matrix(format, tokens, hidden, 5).fill(random), out(format, rows, hidden, 1);
  Matrix scale = Matrix(Format::kFp32, tokens, 2).fill(random), out_scale(Format::kFp32, rows, 2);
  const int64_t size = bytes_of(format);
  moe_permute_cpu({.maps = {nullptr, to_entry.data(), tokens, rows, top_k},
                   .x = x.data(),
                   .out = out.data(),
                   .scale = scale.floats(),
                   .out_scale = out_scale.floats(),
                   .row_bytes = hidden * size,
                   .scale_columns = 2,
                   .ldx_bytes = x.ld * size,
                   .ld_out_bytes = out.ld * size,
                   .scale_stride_t = 2,
                   .scale_stride_s = 1,
                   .out_scale_stride_r = 2,
                   .out_scale_stride_s = 1,
                   .stream = nullptr},
                  threads);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = expected[r] / top_k;
    for (int64_t c = 0; c < hidden; ++c) {
      expect_close("moe_permute", r, c, out(r, c), expected[r] < 0 ? 0 : x(t, c), 0, 0);
    }
    for (int64_t c = 0; c < 2; ++c) {
      expect_close("moe_permute scale", r, c, out_scale(r, c), expected[r] < 0 ? 0 : scale(t, c), 0, 0);
    }
  }

  Matrix weights = Matrix(Format::kFp32, tokens, top_k).fill(random), sum(format, tokens, hidden, 2);
  moe_unpermute_cpu({.maps = {to_pos.data(), nullptr, tokens, rows, top_k},
                     .y = out.data(),
                     .weights = weights.floats(),
                     .out = sum.data(),
                     .hidden = hidden,
                     .dtype = dtype(format),
                     .ldy = out.ld,
                     .ld_out = sum.ld,
                     .stream = nullptr},
                    threads);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < hidden; ++c) {
      double total = 0;
      for (int k = 0; k < top_k; ++k)
        if (to_pos[t * top_k + k] >= 0) total += weights(t, k) * x(t, c);
      expect_close("moe_unpermute", t, c, sum(t, c), total, rounding(format), 1e-5);
    }
  }
}

}  // namespace

void test_routing(Random& random) {
  each_thread_count([&](int threads) {
    for (Format format : kFloats) {
      for (GateScore score : {GateScore::kSigmoid, GateScore::kSoftmax, GateScore::kSqrtSoftplus}) {
        gate(random, format, score, 5, 1, 1, 2, false, threads);
        gate_backward<int32_t>(random, format, score, true, 5, 2, threads);
        gate_backward<int64_t>(random, format, score, false, 40, 19, threads);
        gate(random, format, score, 24, 8, 3, 4, true, threads);
      }
      for (int64_t hidden : {1, 16, 77}) sort_and_permute<int64_t>(random, format, 9, 3, hidden, 4, threads);
    }
    gate(random, Format::kFp32, GateScore::kSigmoid, 72, 1, 1, 70, true, threads);
    gate(random, Format::kFp32, GateScore::kSigmoid, 16, 16, 5, 5, true, threads);
    sort_and_permute<int32_t>(random, Format::kBf16, 2100, 2, 3, 1, threads);
    sort_and_permute<int32_t>(random, Format::kBf16, 0, 2, 3, 1, threads);
  });
}

}  // namespace deepseek_kernels::driver
