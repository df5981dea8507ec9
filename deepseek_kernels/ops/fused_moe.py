"""`fused_moe`: the routed experts of a layer as one differentiable op, composed of this package's other ops.

`fused_moe` keeps nothing, and its gradient computes the forward pass again. `fused_moe_forward` is the same with
`gate_up` and the maps as further outputs, and its gradient computes no matmul twice: the public face calls it when
there is a gradient to come.

Backends: "triton" is a kernel of its own for a few tokens, else the composition; "cpu" is the composition on a CPU.
Left to itself, each op of it chooses its own backend; forced by `use_backend(...)`, so are they all. "torch" is the
same composition for a CPU without compiled kernels, of plain torch and one library matmul per chosen expert.
"""

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Literal

import torch

from ..plan import fused_moe as plan
from ..reference import fused_moe as reference
from ..reference.fp8_quantize import fp8_dequantize, fp8_quantize
from ..reference.moe_permute import moe_permute, moe_unpermute
from ..reference.moe_sort import moe_sort
from ..reference.swiglu import swiglu, swiglu_backward
from ..shapes import BLOCK, ceil_div
from . import _allocate
from . import _checks as checks
from ._registry import register

ops = torch.ops.deepseek_kernels


def fused_moe(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale_gate_up: torch.Tensor | None = None,
    scale_down: torch.Tensor | None = None,
    clamp: float | None = None,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`out[t] = sum_k weights[t, k] * expert_{indices[t, k]}(x[t])`, `expert(x) = W_down(silu(W_gate x) * W_up x)`.

    Args:
        x: [T, H] bf16, fp16, fp32 or fp64; any strides.
        w_gate_up: [E, 2I, H] of x's dtype, gate rows first, or e4m3; contiguous in the last dimension.
        w_down: [E, H, I] likewise.
        weights: fp32 [T, K], from `moe_gate`.
        indices: int32 or int64 [T, K], expert ids of the whole model. Ids that are none of the E experts here (-1,
            another rank's, anything) are skipped, and so are their weights.
        scale_gate_up, scale_down: for e4m3 weights fp32 [E, ceil(2I/128), ceil(H/128)] and
            [E, ceil(H/128), ceil(I/128)]. x and the activation are then quantised 1x128 on the way; H and I must be
            multiples of 16.
        clamp: limit of the SwiGLU's inputs, as in `swiglu`.
        expert_range: (begin, end), ids of the experts here; `end - begin` must be E. Left out: (0, E). The outputs of
            all ranks sum to that of all experts.

    Returns:
        out [T, H] in x's dtype; zero for a token without an expert. Each matmul and the sum over k accumulate in fp32;
        in between, rows are rounded to x's dtype (FP8: gate_up to x's dtype, fp32 for fp16).

    Raises:
        ValueError, TypeError: naming the argument.
        NotImplementedError: on backward with e4m3 weights.

    Differentiable in x, w_gate_up, w_down and weights; of the activations, only x and gate_up [T * K, 2I] are kept.
    Semantics of `MoE.forward` in DeepSeek-V3's inference/model.py, without its shared expert.
    """
    begin, end = expert_range if expert_range is not None else (0, -1)
    if expert_range is not None and end < begin:  # to the op, -1 means begin + E
        raise checks.fail("fused_moe", "expert_range", "0 <= begin <= end", expert_range)
    args = (x, w_gate_up, w_down, weights, indices, scale_gate_up, scale_down, clamp, begin, end)
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in args[:4])
    return ops.fused_moe_forward(*args)[0] if keeps and scale_gate_up is None else ops.fused_moe(*args)


def _check_as(op: str):
    def check(x, w_gate_up, w_down, weights, indices, scale_gate_up, scale_down, clamp, expert_begin, expert_end):
        checks.tensor(op, "x", x, dtype=checks.FLOATS, shape=(None, None))
        num_tokens, hidden = x.shape
        is_fp8 = w_gate_up.dtype == checks.FP8
        dtype = checks.FP8 if is_fp8 else x.dtype
        checks.tensor(
            op, "w_gate_up", w_gate_up,
            dtype=dtype, shape=(None, None, hidden), device=x.device, last_contiguous=True,
        )  # fmt: skip
        num_experts, width, _ = w_gate_up.shape
        checks.multiple(op, "w_gate_up: rows", width, 2)
        intermediate = width // 2
        checks.tensor(
            op, "w_down", w_down,
            dtype=dtype, shape=(num_experts, hidden, intermediate), device=x.device, last_contiguous=True,
        )  # fmt: skip
        checks.tensor(
            op, "weights", weights,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
            shape=(num_tokens, None), device=x.device,
        )  # fmt: skip
        checks.tensor(
            op, "indices", indices, dtype=(torch.int32, torch.int64), shape=weights.shape, device=x.device
        )  # fmt: skip
        if clamp is not None and not clamp > 0:
            raise checks.fail(op, "clamp", "a number above 0", clamp)
        if expert_begin < 0 or expert_end not in (-1, expert_begin + num_experts):
            raise checks.fail(op, "expert_range", f"{num_experts} ids from 0 up", (expert_begin, expert_end))
        for name, scale, rows, columns in (
            ("scale_gate_up", scale_gate_up, width, hidden), ("scale_down", scale_down, hidden, intermediate),
        ):  # fmt: skip
            if (scale is not None) != is_fp8:
                raise checks.fail(
                    op, name, "scales with e4m3 weights, and only then", None if scale is None else "some"
                )
            shape = (num_experts, ceil_div(rows, BLOCK), ceil_div(columns, BLOCK))
            checks.tensor(op, name, scale, dtype=torch.float32, shape=shape, device=x.device)
        if is_fp8:
            checks.tensor(op, "x", x, dtype=checks.FLOATS[:3])
            checks.multiple(op, "x: columns", hidden, 16)
            checks.multiple(op, "w_down: columns", intermediate, 16)

    return check


def _problem_as(kind: Literal["inference", "forward", "backward"]):
    def problem(x, w_gate_up, w_down, weights, indices, *_) -> plan.Problem:
        num_experts, hidden, intermediate = w_down.shape
        return plan.Problem(
            kind, x.shape[0], hidden, intermediate, num_experts, indices.shape[1],
            x.element_size(), w_down.element_size(), str(x.dtype).removeprefix("torch."),
        )  # fmt: skip

    return problem


def _fake(x, *_):
    return x.new_empty(x.shape)


def _fake_forward(x, w_gate_up, w_down, weights, indices, *_):
    num_experts, width, _ = w_gate_up.shape
    num_rows = indices.shape[0] * indices.shape[1]
    dtype = reference.rows_dtype(x, w_gate_up.dtype == checks.FP8)
    maps = (x.new_empty(shape, dtype=torch.int32) for shape in (indices.shape, (num_rows,), (num_experts + 1,)))
    return x.new_empty(x.shape), x.new_empty(num_rows, width, dtype=dtype), *maps


def _forward(
    ops, x, w_gate_up, w_down, weights, indices, scale_gate_up, scale_down, clamp, expert_begin, expert_end
):  # fmt: skip
    expert_end = expert_begin + w_gate_up.shape[0]
    maps = ops.moe_sort(indices, max(expert_end, 1), expert_begin, expert_end)
    to_pos, to_entry, offsets = maps
    if scale_gate_up is None:
        rows, _ = ops.moe_permute(x, to_pos, to_entry)
        gate_up = ops.grouped_matmul(rows, w_gate_up, offsets)
        del rows
        h, _ = ops.swiglu(gate_up, weights, to_entry, False, clamp)
        y = ops.grouped_matmul(h, w_down, offsets)
    else:
        dtype = reference.rows_dtype(x, is_fp8=True)
        rows, scale = ops.moe_permute(x, to_pos, to_entry, None, True)
        gate_up = ops.fp8_grouped_matmul(rows, scale, w_gate_up, scale_gate_up, offsets, dtype)
        del rows
        h, scale = ops.swiglu(gate_up, weights, to_entry, True, clamp)
        y = ops.fp8_grouped_matmul(h, scale, w_down, scale_down, offsets, dtype)
    return ops.moe_unpermute(y, to_pos, to_entry).to(x.dtype), gate_up, *maps


def _inference(config, *args):
    if config is None:
        return _forward(ops, *args)[0]
    from ..triton_kernels import fused_moe as kernel

    x, w_gate_up, w_down, weights, indices, scale_gate_up, scale_down, clamp, expert_begin, _ = args
    out = _allocate.empty(x.shape, x.dtype, x.device)
    if indices.numel() == 0 or w_down.numel() == 0:
        return out.zero_()
    h = _allocate.empty((indices.numel(), w_down.shape[2]), torch.float32, x.device)
    kept = reference.rows_dtype(x, scale_gate_up is not None)
    kernel.decode(
        config, checks.rows(x), w_gate_up, w_down, weights.contiguous(), indices.contiguous(),
        scale_gate_up, scale_down, clamp, expert_begin, kept, h, out,
    )  # fmt: skip
    return out


def _busy(expert_offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and those rows. Reads the offsets: for CPU tensors only."""
    for expert, (first, last) in enumerate(pairwise(expert_offsets.tolist())):
        if first < last:
            yield expert, slice(first, last)


def _grouped_matmul(a, b, expert_offsets):
    out = _allocate.empty((a.shape[0], b.shape[1]), a.dtype, a.device).zero_()
    for expert, rows in _busy(expert_offsets):
        torch.mm(a[rows], b[expert].t(), out=out[rows])
    return out


def _grouped_matmul_wgrad(grad, a, expert_offsets):
    shape = (expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1])
    out = _allocate.empty(shape, a.dtype, a.device).zero_()
    for expert, rows in _busy(expert_offsets):
        torch.mm(grad[rows].t(), a[rows], out=out[expert])
    return out


