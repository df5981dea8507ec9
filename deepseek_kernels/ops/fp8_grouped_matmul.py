"""`fp8_grouped_matmul`: each expert's FP8 rows times its own FP8 weight, with 1x128 and 128x128 scales."""

import torch

from ..plan import fp8_grouped_matmul as plan
from ..reference import fp8_grouped_matmul as reference
from ..shapes import BLOCK, ceil_div
from . import _allocate, _grouped_cpu
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


def _check(a, scale_a, b, scale_b, expert_offsets, out_dtype) -> None:
    op = "fp8_grouped_matmul"
    checks.tensor(op, "a", a, dtype=checks.FP8, shape=(None, None))
    num_rows, k = a.shape
    checks.multiple(op, "a: k", k, 16)
    checks.tensor(op, "scale_a", scale_a, dtype=torch.float32, shape=(num_rows, ceil_div(k, BLOCK)), device=a.device)
    checks.tensor(op, "b", b, dtype=checks.FP8, shape=(None, None, k), device=a.device, last_contiguous=True)
    num_experts, n, _ = b.shape
    checks.multiple(op, "b: n", n, 8)
    checks.tensor(
        op, "scale_b", scale_b,
        dtype=torch.float32, shape=(num_experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK)), device=a.device,
    )  # fmt: skip
    checks.tensor(
        op, "expert_offsets", expert_offsets,
        dtype=torch.int32, shape=(num_experts + 1,), device=a.device, contiguous=True,
    )  # fmt: skip
    checks.one_of(op, "out_dtype", out_dtype, (None, torch.bfloat16, torch.float32))


def _problem(a, scale_a, b, scale_b, expert_offsets, out_dtype) -> plan.Problem:
    dtype = str(out_dtype or torch.bfloat16).removeprefix("torch.")
    return plan.Problem(a.shape[0], b.shape[1], a.shape[1], b.shape[0], dtype)


def _fake(a, scale_a, b, scale_b, expert_offsets, out_dtype):
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype or torch.bfloat16)


def _triton(config, a, scale_a, b, scale_b, expert_offsets, out_dtype):
    from ..triton_kernels import fp8_grouped_matmul as kernel

    out = _allocate.empty((a.shape[0], b.shape[1]), out_dtype or torch.bfloat16, a.device)
    if out.numel():
        kernel.fp8_grouped_matmul(config, checks.rows(a), scale_a, b, scale_b, expert_offsets, out)
    return out


def _cpu(config, a, scale_a, b, scale_b, expert_offsets, out_dtype):
    out = _allocate.empty((a.shape[0], b.shape[1]), out_dtype or torch.bfloat16, a.device)
    return _grouped_cpu.grouped(checks.rows(a), scale_a, b, scale_b, expert_offsets, out)


register(
    "fp8_grouped_matmul(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor expert_offsets, "
    "ScalarType? out_dtype=None) -> Tensor",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.fp8_grouped_matmul,
    backends={"triton": _triton, "cpu": _cpu},
)
