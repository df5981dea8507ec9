"""`fp8_grouped_matmul`: each expert's FP8 rows times its own FP8 weight, with 1x128 and 128x128 scales; its masked form
has a fixed number of places for the rows of each expert, of which the first few are filled.
`fp8_grouped_matmul_wgrad`: the gradient of those weights, with 1x128 scales along the rows.
"""

from collections.abc import Callable

import torch

from ..plan import fp8_grouped_matmul as plan
from ..reference import fp8_grouped_matmul as reference
from ..shapes import BLOCK, ceil_div
from . import _allocate, _descriptors, _extension, _fp8_wgrad, _grouped_cpu
from . import _checks as checks
from ._registry import register


def fp8_grouped_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`d[r] = a[r] @ b[e]^T` of the dequantised operands, for every row r of expert e.

    Expert e has the rows `expert_offsets[e] <= r < expert_offsets[e + 1]`.

    Args:
        a: e4m3 [R, k], k a multiple of 16; any strides (a copy is made unless the last dimension is contiguous).
        scale_a: fp32 [R, ceil(k/128)], any strides; 1x128.
        b: e4m3 [E, n, k], n a multiple of 8, contiguous in the last dimension.
        scale_b: fp32 [E, ceil(n/128), ceil(k/128)], any strides; 128x128.
        expert_offsets: int32 [E + 1] on the device, as `moe_sort` makes them. No alignment is asked for. Offsets
            outside [0, R] are clamped to it, and one that decreases is raised to the one before.
        out_dtype: bf16 (when left out) or fp32.

    Returns:
        d [R, n], accumulated in fp32. Rows of no expert are zero whatever `a` and `scale_a` hold there.

    Raises:
        ValueError, TypeError: naming the argument.
        NotImplementedError: on backward.

    Semantics of DeepGEMM's m_grouped_fp8_gemm_nt_contiguous, without its 128-row padding.
    """
    return torch.ops.deepseek_kernels.fp8_grouped_matmul(a, scale_a, b, scale_b, expert_offsets, out_dtype)


def fp8_grouped_matmul_masked(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    counts: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    expected_m: int | None = None,
) -> torch.Tensor:
    """`d[e, r] = a[e, r] @ b[e]^T` of the dequantised operands, for the first `counts[e]` rows r of every expert e.

    Made for decoding under a CUDA graph: shapes and launches do not depend on how many rows the experts got.

    Args:
        a: e4m3 [E, m_max, k], k a multiple of 16; any strides (a copy is made unless the last dimension is contiguous).
        scale_a: fp32 [E, m_max, ceil(k/128)], any strides; 1x128.
        b: e4m3 [E, n, k], n a multiple of 8, contiguous in the last dimension.
        scale_b: fp32 [E, ceil(n/128), ceil(k/128)], any strides; 128x128.
        counts: int32 [E] on the device. Counts outside [0, m_max] are clamped to it.
        out_dtype: bf16 (when left out) or fp32.
        expected_m: rows that an expert has on average, m_max when left out. A tile is chosen for it; the result does
            not depend on it beyond rounding.

    Returns:
        d [E, m_max, n], accumulated in fp32. Rows at or past `counts[e]` are left unwritten, so they hold anything:
        with m_max in the thousands, zeroing them would cost more than the matmul of a decode step. Rows of `a` and
        `scale_a` there are not used.

    Raises:
        ValueError, TypeError: naming the argument.
        NotImplementedError: on backward.

    Semantics of DeepGEMM's m_grouped_fp8_gemm_nt_masked.
    """
    op = torch.ops.deepseek_kernels.fp8_grouped_matmul_masked
    return op(a, scale_a, b, scale_b, counts, out_dtype, expected_m)


def fp8_grouped_matmul_wgrad(
    grad_t: torch.Tensor,
    scale_grad: torch.Tensor,
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """`d[e] = grad_t[:, columns of e] @ a_t[:, columns of e]^T` of the dequantised operands.

    The gradient of `fp8_grouped_matmul` with respect to b. Both operands are transposed, because FP8 tensor cores sum
    along contiguous memory. Expert e with `rows_e = expert_offsets[e + 1] - expert_offsets[e]` has the rows_e columns
    from `128 * sum(ceil(rows_i / 128) for i < e)`, so that no block of 128 belongs to two experts; up to the next
    multiple of 128 the columns hold zeros. Columns past those of the last expert are never read.

    Args:
        grad_t: e4m3 [n, C], C a multiple of 128, `shapes.padded_columns(R, E)` for R rows; any strides (a copy is made
            unless the last dimension is contiguous).
        scale_grad: fp32 [n, C/128], any strides; 1x128.
        a_t: e4m3 [k, C], k a multiple of 8; any strides, as grad_t.
        scale_a: fp32 [k, C/128], any strides; 1x128.
        expert_offsets: int32 [E + 1] on the device, of rows, as `moe_sort` makes them. Offsets outside [0, C] are
            clamped to it, one that decreases is raised to the one before, and no expert's columns reach past C.
        out: fp32 [E, n, k], contiguous, to write into.
        accumulate: add to what is in `out` instead.

    Returns:
        d fp32 [E, n, k], or `out`. The products of each block of 128 are summed by the tensor cores, the blocks in fp32
        and in order. An expert without rows gives zeros, or with accumulate leaves `out` as it is.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: `out` is given and an input requires grad.
        NotImplementedError: on backward.

    Not differentiable. Semantics of DeepGEMM's k_grouped_fp8_gemm_nt_contiguous, with offsets on the device.
    """
    if out is None:
        if accumulate:
            raise checks.fail("fp8_grouped_matmul_wgrad", "accumulate", "False without out", accumulate)
        return torch.ops.deepseek_kernels.fp8_grouped_matmul_wgrad(grad_t, scale_grad, a_t, scale_a, expert_offsets)
    torch.ops.deepseek_kernels.fp8_grouped_matmul_wgrad.out(
        grad_t, scale_grad, a_t, scale_a, expert_offsets, out, accumulate
    )
    return out


def _check_operands(op, a, scale_a, b, scale_b, out_dtype) -> None:
    """`a` is checked for its dtype and number of dimensions by the caller."""
    k = a.shape[-1]
    checks.multiple(op, "a: k", k, 16)
    scales = (*a.shape[:-1], ceil_div(k, BLOCK))
    checks.tensor(op, "scale_a", scale_a, dtype=torch.float32, shape=scales, device=a.device)
    checks.tensor(op, "b", b, dtype=checks.FP8, shape=(None, None, k), device=a.device, last_contiguous=True)
    num_experts, n, _ = b.shape
    checks.multiple(op, "b: n", n, 8)
    checks.tensor(
        op, "scale_b", scale_b,
        dtype=torch.float32, shape=(num_experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK)), device=a.device,
    )  # fmt: skip
    checks.one_of(op, "out_dtype", out_dtype, (None, torch.bfloat16, torch.float32))


def _check(a, scale_a, b, scale_b, expert_offsets, out_dtype) -> None:
    op = "fp8_grouped_matmul"
    checks.tensor(op, "a", a, dtype=checks.FP8, shape=(None, None))
    _check_operands(op, a, scale_a, b, scale_b, out_dtype)
    checks.tensor(
        op, "expert_offsets", expert_offsets,
        dtype=torch.int32, shape=(b.shape[0] + 1,), device=a.device, contiguous=True,
    )  # fmt: skip


def _check_masked(a, scale_a, b, scale_b, counts, out_dtype, expected_m) -> None:
    op = "fp8_grouped_matmul_masked"
    checks.tensor(op, "a", a, dtype=checks.FP8, shape=(None, None, None))
    _check_operands(op, a, scale_a, b, scale_b, out_dtype)
    checks.tensor(op, "b", b, shape=(a.shape[0], None, None))
    checks.tensor(op, "counts", counts, dtype=torch.int32, shape=(a.shape[0],), device=a.device, contiguous=True)
    if expected_m is not None:
        checks.at_least(op, "expected_m", expected_m, 0)


def _check_values(a, scale_a, b, scale_b, expert_offsets, out_dtype) -> None:
    checks.offsets("fp8_grouped_matmul", "expert_offsets", expert_offsets, a.shape[0])


def _check_values_masked(a, scale_a, b, scale_b, counts, out_dtype, expected_m) -> None:
    checks.within("fp8_grouped_matmul_masked", "counts", counts, 0, a.shape[1] + 1)


def _check_wgrad(grad_t, scale_grad, a_t, scale_a, expert_offsets) -> None:
    op = "fp8_grouped_matmul_wgrad"
    checks.tensor(op, "grad_t", grad_t, dtype=checks.FP8, shape=(None, None))
    n, columns = grad_t.shape
    checks.multiple(op, "grad_t: columns", columns, BLOCK)
    device, blocks = grad_t.device, columns // BLOCK
    checks.tensor(op, "scale_grad", scale_grad, dtype=torch.float32, shape=(n, blocks), device=device)
    checks.tensor(op, "a_t", a_t, dtype=checks.FP8, shape=(None, columns), device=device)
    k = a_t.shape[0]
    checks.multiple(op, "a_t: k", k, 8)
    checks.tensor(op, "scale_a", scale_a, dtype=torch.float32, shape=(k, blocks), device=device)
    checks.tensor(
        op, "expert_offsets", expert_offsets, dtype=torch.int32, shape=(None,), device=device, contiguous=True
    )
    checks.at_least(op, "expert_offsets: length", expert_offsets.shape[0], 1)


def _check_wgrad_out(grad_t, scale_grad, a_t, scale_a, expert_offsets, out, accumulate) -> None:
    op = "fp8_grouped_matmul_wgrad"
    _check_wgrad(grad_t, scale_grad, a_t, scale_a, expert_offsets)
    shape = _shape_wgrad(grad_t, a_t, expert_offsets)
    checks.tensor(op, "out", out, dtype=torch.float32, shape=shape, device=grad_t.device, contiguous=True)
    checks.no_grad(op, grad_t=grad_t, scale_grad=scale_grad, a_t=a_t, scale_a=scale_a, out=out)


def _check_values_wgrad(grad_t, scale_grad, a_t, scale_a, expert_offsets, out=None, accumulate=False) -> None:
    op, columns = "fp8_grouped_matmul_wgrad", grad_t.shape[1]
    checks.offsets(op, "expert_offsets", expert_offsets, columns)
    needed = BLOCK * int(((expert_offsets.diff() + BLOCK - 1) // BLOCK).sum())
    if needed > columns:
        raise checks.fail(op, "expert_offsets", f"rows that fill at most {columns} columns, in whole blocks", needed)


def _shape_wgrad(grad_t, a_t, expert_offsets) -> tuple[int, int, int]:
    return expert_offsets.shape[0] - 1, grad_t.shape[0], a_t.shape[0]


def _name(out_dtype: torch.dtype | None) -> str:
    return str(out_dtype or torch.bfloat16).removeprefix("torch.")


def _problem(a, scale_a, b, scale_b, expert_offsets, out_dtype) -> plan.Problem:
    (num_experts, n, k), name = b.shape, _name(out_dtype)
    return plan.Problem(a.shape[0], n, k, num_experts, name, aligned=_descriptors.take(a[None], b))


def _problem_masked(a, scale_a, b, scale_b, counts, out_dtype, expected_m) -> plan.Problem:
    num_experts, m_max, k = a.shape
    rows = num_experts * (m_max if expected_m is None else min(expected_m, m_max))
    return plan.Problem(rows, b.shape[1], k, num_experts, _name(out_dtype), "masked", aligned=_descriptors.take(a, b))


def _problem_wgrad(grad_t, scale_grad, a_t, scale_a, expert_offsets, out=None, accumulate=False) -> plan.Problem:
    num_experts, n, k = _shape_wgrad(grad_t, a_t, expert_offsets)
    aligned = _descriptors.take(grad_t[None], a_t[None])
    return plan.Problem(grad_t.shape[1], n, k, num_experts, "float32", "wgrad", accumulate, aligned)


def _fake(a, scale_a, b, scale_b, rows, out_dtype, expected_m=None):
    return a.new_empty(*a.shape[:-1], b.shape[1], dtype=out_dtype or torch.bfloat16)


def _fake_wgrad(grad_t, scale_grad, a_t, scale_a, expert_offsets):
    return scale_a.new_empty(_shape_wgrad(grad_t, a_t, expert_offsets))


def _empty(a, b, out_dtype):
    return _allocate.empty((*a.shape[:-1], b.shape[1]), out_dtype or torch.bfloat16, a.device)


def _matrices(t: torch.Tensor) -> torch.Tensor:
    """`t` [groups, rows, columns], or a copy, as the Hopper kernel addresses it: rows that begin at multiples of 16
    bytes, a whole number of them from one group to the next."""
    group, row, column = t.stride()
    rows_apart = column == 1 and row >= max(t.shape[2], 1) and row % 16 == t.data_ptr() % 16 == 0
    if rows_apart and (t.shape[0] == 1 or (group >= t.shape[1] * row and group % row == 0)):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _group_rows(t: torch.Tensor) -> int:
    return t.stride(0) // t.stride(1) if t.shape[0] > 1 else t.shape[1]


def _launch(config, a, scale_a, b, scale_b, groups, out, masked: bool) -> None:
    """a, scale_a and out [groups or 1, rows, ..]."""
    if out.numel() == 0:
        return
    if b.shape[0] == 0:
        out.zero_()
        return
    a, b = _matrices(a), _matrices(b)
    address = _extension.address
    _extension.module().fp8_grouped_matmul(
        a=address(a), scale_a=address(scale_a), b=address(b), scale_b=address(scale_b), groups=address(groups),
        d=address(out), num_rows=a.shape[1], n=b.shape[1], k=b.shape[2], num_groups=b.shape[0], masked=masked,
        lda=a.stride(1), ldb=b.stride(1), a_group_rows=_group_rows(a) if masked else 0, b_group_rows=_group_rows(b),
        scale_a_stride_g=scale_a.stride(0), scale_a_stride_m=scale_a.stride(1), scale_a_stride_k=scale_a.stride(2),
        scale_b_stride_g=scale_b.stride(0), scale_b_stride_n=scale_b.stride(1), scale_b_stride_k=scale_b.stride(2),
        out_dtype=_extension.dtype_code(out.dtype), tile_m=config.tile_m, tile_n=config.tile_n,
        cluster_m=config.cluster_m, cluster_n=config.cluster_n, swap=config.swap, raster=config.raster,
        ctas=config.ctas, stream=_extension.stream(a),
    )  # fmt: skip


def _cuda(config, a, scale_a, b, scale_b, expert_offsets, out_dtype):
    out = _empty(a, b, out_dtype)
    _launch(config, a[None], scale_a[None], b, scale_b, expert_offsets, out, False)
    return out


def _cuda_masked(config, a, scale_a, b, scale_b, counts, out_dtype, expected_m):
    out = _empty(a, b, out_dtype)
    _launch(config, a, scale_a, b, scale_b, counts, out, True)
    return out


def _triton(config, a, scale_a, b, scale_b, expert_offsets, out_dtype):
    from ..triton_kernels import fp8_grouped_matmul as kernel

    out = _empty(a, b, out_dtype)
    if b.numel() == 0:
        return out.zero_()
    if out.numel():
        a, b = _descriptors.operand(config, checks.rows(a)), _descriptors.operand(config, b)
        kernel.fp8_grouped_matmul(config, a, scale_a, b, scale_b, expert_offsets, out)
    return out


def _triton_masked(config, a, scale_a, b, scale_b, counts, out_dtype, expected_m):
    from ..triton_kernels import fp8_grouped_matmul as kernel

    out = _empty(a, b, out_dtype)
    if b.numel() == 0:
        return out.zero_()
    if out.numel():
        a, b = _descriptors.operand(config, checks.rows(a)), _descriptors.operand(config, b)
        kernel.fp8_grouped_matmul_masked(config, a, scale_a, b, scale_b, counts, out)
    return out


def _cpu(config, a, scale_a, b, scale_b, expert_offsets, out_dtype):
    return _grouped_cpu.grouped(checks.rows(a), scale_a, b, scale_b, expert_offsets, _empty(a, b, out_dtype))


def _cpu_masked(config, a, scale_a, b, scale_b, counts, out_dtype, expected_m):
    """The filled rows of one expert after the other, each a contiguous matmul of one group."""
    a, out = checks.rows(a), _empty(a, b, out_dtype)
    if out.numel():
        for e, count in enumerate(counts.clamp(0, a.shape[1]).tolist()):
            offsets = torch.tensor([0, count], dtype=torch.int32)
            this = slice(e, e + 1)
            _grouped_cpu.grouped(a[e, :count], scale_a[e, :count], b[this], scale_b[this], offsets, out[e, :count])
    return out


def _is_done(grad_t, out, accumulate) -> bool:
    """Whether there is nothing to multiply; `out` is then what it should be."""
    if out.numel() == 0 or grad_t.shape[1]:
        return out.numel() == 0
    if not accumulate:
        out.zero_()
    return True


def _triton_wgrad(config, grad_t, scale_grad, a_t, scale_a, expert_offsets, out, accumulate) -> None:
    from ..triton_kernels import fp8_grouped_matmul as kernel

    if not _is_done(grad_t, out, accumulate):
        grad_t, a_t = (_descriptors.operand(config, checks.rows(t)) for t in (grad_t, a_t))
        kernel.fp8_grouped_matmul_wgrad(config, accumulate, grad_t, scale_grad, a_t, scale_a, expert_offsets, out)


def _cuda_wgrad(config, grad_t, scale_grad, a_t, scale_a, expert_offsets, out, accumulate) -> None:
    if _is_done(grad_t, out, accumulate):
        return
    grad_t, a_t = _matrices(grad_t[None])[0], _matrices(a_t[None])[0]
    d = out
    if out.data_ptr() % 16:  # a view into a flat buffer may begin anywhere
        d = _allocate.empty(out.shape, out.dtype, out.device)
        if accumulate:
            d.copy_(out)
    _fp8_wgrad.launch(config, grad_t, scale_grad, a_t, scale_a, expert_offsets, d, accumulate)
    if d is not out:
        out.copy_(d)


def _allocating(into: Callable) -> Callable:
    """The op that allocates its result, from the one that writes into it."""

    def run(config, grad_t, scale_grad, a_t, scale_a, expert_offsets):
        out = _allocate.empty(_shape_wgrad(grad_t, a_t, expert_offsets), torch.float32, grad_t.device)
        into(config, grad_t, scale_grad, a_t, scale_a, expert_offsets, out, False)
        return out

    return run


register(
    "fp8_grouped_matmul(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor expert_offsets, "
    "ScalarType? out_dtype=None) -> Tensor",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.fp8_grouped_matmul,
    check_values=_check_values,
    backends={"cuda": _cuda, "triton": _triton, "cpu": _cpu},
)
register(
    "fp8_grouped_matmul_masked(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor counts, "
    "ScalarType? out_dtype=None, int? expected_m=None) -> Tensor",
    check=_check_masked,
    problem=_problem_masked,
    plan=plan,
    fake=_fake,
    reference=reference.fp8_grouped_matmul_masked,
    check_values=_check_values_masked,
    backends={"cuda": _cuda_masked, "triton": _triton_masked, "cpu": _cpu_masked},
)

_INTO_WGRAD = {"cuda": _cuda_wgrad, "triton": _triton_wgrad}

register(
    "fp8_grouped_matmul_wgrad(Tensor grad_t, Tensor scale_grad, Tensor a_t, Tensor scale_a, Tensor expert_offsets) "
    "-> Tensor",
    check=_check_wgrad,
    problem=_problem_wgrad,
    plan=plan,
    fake=_fake_wgrad,
    reference=reference.fp8_grouped_matmul_wgrad,
    check_values=_check_values_wgrad,
    backends={backend: _allocating(into) for backend, into in _INTO_WGRAD.items()},
)
register(
    "fp8_grouped_matmul_wgrad.out(Tensor grad_t, Tensor scale_grad, Tensor a_t, Tensor scale_a, "
    "Tensor expert_offsets, Tensor(a!) out, bool accumulate=False) -> ()",
    check=_check_wgrad_out,
    problem=_problem_wgrad,
    plan=plan,
    fake=lambda *args: None,
    reference=reference.fp8_grouped_matmul_wgrad_out,
    check_values=_check_values_wgrad,
    backends=_INTO_WGRAD,
)
