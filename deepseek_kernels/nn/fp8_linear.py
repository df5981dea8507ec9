"""A linear layer that multiplies in FP8, to serve or to train."""

import torch

from ..ops.fp8_matmul import fp8_matmul
from ..ops.fp8_quantize import fp8_quantize
from ._dtype import keep_dtype
from .functional import WgradQueue, fp8_linear


class FP8Linear(torch.nn.Module):
    """`y = x @ weight^T + bias` in FP8: x is quantised 1x128 on the way in, the weight 128x128.

    To serve, the weight is e4m3, quantised once, and nothing has a gradient. To train, the weight stays in the dtype
    of the optimiser, is quantised at every call, and both gradients are computed in FP8: see `fp8_linear`.

    Parameters, named as in DeepSeek's published checkpoints:
        weight: [n, k], e4m3 (k a multiple of 16, n of 8) or bf16, fp16 or fp32 (both multiples of 16).
        weight_scale_inv: of an e4m3 weight fp32 [ceil(n / 128), ceil(k / 128)], multiply to dequantise; else None.
        bias: [n] or None.

    Attributes:
        wgrad_queue: where the weight's gradients wait in place of being computed by the backward pass; None.
    """

    weight: torch.nn.Parameter
    weight_scale_inv: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale_inv: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ):
        super().__init__()
        learns = weight_scale_inv is None
        self.wgrad_queue: WgradQueue | None = None
        for name, t in (("weight", weight), ("weight_scale_inv", weight_scale_inv), ("bias", bias)):
            if t is not None and not (learns and isinstance(t, torch.nn.Parameter)):
                t = torch.nn.Parameter(t, requires_grad=learns)
            self.register_parameter(name, t)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, *, train: bool = False) -> "FP8Linear":
        """With an e4m3 copy of the linear's weight or, to train, with the very parameters of `linear`."""
        if train:
            return cls(linear.weight, None, linear.bias)
        with torch.no_grad():
            return cls(*fp8_quantize(linear.weight, "128x128"), linear.bias)

    @property
    def quantized(self) -> bool:
        return self.weight_scale_inv is not None

    def quantize_(self) -> "FP8Linear":
        """From training to serving, in place; returns self."""
        if not self.quantized:
            weight, scale = fp8_quantize(self.weight.detach(), "128x128")
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
            if self.bias is not None:
                self.bias.requires_grad_(False)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] bf16, fp16 or fp32 -> [..., n] in x's dtype."""
        if not self.quantized:
            return fp8_linear(x, self.weight, self.bias, wgrad_queue=self.wgrad_queue)
        q, scale = fp8_quantize(x.reshape(-1, x.shape[-1]))
        return self.forward_quantized(q, scale, x.dtype).view(*x.shape[:-1], self.weight.shape[0])

    def forward_quantized(self, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """q e4m3 [m, k] with 1x128 scales fp32 [m, ceil(k / 128)] -> [m, n] in `dtype`."""
        if self.weight_scale_inv is None:
            raise RuntimeError("FP8Linear.forward_quantized: wanted an e4m3 weight, got one in training; see quantize_")
        return fp8_matmul(q, scale, self.weight, self.weight_scale_inv, bias=self.bias, out_dtype=dtype)

    def extra_repr(self) -> str:
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, bias={self.bias is not None}, quantized={self.quantized}"

    def _apply(self, fn, recurse=True):
        return super()._apply(keep_dtype(fn) if self.quantized else fn, recurse)


def quantize_linears_(module: torch.nn.Module, *names: str) -> None:
    """Make the named children `FP8Linear` with e4m3 weights; those that are None or have them already stay."""
    for name in names:
        linear = getattr(module, name)
        if isinstance(linear, FP8Linear):
            linear.quantize_()
        elif isinstance(linear, torch.nn.Linear):
            setattr(module, name, FP8Linear.from_linear(linear))
