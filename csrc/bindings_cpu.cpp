// The Python face of the CPU kernels, `_C.cpu`: numbers in, a result out. deepseek_kernels/_C.pyi says what they mean.
#include "bindings_cpu.h"

#include "moe_permute/cpu.h"

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

void bind_moe_permute(py::module_& m) {
  m.def(
      "moe_permute",
      [](address x, address scale, address pos_to_token_topk, address out, address out_scale, int64_t num_tokens,
         int top_k, int64_t num_rows, int64_t row_bytes, int64_t ldx_bytes, int64_t ld_out_bytes, int64_t scale_columns,
         int64_t scale_stride_t, int64_t scale_stride_s, int64_t out_scale_stride_r, int64_t out_scale_stride_s,
         int threads) {
        moe_permute_cpu({{nullptr, at<int32_t>(pos_to_token_topk), num_tokens, num_rows, top_k}, at<void>(x),
                         at<void>(out), at<float>(scale), at<float>(out_scale), row_bytes, scale_columns, ldx_bytes,
                         ld_out_bytes, scale_stride_t, scale_stride_s, out_scale_stride_r, out_scale_stride_s, nullptr},
                        threads);
      },
      kw_only(), "x"_a, "scale"_a, "pos_to_token_topk"_a, "out"_a, "out_scale"_a, "num_tokens"_a, "top_k"_a,
      "num_rows"_a, "row_bytes"_a, "ldx_bytes"_a, "ld_out_bytes"_a, "scale_columns"_a, "scale_stride_t"_a,
      "scale_stride_s"_a, "out_scale_stride_r"_a, "out_scale_stride_s"_a, "threads"_a, release_gil());
  m.def(
      "moe_unpermute",
      [](address y, address token_topk_to_pos, address weights, address out, int64_t num_tokens, int top_k,
         int64_t num_rows, int64_t hidden, int dtype, int64_t ldy, int64_t ld_out, int threads) {
        moe_unpermute_cpu({{at<int32_t>(token_topk_to_pos), nullptr, num_tokens, num_rows, top_k}, at<void>(y),
                           at<float>(weights), at<void>(out), hidden, Dtype(dtype), ldy, ld_out, nullptr},
                          threads);
      },
      kw_only(), "y"_a, "token_topk_to_pos"_a, "weights"_a, "out"_a, "num_tokens"_a, "top_k"_a, "num_rows"_a,
      "hidden"_a, "dtype"_a, "ldy"_a, "ld_out"_a, "threads"_a, release_gil());
}

}  // namespace

void bind_cpu(py::module_& module) {
  py::module_ m = module.def_submodule("cpu", "Kernels for CPU memory. `threads` is the caller's thread count.");
  m.def("isa", [] { return name(cpu_isa()); }, "The instruction set in use.");
  bind_moe_permute(m);
  m.attr("ops") = py::make_tuple("moe_permute", "moe_unpermute");
}

}  // namespace deepseek_kernels
