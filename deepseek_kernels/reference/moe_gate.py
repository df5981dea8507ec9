"""Choosing experts for every token, in plain torch."""

import torch
import torch.nn.functional as F

EPSILON = 1e-20

SCORES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: torch.softmax(x, -1).nan_to_num(nan=0.0),  # a row of -inf has no probabilities
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
}


def _above_minus_infinity(x: torch.Tensor) -> torch.Tensor:
    """NaN counts as -inf and +inf as the largest finite number."""
    return x.nan_to_num(nan=-torch.inf, posinf=torch.finfo(x.dtype).max, neginf=-torch.inf)


def _logits(logits: torch.Tensor) -> torch.Tensor:
    return _above_minus_infinity(logits if logits.dtype == torch.float64 else logits.float())


def _descending(x: torch.Tensor) -> torch.Tensor:
    """Order of the last dimension, largest first, ties to the lower index (torch.topk promises no order of ties)."""
    return x.sort(dim=-1, descending=True, stable=True).indices


def moe_gate(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `deepseek_kernels.moe_gate`."""
    num_tokens, num_experts = logits.shape
    x = _logits(logits)
    scores = SCORES[score](x)
    selection = scores if bias is None else scores + bias.to(scores.dtype)
    selection = _above_minus_infinity(selection).masked_fill(x == -torch.inf, -torch.inf)

    order = _descending(selection)
    if topk_groups < num_groups:
        best = selection.view(num_tokens, num_groups, -1).sort(dim=-1, descending=True).values
        group_score = best[..., 0]
        if bias is not None and num_groups < num_experts:
            group_score = torch.where(best[..., 1] > -torch.inf, best[..., 0] + best[..., 1], best[..., 0])
        excluded = torch.ones_like(group_score, dtype=torch.int32)
        excluded.scatter_(1, _descending(group_score)[:, :topk_groups], 0)
        excluded = excluded.repeat_interleave(num_experts // num_groups, dim=1)
        # behind every allowed expert, even one at -inf
        order = order.gather(1, excluded.gather(1, order).argsort(dim=-1, stable=True))
    indices = order[:, :top_k].clone(memory_format=torch.contiguous_format)

    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    weights = weights * scale
    if mask is not None:
        indices = torch.where(mask[:, None], indices, -1)
        weights = torch.where(mask[:, None], weights, 0)
    return weights, indices


def moe_gate_backward(
    grad_weights: torch.Tensor, logits: torch.Tensor, indices: torch.Tensor, score: str, normalize: bool, scale: float
) -> torch.Tensor:
    """Gradient of `moe_gate`'s logits [T, E]. Entries of `indices` out of range have none."""
    num_tokens, num_experts = logits.shape
    x = _logits(logits)
    scores = SCORES[score](x)
    indices = indices.contiguous()  # the order in which torch sums over the chosen follows their strides on a GPU
    chosen = (indices >= 0) & (indices < num_experts)
    column = torch.where(chosen, indices, num_experts).long()
    weights = F.pad(scores, (0, 1)).gather(1, column)
    grad = torch.where(chosen, grad_weights.to(x.dtype), 0) * scale
    if normalize:
        total = weights.sum(-1, keepdim=True) + EPSILON
        grad = (grad - (grad * weights).sum(-1, keepdim=True) / total) / total
    grad_scores = scores.new_zeros(num_tokens, num_experts + 1).scatter_(1, column, grad)[:, :-1]

    if score == "sigmoid":
        grad_logits = grad_scores * scores * (1 - scores)
    elif score == "softmax":
        grad_logits = scores * (grad_scores - (grad_scores * scores).sum(-1, keepdim=True))
    else:
        grad_logits = torch.where(scores > 0, grad_scores * torch.sigmoid(x) / (2 * scores), 0)
    return grad_logits.to(logits.dtype)