def _moe_permute(x, to_pos, to_entry, scale=None, quantize=False):
    if quantize:  # a token once, not once a row
        x, scale = fp8_quantize(x)
    return moe_permute(x, to_pos, to_entry, scale)


def _fp8_grouped_matmul(a, scale_a, b, scale_b, expert_offsets, out_dtype):
    out = _allocate.empty((a.shape[0], b.shape[1]), torch.float32, a.device).zero_()
    a = fp8_dequantize(a, scale_a, "1x128")
    for expert, rows in _busy(expert_offsets):
        torch.mm(a[rows], fp8_dequantize(b[expert], scale_b[expert], "128x128").t(), out=out[rows])
    return out.to(out_dtype)


_ON_CPU = SimpleNamespace(
    moe_sort=moe_sort,
    moe_permute=_moe_permute,
    moe_unpermute=moe_unpermute,
    swiglu=swiglu,
    swiglu_backward=swiglu_backward,
    grouped_matmul=_grouped_matmul,
    grouped_matmul_wgrad=_grouped_matmul_wgrad,
    fp8_grouped_matmul=_fp8_grouped_matmul,
)


def _refuse_fp8(op: str, w_gate_up: torch.Tensor) -> None:
    if w_gate_up.dtype == checks.FP8:
        raise NotImplementedError(f"{op}: has no backward with e4m3 weights; use bf16 weights or detach its inputs")


