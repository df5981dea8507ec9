"""`merge_states`: attention over two disjoint sets of keys, from the results over each."""

import torch

from ..plan import merge_states as plan
from ..reference import merge_states as reference
from . import _allocate, _extension
from . import _checks as checks
from ._registry import register


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention results over disjoint keys: the softmax over both is their mean weighted by exp(lse).

    Args:
        out_a, out_b: [b, s_q, h_q, d_v] bf16, fp16, fp32 or fp64, of one dtype; any strides.
        lse_a, lse_b: fp32 (fp64 with fp64) [b, h_q, s_q], natural log-sum-exp of the scaled scores.

    Returns:
        out in out_a's dtype, and lse like lse_a. An empty side (lse -inf) is ignored, whatever its out holds; where
        both are empty out is 0 and lse -inf. A side with lse +inf takes all; two such sides count the same.

    Raises:
        ValueError, TypeError: naming the argument.

    Differentiable in all four; a side whose lse is infinite has no gradient. Attention sinks belong into one side
    only, or after the merge.
    """
    return torch.ops.deepseek_kernels.merge_states(out_a, lse_a, out_b, lse_b)


def _check(out_a, lse_a, out_b, lse_b) -> None:
    op = "merge_states"
    checks.tensor(op, "out_a", out_a, dtype=checks.FLOATS, shape=(None,) * 4)
    b, s_q, h_q, d_v = out_a.shape
    checks.tensor(op, "out_b", out_b, dtype=out_a.dtype, shape=(b, s_q, h_q, d_v), device=out_a.device)
    lse_dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.tensor(op, name, lse, dtype=lse_dtype, shape=(b, h_q, s_q), device=out_a.device)


def _problem(out_a, lse_a, out_b, lse_b) -> plan.Problem:
    b, s_q, h_q, d_v = out_a.shape
    return plan.Problem(b * s_q * h_q, d_v, out_a.element_size(), str(out_a.dtype).removeprefix("torch."))


def _fake(out_a, lse_a, out_b, lse_b):
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _triton(config, out_a, lse_a, out_b, lse_b):
    from ..triton_kernels import merge_states as kernel

    out = _allocate.empty(out_a.shape, out_a.dtype, out_a.device)
    lse = _allocate.empty(lse_a.shape, lse_a.dtype, lse_a.device)
    if out.numel():
        kernel.merge(config, out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous(), out, lse)
    elif lse.numel():
        lse = reference.merge_states(out_a, lse_a, out_b, lse_b)[1]
    return out, lse


def _cpu(config, out_a, lse_a, out_b, lse_b):
    out = _allocate.empty(out_a.shape, out_a.dtype, out_a.device)
    lse = _allocate.empty(lse_a.shape, lse_a.dtype, lse_a.device)
    inputs = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    inputs = {name: t.contiguous() for name, t in inputs.items()}
    b, s_q, h_q, d_v = out.shape
    _extension.cpu().merge_states(
        **{name: t.data_ptr() for name, t in inputs.items()}, out=out.data_ptr(), lse=lse.data_ptr(),
        b=b, s_q=s_q, h_q=h_q, d_v=d_v, dtype=_extension.dtype_code(out.dtype), threads=torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def _context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad_out, grad_lse):
    out_a, lse_a, out_b, lse_b, lse = ctx.saved_tensors
    grad_out = grad_out.to(lse.dtype)
    weight_a, weight_b = _weight(lse_a, lse), _weight(lse_b, lse)
    both = weight_a * weight_b
    difference = torch.where(_as_out(both) == 0, 0, out_a.to(lse.dtype) - out_b.to(lse.dtype))
    moved = both * (grad_out * difference).sum(-1).transpose(1, 2)
    return (
        (_as_out(weight_a) * grad_out).to(out_a.dtype),
        weight_a * grad_lse + moved,
        (_as_out(weight_b) * grad_out).to(out_b.dtype),
        weight_b * grad_lse - moved,
    )


def _weight(lse_side: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return torch.where(lse_side.isinf(), 0, (lse_side - lse).exp())  # an infinite lse has no gradient


def _as_out(weight: torch.Tensor) -> torch.Tensor:
    return weight.transpose(1, 2)[..., None]


register(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.merge_states,
    backends={"triton": _triton, "cpu": _cpu},
    backward=_backward,
    setup_context=_context,
)
