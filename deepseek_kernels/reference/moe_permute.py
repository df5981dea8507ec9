"""Moving token rows to expert order and back, in plain torch."""

import torch

from .fp8_quantize import fp8_quantize


def moe_permute(
    x: torch.Tensor,
    token_topk_to_pos: torch.Tensor,
    pos_to_token_topk: torch.Tensor,
    scale: torch.Tensor | None = None,
    quantize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `deepseek_kernels.moe_permute`."""
    if quantize:
        x, scale = fp8_quantize(x)
    if scale is None:
        scale = x.new_empty(x.shape[0], 0, dtype=torch.float32)
    top_k = token_topk_to_pos.shape[1]
    return _gather(x, pos_to_token_topk, top_k), _gather(scale, pos_to_token_topk, top_k)


def _gather(rows: torch.Tensor, pos_to_token_topk: torch.Tensor, top_k: int) -> torch.Tensor:
    out = rows.new_empty(pos_to_token_topk.shape[0], rows.shape[1])
    if rows.numel() == 0 or top_k == 0:
        return out.zero_()
    has_entry = (pos_to_token_topk >= 0) & (pos_to_token_topk < rows.shape[0] * top_k)
    token = torch.where(has_entry, pos_to_token_topk // top_k, 0).long()
    moved = rows.contiguous().view(torch.uint8)[token]  # bytes: movement is exact, also for NaN and FP8
    out.view(torch.uint8).copy_(torch.where(has_entry[:, None], moved, 0))
    return out


def moe_unpermute(
    y: torch.Tensor,
    token_topk_to_pos: torch.Tensor,
    pos_to_token_topk: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `deepseek_kernels.moe_unpermute`."""
    accumulate = torch.float64 if y.dtype == torch.float64 else torch.float32
    out = y.new_zeros(token_topk_to_pos.shape[0], y.shape[1], dtype=accumulate)
    if y.numel() == 0:
        return out.to(y.dtype)
    for k in range(token_topk_to_pos.shape[1]):  # a fixed order of summation
        pos = token_topk_to_pos[:, k].long()
        has_entry = (pos >= 0) & (pos < y.shape[0])
        term = y[torch.where(has_entry, pos, 0)].to(accumulate)
        if weights is not None:
            term = term * weights[:, k, None].to(accumulate)
        out += torch.where(has_entry[:, None], term, 0)
    return out.to(y.dtype)
