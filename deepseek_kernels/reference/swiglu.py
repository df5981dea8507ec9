"""SwiGLU with the routing weight of each row, and its gradients, in plain torch."""

import torch

from .fp8_quantize import fp8_quantize


def swiglu(
    gate_up: torch.Tensor,
    weights: torch.Tensor | None = None,
    pos_to_token_topk: torch.Tensor | None = None,
    quantize: bool = False,
    clamp: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `deepseek_kernels.swiglu`."""
    has_entry, weight, gate, up = _rows(gate_up, weights, pos_to_token_topk)
    gate, up = _clamp(gate, up, clamp)
    out = gate / (1 + torch.exp(-gate)) * up * weight
    out = torch.where(has_entry, out, 0)
    if quantize:
        q, scale = fp8_quantize(out)
        return q, scale.new_zeros(scale.shape).copy_(torch.where(has_entry, scale, 0))
    return out.to(gate_up.dtype), out.new_empty(out.shape[0], 0, dtype=torch.float32)


def swiglu_backward(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    weights: torch.Tensor | None = None,
    pos_to_token_topk: torch.Tensor | None = None,
    clamp: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu`: of gate_up, zero in rows without an entry, and of weights, zero in entries without a row.

    grad: [R, I] in gate_up's dtype. Without weights the second output is empty.
    """
    has_entry, weight, raw_gate, raw_up = _rows(gate_up, weights, pos_to_token_topk)
    gate, up = _clamp(raw_gate, raw_up, clamp)
    grad = torch.where(has_entry, grad.contiguous().to(gate.dtype), 0)
    sigmoid = 1 / (1 + torch.exp(-gate))
    silu = gate * sigmoid
    grad_gate = grad * weight * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    grad_up = grad * weight * silu
    if clamp is not None:
        grad_gate = torch.where(raw_gate > clamp, 0, grad_gate)
        grad_up = torch.where(raw_up.abs() > clamp, 0, grad_up)
    grad_gate_up = torch.where(has_entry, torch.cat([grad_gate, grad_up], 1), 0).to(gate_up.dtype)
    if weights is None:
        return grad_gate_up, grad.new_empty(0, dtype=torch.float32)

    dots = torch.where(has_entry[:, 0], (grad * silu * up).sum(1), 0).to(weights.dtype)
    if pos_to_token_topk is None:
        return grad_gate_up, dots
    grad_weights = weights.new_zeros(weights.numel() + 1)  # the extra element takes the rows without an entry
    grad_weights[torch.where(has_entry[:, 0], pos_to_token_topk.long(), weights.numel())] = dots
    return grad_gate_up, grad_weights[:-1].clone().view(weights.shape)


def _rows(gate_up, weights, pos_to_token_topk):
    """has_entry [R, 1], weight [R, 1] and the halves of gate_up, zero where there is no entry."""
    num_rows, width = gate_up.shape
    accumulate = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    has_entry = torch.ones(num_rows, dtype=torch.bool, device=gate_up.device)
    weight = gate_up.new_ones(num_rows, dtype=accumulate)
    if pos_to_token_topk is not None:
        has_entry = pos_to_token_topk >= 0
        if weights is not None:
            has_entry &= pos_to_token_topk < weights.numel()
            flat = torch.cat([weights.flatten(), weights.new_zeros(1)])
            weight = flat[torch.where(has_entry, pos_to_token_topk.long(), weights.numel())]
    elif weights is not None:
        weight = weights
    rows = torch.where(has_entry[:, None], gate_up.contiguous(), 0).to(accumulate)
    return has_entry[:, None], weight.to(accumulate)[:, None], rows[:, : width // 2], rows[:, width // 2 :]


def _clamp(gate, up, clamp):
    return (gate, up) if clamp is None else (gate.clamp(max=clamp), up.clamp(-clamp, clamp))
