// The Python face of the launchers: numbers in, a launch out. deepseek_kernels/_C.pyi says what they mean.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>

#include "bindings_cpu.h"

#if defined(DEEPSEEK_KERNELS_CUDA)
#include <cuda_runtime_api.h>

#include "fp8_grouped_matmul/params.h"
#include "fp8_matmul/params.h"
#include "fp8_quantize/params.h"
#include "grouped_matmul/params.h"
#include "mla_decode/params.h"
#include "moe_gate/params.h"
#include "moe_permute/params.h"
#include "moe_sort/params.h"
#endif

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

[[maybe_unused]] py::tuple split(const std::string& list) {
  py::list words;
  std::istringstream stream(list);
  for (std::string word; std::getline(stream, word, ',');) words.append(word);
  return py::tuple(words);
}

#if defined(DEEPSEEK_KERNELS_CUDA)
void bind_fp8_quantize(py::module_& m) {
  m.def(
      "fp8_quantize",
      [](address x, address q, address scale, int64_t m, int64_t k, int dtype, int block_m, int block_k, int64_t ldx,
         int64_t ldq, int64_t scale_stride_m, int64_t scale_stride_k, bool pow2_scale, address stream) {
        launch_fp8_quantize({at<void>(x), at<void>(q), at<float>(scale), m, k, Dtype(dtype), block_m, block_k, ldx, ldq,
                             scale_stride_m, scale_stride_k, pow2_scale, at<void>(stream)});
      },
      kw_only(), "x"_a, "q"_a, "scale"_a, "m"_a, "k"_a, "dtype"_a, "block_m"_a, "block_k"_a, "ldx"_a, "ldq"_a,
      "scale_stride_m"_a, "scale_stride_k"_a, "pow2_scale"_a, "stream"_a, release_gil());
  m.def(
      "fp8_quantize_both",
      [](address x, address expert_offsets, address q, address scale, address q_t, address scale_t, int64_t m,
         int64_t k, int64_t width, int64_t row_tiles, int num_experts, int dtype, int64_t ldx, int64_t ldq,
         int64_t ldq_t, int64_t scale_stride_m, int64_t scale_stride_k, int64_t scale_t_stride_k,
         int64_t scale_t_stride_w, bool pow2_scale, address stream) {
        launch_fp8_quantize_both({at<void>(x),
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
                                  at<void>(stream)});
      },
      kw_only(), "x"_a, "expert_offsets"_a, "q"_a, "scale"_a, "q_t"_a, "scale_t"_a, "m"_a, "k"_a, "width"_a,
      "row_tiles"_a, "num_experts"_a, "dtype"_a, "ldx"_a, "ldq"_a, "ldq_t"_a, "scale_stride_m"_a, "scale_stride_k"_a,
      "scale_t_stride_k"_a, "scale_t_stride_w"_a, "pow2_scale"_a, "stream"_a, release_gil());
  m.def(
      "fp8_dequantize",
      [](address q, address scale, address out, int64_t m, int64_t k, int64_t ldq, int64_t ld_out,
         int64_t scale_stride_m, int64_t scale_stride_k, int block_m, int block_k, int dtype, address stream) {
        launch_fp8_dequantize({at<void>(q), at<float>(scale), at<void>(out), m, k, ldq, ld_out, scale_stride_m,
                               scale_stride_k, block_m, block_k, Dtype(dtype), at<void>(stream)});
      },
      kw_only(), "q"_a, "scale"_a, "out"_a, "m"_a, "k"_a, "ldq"_a, "ld_out"_a, "scale_stride_m"_a, "scale_stride_k"_a,
      "block_m"_a, "block_k"_a, "dtype"_a, "stream"_a, release_gil());
}

