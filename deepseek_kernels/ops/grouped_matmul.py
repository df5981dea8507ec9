"""`grouped_matmul`: each expert's rows times its own weight; `grouped_matmul_wgrad`: the gradient of those weights."""

import torch

from ..plan import grouped_matmul as plan
from ..reference import grouped_matmul as reference
from . import _allocate, _descriptors, _extension, _grouped_cpu
from . import _checks as checks
from ._registry import register


def grouped_matmul(
    a: torch.Tensor, b: torch.Tensor, expert_offsets: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`d[r] = a[r] @ b[e]^T` for every row r of expert e, that is `expert_offsets[e] <= r < expert_offsets[e + 1]`.

    Args:
        a: [R, k] bf16, fp16, fp32 or fp64; any strides (a copy is made unless the last dimension is contiguous).
        b: [E, n, k] of the same dtype, any strides; a GPU reads a transposed view where it is.
        expert_offsets: int32 [E + 1] on the device, as `moe_sort` makes them. No alignment is asked for. Offsets
            outside [0, R] are clamped to it, and one that decreases is raised to the one before.
        out_dtype: of the result; a's when left out.

    Returns:
        d [R, n], accumulated in fp32. Rows of no expert are zero whatever `a` holds there.

    Raises:
        ValueError, TypeError: naming the argument.

    Differentiable in a and b, twice. Semantics of torch.nn.functional.grouped_mm, with the rows past the end defined.
    """
    return torch.ops.deepseek_kernels.grouped_matmul(a, b, expert_offsets, out_dtype)


def grouped_matmul_wgrad(
    grad: torch.Tensor, a: torch.Tensor, expert_offsets: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`d[e] = grad[rows of e]^T @ a[rows of e]`: the gradient of `grouped_matmul` with respect to b.

    Args:
        grad: [R, n] bf16, fp16, fp32 or fp64; any strides.
        a: [R, k] of the same dtype; any strides.
        expert_offsets: as for `grouped_matmul`.
        out_dtype: of the result; a's when left out.

    Returns:
        d [E, n, k], accumulated in fp32 in the order of the rows. An expert without rows gives zeros; rows of no
        expert are never read.

    Raises:
        ValueError, TypeError: naming the argument.

    Differentiable in grad and a.
    """
    return torch.ops.deepseek_kernels.grouped_matmul_wgrad(grad, a, expert_offsets, out_dtype)


_OUT_DTYPES = checks.FLOATS[:3]


def _check_rest(op, a, expert_offsets, out_dtype) -> None:
    checks.tensor(
        op, "expert_offsets", expert_offsets, dtype=torch.int32, shape=(None,), device=a.device, contiguous=True
    )
    checks.at_least(op, "expert_offsets: length", expert_offsets.shape[0], 1)
    if out_dtype is not None and out_dtype != a.dtype:
        checks.one_of(op, "out_dtype", out_dtype, _OUT_DTYPES)


def _check(a, b, expert_offsets, out_dtype) -> None:
    op = "grouped_matmul"
    checks.tensor(op, "a", a, dtype=checks.FLOATS, shape=(None, None))
    checks.tensor(op, "b", b, dtype=a.dtype, shape=(None, None, a.shape[1]), device=a.device)
    _check_rest(op, a, expert_offsets, out_dtype)
    checks.tensor(op, "expert_offsets", expert_offsets, shape=(b.shape[0] + 1,))


def _check_wgrad(grad, a, expert_offsets, out_dtype) -> None:
    op = "grouped_matmul_wgrad"
    checks.tensor(op, "grad", grad, dtype=checks.FLOATS, shape=(None, None))
    checks.tensor(op, "a", a, dtype=grad.dtype, shape=(grad.shape[0], None), device=grad.device)
    _check_rest(op, a, expert_offsets, out_dtype)


def _check_values(op: str):
    def check(a, b, expert_offsets, out_dtype) -> None:
        checks.offsets(op, "expert_offsets", expert_offsets, a.shape[0])

    return check


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _whole_vectors(t: torch.Tensor) -> bool:
    """One of the last two dimensions is contiguous and every other stride is whole 16 bytes."""
    rows, columns = t.shape[-2:]
    for inner, outer, least in ((-1, -2, columns), (-2, -1, rows)):
        if t.stride(inner) == 1 and t.stride(outer) >= least:
            strides = [t.stride(outer), *t.stride()[:-2]]
            return all(s * t.element_size() % 16 == 0 for s in strides)
    return False


def _vectors(*sizes: int) -> bool:
    return all(s % 16 == 0 for s in sizes)


def _row_stride(t: torch.Tensor) -> int:
    """Of `t` as the kernel sees it: a copy where the last dimension is not contiguous."""
    return t.stride(0) if t.stride(1) == 1 else t.shape[1]


def _rows_of_memory(b: torch.Tensor) -> torch.Tensor:
    """[E, n, k], or [E, k, n] where n is the contiguous dimension."""
    return b if b.stride(2) == 1 else b.transpose(1, 2)


def _problem(a, b, expert_offsets, out_dtype) -> plan.Problem:
    (num_rows, k), n = a.shape, b.shape[1]
    vectors = 1 in b.stride()[1:] and _vectors(n, k, _row_stride(a), *(s for s in b.stride() if s != 1))
    aligned = _descriptors.take(a[None], _rows_of_memory(b))
    return plan.Problem(
        "forward", num_rows, n, k, b.shape[0], _name(a.dtype), _name(out_dtype or a.dtype), vectors, aligned
    )  # fmt: skip


def _problem_wgrad(grad, a, expert_offsets, out_dtype) -> plan.Problem:
    (num_rows, n), k = grad.shape, a.shape[1]
    vectors = _vectors(n, k, _row_stride(grad), _row_stride(a))
    num_experts = expert_offsets.shape[0] - 1
    return plan.Problem("wgrad", num_rows, n, k, num_experts, _name(a.dtype), _name(out_dtype or a.dtype), vectors)


def _fake(a, b, expert_offsets, out_dtype):
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype)


