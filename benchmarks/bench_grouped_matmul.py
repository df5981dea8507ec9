"""Matmul of each expert's rows with its own weight, and both gradients, at DeepSeek-V3's sizes."""

import torch
from common import Bench, Case, Peer

from deepseek_kernels.testing.compare import MATMUL

GATE_UP, DOWN = (4096, 7168), (7168, 2048)
"""(n, k) of one V3 expert."""


def case(num_experts: int, rows: int, n: int, k: int) -> Case:
    """`rows` per expert on average."""
    dims = dict(num_experts=num_experts, num_rows=num_experts * rows, n=n, k=k)
    return Case(f"{num_experts}x{rows} n={n} k={k}", dims, devices=("cuda",))


SMALL = Case("small", dict(num_experts=16, num_rows=256, n=256, k=256), quick=True)
CPU = Case("cpu 64x8", dict(num_experts=64, num_rows=512, n=1024, k=1024), devices=("cpu",))
SIZES = [(e, rows, *nk) for e, rows in ((4, 8192), (8, 4096), (32, 512), (32, 20), (32, 1)) for nk in (GATE_UP, DOWN)]
CASES = (SMALL, CPU, *(case(*size) for size in SIZES))
DGRAD_CASES = (SMALL, *(case(e, rows, k, n) for e, rows, n, k in SIZES if rows in (512, 4096)))
WGRAD_CASES = (SMALL, CPU, *(case(*size) for size in SIZES if size[1] >= 512))


def uneven_offsets(device, g, num_experts: int, num_rows: int) -> torch.Tensor:
    """Offsets of experts whose rows vary by 0.7 to 1.3 of the average and fill all of num_rows."""
    share = 0.7 + 0.6 * torch.rand(num_experts, device=device, generator=g)
    ends = (share.cumsum(0) / share.sum() * num_rows).round().int()
    return torch.cat([ends.new_zeros(1), ends])


def inputs(device, g, num_experts, num_rows, n, k):
    a = torch.randn(num_rows, k, device=device, generator=g).bfloat16()
    b = torch.randn(num_experts, n, k, device=device, generator=g).bfloat16()
    return a, b, uneven_offsets(device, g, num_experts, num_rows)


def dgrad_inputs(device, g, num_experts, num_rows, n, k):
    """What the gradient of a is computed of: b as the forward pass has it, transposed."""
    a, b, expert_offsets = inputs(device, g, num_experts, num_rows, n, k)
    return a, b.mT.contiguous().mT, expert_offsets


def wgrad_inputs(device, g, num_experts, num_rows, n, k):
    grad = torch.randn(num_rows, n, device=device, generator=g).bfloat16()
    a = torch.randn(num_rows, k, device=device, generator=g).bfloat16()
    return grad, a, uneven_offsets(device, g, num_experts, num_rows)


def loop(a, b, expert_offsets):
    """What a user writes: the offsets come to the host, then one matmul per expert."""
    counts = expert_offsets.diff().tolist()
    return torch.cat([rows @ weight.t() for rows, weight in zip(a.split(counts), b, strict=True)])


def wgrad_loop(grad, a, expert_offsets):
    counts = expert_offsets.diff().tolist()
    return torch.stack([g.t() @ x for g, x in zip(grad.split(counts), a.split(counts), strict=True)])


BENCHES = [
    Bench("grouped_matmul", CASES, inputs, {"torch loop": Peer(loop, capturable=False)}, tolerance=MATMUL),
    Bench(
        "grouped_matmul", DGRAD_CASES, dgrad_inputs, {"torch loop": Peer(loop, capturable=False)}, tolerance=MATMUL,
        name="grouped_matmul dgrad",
    ),
    Bench(
        "grouped_matmul_wgrad", WGRAD_CASES, wgrad_inputs, {"torch loop": Peer(wgrad_loop, capturable=False)},
        tolerance=MATMUL,
    ),
]  # fmt: skip