void bind_moe_gate(py::module_& m) {
  m.def(
      "moe_gate",
      [](address logits, address bias, address mask, address weights, address indices, int64_t num_tokens,
         int64_t ld_logits, int num_experts, int top_k, int num_groups, int topk_groups, int score, int dtype,
         bool normalize, float scale, int group_lanes, int per_lane, int warps, int ctas, address stream) {
        launch_moe_gate({at<void>(logits),
                         at<float>(bias),
                         at<uint8_t>(mask),
                         at<float>(weights),
                         at<int64_t>(indices),
                         num_tokens,
                         ld_logits,
                         num_experts,
                         top_k,
                         num_groups,
                         topk_groups,
                         GateScore(score),
                         Dtype(dtype),
                         normalize,
                         scale,
                         group_lanes,
                         per_lane,
                         warps,
                         ctas,
                         at<void>(stream)});
      },
      kw_only(), "logits"_a, "bias"_a, "mask"_a, "weights"_a, "indices"_a, "num_tokens"_a, "ld_logits"_a,
      "num_experts"_a, "top_k"_a, "num_groups"_a, "topk_groups"_a, "score"_a, "dtype"_a, "normalize"_a, "scale"_a,
      "group_lanes"_a, "per_lane"_a, "warps"_a, "ctas"_a, "stream"_a, release_gil());
}

void bind_moe_permute(py::module_& m) {
  m.def(
      "moe_permute",
      [](address x, address scale, address token_topk_to_pos, address pos_to_token_topk, address out, address out_scale,
         int64_t num_tokens, int top_k, int64_t num_rows, int64_t row_bytes, int64_t ldx_bytes, int64_t ld_out_bytes,
         int64_t scale_columns, int64_t scale_stride_t, int64_t scale_stride_s, int64_t out_scale_stride_r,
         int64_t out_scale_stride_s, address stream) {
        launch_moe_permute(
            {{at<int32_t>(token_topk_to_pos), at<int32_t>(pos_to_token_topk), num_tokens, num_rows, top_k},
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
             at<void>(stream)});
      },
      kw_only(), "x"_a, "scale"_a, "token_topk_to_pos"_a, "pos_to_token_topk"_a, "out"_a, "out_scale"_a, "num_tokens"_a,
      "top_k"_a, "num_rows"_a, "row_bytes"_a, "ldx_bytes"_a, "ld_out_bytes"_a, "scale_columns"_a, "scale_stride_t"_a,
      "scale_stride_s"_a, "out_scale_stride_r"_a, "out_scale_stride_s"_a, "stream"_a, release_gil());
  m.def(
      "moe_permute_quantize",
      [](address x, address token_topk_to_pos, address pos_to_token_topk, address out, address out_scale,
         int64_t num_tokens, int top_k, int64_t num_rows, int64_t hidden, int dtype, int64_t ldx, int64_t ld_out,
         int64_t out_scale_stride_r, int64_t out_scale_stride_s, bool pow2_scale, address stream) {
        launch_moe_permute_quantize(
            {{at<int32_t>(token_topk_to_pos), at<int32_t>(pos_to_token_topk), num_tokens, num_rows, top_k},
             at<void>(x),
             at<void>(out),
             at<float>(out_scale),
             hidden,
             Dtype(dtype),
             ldx,
             ld_out,
             out_scale_stride_r,
             out_scale_stride_s,
             pow2_scale,
             at<void>(stream)});
      },
      kw_only(), "x"_a, "token_topk_to_pos"_a, "pos_to_token_topk"_a, "out"_a, "out_scale"_a, "num_tokens"_a, "top_k"_a,
      "num_rows"_a, "hidden"_a, "dtype"_a, "ldx"_a, "ld_out"_a, "out_scale_stride_r"_a, "out_scale_stride_s"_a,
      "pow2_scale"_a, "stream"_a, release_gil());
  m.def(
      "moe_unpermute",
      [](address y, address token_topk_to_pos, address weights, address out, int64_t num_tokens, int top_k,
         int64_t num_rows, int64_t hidden, int dtype, int64_t ldy, int64_t ld_out, address stream) {
        launch_moe_unpermute({{at<int32_t>(token_topk_to_pos), nullptr, num_tokens, num_rows, top_k},
                              at<void>(y),
                              at<float>(weights),
                              at<void>(out),
                              hidden,
                              Dtype(dtype),
                              ldy,
                              ld_out,
                              at<void>(stream)});
      },
      kw_only(), "y"_a, "token_topk_to_pos"_a, "weights"_a, "out"_a, "num_tokens"_a, "top_k"_a, "num_rows"_a,
      "hidden"_a, "dtype"_a, "ldy"_a, "ld_out"_a, "stream"_a, release_gil());
}

