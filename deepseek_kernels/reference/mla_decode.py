"""Attention of a few absorbed queries over a paged latent cache, in plain torch."""

import torch

from .mla_cache_write import decode_rows


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seqlens_kv: torch.Tensor,
    scale: float,
    causal: bool = True,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `deepseek_kernels.mla_decode`."""
    b, s_q, h_q, d_qk = q.shape
    d_latent = d_qk - 64
    pages, page_size, _ = kv_cache.shape
    capacity = block_table.shape[1] * page_size
    out = q.new_zeros(b, s_q, h_q, d_latent, dtype=torch.float32)
    lse = q.new_full((b, h_q, s_q), float("-inf"), dtype=torch.float32)
    if out.numel() == 0 or capacity == 0 or pages == 0:
        return out.to(q.dtype), lse
    position = torch.arange(capacity, device=q.device)
    for i in range(b):
        length = seqlens_kv[i].long().clamp(0, capacity)
        page = block_table[i].long()
        known = ((page >= 0) & (page < pages)).repeat_interleave(page_size) & (position < length)
        rows = decode_rows(kv_cache[page.clamp(0, pages - 1)].flatten(0, 1))
        rows = torch.where(known[:, None], rows, 0)
        query = torch.arange(s_q, device=q.device)[:, None]
        visible = known & (position <= length - s_q + query) if causal else known.expand(s_q, capacity)
        scores = torch.einsum("shd,jd->hsj", q[i].float(), rows) * scale
        scores = scores.masked_fill(~visible, float("-inf"))
        lse[i] = scores.logsumexp(-1)
        empty = lse[i].isneginf()[..., None]
        weights = torch.where(empty, 0, (scores - lse[i][..., None]).exp())
        out[i] = torch.einsum("hsj,jd->shd", weights, rows[:, :d_latent])
    if sink is not None:
        share = torch.where(lse.isneginf(), 0, torch.sigmoid(lse - sink[:, None]))
        out *= share.transpose(1, 2)[..., None]
    return out.to(q.dtype), lse
