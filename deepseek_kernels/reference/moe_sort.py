"""Routing maps, in plain torch."""

import torch

from ..shapes import align_up


def max_rows(num_entries: int, num_experts: int, alignment: int) -> int:
    """Rows that hold any routing of `num_entries` (token, k) pairs, known without looking at the data."""
    return align_up(num_entries + (alignment - 1) * min(num_experts, num_entries), alignment)


def moe_sort(
    indices: torch.Tensor, num_experts: int, expert_begin: int = 0, expert_end: int = -1, alignment: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `deepseek_kernels.moe_sort`."""
    expert_end = num_experts if expert_end < 0 else expert_end
    local = expert_end - expert_begin
    flat = indices.reshape(-1).long() - expert_begin
    flat = torch.where((flat >= 0) & (flat < local), flat, local)  # bucket `local` collects what is not ours
    counts = flat.new_zeros(local + 1).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts[:local] + alignment - 1) // alignment * alignment
    expert_offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])

    order = torch.argsort(flat, stable=True)
    expert = flat[order]
    first = counts.cumsum(0) - counts
    rank = torch.arange(flat.numel(), device=flat.device) - first[expert]
    rows = max_rows(flat.numel(), local, alignment)
    pos = torch.where(expert < local, expert_offsets[expert.clamp(max=max(local - 1, 0))] + rank, rows)

    pos_to_token_topk = flat.new_full((rows + 1,), -1)  # the extra row takes what has no position
    pos_to_token_topk[pos] = order
    token_topk_to_pos = torch.empty_like(flat)
    token_topk_to_pos[order] = torch.where(expert < local, pos, -1)
    return (
        token_topk_to_pos.view(indices.shape).int(),
        pos_to_token_topk[:rows].int(),
        expert_offsets.int(),
    )