void bind_moe_sort(py::module_& m) {
  m.def(
      "moe_sort",
      [](address indices, address token_topk_to_pos, address pos_to_token_topk, address expert_offsets, address counts,
         int64_t num_entries, int64_t num_rows, int64_t expert_begin, int num_local, uint32_t alignment, bool wide,
         int warps, int rounds, int ctas, bool dependent, address stream) {
        launch_moe_sort({at<void>(indices), at<int32_t>(token_topk_to_pos), at<int32_t>(pos_to_token_topk),
                         at<int32_t>(expert_offsets), at<int32_t>(counts), num_entries, num_rows, expert_begin,
                         num_local, alignment, wide, warps, rounds, ctas, dependent, at<void>(stream)});
      },
      kw_only(), "indices"_a, "token_topk_to_pos"_a, "pos_to_token_topk"_a, "expert_offsets"_a, "counts"_a,
      "num_entries"_a, "num_rows"_a, "expert_begin"_a, "num_local"_a, "alignment"_a, "wide"_a, "warps"_a, "rounds"_a,
      "ctas"_a, "dependent"_a, "stream"_a, release_gil());
}

#if defined(DEEPSEEK_KERNELS_SM90A)
void bind_fp8_matmul(py::module_& m) {
  m.def(
      "fp8_matmul",
      [](address a, address scale_a, address b, address scale_b, address bias, address d, int64_t m, int64_t n,
         int64_t k, int64_t lda, int64_t ldb, int64_t ldd, int64_t scale_a_stride_m, int64_t scale_a_stride_k,
         int64_t scale_b_stride_n, int64_t scale_b_stride_k, int out_dtype, int bias_dtype, bool accumulate, int tile_m,
         int tile_n, int cluster_m, int cluster_n, int cluster_k, bool swap, int raster, int ctas, address stream) {
        launch_fp8_matmul({at<void>(a),
                           at<float>(scale_a),
                           at<void>(b),
                           at<float>(scale_b),
                           at<void>(bias),
                           at<void>(d),
                           m,
                           n,
                           k,
                           lda,
                           ldb,
                           ldd,
                           scale_a_stride_m,
                           scale_a_stride_k,
                           scale_b_stride_n,
                           scale_b_stride_k,
                           Dtype(out_dtype),
                           Dtype(bias_dtype),
                           accumulate,
                           tile_m,
                           tile_n,
                           cluster_m,
                           cluster_n,
                           cluster_k,
                           swap,
                           raster,
                           ctas,
                           at<void>(stream)});
      },
      kw_only(), "a"_a, "scale_a"_a, "b"_a, "scale_b"_a, "bias"_a, "d"_a, "m"_a, "n"_a, "k"_a, "lda"_a, "ldb"_a,
      "ldd"_a, "scale_a_stride_m"_a, "scale_a_stride_k"_a, "scale_b_stride_n"_a, "scale_b_stride_k"_a, "out_dtype"_a,
      "bias_dtype"_a, "accumulate"_a, "tile_m"_a, "tile_n"_a, "cluster_m"_a, "cluster_n"_a, "cluster_k"_a, "swap"_a,
      "raster"_a, "ctas"_a, "stream"_a, release_gil());
  py::list instances;
  for (const Fp8MatmulInstance& i : fp8_matmul_instances())
    instances.append(
        py::make_tuple(int(i.out_dtype), i.tile_m, i.tile_n, i.cluster_m, i.cluster_n, i.swap, i.cluster_k, i.stages));
  m.attr("fp8_matmul_instances") = py::tuple(instances);
}

