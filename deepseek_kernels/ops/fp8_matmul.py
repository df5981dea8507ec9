"""`fp8_matmul`: block-scaled FP8 matmul, into a new tensor or into (or onto) a given one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..plan import fp8_matmul as plan
from ..reference import fp8_matmul as reference
from ..shapes import BLOCK, ceil_div
from . import _allocate, _extension, _fp8_wgrad, _scaled_mm
from . import _checks as checks
from ._registry import register

_WIDE = (torch.bfloat16, torch.float16, torch.float32)
_VECTOR_BYTES = 16


def fp8_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Multiply block-scaled e4m3 matrices: `d[m, n] = dequantize(a) @ dequantize(b)^T + bias[n]`.

    Args:
        a: [m, k] e4m3; any m, k a multiple of 16 (the last block of 128 may be partial); any strides.
        scale_a: fp32 [m, ceil(k/128)], any strides, as `fp8_quantize(x)` gives it in either layout.
        b: [n, k] e4m3, n a multiple of 8; the last dimension is contiguous. A GPU backend copies a or b at every call
            unless its rows are contiguous and begin at multiples of 16 bytes.
        scale_b: fp32 [ceil(n/128), ceil(k/128)], one scale per 128x128 block (weights), or [n, ceil(k/128)], one per
            1x128 block (both operands of a weight gradient are activations). Any strides.
        bias: bf16, fp16 or fp32 [n], added in fp32.
        out_dtype: bf16 (None), fp16 or fp32.
        out: [m, n] of out_dtype to write into; rows may be strided.
        accumulate: add to what is in `out` instead; the sum is rounded once.

    Returns:
        [m, n] of out_dtype, or `out`. The products of each block of 128 are summed by the tensor cores, the blocks in
        fp32.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: `out` is given and an input requires grad.
        NotImplementedError: on backward.

    Not differentiable. Semantics of DeepGEMM's fp8_gemm_nt.
    """
    if out is None:
        if accumulate:
            raise checks.fail("fp8_matmul", "accumulate", "False without out", accumulate)
        return torch.ops.deepseek_kernels.fp8_matmul(a, scale_a, b, scale_b, bias, out_dtype)
    if out_dtype is not None and out.dtype != out_dtype:
        raise TypeError(f"fp8_matmul: out: wanted dtype {out_dtype}, got {out.dtype}")
    torch.ops.deepseek_kernels.fp8_matmul.out(a, scale_a, b, scale_b, bias, out, accumulate)
    return out


def _check_operands(a, scale_a, b, scale_b, bias) -> None:
    op = "fp8_matmul"
    checks.tensor(op, "a", a, dtype=checks.FP8, shape=(None, None))
    m, k = a.shape
    checks.multiple(op, "k (columns of a)", k, 16)
    checks.tensor(op, "b", b, dtype=checks.FP8, shape=(None, k), device=a.device, last_contiguous=True)
    n = b.shape[0]
    checks.multiple(op, "n (rows of b)", n, 8)
    blocks = ceil_div(k, BLOCK)
    checks.tensor(op, "scale_a", scale_a, dtype=torch.float32, shape=(m, blocks), device=a.device)
    checks.tensor(op, "scale_b", scale_b, dtype=torch.float32, shape=(None, blocks), device=a.device)
    if scale_b.shape[0] not in (ceil_div(n, BLOCK), n):
        raise checks.fail(op, "scale_b", f"{ceil_div(n, BLOCK)} rows (128x128) or {n} (1x128)", scale_b.shape[0])
    checks.tensor(op, "bias", bias, dtype=_WIDE, shape=(n,), device=a.device)


def _check(a, scale_a, b, scale_b, bias, out_dtype) -> None:
    _check_operands(a, scale_a, b, scale_b, bias)
    checks.one_of("fp8_matmul", "out_dtype", out_dtype, (None, *_WIDE))


def _check_out(a, scale_a, b, scale_b, bias, out, accumulate) -> None:
    op = "fp8_matmul"
    _check_operands(a, scale_a, b, scale_b, bias)
    shape = (a.shape[0], b.shape[0])
    checks.tensor(op, "out", out, dtype=_WIDE, shape=shape, device=a.device, last_contiguous=True)
    if shape[0] > 1 and shape[1] and out.stride(0) < shape[1]:
        raise checks.fail(op, "out", f"rows at least {shape[1]} elements apart", f"stride {out.stride(0)}")
    checks.no_grad(op, a=a, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias, out=out)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _granularity(b, scale_b) -> str:
    return "128x128" if scale_b.shape[0] == ceil_div(b.shape[0], BLOCK) else "1x128"


