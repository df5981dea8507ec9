"""Token rows to expert order and back, at the sizes of one DeepSeek-V3 and one V2-Lite layer."""

import torch
from common import Bench, Case

from deepseek_kernels.reference.moe_sort import moe_sort
from deepseek_kernels.shapes import V2_LITE, V3
from deepseek_kernels.testing.compare import SUM

SIZES = {"v3": (V3, (1, 128, 4096, 16384)), "v2-lite": (V2_LITE, (4096,))}
CASES = (
    Case("small", dict(num_tokens=64, hidden=512, num_experts=16, top_k=4), quick=True),
    *(
        Case(
            f"{name} T={t}",
            dict(num_tokens=t, hidden=m.hidden, num_experts=m.num_experts, top_k=m.top_k),
            devices=("cpu", "cuda") if t <= 4096 else ("cuda",),
        )
        for name, (m, tokens) in SIZES.items()
        for t in tokens
    ),
)


def maps(device, g, num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.rand(num_tokens, num_experts, device=device, generator=g).topk(top_k, dim=1).indices
    return moe_sort(indices, num_experts)[:2]


def permute_inputs(device, g, num_tokens, hidden, num_experts, top_k):
    x = torch.randn(num_tokens, hidden, device=device, generator=g).bfloat16()
    return x, *maps(device, g, num_tokens, num_experts, top_k)


def permute_quantize_inputs(device, g, **dims):
    return *permute_inputs(device, g, **dims), None, True


def unpermute_inputs(device, g, num_tokens, hidden, num_experts, top_k):
    y = torch.randn(num_tokens * top_k, hidden, device=device, generator=g).bfloat16()
    weights = torch.rand(num_tokens, top_k, device=device, generator=g)
    return y, *maps(device, g, num_tokens, num_experts, top_k), weights


def eager_permute(x, token_topk_to_pos, pos_to_token_topk):
    top_k = token_topk_to_pos.shape[1]
    return x.index_select(0, pos_to_token_topk // top_k), x.new_empty(len(pos_to_token_topk), 0, dtype=torch.float32)


def eager_unpermute(y, token_topk_to_pos, pos_to_token_topk, weights):
    rows = y.index_select(0, token_topk_to_pos.flatten()).view(*token_topk_to_pos.shape, -1)
    return (rows.float() * weights[:, :, None]).sum(1).to(y.dtype)


BENCHES = [
    Bench("moe_permute", CASES, permute_inputs, {"torch eager": eager_permute}),
    Bench("moe_permute", CASES, permute_quantize_inputs, name="moe_permute quantize"),
    Bench("moe_unpermute", CASES, unpermute_inputs, {"torch eager": eager_unpermute}, tolerance=SUM),
]