void bind_fp8_grouped_matmul(py::module_& m) {
  m.def(
      "fp8_grouped_matmul",
      [](address a, address scale_a, address b, address scale_b, address groups, address d, int64_t num_rows, int64_t n,
         int64_t k, int num_groups, bool masked, int64_t lda, int64_t ldb, int64_t a_group_rows, int64_t b_group_rows,
         int64_t scale_a_stride_g, int64_t scale_a_stride_m, int64_t scale_a_stride_k, int64_t scale_b_stride_g,
         int64_t scale_b_stride_n, int64_t scale_b_stride_k, int out_dtype, int tile_m, int tile_n, int cluster_m,
         int cluster_n, bool swap, int raster, int ctas, address stream) {
        launch_fp8_grouped_matmul({at<void>(a),
                                   at<float>(scale_a),
                                   at<void>(b),
                                   at<float>(scale_b),
                                   at<int32_t>(groups),
                                   at<void>(d),
                                   num_rows,
                                   n,
                                   k,
                                   num_groups,
                                   masked,
                                   lda,
                                   ldb,
                                   a_group_rows,
                                   b_group_rows,
                                   scale_a_stride_g,
                                   scale_a_stride_m,
                                   scale_a_stride_k,
                                   scale_b_stride_g,
                                   scale_b_stride_n,
                                   scale_b_stride_k,
                                   Dtype(out_dtype),
                                   tile_m,
                                   tile_n,
                                   cluster_m,
                                   cluster_n,
                                   swap,
                                   raster,
                                   ctas,
                                   at<void>(stream)});
      },
      kw_only(), "a"_a, "scale_a"_a, "b"_a, "scale_b"_a, "groups"_a, "d"_a, "num_rows"_a, "n"_a, "k"_a, "num_groups"_a,
      "masked"_a, "lda"_a, "ldb"_a, "a_group_rows"_a, "b_group_rows"_a, "scale_a_stride_g"_a, "scale_a_stride_m"_a,
      "scale_a_stride_k"_a, "scale_b_stride_g"_a, "scale_b_stride_n"_a, "scale_b_stride_k"_a, "out_dtype"_a, "tile_m"_a,
      "tile_n"_a, "cluster_m"_a, "cluster_n"_a, "swap"_a, "raster"_a, "ctas"_a, "stream"_a, release_gil());
  py::list instances;
  for (const Fp8GroupedMatmulInstance& i : fp8_grouped_matmul_instances())
    instances.append(py::make_tuple(int(i.out_dtype), i.tile_m, i.tile_n, i.cluster_m, i.cluster_n, i.swap, i.stages));
  m.attr("fp8_grouped_matmul_instances") = py::tuple(instances);
}

