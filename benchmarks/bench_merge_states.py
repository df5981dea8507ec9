"""Two attention results into one: prefix and suffix of a decode batch."""

import torch
from common import Bench, Case

from deepseek_kernels.shapes import V3
from deepseek_kernels.testing.compare import LSE, SUM

CASES = (
    Case("b=4 h_q=16", dict(b=4, h_q=16, d_v=V3.d_latent), quick=True),
    Case("b=128 h_q=16", dict(b=128, h_q=16, d_v=V3.d_latent)),
    Case("b=128 h_q=128", dict(b=128, h_q=V3.h_q, d_v=V3.d_latent)),
    Case("b=8192 h_q=128 d_v=128", dict(b=8192, h_q=V3.h_q, d_v=V3.d_v), devices=("cuda",)),
)


def inputs(device, g, b, h_q, d_v):
    def side():
        out = torch.randn(b, 1, h_q, d_v, device=device, generator=g).bfloat16()
        return out, torch.randn(b, h_q, 1, device=device, generator=g)

    return *side(), *side()


def eager(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((side - lse).exp().transpose(1, 2)[..., None] for side in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


BENCHES = [Bench("merge_states", CASES, inputs, {"torch eager": eager}, tolerance=(SUM, LSE))]
