"""Choosing experts as DeepSeek-V3 and V2-Lite do, forward and backward."""

import torch
from common import Bench, Case

from deepseek_kernels.shapes import V2_LITE, V3
from deepseek_kernels.testing.compare import EXACT, GRADIENT, SUM

MODELS = {"v3": V3, "v2-lite": V2_LITE}
CASES = (
    Case("small", dict(model="v3", num_tokens=64), quick=True),
    *(Case(f"v3 T={t}", dict(model="v3", num_tokens=t)) for t in (1, 128, 4096, 8192)),
    Case("v2-lite T=8192", dict(model="v2-lite", num_tokens=8192)),
)


def inputs(device, g, model, num_tokens):
    m = MODELS[model]
    logits = torch.randn(num_tokens, m.num_experts, device=device, generator=g)
    bias = torch.randn(m.num_experts, device=device, generator=g) * 0.1 if m.score == "sigmoid" else None
    return logits, bias, m.top_k, m.num_groups, m.topk_groups, m.score, m.normalize, m.routed_scale


def backward_inputs(device, g, **dims):
    logits, bias, top_k, *_, score, normalize, scale = inputs(device, g, **dims)
    indices = torch.rand(logits.shape, device=device, generator=g).topk(top_k, dim=1).indices
    grad = torch.randn(indices.shape, device=device, generator=g)
    return grad, logits, indices, score, normalize, scale


def eager(logits, bias, top_k, num_groups, topk_groups, score, normalize, scale):
    """`Gate.forward` of DeepSeek-V3's inference/model.py, without the matmul."""
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    selection = scores if bias is None else scores + bias
    if num_groups > 1:
        by_group = selection.view(len(logits), num_groups, -1)
        group_score = by_group.amax(-1) if bias is None else by_group.topk(2, dim=-1)[0].sum(-1)
        out = torch.ones_like(group_score, dtype=torch.bool)
        out.scatter_(1, group_score.topk(topk_groups, dim=-1)[1], False)
        selection = by_group.masked_fill(out[:, :, None], -torch.inf).flatten(1)
    indices = selection.topk(top_k, dim=-1)[1]
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, indices


def eager_backward(grad_weights, logits, indices, score, normalize, scale):
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        weights = (leaf.sigmoid() if score == "sigmoid" else leaf.softmax(-1)).gather(1, indices)
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return torch.autograd.grad(weights * scale, leaf, grad_weights)[0]


BENCHES = [
    Bench("moe_gate", CASES, inputs, {"torch eager": eager}, tolerance=(SUM, EXACT), rate="fp32"),
    Bench(
        "moe_gate_backward", CASES, backward_inputs, {"torch eager": eager_backward}, tolerance=GRADIENT, rate="fp32"
    ),
]
