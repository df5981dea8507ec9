"""Block-scaled FP8 quantisation, in plain torch."""

import torch

from ..shapes import FP8_AMAX_FLOOR, FP8_MAX, GRANULARITIES, align_up, ceil_div


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
    scale = amax.clamp(min=FP8_AMAX_FLOOR) / FP8_MAX
    if pow2_scale:
        scale = round_up_to_power_of_two(scale)
    q = (x / expand_scale(scale, m, k, granularity)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if scale_layout == "mn_major":
        stored = scale.new_zeros(scale.shape[1], align_up(scale.shape[0], 4))
        stored[:, : scale.shape[0]] = scale.t()
        scale = stored.t()[: scale.shape[0]]
    return q, scale


def fp8_dequantize(
    q: torch.Tensor, scale: torch.Tensor, granularity: str = "1x128", out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """See `deepseek_kernels.fp8_dequantize`."""
    return (q.float() * expand_scale(scale, *q.shape, granularity)).to(out_dtype or torch.float32)
