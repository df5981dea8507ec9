"""The routed experts of a layer at the shapes of V3 (32 of its experts, which fit a GPU in bf16) and V2-Lite."""

import dataclasses

import torch
import torch.nn.functional as F
from common import Bench, Case, Peer

import deepseek_kernels
from deepseek_kernels.shapes import BLOCK, V2_LITE, V3, ceil_div
from deepseek_kernels.testing.compare import MATMUL, MOE_GRADIENT, REQUANTIZED, Tolerance

V3_DIMS = dict(hidden=V3.hidden, intermediate=V3.intermediate, num_experts=32, top_k=V3.top_k)
V2_LITE_DIMS = dict(
    hidden=V2_LITE.hidden, intermediate=V2_LITE.intermediate, num_experts=V2_LITE.num_experts, top_k=V2_LITE.top_k
)
LAPTOP_DIMS = dict(hidden=1024, intermediate=512, num_experts=32, top_k=4)
CASES = (
    Case("small", dict(num_tokens=8, hidden=256, intermediate=128, num_experts=8, top_k=2), quick=True),
    *(Case(f"E=32 H=1024 T={t}", dict(num_tokens=t, **LAPTOP_DIMS), devices=("cpu",)) for t in (1, 64)),
    *(Case(f"v3 32 experts T={t}", dict(num_tokens=t, **V3_DIMS), devices=("cuda",)) for t in (1, 16, 128, 1024, 8192)),
    *(Case(f"v2-lite T={t}", dict(num_tokens=t, **V2_LITE_DIMS), devices=("cuda",)) for t in (1, 128, 8192)),
)


def inputs(device, g, num_tokens, hidden, intermediate, num_experts, top_k):
    def normal(*shape):
        return (torch.randn(*shape, device=device, generator=g) * shape[-1] ** -0.5).bfloat16()

    x = torch.randn(num_tokens, hidden, device=device, generator=g).bfloat16()
    indices = torch.rand(num_tokens, num_experts, device=device, generator=g).topk(top_k, dim=1).indices
    weights = torch.rand(num_tokens, top_k, device=device, generator=g)
    w_gate_up = normal(num_experts, 2 * intermediate, hidden)
    return x, w_gate_up, normal(num_experts, hidden, intermediate), weights, indices


def fp8_inputs(device, g, **dims):
    x, w_gate_up, w_down, weights, indices = inputs(device, g, **dims)

    def scale(w):
        return torch.full((w.shape[0], *(ceil_div(n, BLOCK) for n in w.shape[1:])), 2.0**-8, device=device)

    quantized = ((w.float() * 256).to(torch.float8_e4m3fn) for w in (w_gate_up, w_down))
    return x, *quantized, weights, indices, scale(w_gate_up), scale(w_down)


def training_inputs(device, g, **dims):
    *floats, indices = inputs(device, g, **dims)
    return *(t.requires_grad_() for t in floats), indices


def naive(x, w_gate_up, w_down, weights, indices):
    """`MoE.forward` of DeepSeek-V3's inference/model.py."""
    out = torch.zeros_like(x, dtype=torch.float32)
    counts = torch.bincount(indices.flatten(), minlength=len(w_down)).tolist()
    for expert, count in enumerate(counts):
        if count:
            token, k = torch.where(indices == expert)
            gate, up = F.linear(x[token], w_gate_up[expert]).chunk(2, dim=1)
            h = F.linear(F.silu(gate) * up, w_down[expert])
            out = out.index_add(0, token, h.float() * weights[token, k, None])
    return out.to(x.dtype)


def grouped(x, w_gate_up, w_down, weights, indices):
    """transformers' `grouped_mm` experts: a stable argsort, torch's grouped matmul, a weighted sum."""
    order = indices.flatten().argsort(stable=True)
    counts = torch.zeros(len(w_down), dtype=torch.int32, device=x.device)
    ends = counts.scatter_add_(0, indices.flatten(), torch.ones_like(order, dtype=torch.int32)).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // indices.shape[1]], w_gate_up.transpose(1, 2), offs=ends).chunk(2, dim=1)
    y = F.grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    y = y[order.argsort()].view(*indices.shape, -1)
    return (y.float() * weights[:, :, None]).sum(1).to(x.dtype)


def has_grouped_mm(device) -> bool:
    return hasattr(F, "grouped_mm")


def trained(run):
    """The gradients of x, both weights and the routing weights, after a forward pass."""

    def step(*args):
        out = run(*args)
        return torch.autograd.grad(out, args[:4], torch.ones_like(out))

    return step


def training_cost(problem, x, w_gate_up, w_down, *_):
    """Forward and backward: three times the matmuls; weights read twice and their gradients written once."""
    gate_up = problem.num_rows * 2 * problem.intermediate * problem.element_bytes
    flops = 3 * 6 * problem.num_rows * problem.hidden * problem.intermediate
    return flops, 3 * (w_gate_up.nbytes + w_down.nbytes) + 4 * x.nbytes + 2 * gate_up


TRAINING_CASES = tuple(c for c in CASES if c.quick or c.dims["num_tokens"] >= 1024)
PEERS = {"torch naive": Peer(naive, capturable=False), "torch grouped_mm": Peer(grouped, available=has_grouped_mm)}
IN_BF16 = Tolerance(steps=4, of_norm=2e-2, distance=1e-4)
"""The peers also round what lies between their matmuls and the sum over experts."""
TRAINED = dataclasses.replace(MOE_GRADIENT, of_norm=8e-3)
"""The gradient of a routing weight is a dot of rows kept in bf16: of 65536, the worst is further off than of a few."""
TRAINING_PEERS = {
    name: dataclasses.replace(peer, run=trained(peer.run), tolerance=IN_BF16) for name, peer in PEERS.items()
}
BENCHES = [
    Bench("fused_moe", CASES, inputs, PEERS, tolerance=MATMUL),
    Bench("fused_moe", CASES, fp8_inputs, tolerance=REQUANTIZED, rate="fp8", name="fused_moe fp8"),
    Bench(
        "fused_moe_forward", TRAINING_CASES, training_inputs, TRAINING_PEERS, tolerance=TRAINED,
        name="fused_moe forward+backward", call=trained(deepseek_kernels.fused_moe), cost=training_cost,
    ),
]  # fmt: skip
