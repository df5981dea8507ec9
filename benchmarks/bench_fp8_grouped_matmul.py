"""Matmul of each expert's FP8 rows with its own FP8 weight, at DeepSeek-V3's expert sizes."""

import torch
from bench_grouped_matmul import SIZES, SMALL, case, uneven_offsets
from common import Bench, Case, Peer

from deepseek_kernels.reference.fp8_quantize import expand_scale
from deepseek_kernels.shapes import ceil_div
from deepseek_kernels.testing.compare import MATMUL, Tolerance

CPU = Case("cpu 16x8", dict(num_experts=16, num_rows=128, n=512, k=512), devices=("cpu",))
BF16_OPERANDS = Tolerance(steps=4, of_norm=1e-2, distance=1e-4)
"""The peer rounds its operands to bf16."""
CASES = (SMALL, CPU, *(case(*size) for size in SIZES))


def inputs(device, g, num_experts, num_rows, n, k):
    def codes(*shape):
        return torch.randn(*shape, device=device, generator=g).to(torch.float8_e4m3fn)

    def scales(*shape):
        return 0.5 + torch.rand(*shape, device=device, generator=g)

    blocks = ceil_div(k, 128)
    return (
        codes(num_rows, k), scales(num_rows, blocks), codes(num_experts, n, k),
        scales(num_experts, ceil_div(n, 128), blocks), uneven_offsets(device, g, num_experts, num_rows),
    )  # fmt: skip


def dequantized(a, scale_a, b, scale_b, expert_offsets):
    """The operands in bf16, as a user without a grouped FP8 matmul keeps them."""
    x = (a.float() * expand_scale(scale_a, *a.shape, "1x128")).bfloat16()
    weights = [(q.float() * expand_scale(s, *q.shape, "128x128")).bfloat16() for q, s in zip(b, scale_b, strict=True)]
    return x, weights, expert_offsets


def loop(x, weights, expert_offsets):
    counts = expert_offsets.diff().tolist()
    return torch.cat([rows @ weight.t() for rows, weight in zip(x.split(counts), weights, strict=True)])


BENCHES = [
    Bench(
        "fp8_grouped_matmul", CASES, inputs,
        {"torch loop bf16": Peer(loop, prepare=dequantized, tolerance=BF16_OPERANDS, capturable=False)},
        tolerance=MATMUL, rate="fp8",
    ),
]  # fmt: skip
