// The Python face of the CPU kernels, `_C.cpu`: numbers in, a result out. deepseek_kernels/_C.pyi says what they mean.
#include "bindings_cpu.h"

#include "fp8_matmul/cpu.h"
#include "fp8_quantize/cpu.h"
#include "grouped_matmul/cpu.h"
#include "merge_states/cpu.h"
#include "mla_cache_write/cpu.h"
#include "mla_decode/cpu.h"
#include "moe_gate/cpu.h"
#include "moe_permute/cpu.h"
#include "moe_sort/cpu.h"
#include "swiglu/cpu.h"

namespace deepseek_kernels {
namespace {

namespace py = pybind11;
using py::kw_only;
using py::operator""_a;
using address = uintptr_t;
using release_gil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(address a) {
  return reinterpret_cast<T*>(a);
}

void bind_fp8_matmul(py::module_& m) {
  m.def("fp8_matmul_workspace", &fp8_matmul_workspace, kw_only(), "m"_a, "k"_a, "threads"_a);
  m.def(
      "fp8_matmul",
      [](address a, address scale_a, address b, address scale_b, address bias, address d, address workspace, int64_t m,
         int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldd, int64_t scale_a_stride_m,
         int64_t scale_a_stride_k, int64_t scale_b_stride_n, int64_t scale_b_stride_k, int out_dtype, bool accumulate,
         int threads) {
        fp8_matmul_cpu({at<uint8_t>(a), at<float>(scale_a), at<uint8_t>(b), at<float>(scale_b), at<float>(bias),
                        at<void>(d), at<float>(workspace), m, n, k, lda, ldb, ldd, scale_a_stride_m, scale_a_stride_k,
                        scale_b_stride_n, scale_b_stride_k, Dtype(out_dtype), accumulate},
                       threads);
      },
      kw_only(), "a"_a, "scale_a"_a, "b"_a, "scale_b"_a, "bias"_a, "d"_a, "workspace"_a, "m"_a, "n"_a, "k"_a, "lda"_a,
      "ldb"_a, "ldd"_a, "scale_a_stride_m"_a, "scale_a_stride_k"_a, "scale_b_stride_n"_a, "scale_b_stride_k"_a,
      "out_dtype"_a, "accumulate"_a, "threads"_a, release_gil());
}

void bind_fp8_quantize(py::module_& m) {
  m.def(
      "fp8_quantize",
      [](address x, address q, address scale, int64_t m, int64_t k, int dtype, int block_m, int block_k, int64_t ldx,
         int64_t ldq, int64_t scale_stride_m, int64_t scale_stride_k, bool pow2_scale, int threads) {
        fp8_quantize_cpu({at<void>(x), at<void>(q), at<float>(scale), m, k, Dtype(dtype), block_m, block_k, ldx, ldq,
                          scale_stride_m, scale_stride_k, pow2_scale, nullptr},
                         threads);
      },
      kw_only(), "x"_a, "q"_a, "scale"_a, "m"_a, "k"_a, "dtype"_a, "block_m"_a, "block_k"_a, "ldx"_a, "ldq"_a,
      "scale_stride_m"_a, "scale_stride_k"_a, "pow2_scale"_a, "threads"_a, release_gil());
  m.def(
      "fp8_quantize_both",
      [](address x, address expert_offsets, address q, address scale, address q_t, address scale_t, int64_t m,
         int64_t k, int64_t width, int64_t row_tiles, int num_experts, int dtype, int64_t ldx, int64_t ldq,
         int64_t ldq_t, int64_t scale_stride_m, int64_t scale_stride_k, int64_t scale_t_stride_k,
         int64_t scale_t_stride_w, bool pow2_scale, int threads) {
        fp8_quantize_both_cpu({at<void>(x),
                               at<int32_t>(expert_offsets),
                               at<void>(q),
                               at<float>(scale),
                               at<void>(q_t),
                               at<float>(scale_t),
                               m,
                               k,
                               width,
                               row_tiles,
                               num_experts,
                               Dtype(dtype),
                               ldx,
                               ldq,
                               ldq_t,
                               scale_stride_m,
                               scale_stride_k,
                               scale_t_stride_k,
                               scale_t_stride_w,
                               pow2_scale,
                               nullptr},
                              threads);
      },
      kw_only(), "x"_a, "expert_offsets"_a, "q"_a, "scale"_a, "q_t"_a, "scale_t"_a, "m"_a, "k"_a, "width"_a,
      "row_tiles"_a, "num_experts"_a, "dtype"_a, "ldx"_a, "ldq"_a, "ldq_t"_a, "scale_stride_m"_a, "scale_stride_k"_a,
      "scale_t_stride_k"_a, "scale_t_stride_w"_a, "pow2_scale"_a, "threads"_a, release_gil());
  m.def(
      "fp8_dequantize",
      [](address q, address scale, address out, int64_t m, int64_t k, int64_t ldq, int64_t ld_out,
         int64_t scale_stride_m, int64_t scale_stride_k, int block_m, int block_k, int dtype, int threads) {
        fp8_dequantize_cpu({at<void>(q), at<float>(scale), at<void>(out), m, k, ldq, ld_out, scale_stride_m,
                            scale_stride_k, block_m, block_k, Dtype(dtype), nullptr},
                           threads);
      },
      kw_only(), "q"_a, "scale"_a, "out"_a, "m"_a, "k"_a, "ldq"_a, "ld_out"_a, "scale_stride_m"_a, "scale_stride_k"_a,
      "block_m"_a, "block_k"_a, "dtype"_a, "threads"_a, release_gil());
}

void bind_grouped_matmul(py::module_& m) {
  m.def("grouped_matmul_workspace", &grouped_matmul_workspace, kw_only(), "num_tokens"_a, "num_rows"_a, "k"_a,
        "num_experts"_a, "threads"_a);
  m.def(
      "grouped_matmul",
      [](address a, address scale_a, address b, address scale_b, address expert_offsets, address pos_to_token_topk,
         address d, address workspace, int64_t num_tokens, int64_t num_rows, int64_t n, int64_t k, int64_t num_experts,
         int64_t lda, int64_t ldb, int64_t ldd, int64_t b_stride_e, int64_t scale_a_stride_m, int64_t scale_a_stride_k,
         int64_t scale_b_stride_e, int64_t scale_b_stride_n, int64_t scale_b_stride_k, int top_k, int dtype,
         int out_dtype, int threads) {
        grouped_matmul_cpu({at<void>(a),
                            at<float>(scale_a),
                            at<void>(b),
                            at<float>(scale_b),
                            at<int32_t>(expert_offsets),
                            at<int32_t>(pos_to_token_topk),
                            at<void>(d),
                            at<float>(workspace),
                            num_tokens,
                            num_rows,
                            n,
                            k,
                            num_experts,
                            lda,
                            ldb,
                            ldd,
                            b_stride_e,
                            scale_a_stride_m,
                            scale_a_stride_k,
                            scale_b_stride_e,
                            scale_b_stride_n,
                            scale_b_stride_k,
                            top_k,
                            Dtype(dtype),
                            Dtype(out_dtype)},
                           threads);
      },
      kw_only(), "a"_a, "scale_a"_a, "b"_a, "scale_b"_a, "expert_offsets"_a, "pos_to_token_topk"_a, "d"_a,
      "workspace"_a, "num_tokens"_a, "num_rows"_a, "n"_a, "k"_a, "num_experts"_a, "lda"_a, "ldb"_a, "ldd"_a,
      "b_stride_e"_a, "scale_a_stride_m"_a, "scale_a_stride_k"_a, "scale_b_stride_e"_a, "scale_b_stride_n"_a,
      "scale_b_stride_k"_a, "top_k"_a, "dtype"_a, "out_dtype"_a, "threads"_a, release_gil());
}

void bind_swiglu(py::module_& m) {
  m.def(
      "swiglu",
      [](address gate_up, address weights, address pos_to_token_topk, address out, address scale_out, int64_t num_rows,
         int64_t intermediate, int64_t num_weights, int64_t ld, float clamp, int dtype, int threads) {
        swiglu_cpu({at<void>(gate_up), at<float>(weights), at<int32_t>(pos_to_token_topk), at<void>(out),
                    at<float>(scale_out), num_rows, intermediate, num_weights, ld, clamp, Dtype(dtype)},
                   threads);
      },
      kw_only(), "gate_up"_a, "weights"_a, "pos_to_token_topk"_a, "out"_a, "scale_out"_a, "num_rows"_a,
      "intermediate"_a, "num_weights"_a, "ld"_a, "clamp"_a, "dtype"_a, "threads"_a, release_gil());
}

void bind_swiglu_backward(py::module_& m) {
  m.def(
      "swiglu_backward",
      [](address grad, address gate_up, address weights, address pos_to_token_topk, address grad_gate_up,
         address grad_weights, int64_t num_rows, int64_t intermediate, int64_t num_weights, int64_t ld_grad, int64_t ld,
         float clamp, int dtype, int threads) {
        swiglu_backward_cpu({at<void>(grad), at<void>(gate_up), at<float>(weights), at<int32_t>(pos_to_token_topk),
                             at<void>(grad_gate_up), at<float>(grad_weights), num_rows, intermediate, num_weights,
                             ld_grad, ld, clamp, Dtype(dtype)},
                            threads);
      },
      kw_only(), "grad"_a, "gate_up"_a, "weights"_a, "pos_to_token_topk"_a, "grad_gate_up"_a, "grad_weights"_a,
      "num_rows"_a, "intermediate"_a, "num_weights"_a, "ld_grad"_a, "ld"_a, "clamp"_a, "dtype"_a, "threads"_a,
      release_gil());
}

void bind_mla_decode(py::module_& m) {
  m.def("mla_decode_workspace", &mla_decode_workspace, kw_only(), "rows"_a, "d_latent"_a, "d_rope"_a, "threads"_a);
  m.def(
      "mla_decode",
      [](address q, address kv_cache, address block_table, address seqlens_kv, address sink, address out, address lse,
         address workspace, int64_t b, int64_t s_q, int64_t h_q, int64_t d_latent, int64_t d_rope, int64_t num_pages,
         int64_t page_size, int64_t max_pages, int64_t q_stride_b, int64_t q_stride_s, int64_t q_stride_h,
         int64_t page_bytes, int64_t row_bytes, float scale, int dtype, bool causal, bool fp8, int threads) {
        mla_decode_cpu({at<void>(q),
                        at<void>(kv_cache),
                        at<int32_t>(block_table),
                        at<int32_t>(seqlens_kv),
                        at<float>(sink),
                        at<void>(out),
                        at<float>(lse),
                        at<float>(workspace),
                        b,
                        s_q,
                        h_q,
                        d_latent,
                        d_rope,
                        num_pages,
                        page_size,
                        max_pages,
                        q_stride_b,
                        q_stride_s,
                        q_stride_h,
                        page_bytes,
                        row_bytes,
                        scale,
                        Dtype(dtype),
                        causal,
                        fp8},
                       threads);
      },
      kw_only(), "q"_a, "kv_cache"_a, "block_table"_a, "seqlens_kv"_a, "sink"_a, "out"_a, "lse"_a, "workspace"_a, "b"_a,
      "s_q"_a, "h_q"_a, "d_latent"_a, "d_rope"_a, "num_pages"_a, "page_size"_a, "max_pages"_a, "q_stride_b"_a,
      "q_stride_s"_a, "q_stride_h"_a, "page_bytes"_a, "row_bytes"_a, "scale"_a, "dtype"_a, "causal"_a, "fp8"_a,
      "threads"_a, release_gil());
}

void bind_merge_states(py::module_& m) {
  m.def(
      "merge_states",
      [](address out_a, address lse_a, address out_b, address lse_b, address out, address lse, int64_t b, int64_t s_q,
         int64_t h_q, int64_t d_v, int dtype, int threads) {
        merge_states_cpu({at<void>(out_a), at<void>(out_b), at<float>(lse_a), at<float>(lse_b), at<void>(out),
                          at<float>(lse), b, s_q, h_q, d_v, Dtype(dtype)},
                         threads);
      },
      kw_only(), "out_a"_a, "lse_a"_a, "out_b"_a, "lse_b"_a, "out"_a, "lse"_a, "b"_a, "s_q"_a, "h_q"_a, "d_v"_a,
      "dtype"_a, "threads"_a, release_gil());
}

void bind_mla_cache_write(py::module_& m) {
  m.def(
      "mla_cache_write",
      [](address c_kv, address k_rope, address norm_weight, address cos_sin, address positions, address kv_cache,
         address slots, int64_t num_tokens, int64_t d_latent, int64_t d_rope, int64_t max_positions, int64_t num_pages,
         int64_t page_size, int64_t ld_c_kv, int64_t ld_k_rope, int64_t page_bytes, int64_t row_bytes, float eps,
         int c_kv_dtype, int k_rope_dtype, int norm_dtype, int cache_dtype, bool wide_positions, bool wide_slots,
         bool fp8, bool interleaved, int threads) {
        const RotationCpu rotation{at<float>(cos_sin), at<void>(positions), max_positions, d_rope,
                                   wide_positions,     interleaved,         false};
        mla_cache_write_cpu({rotation,
                             at<void>(c_kv),
                             at<void>(k_rope),
                             at<void>(norm_weight),
                             at<void>(kv_cache),
                             at<void>(slots),
                             num_tokens,
                             d_latent,
                             num_pages,
                             page_size,
                             ld_c_kv,
                             ld_k_rope,
                             page_bytes,
                             row_bytes,
                             eps,
                             Dtype(c_kv_dtype),
                             Dtype(k_rope_dtype),
                             Dtype(norm_dtype),
                             Dtype(cache_dtype),
                             wide_slots,
                             fp8},
                            threads);
      },
      kw_only(), "c_kv"_a, "k_rope"_a, "norm_weight"_a, "cos_sin"_a, "positions"_a, "kv_cache"_a, "slots"_a,
      "num_tokens"_a, "d_latent"_a, "d_rope"_a, "max_positions"_a, "num_pages"_a, "page_size"_a, "ld_c_kv"_a,
      "ld_k_rope"_a, "page_bytes"_a, "row_bytes"_a, "eps"_a, "c_kv_dtype"_a, "k_rope_dtype"_a, "norm_dtype"_a,
      "cache_dtype"_a, "wide_positions"_a, "wide_slots"_a, "fp8"_a, "interleaved"_a, "threads"_a, release_gil());
  m.def(
      "mla_rope",
      [](address x, address cos_sin, address positions, address out, int64_t num_tokens, int64_t heads, int64_t d_rope,
         int64_t max_positions, int64_t x_stride_t, int64_t x_stride_h, int dtype, bool wide_positions,
         bool interleaved, bool inverse, int threads) {
        const RotationCpu rotation{at<float>(cos_sin), at<void>(positions), max_positions, d_rope,
                                   wide_positions,     interleaved,         inverse};
        mla_rope_cpu({rotation, at<void>(x), at<void>(out), num_tokens, heads, x_stride_t, x_stride_h, Dtype(dtype)},
                     threads);
      },
      kw_only(), "x"_a, "cos_sin"_a, "positions"_a, "out"_a, "num_tokens"_a, "heads"_a, "d_rope"_a, "max_positions"_a,
      "x_stride_t"_a, "x_stride_h"_a, "dtype"_a, "wide_positions"_a, "interleaved"_a, "inverse"_a, "threads"_a,
      release_gil());
}

void bind_moe_gate(py::module_& m) {
  m.def("moe_gate_workspace", &moe_gate_workspace, kw_only(), "num_experts"_a, "num_groups"_a, "top_k"_a, "threads"_a);
  m.def(
      "moe_gate",
      [](address logits, address bias, address mask, address weights, address indices, address workspace,
         int64_t num_tokens, int64_t num_experts, int64_t ld_logits, int top_k, int num_groups, int topk_groups,
         int score, int dtype, bool normalize, float scale, int threads) {
        moe_gate_cpu({at<void>(logits), at<float>(bias), at<bool>(mask), at<float>(weights), at<int64_t>(indices),
                      at<float>(workspace), num_tokens, num_experts, ld_logits, top_k, num_groups, topk_groups,
                      GateScore(score), Dtype(dtype), normalize, scale},
                     threads);
      },
      kw_only(), "logits"_a, "bias"_a, "mask"_a, "weights"_a, "indices"_a, "workspace"_a, "num_tokens"_a,
      "num_experts"_a, "ld_logits"_a, "top_k"_a, "num_groups"_a, "topk_groups"_a, "score"_a, "dtype"_a, "normalize"_a,
      "scale"_a, "threads"_a, release_gil());
}

void bind_moe_gate_backward(py::module_& m) {
  m.def("moe_gate_backward_workspace", &moe_gate_backward_workspace, kw_only(), "num_experts"_a, "top_k"_a,
        "threads"_a);
  m.def(
      "moe_gate_backward",
      [](address grad_weights, address logits, address indices, address grad_logits, address workspace,
         int64_t num_tokens, int64_t num_experts, int64_t ld_logits, int top_k, int score, int dtype, bool wide,
         bool normalize, float scale, int threads) {
        moe_gate_backward_cpu(
            {at<float>(grad_weights), at<void>(logits), at<void>(indices), at<void>(grad_logits), at<float>(workspace),
             num_tokens, num_experts, ld_logits, top_k, GateScore(score), Dtype(dtype), wide, normalize, scale},
            threads);
      },
      kw_only(), "grad_weights"_a, "logits"_a, "indices"_a, "grad_logits"_a, "workspace"_a, "num_tokens"_a,
      "num_experts"_a, "ld_logits"_a, "top_k"_a, "score"_a, "dtype"_a, "wide"_a, "normalize"_a, "scale"_a, "threads"_a,
      release_gil());
}

void bind_moe_sort(py::module_& m) {
  m.def(
      "moe_sort",
      [](address indices, address token_topk_to_pos, address pos_to_token_topk, address expert_offsets,
         address workspace, int64_t num_entries, int64_t num_rows, int64_t expert_begin, int64_t expert_end,
         int64_t alignment, bool wide, int threads) {
        moe_sort_cpu({at<void>(indices), at<int32_t>(token_topk_to_pos), at<int32_t>(pos_to_token_topk),
                      at<int32_t>(expert_offsets), at<int32_t>(workspace), num_entries, num_rows, expert_begin,
                      expert_end, alignment, wide},
                     threads);
      },
      kw_only(), "indices"_a, "token_topk_to_pos"_a, "pos_to_token_topk"_a, "expert_offsets"_a, "workspace"_a,
      "num_entries"_a, "num_rows"_a, "expert_begin"_a, "expert_end"_a, "alignment"_a, "wide"_a, "threads"_a,
      release_gil());
}

void bind_moe_permute(py::module_& m) {
  m.def(
      "moe_permute",
      [](address x, address scale, address pos_to_token_topk, address out, address out_scale, int64_t num_tokens,
         int top_k, int64_t num_rows, int64_t row_bytes, int64_t ldx_bytes, int64_t ld_out_bytes, int64_t scale_columns,
         int64_t scale_stride_t, int64_t scale_stride_s, int64_t out_scale_stride_r, int64_t out_scale_stride_s,
         int threads) {
        moe_permute_cpu({{nullptr, at<int32_t>(pos_to_token_topk), num_tokens, num_rows, top_k},
                         at<void>(x),
                         at<void>(out),
                         at<float>(scale),
                         at<float>(out_scale),
                         row_bytes,
                         scale_columns,
                         ldx_bytes,
                         ld_out_bytes,
                         scale_stride_t,
                         scale_stride_s,
                         out_scale_stride_r,
                         out_scale_stride_s,
                         nullptr},
                        threads);
      },
      kw_only(), "x"_a, "scale"_a, "pos_to_token_topk"_a, "out"_a, "out_scale"_a, "num_tokens"_a, "top_k"_a,
      "num_rows"_a, "row_bytes"_a, "ldx_bytes"_a, "ld_out_bytes"_a, "scale_columns"_a, "scale_stride_t"_a,
      "scale_stride_s"_a, "out_scale_stride_r"_a, "out_scale_stride_s"_a, "threads"_a, release_gil());
  m.def(
      "moe_unpermute",
      [](address y, address token_topk_to_pos, address weights, address out, int64_t num_tokens, int top_k,
         int64_t num_rows, int64_t hidden, int dtype, int64_t ldy, int64_t ld_out, int threads) {
        moe_unpermute_cpu({{at<int32_t>(token_topk_to_pos), nullptr, num_tokens, num_rows, top_k},
                           at<void>(y),
                           at<float>(weights),
                           at<void>(out),
                           hidden,
                           Dtype(dtype),
                           ldy,
                           ld_out,
                           nullptr},
                          threads);
      },
      kw_only(), "y"_a, "token_topk_to_pos"_a, "weights"_a, "out"_a, "num_tokens"_a, "top_k"_a, "num_rows"_a,
      "hidden"_a, "dtype"_a, "ldy"_a, "ld_out"_a, "threads"_a, release_gil());
}

}  // namespace

void bind_cpu(py::module_& module) {
  py::module_ m = module.def_submodule("cpu", "Kernels for CPU memory. `threads` is the caller's thread count.");
  m.def("isa", [] { return name(cpu_isa()); }, "The instruction set in use.");
  bind_fp8_matmul(m);
  bind_fp8_quantize(m);
  bind_grouped_matmul(m);
  bind_merge_states(m);
  bind_mla_cache_write(m);
  bind_mla_decode(m);
  bind_moe_gate(m);
  bind_moe_gate_backward(m);
  bind_moe_permute(m);
  bind_moe_sort(m);
  bind_swiglu(m);
  bind_swiglu_backward(m);
  m.attr("ops") =
      py::make_tuple("fp8_dequantize", "fp8_matmul", "fp8_quantize", "fp8_quantize_both", "grouped_matmul",
                     "merge_states", "mla_cache_write", "mla_decode", "mla_rope", "moe_gate", "moe_gate_backward",
                     "moe_permute", "moe_sort", "moe_unpermute", "swiglu", "swiglu_backward");
}

}  // namespace deepseek_kernels