def _fake_wgrad(grad, a, expert_offsets, out_dtype):
    return a.new_empty(expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1], dtype=out_dtype or a.dtype)


def _addressable(t: torch.Tensor) -> bool:
    """By the Hopper kernel: rows side by side that begin at multiples of 16 bytes, one matrix after the other."""
    *group, row, column = t.stride()
    apart = column == 1 and row >= max(t.shape[-1], 1) and row % 8 == t.data_ptr() % 16 == 0
    return apart and (not group or t.shape[0] == 1 or (group[0] >= t.shape[1] * row and group[0] % 8 == 0))


def _for_hopper(t: torch.Tensor) -> torch.Tensor:
    return t if _addressable(t) else t.clone(memory_format=torch.contiguous_format)


def _cuda(config, a, b, expert_offsets, out_dtype):
    out = _allocate.empty((a.shape[0], b.shape[1]), a.dtype, a.device)
    if out.numel() == 0:
        return out
    if b.shape[0] == 0:
        return out.zero_()
    transposed = not _addressable(b) and _addressable(b.transpose(1, 2))
    a, weights = _for_hopper(a), b.transpose(1, 2) if transposed else _for_hopper(b)
    address = _extension.address
    _extension.module().grouped_matmul(
        a=address(a), b=address(weights), groups=address(expert_offsets), d=address(out), num_rows=a.shape[0],
        n=b.shape[1], k=b.shape[2], num_groups=b.shape[0], lda=a.stride(0), ldb=weights.stride(1),
        b_stride_g=weights.stride(0), transposed=transposed, tile_m=config.columns, cluster_n=config.cluster,
        raster=config.raster, ctas=config.ctas, stream=_extension.stream(a),
    )  # fmt: skip
    return out


def _cuda_wgrad(config, grad, a, expert_offsets, out_dtype):
    out = _allocate.empty((expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1]), out_dtype or a.dtype, a.device)
    if out.numel() == 0:
        return out
    if a.shape[0] == 0:
        return out.zero_()
    grad, a = _for_hopper(grad), _for_hopper(a)
    address = _extension.address
    _extension.module().grouped_matmul_wgrad(
        grad=address(grad), a=address(a), groups=address(expert_offsets), d=address(out), num_rows=a.shape[0],
        n=out.shape[1], k=out.shape[2], num_groups=out.shape[0], ld_grad=grad.stride(0), lda=a.stride(0),
        out_dtype=_extension.dtype_code(out.dtype), tile_n=config.columns, cluster_m=config.cluster,
        raster=config.raster, ctas=config.ctas, stream=_extension.stream(a),
    )  # fmt: skip
    return out


