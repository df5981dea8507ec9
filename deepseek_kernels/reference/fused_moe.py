"""The routed experts of a mixture-of-experts layer, in plain torch."""

import torch

from .fp8_grouped_matmul import fp8_grouped_matmul
from .grouped_matmul import grouped_matmul, grouped_matmul_wgrad
from .moe_permute import moe_permute, moe_unpermute
from .moe_sort import moe_sort
from .swiglu import swiglu, swiglu_backward


def rows_dtype(x: torch.Tensor, is_fp8: bool) -> torch.dtype:
    """Of `gate_up`: x's, except that FP8 matmuls give bf16 or fp32."""
    return torch.float32 if is_fp8 and x.dtype == torch.float16 else x.dtype


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def fused_moe(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    scale_gate_up: torch.Tensor | None = None,
    scale_down: torch.Tensor | None = None,
    clamp: float | None = None,
    expert_begin: int = 0,
    expert_end: int = -1,
) -> torch.Tensor:
    """See `deepseek_kernels.fused_moe`."""
    return fused_moe_forward(
        x, w_gate_up, w_down, weights, indices, scale_gate_up, scale_down, clamp, expert_begin, expert_end
    )[0]


def fused_moe_forward(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    scale_gate_up: torch.Tensor | None = None,
    scale_down: torch.Tensor | None = None,
    clamp: float | None = None,
    expert_begin: int = 0,
    expert_end: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and what its gradient needs: gate_up (rounded to the dtype it is kept in) and the routing maps."""
    expert_end = expert_begin + w_gate_up.shape[0]
    maps = moe_sort(indices, expert_end, expert_begin, expert_end)
    to_pos, to_entry, offsets = maps
    if scale_gate_up is None:
        rows, _ = moe_permute(_wide(x), to_pos, to_entry)
        gate_up = grouped_matmul(rows, _wide(w_gate_up), offsets).to(x.dtype)
        h, _ = swiglu(_wide(gate_up), weights, to_entry, clamp=clamp)
        y = grouped_matmul(h, _wide(w_down), offsets)
    else:
        dtype = rows_dtype(x, is_fp8=True)
        rows, scale = moe_permute(x, to_pos, to_entry, quantize=True)
        gate_up = fp8_grouped_matmul(rows, scale, w_gate_up, scale_gate_up, offsets, torch.float32).to(dtype)
        h, scale = swiglu(gate_up, weights, to_entry, quantize=True, clamp=clamp)
        y = fp8_grouped_matmul(h, scale, w_down, scale_down, offsets, torch.float32)  # type: ignore[arg-type]
    return moe_unpermute(y, to_pos, to_entry).to(x.dtype), gate_up, *maps


def fused_moe_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    token_topk_to_pos: torch.Tensor,
    pos_to_token_topk: torch.Tensor,
    expert_offsets: torch.Tensor,
    clamp: float | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, w_gate_up, w_down and weights; those that nobody `needs` are empty."""
    grad_rows, _ = moe_permute(_wide(grad), token_topk_to_pos, pos_to_token_topk)
    grad_h = grouped_matmul(grad_rows, _wide(w_down).transpose(1, 2), expert_offsets)
    wide = _wide(gate_up)
    grad_gate_up, grad_weights = swiglu_backward(grad_h, wide, weights, pos_to_token_topk, clamp)
    grad_x_rows = grouped_matmul(grad_gate_up, _wide(w_gate_up).transpose(1, 2), expert_offsets)
    grad_x = moe_unpermute(grad_x_rows, token_topk_to_pos, pos_to_token_topk)
    rows, _ = moe_permute(_wide(x), token_topk_to_pos, pos_to_token_topk)
    grad_w_gate_up = grouped_matmul_wgrad(grad_gate_up, rows, expert_offsets)
    h, _ = swiglu(wide, weights, pos_to_token_topk, clamp=clamp)
    grad_w_down = grouped_matmul_wgrad(grad_rows, h, expert_offsets)
    grads = (
        grad_x.to(x.dtype),
        grad_w_gate_up.to(w_gate_up.dtype),
        grad_w_down.to(w_down.dtype),
        grad_weights.to(weights.dtype),
    )
    return tuple(g if need else g.new_empty(0) for g, need in zip(grads, needs))
