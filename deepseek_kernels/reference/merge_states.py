"""Two attention results over disjoint keys into one, in plain torch."""

import torch


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `deepseek_kernels.merge_states`."""
    compute = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    a, b = lse_a.to(compute), lse_b.to(compute)
    top = torch.maximum(a, b)
    empty = top.isneginf()
    # an infinite log-sum-exp takes all, -inf takes nothing, and inf - inf is never formed
    mass_a = torch.where(a == top, 1, (a - top).exp()).masked_fill(empty, 0)
    mass_b = torch.where(b == top, 1, (b - top).exp()).masked_fill(empty, 0)
    total = (mass_a + mass_b).masked_fill(empty, 1)
    out = _weighted(mass_a / total, out_a.to(compute)) + _weighted(mass_b / total, out_b.to(compute))
    return out.to(out_a.dtype).contiguous(), (top + total.log()).to(lse_a.dtype).contiguous()


def _weighted(weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    weight = weight.transpose(1, 2)[..., None]
    return torch.where(weight == 0, 0, weight * out)