def _problem(a, scale_a, b, scale_b, bias, out_dtype, accumulate=False) -> plan.Problem:
    return plan.Problem(
        a.shape[0], b.shape[0], a.shape[1], _granularity(b, scale_b), _name(out_dtype or torch.bfloat16),
        "" if bias is None else _name(bias.dtype), accumulate,
    )  # fmt: skip


def _problem_out(a, scale_a, b, scale_b, bias, out, accumulate) -> plan.Problem:
    return _problem(a, scale_a, b, scale_b, bias, out.dtype, accumulate)


def _fake(a, scale_a, b, scale_b, bias, out_dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype or torch.bfloat16)


def _returning(into: Callable) -> Callable:
    """The op that allocates its result, from the one that writes into it."""

    def run(config, a, scale_a, b, scale_b, bias, out_dtype):
        out = _allocate.empty((a.shape[0], b.shape[0]), out_dtype or torch.bfloat16, a.device)
        into(config, a, scale_a, b, scale_b, bias, out, False)
        return out

    return run


def _in_vectors(t: torch.Tensor) -> bool:
    """Whether the rows of `t` are contiguous, 16-byte aligned and apart from each other. TMA takes no others, and what
    cannot be loaded in whole vectors is slower to read once than to copy."""
    rows_apart = t.stride(0) >= t.shape[1] and t.stride(0) * t.element_size() % _VECTOR_BYTES == 0
    return t.stride(1) == 1 and rows_apart and t.data_ptr() % _VECTOR_BYTES == 0


def _vector_rows(t: torch.Tensor) -> torch.Tensor:
    return t if _in_vectors(t) else t.clone(memory_format=torch.contiguous_format)


def _triton(config, a, scale_a, b, scale_b, bias, out, accumulate) -> None:
    from ..triton_kernels import fp8_matmul as kernel

    if out.numel() == 0:
        return
    workspace = None
    if config.split_k > 1:
        workspace = _allocate.empty((config.split_k, *out.shape), torch.float32, out.device)
    scale_b_rows = plan.SCALE_B_ROWS[_granularity(b, scale_b)]
    a, b = _vector_rows(a), _vector_rows(b)
    bias = bias if bias is None else bias.contiguous()
    kernel.matmul(config, scale_b_rows, accumulate, a, scale_a, b, scale_b, bias, out, workspace)


def _cuda(config, a, scale_a, b, scale_b, bias, out, accumulate) -> None:
    if out.numel() == 0:
        return
    a, b = _vector_rows(a), _vector_rows(b)
    bias = bias if bias is None else bias.contiguous()
    d = out if _in_vectors(out) else _allocate.empty(out.shape, out.dtype, out.device)
    if accumulate and d is not out:
        d.copy_(out)
    if _granularity(b, scale_b) == "1x128":
        _fp8_wgrad.launch(config, a, scale_a, b, scale_b, None, d[None], accumulate)
    else:
        _launch(config, a, scale_a, b, scale_b, bias, d, accumulate)
    if d is not out:
        out.copy_(d)


def _launch(config, a, scale_a, b, scale_b, bias, d, accumulate) -> None:
    address = _extension.address
    _extension.module().fp8_matmul(
        a=address(a), scale_a=address(scale_a), b=address(b), scale_b=address(scale_b), bias=address(bias),
        d=address(d), m=a.shape[0], n=b.shape[0], k=a.shape[1], lda=a.stride(0), ldb=b.stride(0), ldd=d.stride(0),
        scale_a_stride_m=scale_a.stride(0), scale_a_stride_k=scale_a.stride(1),
        scale_b_stride_n=scale_b.stride(0), scale_b_stride_k=scale_b.stride(1),
        out_dtype=_extension.dtype_code(d.dtype), bias_dtype=_extension.dtype_code((d if bias is None else bias).dtype),
        accumulate=accumulate, tile_m=config.tile_m, tile_n=config.tile_n, cluster_m=config.cluster_m,
        cluster_n=config.cluster_n, cluster_k=config.cluster_k, swap=config.swap, raster=config.raster,
        ctas=config.ctas, stream=_extension.stream(a),
    )  # fmt: skip