void bind_fp8_grouped_matmul_wgrad(py::module_& m) {
  m.def(
      "fp8_grouped_matmul_wgrad",
      [](address grad_t, address scale_grad, address a_t, address scale_a, address expert_offsets, address d, int64_t n,
         int64_t k, int64_t columns, int num_experts, int64_t ld_grad, int64_t ld_a, int64_t ldd, int64_t d_stride_e,
         int64_t scale_grad_stride_n, int64_t scale_grad_stride_c, int64_t scale_a_stride_k, int64_t scale_a_stride_c,
         bool accumulate, int tile_m, int tile_n, int cluster_m, int cluster_n, int raster, int ctas, address stream) {
        launch_fp8_grouped_wgrad({at<void>(grad_t),
                                  at<float>(scale_grad),
                                  at<void>(a_t),
                                  at<float>(scale_a),
                                  at<int32_t>(expert_offsets),
                                  at<float>(d),
                                  n,
                                  k,
                                  columns,
                                  num_experts,
                                  ld_grad,
                                  ld_a,
                                  ldd,
                                  d_stride_e,
                                  scale_grad_stride_n,
                                  scale_grad_stride_c,
                                  scale_a_stride_k,
                                  scale_a_stride_c,
                                  accumulate,
                                  tile_m,
                                  tile_n,
                                  cluster_m,
                                  cluster_n,
                                  raster,
                                  ctas,
                                  at<void>(stream)});
      },
      kw_only(), "grad_t"_a, "scale_grad"_a, "a_t"_a, "scale_a"_a, "expert_offsets"_a, "d"_a, "n"_a, "k"_a, "columns"_a,
      "num_experts"_a, "ld_grad"_a, "ld_a"_a, "ldd"_a, "d_stride_e"_a, "scale_grad_stride_n"_a, "scale_grad_stride_c"_a,
      "scale_a_stride_k"_a, "scale_a_stride_c"_a, "accumulate"_a, "tile_m"_a, "tile_n"_a, "cluster_m"_a, "cluster_n"_a,
      "raster"_a, "ctas"_a, "stream"_a, release_gil());
  py::list instances;
  for (const Fp8GroupedWgradInstance& i : fp8_grouped_wgrad_instances())
    instances.append(py::make_tuple(i.tile_m, i.tile_n, i.cluster_m, i.cluster_n, i.stages));
  m.attr("fp8_grouped_matmul_wgrad_instances") = py::tuple(instances);
}

void bind_grouped_matmul(py::module_& m) {
  m.def(
      "grouped_matmul",
      [](address a, address b, address groups, address d, int64_t num_rows, int64_t n, int64_t k, int num_groups,
         int64_t lda, int64_t ldb, int64_t b_stride_g, bool transposed, int tile_m, int cluster_n, int raster, int ctas,
         address stream) {
        launch_grouped_matmul({at<void>(a), at<void>(b), at<int32_t>(groups), at<void>(d), num_rows, n, k, num_groups,
                               lda, ldb, b_stride_g, transposed, tile_m, cluster_n, raster, ctas, at<void>(stream)});
      },
      kw_only(), "a"_a, "b"_a, "groups"_a, "d"_a, "num_rows"_a, "n"_a, "k"_a, "num_groups"_a, "lda"_a, "ldb"_a,
      "b_stride_g"_a, "transposed"_a, "tile_m"_a, "cluster_n"_a, "raster"_a, "ctas"_a, "stream"_a, release_gil());
  py::list instances;
  for (const GroupedMatmulInstance& i : grouped_matmul_instances())
    instances.append(py::make_tuple(i.tile_m, i.tile_n, i.cluster_n, i.transposed, i.stages));
  m.attr("grouped_matmul_instances") = py::tuple(instances);
}

void bind_grouped_matmul_wgrad(py::module_& m) {
  m.def(
      "grouped_matmul_wgrad",
      [](address grad, address a, address groups, address d, int64_t num_rows, int64_t n, int64_t k, int num_groups,
         int64_t ld_grad, int64_t lda, int out_dtype, int tile_n, int cluster_m, int raster, int ctas, address stream) {
        launch_grouped_wgrad({at<void>(grad), at<void>(a), at<int32_t>(groups), at<void>(d), num_rows, n, k, num_groups,
                              ld_grad, lda, Dtype(out_dtype), tile_n, cluster_m, raster, ctas, at<void>(stream)});
      },
      kw_only(), "grad"_a, "a"_a, "groups"_a, "d"_a, "num_rows"_a, "n"_a, "k"_a, "num_groups"_a, "ld_grad"_a, "lda"_a,
      "out_dtype"_a, "tile_n"_a, "cluster_m"_a, "raster"_a, "ctas"_a, "stream"_a, release_gil());
  py::list instances;
  for (const GroupedWgradInstance& i : grouped_wgrad_instances())
    instances.append(py::make_tuple(int(i.out_dtype), i.tile_m, i.tile_n, i.cluster_m, i.stages));
  m.attr("grouped_matmul_wgrad_instances") = py::tuple(instances);
}

