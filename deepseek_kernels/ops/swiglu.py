"""`swiglu`: the activation of an expert, with the routing weight of each row and FP8 output in the same pass."""

import torch

from ..plan import swiglu as plan
from ..reference import swiglu as reference
from ..shapes import BLOCK, ceil_div
from . import _allocate, _extension
from . import _checks as checks
from ._maps import MoeMaps
from ._registry import register


def swiglu(
    gate_up: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    maps: MoeMaps | None = None,
    pos_to_token_topk: torch.Tensor | None = None,
    quantize: bool = False,
    clamp: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`silu(gate) * up * weight` of every row, where gate_up = [gate | up].

    Args:
        gate_up: [R, 2I] bf16, fp16, fp32 or fp64; any strides (a copy is made unless the last dimension is contiguous).
        weights: fp32; [R], one per row, or with a map [T, K], the routing weights of `moe_gate`. Applied here, so that
            `moe_unpermute` is a plain sum.
        maps: from `moe_sort`; says which (token, k) each row belongs to.
        pos_to_token_topk: int32 [R], that part of `maps` alone. Rows without an entry (below 0, or past the end of
            weights) are never read and give zero.
        quantize: the result comes as e4m3 with 1x128 scales. The fp32 value is quantised, not its rounding to bf16.
        clamp: above 0; gate is limited to at most `clamp`, up to [-clamp, clamp], before anything else.

    Returns:
        h [R, I] in gate_up's dtype, computed in fp32; with `quantize` (e4m3 [R, I], fp32 scale [R, ceil(I/128)]), both
        zero where there is no entry.

    Raises:
        ValueError, TypeError: naming the argument.
        NotImplementedError: on backward with `quantize`.

    Differentiable in gate_up and weights. Semantics of TileKernels' swiglu_forward, whose clamp is also that of
    gpt-oss and DeepSeek-V4.
    """
    if maps is not None:
        if pos_to_token_topk is not None:
            raise checks.fail("swiglu", "pos_to_token_topk", "None when maps is given", list(pos_to_token_topk.shape))
        pos_to_token_topk = maps.pos_to_token_topk
    out, scale = torch.ops.deepseek_kernels.swiglu(gate_up, weights, pos_to_token_topk, quantize, clamp)
    return (out, scale) if quantize else out


def _check_rows(op, gate_up, weights, pos_to_token_topk, clamp) -> None:
    checks.tensor(op, "gate_up", gate_up, dtype=checks.FLOATS, shape=(None, None))
    checks.multiple(op, "gate_up: columns", gate_up.shape[1], 2)
    num_rows = gate_up.shape[0]
    checks.tensor(
        op, "weights", weights,
        dtype=(torch.float32, torch.float64), device=gate_up.device,
        shape=(num_rows,) if pos_to_token_topk is None else (None, None),
    )  # fmt: skip
    checks.tensor(
        op, "pos_to_token_topk", pos_to_token_topk,
        dtype=torch.int32, shape=(num_rows,), device=gate_up.device, contiguous=True,
    )  # fmt: skip
    if clamp is not None and not clamp > 0:
        raise checks.fail(op, "clamp", "a number above 0", clamp)


def _check(gate_up, weights, pos_to_token_topk, quantize, clamp) -> None:
    _check_rows("swiglu", gate_up, weights, pos_to_token_topk, clamp)
    if quantize:
        checks.tensor("swiglu", "gate_up", gate_up, dtype=checks.FLOATS[:3])


def _check_backward(grad, gate_up, weights, pos_to_token_topk, clamp) -> None:
    op = "swiglu_backward"
    _check_rows(op, gate_up, weights, pos_to_token_topk, clamp)
    num_rows, width = gate_up.shape
    checks.tensor(op, "grad", grad, dtype=gate_up.dtype, shape=(num_rows, width // 2), device=gate_up.device)


def _check_values(op: str, weights, pos_to_token_topk) -> None:
    if weights is not None:
        checks.within(op, "pos_to_token_topk", pos_to_token_topk, -1, weights.numel())


def _problem_of(kind, gate_up, weights, pos_to_token_topk, quantize=False) -> plan.Problem:
    return plan.Problem(
        kind, gate_up.shape[0], gate_up.shape[1] // 2, gate_up.element_size(), weights is not None,
        pos_to_token_topk is not None, quantize, str(gate_up.dtype).removeprefix("torch."),
    )  # fmt: skip


def _problem(gate_up, weights, pos_to_token_topk, quantize, clamp) -> plan.Problem:
    return _problem_of("forward", gate_up, weights, pos_to_token_topk, quantize)


def _problem_backward(grad, gate_up, weights, pos_to_token_topk, clamp) -> plan.Problem:
    return _problem_of("backward", gate_up, weights, pos_to_token_topk)


def _shapes(gate_up, quantize):
    num_rows, width = gate_up.shape
    return (num_rows, width // 2), (num_rows, ceil_div(width // 2, BLOCK) if quantize else 0)


def _fake(gate_up, weights, pos_to_token_topk, quantize, clamp):
    shape, scale_shape = _shapes(gate_up, quantize)
    out = gate_up.new_empty(shape, dtype=checks.FP8 if quantize else gate_up.dtype)
    return out, gate_up.new_empty(scale_shape, dtype=torch.float32)


def _fake_backward(grad, gate_up, weights, pos_to_token_topk, clamp):
    grad_weights = gate_up.new_empty(0, dtype=torch.float32) if weights is None else weights.new_empty(weights.shape)
    return gate_up.new_empty(gate_up.shape), grad_weights


def _flat(weights):
    return None if weights is None else weights.contiguous().float()


def _triton(config, gate_up, weights, pos_to_token_topk, quantize, clamp):
    from ..triton_kernels import swiglu as kernel

    shape, scale_shape = _shapes(gate_up, quantize)
    out = _allocate.empty(shape, checks.FP8 if quantize else gate_up.dtype, gate_up.device)
    scale = _allocate.empty(scale_shape, torch.float32, gate_up.device)
    if out.numel():
        kernel.swiglu(config, checks.rows(gate_up), _flat(weights), pos_to_token_topk, clamp, out, scale)
    return out, scale


def _cpu(config, gate_up, weights, pos_to_token_topk, quantize, clamp):
    shape, scale_shape = _shapes(gate_up, quantize)
    out = _allocate.empty(shape, checks.FP8 if quantize else gate_up.dtype, gate_up.device)
    scale = _allocate.empty(scale_shape, torch.float32, gate_up.device)
    gate_up, weights = checks.rows(gate_up), _flat(weights)
    if out.numel():
        _extension.cpu().swiglu(
            gate_up=gate_up.data_ptr(), weights=_extension.address(weights),
            pos_to_token_topk=_extension.address(pos_to_token_topk), out=out.data_ptr(),
            scale_out=scale.data_ptr() if quantize else 0, num_rows=shape[0], intermediate=shape[1],
            num_weights=weights.numel() if weights is not None else 0, ld=gate_up.stride(0),
            clamp=float("inf") if clamp is None else clamp, dtype=_extension.dtype_code(gate_up.dtype),
            threads=torch.get_num_threads(),
        )  # fmt: skip
    return out, scale


def _triton_backward(config, grad, gate_up, weights, pos_to_token_topk, clamp):
    from ..triton_kernels import swiglu as kernel

    grad_gate_up = _allocate.empty(gate_up.shape, gate_up.dtype, gate_up.device)
    shape = (0,) if weights is None else weights.shape
    grad_weights = _allocate.empty(shape, torch.float32, gate_up.device)
    if pos_to_token_topk is not None or not grad_gate_up.numel():
        grad_weights.zero_()  # entries without a row
    if grad_gate_up.numel():
        kernel.swiglu_backward(
            config, checks.rows(grad), checks.rows(gate_up), _flat(weights), pos_to_token_topk, clamp,
            grad_gate_up, grad_weights,
        )  # fmt: skip
    return grad_gate_up, grad_weights if weights is None else grad_weights.to(weights.dtype)


def _cpu_backward(config, grad, gate_up, weights, pos_to_token_topk, clamp):
    grad_gate_up = _allocate.empty(gate_up.shape, gate_up.dtype, gate_up.device)
    grad_weights = _allocate.empty((0,) if weights is None else weights.shape, torch.float32, gate_up.device)
    if pos_to_token_topk is not None or not grad_gate_up.numel():
        grad_weights.zero_()  # entries without a row
    grad, gate_up, flat = checks.rows(grad), checks.rows(gate_up), _flat(weights)
    if grad_gate_up.numel():
        _extension.cpu().swiglu_backward(
            grad=grad.data_ptr(), gate_up=gate_up.data_ptr(), weights=_extension.address(flat),
            pos_to_token_topk=_extension.address(pos_to_token_topk), grad_gate_up=grad_gate_up.data_ptr(),
            grad_weights=grad_weights.data_ptr(), num_rows=grad.shape[0], intermediate=grad.shape[1],
            num_weights=grad_weights.numel(), ld_grad=grad.stride(0), ld=gate_up.stride(0),
            clamp=float("inf") if clamp is None else clamp, dtype=_extension.dtype_code(gate_up.dtype),
            threads=torch.get_num_threads(),
        )  # fmt: skip
    return grad_gate_up, grad_weights if weights is None else grad_weights.to(weights.dtype)


def _backward(ctx, grad, grad_scale):
    if ctx.quantize:
        raise NotImplementedError("swiglu: has no backward with quantize=True; quantise a detached tensor")
    gate_up, weights, pos_to_token_topk = ctx.saved_tensors
    grad_gate_up, grad_weights = torch.ops.deepseek_kernels.swiglu_backward(
        grad, gate_up, weights, pos_to_token_topk, ctx.clamp
    )
    return grad_gate_up, None if weights is None else grad_weights, None, None, None


def _context(ctx, inputs, output) -> None:
    gate_up, weights, pos_to_token_topk, quantize, clamp = inputs + (None, None, False, None)[len(inputs) - 1 :]
    ctx.save_for_backward(gate_up, weights, pos_to_token_topk)
    ctx.quantize, ctx.clamp = quantize, clamp
    ctx.mark_non_differentiable(output[1])


register(
    "swiglu(Tensor gate_up, Tensor? weights=None, Tensor? pos_to_token_topk=None, bool quantize=False, "
    "float? clamp=None) -> (Tensor, Tensor)",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.swiglu,
    check_values=lambda gate_up, *rest: _check_values("swiglu", *rest[:2]),
    backends={"triton": _triton, "cpu": _cpu},
    backward=_backward,
    setup_context=_context,
)
register(
    "swiglu_backward(Tensor grad, Tensor gate_up, Tensor? weights=None, Tensor? pos_to_token_topk=None, "
    "float? clamp=None) -> (Tensor, Tensor)",
    check=_check_backward,
    problem=_problem_backward,
    plan=plan,
    fake=_fake_backward,
    reference=reference.swiglu_backward,
    check_values=lambda grad, gate_up, *rest: _check_values("swiglu_backward", *rest[:2]),
    backends={"triton": _triton_backward, "cpu": _cpu_backward},
)
