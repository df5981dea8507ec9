"""Absorbed decode over the paged latent cache: V3's heads whole and split over 8 GPUs, one and two query tokens."""

import torch
from common import Bench, Case, Peer

from deepseek_kernels.reference.mla_cache_write import encode_rows
from deepseek_kernels.shapes import V3
from deepseek_kernels.testing.compare import ATTENTION, LSE, Tolerance

PAGE_SIZE = 64
SCALE = (V3.d_nope + V3.d_rope) ** -0.5


def case(b: int, s_q: int, h_q: int, s_kv: int, devices=("cuda",), **options) -> Case:
    name = f"b={b} s_q={s_q} h_q={h_q} s_kv={s_kv}"
    return Case(name, dict(b=b, s_q=s_q, h_q=h_q, s_kv=s_kv), devices=devices, **options)


CASES = (
    case(2, 1, 4, 128, devices=("cpu", "cuda"), quick=True),
    *(case(b, 1, h_q, s_kv, ("cpu", "cuda")) for b, s_kv in ((1, 1024), (1, 4096), (8, 1024)) for h_q in (16, 128)),
    *(case(b, 1, 16, s_kv) for b, s_kv in ((1, 32768), (32, 4096), (128, 4096))),
    *(case(128, s_q, 128, s_kv) for s_q in (1, 2) for s_kv in (4096, 8192, 32768)),
)
ROUNDS_SCORES = (Tolerance(steps=4, absolute=4e-3, distance=1e-4), Tolerance(absolute=4e-2))


def inputs(device, g, b, s_q, h_q, s_kv):
    pages = s_kv // PAGE_SIZE
    table = torch.randperm(b * pages, device=device, generator=g).view(b, pages).int()
    cache = torch.randn(b * pages, PAGE_SIZE, V3.d_qk, device=device, generator=g, dtype=torch.bfloat16).div_(10)
    q = torch.randn(b, s_q, h_q, V3.d_qk, device=device, generator=g, dtype=torch.bfloat16)
    return q, cache, table, torch.full((b,), s_kv, dtype=torch.int32, device=device), SCALE, True, None


def fp8_inputs(device, g, **dims):
    q, cache, *rest = inputs(device, g, **dims)
    rows = cache.new_empty(*cache.shape[:2], 656, dtype=torch.uint8)
    for part, row in zip(cache.split(4096), rows.split(4096), strict=True):
        latent, rope = part.flatten(0, 1).float().split([V3.d_latent, V3.d_rope], 1)
        row.copy_(encode_rows(latent, rope, torch.uint8).view(row.shape))
    return q, rows, *rest


def eager(q, kv_cache, block_table, seqlens_kv, scale, causal, sink):
    rows = kv_cache[block_table.long()].flatten(1, 2)
    s_q = q.shape[1]
    last = seqlens_kv[:, None] - s_q + torch.arange(s_q, device=q.device)
    hidden = torch.arange(rows.shape[1], device=q.device) > last[..., None]
    scores = torch.einsum("bshd,bjd->bshj", q, rows).float() * scale
    scores = scores.masked_fill(hidden[:, :, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(q.dtype)
    return torch.einsum("bshj,bjd->bshd", weights, rows[..., : V3.d_latent]), lse.transpose(1, 2).contiguous()


def prepare_flash_mla(q, kv_cache, block_table, seqlens_kv, scale, causal, sink):
    from flash_mla import get_mla_metadata

    metadata, num_splits = get_mla_metadata(seqlens_kv, q.shape[1] * q.shape[2], 1)
    call = q, kv_cache[:, :, None], block_table, seqlens_kv, metadata, num_splits, scale, causal
    flash_mla(*call)  # its schedule is made by the first call and kept: a step of decoding makes it once for all layers
    return call


def flash_mla(q, kv_cache, block_table, seqlens_kv, metadata, num_splits, scale, causal):
    from flash_mla import flash_mla_with_kvcache

    return flash_mla_with_kvcache(
        q, kv_cache, block_table, seqlens_kv, V3.d_latent, metadata, num_splits, softmax_scale=scale, causal=causal
    )


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


PEERS = {
    "torch eager": Peer(eager, tolerance=ROUNDS_SCORES),
    "flash_mla": Peer(flash_mla, prepare_flash_mla, needs=("flash_mla",), available=on_gpu),
}
BENCHES = [
    Bench("mla_decode", CASES, inputs, PEERS, tolerance=(ATTENTION, LSE)),
    Bench("mla_decode", CASES, fp8_inputs, tolerance=(ATTENTION, LSE), name="mla_decode fp8"),
]
