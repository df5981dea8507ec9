"""Matmul of each expert's FP8 rows with its own FP8 weight, in plain torch."""

import torch

from .fp8_quantize import fp8_dequantize
from .grouped_matmul import blocks


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


def _take(q: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return q.view(torch.uint8)[index].view(q.dtype)