void bind_mla_decode(py::module_& m) {
  m.def(
      "mla_decode",
      [](address q, address kv_cache, address block_table, address seqlens_kv, address sink, address out, address lse,
         address part_out, address part_lse, address heads, int b, int s_q, int h_q, int num_pages, int page_size,
         int max_pages, int64_t q_stride_b, int64_t q_stride_row, int64_t page_stride, int64_t row_stride, float scale,
         bool causal, int dtype, int parts, int cluster, address stream) {
        launch_mla_decode({at<void>(q),
                           at<void>(kv_cache),
                           at<int32_t>(block_table),
                           at<int32_t>(seqlens_kv),
                           at<float>(sink),
                           at<void>(out),
                           at<float>(lse),
                           at<float>(part_out),
                           at<float>(part_lse),
                           at<int32_t>(heads),
                           b,
                           s_q,
                           h_q,
                           num_pages,
                           page_size,
                           max_pages,
                           q_stride_b,
                           q_stride_row,
                           page_stride,
                           row_stride,
                           scale,
                           causal,
                           Dtype(dtype),
                           parts,
                           cluster,
                           at<void>(stream)});
      },
      kw_only(), "q"_a, "kv_cache"_a, "block_table"_a, "seqlens_kv"_a, "sink"_a, "out"_a, "lse"_a, "part_out"_a,
      "part_lse"_a, "heads"_a, "b"_a, "s_q"_a, "h_q"_a, "num_pages"_a, "page_size"_a, "max_pages"_a, "q_stride_b"_a,
      "q_stride_row"_a, "page_stride"_a, "row_stride"_a, "scale"_a, "causal"_a, "dtype"_a, "parts"_a, "cluster"_a,
      "stream"_a, release_gil());
}
#endif
#endif

void bind(py::module_& m) {
  m.doc() = "Raw addresses, sizes, strides in elements, a stream. deepseek_kernels/_C.pyi is the contract.";
  m.attr("FP32") = 0;
  m.attr("FP16") = 1;
  m.attr("BF16") = 2;
#if defined(DEEPSEEK_KERNELS_CUDA)
  bind_fp8_quantize(m);
  bind_moe_gate(m);
  bind_moe_permute(m);
  bind_moe_sort(m);
  std::string ops =
      "fp8_dequantize,fp8_quantize,fp8_quantize_both,moe_gate,moe_permute,moe_permute_quantize,moe_sort,moe_unpermute";
#if defined(DEEPSEEK_KERNELS_SM90A)
  bind_fp8_matmul(m);
  bind_fp8_grouped_matmul(m);
  bind_fp8_grouped_matmul_wgrad(m);
  bind_grouped_matmul(m);
  bind_grouped_matmul_wgrad(m);
  bind_mla_decode(m);
  ops += ",fp8_matmul,fp8_grouped_matmul,fp8_grouped_matmul_wgrad,grouped_matmul,grouped_matmul_wgrad,mla_decode";
#endif
  m.attr("ops") = split(ops);
  m.attr("architectures") = split(DEEPSEEK_KERNELS_ARCHS);
  m.attr("cuda_version") = CUDART_VERSION;
#else
  m.attr("ops") = py::tuple();
  m.attr("architectures") = py::tuple();
  m.attr("cuda_version") = 0;
#endif
}

}  // namespace
}  // namespace deepseek_kernels

#if !defined(DEEPSEEK_KERNELS_MODEL)  // tests/hopper_model/module.cpp includes this file and adds to the module
PYBIND11_MODULE(_C, m) {
  deepseek_kernels::bind(m);
  deepseek_kernels::bind_cpu(m);
}
#endif
