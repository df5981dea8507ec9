"""Routing maps at the sizes of one DeepSeek-V3 layer."""

import torch
from common import Bench, Case, Peer

from deepseek_kernels.shapes import V3

CASES = (
    Case("small", dict(num_tokens=64, num_experts=16, top_k=4), quick=True),
    *(Case(f"v3 T={t}", dict(num_tokens=t, num_experts=V3.num_experts, top_k=V3.top_k)) for t in (1, 128, 4096, 8192)),
    Case("v3 T=131072", dict(num_tokens=131072, num_experts=V3.num_experts, top_k=V3.top_k), devices=("cuda",)),
    Case("E=1000 T=4096", dict(num_tokens=4096, num_experts=1000, top_k=8)),
)
ALIGNED = (Case("v3 T=8192 aligned", dict(num_tokens=8192, num_experts=V3.num_experts, top_k=V3.top_k)),)


def inputs(device, g, num_tokens, num_experts, top_k):
    return torch.rand(num_tokens, num_experts, device=device, generator=g).topk(top_k, dim=1).indices, num_experts


def aligned_inputs(device, g, **dims):
    return *inputs(device, g, **dims), 0, -1, 128


def eager(indices, num_experts):
    """What transformers does: a stable argsort and a histogram, and the inverse of the order."""
    flat = indices.flatten()
    expert, order = flat.sort(stable=True)
    token_topk_to_pos = torch.empty_like(order, dtype=torch.int32)
    token_topk_to_pos[order] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    ends = torch.searchsorted(expert, torch.arange(num_experts + 1, device=flat.device))
    return token_topk_to_pos.view(indices.shape), order.int(), ends.int()


BENCHES = [
    Bench("moe_sort", CASES, inputs, {"torch eager": Peer(eager)}),
    Bench("moe_sort", ALIGNED, aligned_inputs, name="moe_sort alignment=128"),
]
