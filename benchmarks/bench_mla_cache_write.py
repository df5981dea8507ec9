"""Latent rows into the paged cache, and the rotation of queries, at V3's widths."""

import torch
from common import Bench, Case

from deepseek_kernels.reference.mla_cache_write import decode_rows
from deepseek_kernels.shapes import FP8_CACHE_ROW, V3
from deepseek_kernels.testing.compare import SUM
from deepseek_kernels.testing.samples.mla_cache_write import FP8_ROWS

PAGE_SIZE, MAX_POSITIONS = 64, 4096
CASES = (
    Case("T=16", dict(num_tokens=16), quick=True),
    *(Case(f"T={t}", dict(num_tokens=t)) for t in (1, 128, 4096)),
    *(Case(f"T={t}", dict(num_tokens=t), devices=("cuda",)) for t in (16384, 65536)),
)


def angles(device, g) -> torch.Tensor:
    angle = 6.3 * torch.rand(MAX_POSITIONS, V3.d_rope // 2, device=device, generator=g)
    return torch.cat([angle.cos(), angle.sin()], 1)


def write_inputs(device, g, num_tokens, dtype=torch.bfloat16, row=V3.d_qk):
    projected = torch.randn(num_tokens, V3.d_qk, device=device, generator=g).bfloat16()
    c_kv, k_rope = projected.split([V3.d_latent, V3.d_rope], 1)
    weight = torch.ones(V3.d_latent, device=device).bfloat16()
    positions = torch.arange(num_tokens, device=device) % MAX_POSITIONS
    pages = -(-num_tokens // PAGE_SIZE)
    cache = torch.zeros(pages, PAGE_SIZE, row, dtype=dtype, device=device)
    slots = torch.randperm(pages * PAGE_SIZE, device=device, generator=g)[:num_tokens]
    return c_kv, k_rope, weight, angles(device, g), positions, cache, slots


def write_fp8_inputs(device, g, num_tokens):
    return write_inputs(device, g, num_tokens, torch.uint8, FP8_CACHE_ROW)


def rope_inputs(device, g, num_tokens):
    x = torch.randn(num_tokens, V3.h_q, V3.d_nope + V3.d_rope, device=device, generator=g, dtype=torch.bfloat16)
    positions = torch.arange(num_tokens, device=device) % MAX_POSITIONS
    return x[..., V3.d_nope :], angles(device, g), positions


def eager_rope(x, cos_sin, positions):
    cos, sin = cos_sin[positions][:, None].chunk(2, -1)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2).to(x.dtype)


def eager_write(c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots):
    latent = torch.nn.functional.rms_norm(c_kv.float(), (c_kv.shape[1],), norm_weight.float(), 1e-6)
    rope = eager_rope(k_rope[:, None], cos_sin, positions)[:, 0]
    row = torch.cat([latent.to(kv_cache.dtype), rope.to(kv_cache.dtype)], 1)
    kv_cache.view(-1, kv_cache.shape[2]).index_copy_(0, slots, row)


def values(outputs, args) -> tuple:
    return tuple(decode_rows(rows.flatten(0, 1)) for rows in outputs)


BENCHES = [
    Bench("mla_cache_write", CASES, write_inputs, {"torch eager": eager_write}, tolerance=SUM, mutated=(5,)),
    Bench(
        "mla_cache_write", CASES, write_fp8_inputs, tolerance=FP8_ROWS, name="mla_cache_write fp8", mutated=(5,),
        defined=values,
    ),
    Bench("mla_rope", CASES, rope_inputs, {"torch eager": eager_rope}, tolerance=SUM),
]  # fmt: skip
