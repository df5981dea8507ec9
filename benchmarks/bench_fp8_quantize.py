"""Quantising activations and weights of DeepSeek-V3 to block-scaled e4m3, and back."""

import torch
from common import Bench, Case, Peer

from deepseek_kernels.plan.fp8_quantize import scale_shape
from deepseek_kernels.shapes import FP8_AMAX_FLOOR, FP8_MAX, GRANULARITIES, V3
from deepseek_kernels.testing.compare import Tolerance

SMALL = Case("small", dict(m=64, k=512), quick=True)
ROWS = (SMALL, *(Case(f"m={m}", dict(m=m, k=V3.hidden)) for m in (1, 128, 4096)))
ROWS_MANY = Case("m=16384", dict(m=16384, k=V3.hidden), devices=("cuda",))
EXPERTS = (
    Case("small", dict(m=512, k=256, experts=4), quick=True),
    Case("8x4096", dict(m=8 * 4096, k=V3.hidden, experts=8), devices=("cuda",)),
    Case("256 experts", dict(m=8 * 4096, k=V3.hidden, experts=V3.num_experts), devices=("cuda",)),
)
WEIGHT = Case("7168x2048", dict(m=7168, k=2048))
ONE_CODE_APART = Tolerance(steps=16, absolute=2.0**-9)
"""torch.compile may divide by multiplying with the reciprocal: a tie can fall to the other side."""


def wide(granularity: str, **options):
    def inputs(device, g, m, k):
        x = torch.randn(m, k, device=device, generator=g).bfloat16()
        return x, granularity, options.get("pow2_scale", False), options.get("scale_layout", "row")

    return inputs


def wide_both(device, g, m, k):
    return torch.randn(m, k, device=device, generator=g).bfloat16(), None, False, "mn_major"


def wide_experts(device, g, m, k, experts):
    """Rows of experts of uneven sizes, in order."""
    x = torch.randn(m, k, device=device, generator=g).bfloat16()
    share = torch.rand(experts, device=device, generator=g) + 0.1
    offsets = (torch.cumsum(share, 0) / share.sum() * m).int()
    offsets[-1:] = m
    return x, torch.nn.functional.pad(offsets, (1, 0)), False, "mn_major"


def quantized(granularity: str):
    def inputs(device, g, m, k):
        q = torch.randn(m, k, device=device, generator=g).to(torch.float8_e4m3fn)
        return q, torch.rand(*scale_shape(m, k, granularity), device=device, generator=g), granularity, torch.bfloat16

    return inputs


def eager_quantize(x, granularity, pow2_scale, scale_layout):
    rows, columns = GRANULARITIES[granularity]
    m, k = x.shape
    blocks = x.float().view(m // rows, rows, k // columns, columns)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=FP8_AMAX_FLOOR) / FP8_MAX
    q = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q.view(m, k), scale[:, 0, :, 0]


def eager_quantize_both(x, expert_offsets, pow2_scale, scale_layout):
    q_t, scale_t = eager_quantize(x, "128x1", pow2_scale, scale_layout)
    return *eager_quantize(x, "1x128", pow2_scale, scale_layout), q_t.t().contiguous(), scale_t.t()


def eager_dequantize(q, scale, granularity, out_dtype):
    rows, columns = GRANULARITIES[granularity]
    m, k = q.shape
    blocks = q.float().view(m // rows, rows, k // columns, columns)
    return (blocks * scale[:, None, :, None]).view(m, k).to(out_dtype)


QUANTIZE_PEERS = {"torch eager": Peer(eager_quantize, tolerance=ONE_CODE_APART)}
BOTH_PEERS = {"torch eager": Peer(eager_quantize_both, tolerance=ONE_CODE_APART)}
DEQUANTIZE_PEERS = {"torch eager": eager_dequantize}
BENCHES = [
    Bench("fp8_quantize", (*ROWS, ROWS_MANY), wide("1x128"), QUANTIZE_PEERS),
    Bench("fp8_quantize", (*ROWS[2:], ROWS_MANY), wide("1x128", scale_layout="mn_major"), name="fp8_quantize mn_major"),
    Bench("fp8_quantize", (WEIGHT,), wide("128x128"), QUANTIZE_PEERS, name="fp8_quantize 128x128"),
    Bench("fp8_quantize", ROWS[-1:], wide("128x1"), QUANTIZE_PEERS, name="fp8_quantize 128x1"),
    Bench(
        "fp8_quantize_both", (Case("small", dict(m=128, k=512), quick=True), ROWS[-1], ROWS_MANY), wide_both, BOTH_PEERS
    ),
    Bench("fp8_quantize_both", EXPERTS, wide_experts, name="fp8_quantize_both experts"),
    Bench("fp8_dequantize", (SMALL, ROWS[-1]), quantized("1x128"), DEQUANTIZE_PEERS),
    Bench("fp8_dequantize", (WEIGHT,), quantized("128x128"), DEQUANTIZE_PEERS, name="fp8_dequantize 128x128"),
]
