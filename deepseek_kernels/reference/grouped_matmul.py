"""Matmul of each expert's rows with its own weight, and the gradient of those weights, in plain torch."""

from collections.abc import Iterator

import torch

ROWS = 128
"""Rows that are multiplied at a time."""


def expert_bounds(expert_offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The offsets as int64, in [0, num_rows] and raised where they decrease: every row has one expert or none."""
    return expert_offsets.long().clamp(0, num_rows).cummax(0).values


def blocks(expert_offsets: torch.Tensor, num_rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (expert [1], rows [ROWS], inside [ROWS]): up to ROWS rows of one expert, until every expert is done.

    `inside` marks the rows that are the expert's; the others hold any number in [0, num_rows). How many blocks the
    offsets need, only the device knows, so there are as many as any offsets could; the last ones are empty.
    """
    num_experts = expert_offsets.shape[0] - 1
    if num_experts == 0 or num_rows == 0:
        return
    bounds = expert_bounds(expert_offsets, num_rows)
    blocks_of = (bounds.diff() + ROWS - 1) // ROWS
    end_block = blocks_of.cumsum(0)
    step = torch.arange(ROWS, device=expert_offsets.device)
    for block in range(num_rows // ROWS + min(num_experts, num_rows)):
        expert = (end_block <= block).sum().clamp(max=num_experts - 1).view(1)
        rows = bounds[expert] + (block - (end_block - blocks_of)[expert]) * ROWS + step
        yield expert, rows.clamp(max=num_rows - 1), rows < bounds[expert + 1]


def grouped_matmul(
    a: torch.Tensor, b: torch.Tensor, expert_offsets: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """See `deepseek_kernels.grouped_matmul`."""
    num_rows = a.shape[0]
    accumulate = torch.float64 if a.dtype == torch.float64 else torch.float32
    out = a.new_zeros(num_rows + 1, b.shape[1], dtype=accumulate)  # the extra row takes what lies outside the expert
    for expert, rows, inside in blocks(expert_offsets, num_rows):
        d = a[rows].to(accumulate) @ b[expert][0].to(accumulate).t()
        out[torch.where(inside, rows, num_rows)] = d
    return out[:num_rows].to(out_dtype or a.dtype)


def grouped_matmul_wgrad(
    grad: torch.Tensor, a: torch.Tensor, expert_offsets: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """See `deepseek_kernels.grouped_matmul_wgrad`."""
    accumulate = torch.float64 if a.dtype == torch.float64 else torch.float32
    out = a.new_zeros(expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1], dtype=accumulate)
    for expert, rows, inside in blocks(expert_offsets, a.shape[0]):
        g = torch.where(inside[:, None], grad[rows], 0).to(accumulate)
        x = torch.where(inside[:, None], a[rows], 0).to(accumulate)
        out.index_add_(0, expert, (g.t() @ x)[None])
    return out.to(out_dtype or a.dtype)
