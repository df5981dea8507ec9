"""A linear layer with e4m3 weights, for inference."""

import torch

from ..ops.fp8_matmul import fp8_matmul
from ..ops.fp8_quantize import fp8_quantize
from ._dtype import KeepsDtype


class FP8Linear(KeepsDtype):
    """`y = x @ weight^T + bias` in FP8: x is quantised 1x128 on the way in, the weight 128x128 once.

    Parameters, named as in DeepSeek's published checkpoints, without gradient:
        weight: e4m3 [n, k], k a multiple of 16, n of 8.
        weight_scale_inv: fp32 [ceil(n / 128), ceil(k / 128)], multiply to dequantise.
        bias: [n] or None.
    """

    def __init__(self, weight: torch.Tensor, weight_scale_inv: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(weight_scale_inv, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: torch.nn.Linear) -> "FP8Linear":
        return cls(*fp8_quantize(linear.weight, "128x128"), linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] bf16, fp16 or fp32 -> [..., n] in x's dtype."""
        q, scale = fp8_quantize(x.reshape(-1, x.shape[-1]))
        return self.forward_quantized(q, scale, x.dtype).view(*x.shape[:-1], self.weight.shape[0])

    def forward_quantized(self, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """q e4m3 [m, k] with 1x128 scales fp32 [m, ceil(k / 128)] -> [m, n] in `dtype`."""
        return fp8_matmul(q, scale, self.weight, self.weight_scale_inv, bias=self.bias, out_dtype=dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


def quantize_linears_(module: torch.nn.Module, *names: str) -> None:
    """Replace the named `torch.nn.Linear` children by `FP8Linear`; those that are None or FP8 already stay."""
    for name in names:
        linear = getattr(module, name)
        if isinstance(linear, torch.nn.Linear):
            setattr(module, name, FP8Linear.from_linear(linear))
