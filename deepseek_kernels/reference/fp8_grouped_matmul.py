"""Matmul of each expert's FP8 rows with its own FP8 weight, and the gradient of those weights, in plain torch."""

import torch

from ..shapes import BLOCK
from .fp8_quantize import fp8_dequantize
from .grouped_matmul import blocks, expert_bounds


def fp8_grouped_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    expert_offsets: torch.Tensor,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `deepseek_kernels.fp8_grouped_matmul`."""
    num_rows = a.shape[0]
    out = a.new_zeros(num_rows + 1, b.shape[1], dtype=torch.float32)  # the extra row takes what lies outside the expert
    for expert, rows, inside in blocks(expert_offsets, num_rows):
        x = fp8_dequantize(_take(a, rows), scale_a[rows], "1x128")
        weight = fp8_dequantize(_take(b, expert)[0], scale_b[expert][0], "128x128")
        out[torch.where(inside, rows, num_rows)] = x @ weight.t()
    return out[:num_rows].to(out_dtype or torch.bfloat16)


def fp8_grouped_matmul_masked(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    counts: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    expected_m: int | None = None,
) -> torch.Tensor:
    """See `deepseek_kernels.fp8_grouped_matmul_masked`; here the rows past `counts` are zero."""
    num_experts, m_max, _ = a.shape
    out = a.new_empty(num_experts, m_max, b.shape[1], dtype=torch.float32)
    for e in range(num_experts):
        out[e] = fp8_dequantize(a[e], scale_a[e], "1x128") @ fp8_dequantize(b[e], scale_b[e], "128x128").t()
    inside = torch.arange(m_max, device=a.device) < counts[:, None]
    return out.masked_fill_(~inside[..., None], 0).to(out_dtype or torch.bfloat16)


def fp8_grouped_matmul_wgrad(
    grad_t: torch.Tensor,
    scale_grad: torch.Tensor,
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> torch.Tensor:
    """See `deepseek_kernels.fp8_grouped_matmul_wgrad`."""
    num_experts = expert_offsets.shape[0] - 1
    shape = (num_experts + 1, grad_t.shape[0], a_t.shape[0])  # the extra expert takes the columns of none
    out = torch.zeros(shape, dtype=torch.float32, device=grad_t.device)
    end_block = _column_bounds(expert_offsets, grad_t.shape[1])[1:] // BLOCK
    for block in range(grad_t.shape[1] // BLOCK):
        expert = (end_block <= block).sum().view(1)
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        g = fp8_dequantize(grad_t[:, columns], scale_grad[:, block : block + 1], "1x128")
        x = fp8_dequantize(a_t[:, columns], scale_a[:, block : block + 1], "1x128")
        out.index_add_(0, expert, (g @ x.t())[None])
    return out[:num_experts]


def fp8_grouped_matmul_wgrad_out(
    grad_t: torch.Tensor,
    scale_grad: torch.Tensor,
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    expert_offsets: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
) -> None:
    """See `deepseek_kernels.fp8_grouped_matmul_wgrad` with `out`."""
    d = fp8_grouped_matmul_wgrad(grad_t, scale_grad, a_t, scale_a, expert_offsets)
    out.copy_(out + d if accumulate else d)


def _column_bounds(expert_offsets: torch.Tensor, num_columns: int) -> torch.Tensor:
    """The columns that each expert's rows begin at, whole blocks of 128 for each, and where the last ones end."""
    rows = expert_bounds(expert_offsets, num_columns).diff()
    ends = ((rows + BLOCK - 1) // BLOCK * BLOCK).cumsum(0).clamp(max=num_columns)
    return torch.cat([ends.new_zeros(1), ends])


def _take(q: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return q.view(torch.uint8)[index].view(q.dtype)
