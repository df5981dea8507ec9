"""Block-scaled FP8 matmul, in plain torch."""

import torch

from .fp8_quantize import expand_scale


def fp8_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `deepseek_kernels.fp8_matmul`. With out_dtype float64 everything is computed in it."""
    out_dtype = out_dtype or torch.bfloat16
    return _product(a, scale_a, b, scale_b, bias, torch.promote_types(out_dtype, torch.float32)).to(out_dtype)


def fp8_matmul_out(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool = False,
) -> None:
    """See `deepseek_kernels.fp8_matmul` with `out`."""
    product = _product(a, scale_a, b, scale_b, bias, torch.float32)
    out.copy_(out.float() + product if accumulate else product)


def _product(a, scale_a, b, scale_b, bias, dtype: torch.dtype) -> torch.Tensor:
    granularity_b = "1x128" if scale_b.shape[0] == b.shape[0] else "128x128"
    product = _dequantize(a, scale_a, "1x128", dtype) @ _dequantize(b, scale_b, granularity_b, dtype).t()
    return product if bias is None else product + bias.to(dtype)


def _dequantize(q: torch.Tensor, scale: torch.Tensor, granularity: str, dtype: torch.dtype) -> torch.Tensor:
    return q.to(dtype) * expand_scale(scale.to(dtype), *q.shape, granularity)
