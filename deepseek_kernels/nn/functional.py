"""FP8 training of a linear layer: the forward product and both gradients in block-scaled e4m3."""

from collections import deque
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..ops import _checks as checks
from ..ops.fp8_matmul import fp8_matmul
from ..ops.fp8_quantize import fp8_quantize, fp8_quantize_both


class WgradQueue:
    """Weight gradients put off, for pipeline schedules that fill bubbles with them (zero bubble, DualPipe).

    A backward pass given a queue computes the gradients of x and bias only. `pop()` then computes the weight gradient
    that has waited longest, `flush()` all of them; both add to `weight.main_grad` or `weight.grad`. What waits holds
    the FP8 operands of its product: a byte for each element of x and of the output.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, weight: torch.Tensor, operands: tuple[torch.Tensor, ...]) -> None:
        self._waiting.append((weight, operands))

    def pop(self) -> None:
        """Raises IndexError where nothing waits."""
        weight, operands = self._waiting.popleft()
        with torch.no_grad():
            grad = _weight_gradient(weight, getattr(weight, "main_grad", None), operands)
            if grad is not None:
                weight.grad = grad if weight.grad is None else weight.grad.add_(grad)

    def flush(self) -> None:
        while self._waiting:
            self.pop()


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pow2_scale: bool = False,
    wgrad_queue: WgradQueue | None = None,
) -> torch.Tensor:
    """`x @ weight^T + bias`, with the product and the gradients of x and weight computed from e4m3 operands.

    Args:
        x: [..., k] bf16, fp16 or fp32; k a multiple of 16.
        weight: [n, k] bf16, fp16 or fp32, n a multiple of 16. Quantised at every call.
        bias: [n] bf16, fp16 or fp32.
        pow2_scale: powers of two as scales.
        wgrad_queue: put the weight's gradient off. Eager only.

    Returns:
        [..., n] in x's dtype, or in the dtype of `torch.autocast` where that is on; nothing else is cast.

    Raises:
        ValueError, TypeError: naming the argument.

    Differentiable once, in x, weight and bias. Products sum in fp32; each operand has a scale per 128 elements along
    the sum, the weight one per 128x128 block:

        y  = x (1x128)       @ weight^T (128x128)
        dx = dy (1x128)      @ weight (128x128)
        dw = dy^T (1x128)    @ x (1x128, of x^T)       in fp32

    dw is added to `weight.main_grad` where the weight has that attribute (bf16, fp16 or fp32 [n, k]; the weight then
    gets no `.grad`), else it is `.grad` in the weight's dtype. Kept for the backward pass: x^T in e4m3, half of x in
    bf16. Definition: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3; there the scales of some
    activations are powers of two.

        weight = torch.nn.Parameter(torch.randn(512, 256, dtype=torch.bfloat16) / 16)
        weight.main_grad = torch.zeros(512, 256)  # without it: weight.grad, in bf16
        optimizer = torch.optim.SGD([weight], lr=0.1)
        queue = nn.WgradQueue()  # without it: at once

        for x, target in batches:
            y = nn.fp8_linear(x, weight, wgrad_queue=queue)
            (y - target).float().square().mean().backward()  # the gradient goes on to x
            queue.flush()  # the weight's follows when there is time
        weight.grad = weight.main_grad.to(weight.dtype)
        optimizer.step()
    """
    main_grad = getattr(weight, "main_grad", None)
    _check(x, weight, bias, main_grad)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    flat = x.reshape(-1, x.shape[-1])
    y = _FP8Linear.apply(flat, weight, bias, main_grad, dtype, pow2_scale, wgrad_queue)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(x, weight, bias, main_grad) -> None:
    op = "fp8_linear"
    wide = checks.FLOATS[:3]
    checks.at_least(op, "x: dimensions", x.dim(), 1)
    checks.tensor(op, "x", x, dtype=wide)
    checks.multiple(op, "k (columns of x)", x.shape[-1], 16)
    checks.tensor(op, "weight", weight, dtype=wide, shape=(None, x.shape[-1]), device=x.device)
    checks.multiple(op, "n (rows of weight)", weight.shape[0], 16)
    checks.tensor(op, "bias", bias, dtype=wide, shape=weight.shape[:1], device=x.device)
    checks.tensor(op, "weight.main_grad", main_grad, dtype=wide, shape=weight.shape, device=x.device)


def _weight_gradient(weight, main_grad, operands) -> torch.Tensor | None:
    if main_grad is None:
        return fp8_matmul(*operands, out_dtype=weight.dtype)
    fp8_matmul(*operands, out=main_grad, accumulate=True)
    return None


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, main_grad, dtype, pow2_scale, wgrad_queue):
        kept: list[torch.Tensor] = []
        if ctx.needs_input_grad[1]:
            q, scale, *kept = fp8_quantize_both(x, pow2_scale=pow2_scale)
        else:
            q, scale = fp8_quantize(x, pow2_scale=pow2_scale)
        ctx.save_for_backward(weight, *kept)
        ctx.main_grad = main_grad  # not saved: other backward passes may write to it before this one
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        ctx.options = pow2_scale, wgrad_queue
        q_weight, scale_weight = fp8_quantize(weight, "128x128", pow2_scale=pow2_scale)
        return fp8_matmul(q, scale, q_weight, scale_weight, bias=bias, out_dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        weight, *kept = ctx.saved_tensors
        dtype, bias_dtype = ctx.dtypes
        pow2_scale, wgrad_queue = ctx.options
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if need_weight:
            q, scale, *transposed = fp8_quantize_both(grad, pow2_scale=pow2_scale)
        elif need_x:
            q, scale = fp8_quantize(grad, pow2_scale=pow2_scale)
        if need_x:
            q_weight, scale_weight = fp8_quantize(weight, "128x128", pow2_scale=pow2_scale)
            grad_x = fp8_matmul(q, scale, q_weight.t().contiguous(), scale_weight.t(), out_dtype=dtype)
        if need_weight:
            operands = (*transposed, *kept)
            if wgrad_queue is not None:
                wgrad_queue.put(weight, operands)
            else:
                grad_weight = _weight_gradient(weight, ctx.main_grad, operands)
        if need_bias:
            grad_bias = grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None
