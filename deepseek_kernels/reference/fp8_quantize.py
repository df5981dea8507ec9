"""Block-scaled FP8 quantisation, in plain torch."""

import torch

from ..shapes import BLOCK, FP8_AMAX_FLOOR, FP8_MAX, GRANULARITIES, align_up, ceil_div, padded_columns


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not less; exact. NaN and Inf stay."""
    mantissa, exponent = torch.frexp(scale)
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(scale.isfinite(), power, scale)


def expand_scale(scale: torch.Tensor, m: int, k: int, granularity: str) -> torch.Tensor:
    """One scale per element: [m, k]."""
    rows, columns = GRANULARITIES[granularity]
    return scale.repeat_interleave(rows, 0)[:m].repeat_interleave(columns, 1)[:, :k]


def fp8_quantize(
    x: torch.Tensor, granularity: str = "1x128", pow2_scale: bool = False, scale_layout: str = "row"
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `deepseek_kernels.fp8_quantize`."""
    m, k = x.shape
    rows, columns = GRANULARITIES[granularity]
    x = x.float()
    blocks = x.new_zeros(align_up(m, rows), align_up(k, columns))
    blocks[:m, :k] = x
    blocks = blocks.view(ceil_div(m, rows), rows, ceil_div(k, columns), columns)
    amax = blocks.abs().amax(dim=(1, 3)) if blocks.numel() else x.new_zeros(blocks.shape[0], blocks.shape[2])
    amax = amax.clamp(min=FP8_AMAX_FLOOR)
    scale = amax / torch.full_like(amax, FP8_MAX)  # by a number torch multiplies with the reciprocal on a GPU
    if pow2_scale:
        scale = round_up_to_power_of_two(scale)
    q = (x / expand_scale(scale, m, k, granularity)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q, lay_out(scale, scale_layout)


def lay_out(scale: torch.Tensor, scale_layout: str) -> torch.Tensor:
    """The same values in the strides of the layout."""
    if scale_layout == "row":
        return scale.clone(memory_format=torch.contiguous_format)
    stored = scale.new_zeros(scale.shape[1], align_up(scale.shape[0], 4))
    stored[:, : scale.shape[0]] = scale.t()
    return stored.t()[: scale.shape[0]]


def padded_rows(x: torch.Tensor, expert_offsets: torch.Tensor | None) -> torch.Tensor:
    """The rows of each expert, one expert after another, each followed by zeros up to a multiple of 128 rows.

    How many rows the offsets need, only the device knows, so there are as many as any offsets could; the last are zero.
    """
    num_rows, k = x.shape
    if expert_offsets is None:
        expert_offsets = torch.arange(2, device=x.device) * num_rows
    num_experts = expert_offsets.shape[0] - 1
    width = padded_columns(num_rows, num_experts)
    if width == 0:
        return x.new_zeros(0, k)
    bounds = expert_offsets.long().clamp(0, num_rows).cummax(0).values
    blocks = (bounds.diff() + BLOCK - 1) // BLOCK
    end_block = blocks.cumsum(0)
    at = torch.arange(width, device=x.device)
    expert = torch.searchsorted(end_block, at // BLOCK, right=True).clamp(max=num_experts - 1)
    row = bounds[expert] + at - BLOCK * (end_block - blocks)[expert]
    inside = row < bounds[expert + 1]
    return torch.where(inside[:, None], x[row.clamp(max=num_rows - 1)], 0)


def fp8_quantize_both(
    x: torch.Tensor,
    expert_offsets: torch.Tensor | None = None,
    pow2_scale: bool = False,
    scale_layout: str = "row",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `deepseek_kernels.fp8_quantize_both`."""
    q, scale = fp8_quantize(x, "1x128", pow2_scale, scale_layout)
    q_columns, scale_columns = fp8_quantize(padded_rows(x, expert_offsets), "128x1", pow2_scale)
    q_t = q_columns.t().clone(memory_format=torch.contiguous_format)
    return q, scale, q_t, lay_out(scale_columns.t(), scale_layout)


def fp8_dequantize(
    q: torch.Tensor, scale: torch.Tensor, granularity: str = "1x128", out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """See `deepseek_kernels.fp8_dequantize`."""
    return (q.float() * expand_scale(scale, *q.shape, granularity)).to(out_dtype or torch.float32)
