"""SwiGLU with routing weights, plain and quantised, and its backward, at the expert widths of V3 and V2-Lite."""

import torch
from common import Bench, Case

from deepseek_kernels.shapes import V2_LITE, V3
from deepseek_kernels.testing.compare import FP8_STEP, MATMUL, SUM

SIZES = {"v3": (V3, (1, 128, 4096, 16384)), "v2-lite": (V2_LITE, (4096,))}
CASES = (
    Case("small", dict(num_rows=256, intermediate=512), quick=True),
    *(
        Case(
            f"{name} R={t * m.top_k}",
            dict(num_rows=t * m.top_k, intermediate=m.intermediate),
            devices=("cpu", "cuda") if t <= 4096 else ("cuda",),
        )
        for name, (m, tokens) in SIZES.items()
        for t in tokens
    ),
)


def inputs(device, g, num_rows, intermediate):
    gate_up = torch.randn(num_rows, 2 * intermediate, device=device, generator=g).bfloat16()
    return gate_up, torch.rand(num_rows, device=device, generator=g)


def quantize_inputs(device, g, **dims):
    return *inputs(device, g, **dims), None, True


def backward_inputs(device, g, num_rows, intermediate):
    grad = torch.randn(num_rows, intermediate, device=device, generator=g).bfloat16()
    return grad, *inputs(device, g, num_rows, intermediate)


def eager(gate_up, weights):
    gate, up = gate_up.float().chunk(2, 1)
    out = torch.nn.functional.silu(gate) * up * weights[:, None]
    return out.to(gate_up.dtype), out.new_empty(out.shape[0], 0)


def eager_backward(grad, gate_up, weights):
    gate, up = gate_up.float().chunk(2, 1)
    dh = grad.float() * weights[:, None]
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate_up = torch.cat([dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * silu], 1).to(gate_up.dtype)
    return grad_gate_up, (grad.float() * silu * up).sum(1)


BENCHES = [
    Bench("swiglu", CASES, inputs, {"torch eager": eager}, tolerance=SUM),
    Bench("swiglu", CASES, quantize_inputs, tolerance=(FP8_STEP, SUM), name="swiglu quantize"),
    Bench("swiglu_backward", CASES, backward_inputs, {"torch eager": eager_backward}, tolerance=(SUM, MATMUL)),
]