def _gradients_of(needs, grad, *saved):
    grads = ops.fused_moe_backward(grad, *saved, list(needs))
    x, w_gate_up, w_down, weights = (g if need else None for g, need in zip(grads, needs))
    return x, w_gate_up, w_down, weights, *(None,) * 6


def _backward(ctx, grad):
    x, w_gate_up, w_down, weights, indices = ctx.saved_tensors
    _refuse_fp8("fused_moe", w_gate_up)
    _, *kept = ops.fused_moe_forward(x, w_gate_up, w_down, weights, indices, None, None, *ctx.options)
    return _gradients_of(ctx.needs_input_grad[:4], grad, x, w_gate_up, w_down, weights, *kept, ctx.options[0])


def _context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = (*inputs, *_DEFAULTS[len(inputs) :])[7:]


def _backward_of_forward(ctx, grad, *_):
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
    _refuse_fp8("fused_moe_forward", saved[1])
    return _gradients_of(ctx.needs_input_grad[:4], grad, *saved, ctx.clamp)


def _context_of_forward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.clamp = (*inputs, *_DEFAULTS[len(inputs) :])[7]
    ctx.mark_non_differentiable(*output[1:])


_DEFAULTS = (None,) * 8 + (0, -1)  # of the schema, which may be left out of `inputs`