def _triton(config, a, b, expert_offsets, out_dtype):
    from ..triton_kernels import grouped_matmul as kernel

    out = _allocate.empty((a.shape[0], b.shape[1]), out_dtype or a.dtype, a.device)
    if out.numel():
        a, b = _descriptors.operand(config, checks.rows(a)), _descriptors.operand(config, b)
        kernel.grouped_matmul(config, a, b, expert_offsets, out)
    return out


def _triton_wgrad(config, grad, a, expert_offsets, out_dtype):
    from ..triton_kernels import grouped_matmul as kernel

    out = _allocate.empty((expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1]), out_dtype or a.dtype, a.device)
    if out.numel():
        kernel.grouped_matmul_wgrad(config, checks.rows(grad), checks.rows(a), expert_offsets, out)
    return out


def _for_library(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy where grouped_mm would refuse its strides or address."""
    return t if _whole_vectors(t) and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _torch(config, a, b, expert_offsets, out_dtype):
    num_rows = a.shape[0]
    if num_rows * b.numel() == 0:
        return _allocate.empty((num_rows, b.shape[1]), a.dtype, a.device).zero_()
    bounds = reference.expert_bounds(expert_offsets, num_rows)
    out = torch.nn.functional.grouped_mm(
        _for_library(a), _for_library(b).transpose(1, 2), offs=bounds[1:].to(torch.int32)
    )
    row = torch.arange(num_rows, device=a.device)
    return out.masked_fill_(((row < bounds[0]) | (row >= bounds[-1]))[:, None], 0)


def _torch_wgrad(config, grad, a, expert_offsets, out_dtype):
    num_rows = a.shape[0]
    shape = (expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1])
    if num_rows * shape[0] * shape[1] * shape[2] == 0:
        return _allocate.empty(shape, a.dtype, a.device).zero_()
    bounds = reference.expert_bounds(expert_offsets, num_rows)
    before = (torch.arange(num_rows, device=a.device) < bounds[0])[
        :, None
    ]  # grouped_mm starts its first group at row 0
    grad, a = grad.masked_fill(before, 0), a.masked_fill(before, 0)
    return torch.nn.functional.grouped_mm(_for_library(grad).t(), _for_library(a), offs=bounds[1:].to(torch.int32))


def _cpu(config, a, b, expert_offsets, out_dtype):
    out = _allocate.empty((a.shape[0], b.shape[1]), out_dtype or a.dtype, a.device)
    return _grouped_cpu.grouped(checks.rows(a), None, b, None, expert_offsets, out)


def _backward(ctx, grad):
    a, b, expert_offsets = ctx.saved_tensors
    grad = grad.to(b.dtype)
    ops = torch.ops.deepseek_kernels
    grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_a = ops.grouped_matmul(grad, b.transpose(1, 2), expert_offsets)
    if ctx.needs_input_grad[1]:
        grad_b = ops.grouped_matmul_wgrad(grad, a, expert_offsets)
    return grad_a, grad_b, None, None


def _backward_wgrad(ctx, grad_out):
    grad, a, expert_offsets = ctx.saved_tensors
    grad_out = grad_out.to(a.dtype)
    op = torch.ops.deepseek_kernels.grouped_matmul
    grad_grad = op(a, grad_out, expert_offsets) if ctx.needs_input_grad[0] else None
    grad_a = op(grad, grad_out.transpose(1, 2), expert_offsets) if ctx.needs_input_grad[1] else None
    return grad_grad, grad_a, None, None


def _context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


register(
    "grouped_matmul(Tensor a, Tensor b, Tensor expert_offsets, ScalarType? out_dtype=None) -> Tensor",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.grouped_matmul,
    check_values=_check_values("grouped_matmul"),
    backends={"cuda": _cuda, "triton": _triton, "torch": _torch, "cpu": _cpu},
    backward=_backward,
    setup_context=_context,
)
register(
    "grouped_matmul_wgrad(Tensor grad, Tensor a, Tensor expert_offsets, ScalarType? out_dtype=None) -> Tensor",
    check=_check_wgrad,
    problem=_problem_wgrad,
    plan=plan,
    fake=_fake_wgrad,
    reference=reference.grouped_matmul_wgrad,
    check_values=_check_values("grouped_matmul_wgrad"),
    backends={
        "cuda": _cuda_wgrad,
        "triton": _triton_wgrad,
        "torch": _torch_wgrad,
        "cpu": lambda config, *args: reference.grouped_matmul_wgrad(*args),
    },
    backward=_backward_wgrad,
    setup_context=_context,
)