def _torch(config, a, scale_a, b, scale_b, bias, out_dtype) -> torch.Tensor:
    """The library's block-scaled matmul on a GPU, `F.linear` on a CPU."""
    if not a.is_cuda or a.shape[0] * b.shape[0] == 0:
        return _returning(_dequantize_and_multiply)(config, a, scale_a, b, scale_b, bias, out_dtype)
    return _scaled_mm.product(a, scale_a, b, scale_b, bias, out_dtype or torch.bfloat16, _vector_rows)


def _torch_out(config, a, scale_a, b, scale_b, bias, out, accumulate) -> None:
    if not a.is_cuda or out.numel() == 0:
        return _dequantize_and_multiply(config, a, scale_a, b, scale_b, bias, out, accumulate)
    dtype = torch.float32 if accumulate else out.dtype
    product = _scaled_mm.product(a, scale_a, b, scale_b, bias, dtype, _vector_rows)
    out.copy_(product.add_(out) if accumulate else product)


def _dequantize_and_multiply(config, a, scale_a, b, scale_b, bias, out, accumulate) -> None:
    """`F.linear` in fp32 on 128 dequantised rows of b at a time: never more than that of it in memory."""
    if out.numel() == 0:
        return
    x = _dequantize(checks.rows(a), scale_a)
    per_block = _granularity(b, scale_b) == "128x128"
    for i, start in enumerate(range(0, b.shape[0], BLOCK)):
        rows = slice(start, start + BLOCK)
        weight = _dequantize(b[rows], scale_b[i : i + 1] if per_block else scale_b[rows])
        product = F.linear(x, weight, None if bias is None else bias[rows].float())
        out[:, rows] = product.add_(out[:, rows]) if accumulate else product


def _dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 q * scale, with a scale for each 128 columns. Shifted to fp16 (2^-8 of the value), because torch's own
    conversion of e4m3 takes 20 times as long on a CPU."""
    bits = q.view(torch.int8).to(torch.int16)
    is_nan = bits.bitwise_and(0x7F) == 0x7F
    half = bits.bitwise_left_shift_(7).bitwise_and_(-0x4080).masked_fill_(is_nan, 0x7FFF).view(torch.float16)
    return half.float().mul_((scale * 256).repeat_interleave(BLOCK, 1)[:, : q.shape[1]])


def _cpu(config, a, scale_a, b, scale_b, bias, out, accumulate) -> None:
    if out.numel() == 0:
        return
    a = checks.rows(a)
    bias = bias if bias is None else bias.float().contiguous()
    extension, threads, address = _extension.cpu(), torch.get_num_threads(), _extension.address
    size = extension.fp8_matmul_workspace(m=a.shape[0], k=a.shape[1], threads=threads)
    workspace = _allocate.empty((size,), torch.float32, a.device)
    extension.fp8_matmul(
        a=address(a), scale_a=address(scale_a), b=address(b), scale_b=address(scale_b), bias=address(bias),
        d=address(out), workspace=address(workspace), m=a.shape[0], n=b.shape[0], k=a.shape[1], lda=a.stride(0),
        ldb=b.stride(0), ldd=out.stride(0), scale_a_stride_m=scale_a.stride(0), scale_a_stride_k=scale_a.stride(1),
        scale_b_stride_n=scale_b.stride(0), scale_b_stride_k=scale_b.stride(1),
        out_dtype=_extension.dtype_code(out.dtype), accumulate=accumulate, threads=threads,
    )  # fmt: skip


_INTO = {"cuda": _cuda, "triton": _triton, "cpu": _cpu}

register(
    "fp8_matmul(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor? bias=None, ScalarType? out_dtype=None) "
    "-> Tensor",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.fp8_matmul,
    backends={**{backend: _returning(into) for backend, into in _INTO.items()}, "torch": _torch},
)
register(
    "fp8_matmul.out(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor? bias, Tensor(a!) out, "
    "bool accumulate=False) -> ()",
    check=_check_out,
    problem=_problem_out,
    plan=plan,
    fake=lambda *args: None,
    reference=reference.fp8_matmul_out,
    backends={**_INTO, "torch": _torch_out},
)
