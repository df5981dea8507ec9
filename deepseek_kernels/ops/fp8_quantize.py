"""`fp8_quantize`, `fp8_quantize_both` and `fp8_dequantize`: block-scaled e4m3, and back."""

import torch

from ..plan import fp8_quantize as plan
from ..reference import fp8_quantize as reference
from ..shapes import BLOCK, GRANULARITIES, align_up, ceil_div
from . import _allocate, _extension
from . import _checks as checks
from ._registry import register

_WIDE = (torch.bfloat16, torch.float16, torch.float32)
_LAYOUTS = ("row", "mn_major")


def fp8_quantize(
    x: torch.Tensor, granularity: str = "1x128", *, pow2_scale: bool = False, scale_layout: str = "row"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to e4m3 with one scale per block: `scale = max(amax, 1e-4) / 448`, `q = saturate(x / scale)`.

    Args:
        x: [m, k] bf16, fp16 or fp32, any strides (a copy is made unless the last dimension is contiguous). With 1x128
            and row scales also [..., k].
        granularity: "1x128" (activations), "128x128" (weights) or "128x1" (activations for the weight gradient).
            Blocks at the edges may be partial.
        pow2_scale: round each scale up to a power of two.
        scale_layout: "row" gives contiguous scales; "mn_major" scales of strides (1, align(rows, 4)), the layout that
            block-scaled matmuls on Hopper read.

    Returns:
        q e4m3 of x's shape, contiguous; scale fp32 [ceil(m/rows), ceil(k/columns)] by which q is multiplied to
        dequantise.

    Raises:
        ValueError, TypeError: naming the argument.

    A NaN makes its block's scale and values NaN. An infinity makes the scale infinite, finite values 0 and infinite
    ones NaN. Not differentiable. Semantics of DeepGEMM's per_token_cast_to_fp8 and per_block_cast_to_fp8, but with a
    true division and saturation.
    """
    if x.dim() > 2 and granularity == "1x128" and scale_layout == "row":
        q, scale = torch.ops.deepseek_kernels.fp8_quantize(x.flatten(0, -2), granularity, pow2_scale, scale_layout)
        return q.view(x.shape), scale.view(*x.shape[:-1], scale.shape[-1])
    return torch.ops.deepseek_kernels.fp8_quantize(x, granularity, pow2_scale, scale_layout)


def fp8_quantize_both(
    x: torch.Tensor,
    expert_offsets: torch.Tensor | None = None,
    *,
    pow2_scale: bool = False,
    scale_layout: str = "row",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both quantisations that training needs of one operand, in one pass over it: 1x128 as it lies, and 128x1
    transposed, so that the tokens are the contiguous dimension a weight gradient sums over.

    `fp8_matmul(grad_t, scale_grad_t, x_t, scale_x_t, out_dtype=torch.float32)` of the transposed outputs for grad
    [m, n] and x [m, k] is the weight gradient [n, k], for any number of tokens m (n a multiple of 8).

    Args:
        x: [m, k] bf16, fp16 or fp32, any strides (a copy is made unless the last dimension is contiguous).
        expert_offsets: int32 [E + 1] on the device, as `moe_sort` makes them: each expert's tokens then begin a column
            of q_t of their own, so that no scale is shared between experts. Offsets outside [0, m] are clamped to it,
            and one that decreases is raised to the one before.
        pow2_scale, scale_layout: as for `fp8_quantize`, of both scales.

    Returns:
        q e4m3 [m, k] and scale fp32 [m, ceil(k/128)], as `fp8_quantize(x)` gives them, rows of no expert included.
        q_t e4m3 [k, w], contiguous, and scale_t fp32 [k, w/128]. Without experts w is m rounded up to a multiple of 128
        and column t is token t. With them, w is `padded_columns(m, E)`, and the tokens of expert e are the columns from
        `128 * sum(ceil(rows_i / 128) for i < e)`. Columns of no token are zeros quantised with their block: 0, or NaN
        beside a NaN.

    Raises:
        ValueError, TypeError: naming the argument. NotImplementedError: on backward.

    Values are those of `fp8_quantize`, NaN and Inf included. Not differentiable.
    """
    return torch.ops.deepseek_kernels.fp8_quantize_both(x, expert_offsets, pow2_scale, scale_layout)


def fp8_dequantize(
    q: torch.Tensor, scale: torch.Tensor, granularity: str = "1x128", *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Multiply each e4m3 value by the scale of its block, in fp32.

    Args:
        q: [m, k] e4m3, any strides.
        scale: fp32 [ceil(m/rows), ceil(k/columns)], any strides.
        granularity: rows x columns that share a scale: "1x128", "128x128" or "128x1".
        out_dtype: bf16, fp16 or fp32 (None).

    Returns:
        [m, k] of out_dtype, contiguous.

    Raises:
        ValueError, TypeError: naming the argument.

    Not differentiable.
    """
    return torch.ops.deepseek_kernels.fp8_dequantize(q, scale, granularity, out_dtype)


def _check_quantize(x, granularity, pow2_scale, scale_layout) -> None:
    checks.tensor("fp8_quantize", "x", x, dtype=_WIDE, shape=(None, None))
    checks.one_of("fp8_quantize", "granularity", granularity, tuple(GRANULARITIES))
    checks.one_of("fp8_quantize", "scale_layout", scale_layout, _LAYOUTS)


def _quantize_problem(x, granularity, pow2_scale, scale_layout) -> plan.Problem:
    return plan.Problem("quantize", x.shape[0], x.shape[1], granularity, x.element_size())


def _quantize_outputs(empty, x, granularity, scale_layout):
    """(q, scale) made by `empty(shape, dtype, device)`."""
    scale_m, scale_k = plan.scale_shape(x.shape[0], x.shape[1], granularity)
    return empty(x.shape, checks.FP8, x.device), _scale(empty, scale_m, scale_k, x.device, scale_layout)


def _scale(empty, rows, columns, device, scale_layout):
    if scale_layout == "row":
        return empty((rows, columns), torch.float32, device)
    return empty((columns, align_up(rows, 4)), torch.float32, device).t()[:rows]


def _quantize_fake(x, granularity, pow2_scale, scale_layout):
    return _quantize_outputs(_fake_empty(x), x, granularity, scale_layout)


def _fake_empty(x):
    def empty(shape, dtype, device):
        return x.new_empty(shape, dtype=dtype)

    return empty


def _quantize_triton(config, x, granularity, pow2_scale, scale_layout):
    from ..triton_kernels import fp8_quantize as kernel

    q, scale = _quantize_outputs(_allocate.empty, x, granularity, scale_layout)
    if q.numel():
        kernel.quantize(config, *GRANULARITIES[granularity], pow2_scale, checks.rows(x), q, scale)
    return q, scale


def _quantize_compiled(module, last, x, granularity, pow2_scale, scale_layout):
    """`last`: the stream or the thread count."""
    q, scale = _quantize_outputs(_allocate.empty, x, granularity, scale_layout)
    if q.numel() == 0:
        return q, scale
    x = checks.rows(x)
    block_m, block_k = GRANULARITIES[granularity]
    module.fp8_quantize(
        x=_extension.address(x), q=_extension.address(q), scale=_extension.address(scale),
        m=x.shape[0], k=x.shape[1], dtype=_extension.dtype_code(x.dtype), block_m=block_m, block_k=block_k,
        ldx=x.stride(0), ldq=q.stride(0), scale_stride_m=scale.stride(0), scale_stride_k=scale.stride(1),
        pow2_scale=pow2_scale, **last,
    )  # fmt: skip
    return q, scale


def _quantize_cuda(config, x, *args):
    return _quantize_compiled(_extension.module(), {"stream": _extension.stream(x)}, x, *args)


def _quantize_cpu(config, *args):
    return _quantize_compiled(_extension.cpu(), {"threads": torch.get_num_threads()}, *args)


def _check_both(x, expert_offsets, pow2_scale, scale_layout) -> None:
    op = "fp8_quantize_both"
    checks.tensor(op, "x", x, dtype=_WIDE, shape=(None, None))
    checks.one_of(op, "scale_layout", scale_layout, _LAYOUTS)
    if expert_offsets is not None:
        checks.tensor(
            op, "expert_offsets", expert_offsets, dtype=torch.int32, shape=(None,), device=x.device, contiguous=True
        )
        checks.at_least(op, "expert_offsets: length", expert_offsets.shape[0], 1)


def _check_both_values(x, expert_offsets, pow2_scale, scale_layout) -> None:
    checks.offsets("fp8_quantize_both", "expert_offsets", expert_offsets, x.shape[0])


def _both_problem(x, expert_offsets, pow2_scale, scale_layout) -> plan.Problem:
    num_experts = None if expert_offsets is None else expert_offsets.shape[0] - 1
    return plan.Problem("both", x.shape[0], x.shape[1], "1x128", x.element_size(), num_experts)


def _both_outputs(empty, problem, device, scale_layout):
    """(q, scale, q_t, scale_t) made by `empty(shape, dtype, device)`."""
    m, k, width = problem.m, problem.k, problem.width
    return (
        empty((m, k), checks.FP8, device),
        _scale(empty, m, ceil_div(k, BLOCK), device, scale_layout),
        empty((k, width), checks.FP8, device),
        _scale(empty, k, width // BLOCK, device, scale_layout),
    )


def _both_fake(x, expert_offsets, pow2_scale, scale_layout):
    problem = _both_problem(x, expert_offsets, pow2_scale, scale_layout)
    return _both_outputs(_fake_empty(x), problem, x.device, scale_layout)


def _both_triton(config, x, expert_offsets, pow2_scale, scale_layout):
    from ..triton_kernels import fp8_quantize as kernel

    problem = _both_problem(x, expert_offsets, pow2_scale, scale_layout)
    outputs = _both_outputs(_allocate.empty, problem, x.device, scale_layout)
    if x.numel():
        kernel.quantize_both(config, problem.row_tiles, pow2_scale, checks.rows(x), expert_offsets, *outputs)
    return outputs


def _both_compiled(module, last, x, expert_offsets, pow2_scale, scale_layout):
    """`last`: the stream or the thread count."""
    problem = _both_problem(x, expert_offsets, pow2_scale, scale_layout)
    outputs = _both_outputs(_allocate.empty, problem, x.device, scale_layout)
    if x.numel() == 0:
        return outputs
    q, scale, q_t, scale_t = outputs
    x = checks.rows(x)
    module.fp8_quantize_both(
        x=_extension.address(x), expert_offsets=_extension.address(expert_offsets), q=_extension.address(q),
        scale=_extension.address(scale), q_t=_extension.address(q_t), scale_t=_extension.address(scale_t),
        m=problem.m, k=problem.k, width=problem.width, row_tiles=problem.row_tiles,
        num_experts=problem.num_experts or 0, dtype=_extension.dtype_code(x.dtype), ldx=x.stride(0), ldq=q.stride(0),
        ldq_t=q_t.stride(0), scale_stride_m=scale.stride(0), scale_stride_k=scale.stride(1),
        scale_t_stride_k=scale_t.stride(0), scale_t_stride_w=scale_t.stride(1), pow2_scale=pow2_scale, **last,
    )  # fmt: skip
    return outputs


def _both_cuda(config, x, *args):
    return _both_compiled(_extension.module(), {"stream": _extension.stream(x)}, x, *args)


def _both_cpu(config, *args):
    return _both_compiled(_extension.cpu(), {"threads": torch.get_num_threads()}, *args)


def _check_dequantize(q, scale, granularity, out_dtype) -> None:
    op = "fp8_dequantize"
    checks.one_of(op, "granularity", granularity, tuple(GRANULARITIES))
    checks.one_of(op, "out_dtype", out_dtype, (None, *_WIDE))
    checks.tensor(op, "q", q, dtype=checks.FP8, shape=(None, None))
    shape = plan.scale_shape(q.shape[0], q.shape[1], granularity)
    checks.tensor(op, "scale", scale, dtype=torch.float32, shape=shape, device=q.device)


def _dequantize_problem(q, scale, granularity, out_dtype) -> plan.Problem:
    return plan.Problem("dequantize", q.shape[0], q.shape[1], granularity, (out_dtype or torch.float32).itemsize)


def _dequantize_fake(q, scale, granularity, out_dtype):
    return q.new_empty(q.shape, dtype=out_dtype or torch.float32)


def _dequantize_triton(config, q, scale, granularity, out_dtype):
    from ..triton_kernels import fp8_quantize as kernel

    out = _allocate.empty(q.shape, out_dtype or torch.float32, q.device)
    if out.numel():
        kernel.dequantize(config, *GRANULARITIES[granularity], checks.rows(q), scale, out)
    return out


def _dequantize_compiled(module, last, q, scale, granularity, out_dtype):
    """`last`: the stream or the thread count."""
    out = _allocate.empty(q.shape, out_dtype or torch.float32, q.device)
    if out.numel() == 0:
        return out
    q = checks.rows(q)
    block_m, block_k = GRANULARITIES[granularity]
    module.fp8_dequantize(
        q=_extension.address(q), scale=_extension.address(scale), out=_extension.address(out),
        m=q.shape[0], k=q.shape[1], ldq=q.stride(0), ld_out=out.stride(0), scale_stride_m=scale.stride(0),
        scale_stride_k=scale.stride(1), block_m=block_m, block_k=block_k, dtype=_extension.dtype_code(out.dtype),
        **last,
    )  # fmt: skip
    return out


def _dequantize_cuda(config, q, *args):
    return _dequantize_compiled(_extension.module(), {"stream": _extension.stream(q)}, q, *args)


def _dequantize_cpu(config, *args):
    return _dequantize_compiled(_extension.cpu(), {"threads": torch.get_num_threads()}, *args)


register(
    'fp8_quantize(Tensor x, str granularity="1x128", bool pow2_scale=False, str scale_layout="row") '
    "-> (Tensor, Tensor)",
    check=_check_quantize,
    problem=_quantize_problem,
    plan=plan,
    fake=_quantize_fake,
    reference=reference.fp8_quantize,
    backends={"cuda": _quantize_cuda, "triton": _quantize_triton, "cpu": _quantize_cpu},
)
register(
    'fp8_quantize_both(Tensor x, Tensor? expert_offsets=None, bool pow2_scale=False, str scale_layout="row") '
    "-> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_both,
    problem=_both_problem,
    plan=plan,
    fake=_both_fake,
    reference=reference.fp8_quantize_both,
    check_values=_check_both_values,
    backends={"cuda": _both_cuda, "triton": _both_triton, "cpu": _both_cpu},
)
register(
    'fp8_dequantize(Tensor q, Tensor scale, str granularity="1x128", ScalarType? out_dtype=None) -> Tensor',
    check=_check_dequantize,
    problem=_dequantize_problem,
    plan=plan,
    fake=_dequantize_fake,
    reference=reference.fp8_dequantize,
    backends={"cuda": _dequantize_cuda, "triton": _dequantize_triton, "cpu": _dequantize_cpu},
)