def _check_backward(
    grad, x, w_gate_up, w_down, weights, gate_up, token_topk_to_pos, pos_to_token_topk, expert_offsets, clamp, needs
) -> None:  # fmt: skip
    op = "fused_moe_backward"
    checks.tensor(op, "x", x, dtype=checks.FLOATS, shape=(None, None))
    (num_tokens, hidden), device = x.shape, x.device
    checks.tensor(op, "grad", grad, dtype=x.dtype, shape=x.shape, device=device)
    checks.tensor(op, "gate_up", gate_up, dtype=x.dtype, shape=(None, None), device=device)
    num_rows, width = gate_up.shape
    checks.multiple(op, "gate_up: columns", width, 2)
    checks.tensor(op, "w_gate_up", w_gate_up, dtype=x.dtype, shape=(None, width, hidden), device=device)
    num_experts = w_gate_up.shape[0]
    checks.tensor(op, "w_down", w_down, dtype=x.dtype, shape=(num_experts, hidden, width // 2), device=device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    checks.tensor(op, "weights", weights, dtype=wide, shape=(num_tokens, None), device=device)
    for name, t, shape in (
        ("token_topk_to_pos", token_topk_to_pos, weights.shape), ("pos_to_token_topk", pos_to_token_topk, (num_rows,)),
        ("expert_offsets", expert_offsets, (num_experts + 1,)),
    ):  # fmt: skip
        checks.tensor(op, name, t, dtype=torch.int32, shape=shape, device=device, contiguous=True)
    if len(needs) != 4:
        raise checks.fail(op, "needs", "4 values", len(needs))


def _check_values_backward(
    grad, x, w_gate_up, w_down, weights, gate_up, token_topk_to_pos, pos_to_token_topk, expert_offsets, clamp, needs
) -> None:  # fmt: skip
    op, num_rows = "fused_moe_backward", gate_up.shape[0]
    checks.within(op, "token_topk_to_pos", token_topk_to_pos, -1, num_rows)
    checks.within(op, "pos_to_token_topk", pos_to_token_topk, -1, token_topk_to_pos.numel())
    checks.offsets(op, "expert_offsets", expert_offsets, num_rows)


def _problem_backward(grad, x, w_gate_up, w_down, weights, *rest) -> plan.Problem:
    num_experts, hidden, intermediate = w_down.shape
    return plan.Problem(
        "backward", x.shape[0], hidden, intermediate, num_experts, weights.shape[1], x.element_size(),
        w_down.element_size(), str(x.dtype).removeprefix("torch."), tuple(rest[-1]),
    )  # fmt: skip


def _fake_backward(grad, x, w_gate_up, w_down, weights, *rest):
    return tuple(
        t.new_empty(t.shape if need else (0,)) for t, need in zip((x, w_gate_up, w_down, weights), rest[-1])
    )  # fmt: skip


def _gradients(
    ops, grad, x, w_gate_up, w_down, weights, gate_up, to_pos, to_entry, offsets, clamp, needs
):  # fmt: skip
    need_x, need_w_gate_up, need_w_down, need_weights = needs
    grad_x, grad_w_gate_up, grad_w_down, grad_weights = (
        _allocate.empty((0,), t.dtype, t.device) for t in (x, w_gate_up, w_down, weights)
    )
    grad_rows, _ = ops.moe_permute(grad, to_pos, to_entry)
    if need_w_down:
        h, _ = ops.swiglu(gate_up, weights, to_entry, False, clamp)
        grad_w_down = ops.grouped_matmul_wgrad(grad_rows, h, offsets)
        del h
    if need_x or need_w_gate_up or need_weights:
        grad_h = ops.grouped_matmul(grad_rows, w_down.transpose(1, 2), offsets)
        del grad_rows
        grad_gate_up, dots = ops.swiglu_backward(grad_h, gate_up, weights, to_entry, clamp)
        del grad_h
        if need_weights:
            grad_weights = dots
        if need_w_gate_up:
            rows, _ = ops.moe_permute(x, to_pos, to_entry)
            grad_w_gate_up = ops.grouped_matmul_wgrad(grad_gate_up, rows, offsets)
            del rows
        if need_x:
            grad_x_rows = ops.grouped_matmul(grad_gate_up, w_gate_up.transpose(1, 2), offsets)
            grad_x = ops.moe_unpermute(grad_x_rows, to_pos, to_entry)
    return grad_x, grad_w_gate_up, grad_w_down, grad_weights


_ARGUMENTS = (
    "(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor indices, Tensor? scale_gate_up=None, "
    "Tensor? scale_down=None, float? clamp=None, int expert_begin=0, int expert_end=-1)"
)
register(
    f"fused_moe{_ARGUMENTS} -> Tensor",
    check=_check_as("fused_moe"),
    problem=_problem_as("inference"),
    plan=plan,
    fake=_fake,
    reference=reference.fused_moe,
    backends={
        "triton": _inference,
        "cpu": _inference,
        "torch": lambda config, *args: _forward(_ON_CPU, *args)[0],
    },
    backward=_backward,
    setup_context=_context,
)
register(
    f"fused_moe_forward{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_as("fused_moe_forward"),
    problem=_problem_as("forward"),
    plan=plan,
    fake=_fake_forward,
    reference=reference.fused_moe_forward,
    backends={
        "triton": lambda config, *args: _forward(ops, *args),
        "cpu": lambda config, *args: _forward(ops, *args),
        "torch": lambda config, *args: _forward(_ON_CPU, *args),
    },
    backward=_backward_of_forward,
    setup_context=_context_of_forward,
)
register(
    "fused_moe_backward(Tensor grad, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor gate_up, "
    "Tensor token_topk_to_pos, Tensor pos_to_token_topk, Tensor expert_offsets, float? clamp, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    problem=_problem_backward,
    plan=plan,
    fake=_fake_backward,
    reference=reference.fused_moe_backward,
    check_values=_check_values_backward,
    backends={
        "triton": lambda config, *args: _gradients(ops, *args),
        "cpu": lambda config, *args: _gradients(ops, *args),
        "torch": lambda config, *args: _gradients(_ON_CPU, *args),
    },
)
