"""Rows of the latent cache, rotary embedding, and writing rows into pages, in plain torch."""

import torch

from .fp8_quantize import fp8_dequantize, fp8_quantize


def mla_rope(
    x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, interleaved: bool = True, inverse: bool = False
) -> torch.Tensor:
    """See `deepseek_kernels.mla_rope`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = cos_sin[positions.long().clamp(0, cos_sin.shape[0] - 1)].to(compute)
    cos, sin = angle[:, None].chunk(2, dim=-1)
    sin = -sin if inverse else sin
    pairs = x.to(compute).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], -1 if interleaved else -2)
    return rotated.flatten(-2).to(x.dtype)


def encode_rows(latent: torch.Tensor, rope: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cache rows [T, row] of `dtype` from fp32 latent [T, d_latent] and rope [T, d_rope]; uint8 is the FP8 layout."""
    if dtype != torch.uint8:
        return torch.cat([latent, rope], 1).to(dtype)
    q, scale = fp8_quantize(latent)
    return torch.cat([part.view(torch.uint8) for part in (q, scale, rope.bfloat16())], 1)


def decode_rows(rows: torch.Tensor) -> torch.Tensor:
    """Cache rows [T, row] as fp32 [T, d_latent + d_rope]; uint8 is the FP8 layout."""
    if rows.dtype != torch.uint8:
        return rows.float()
    q, scale, rope = (part.contiguous() for part in rows.split([512, 16, 128], dim=1))
    latent = fp8_dequantize(q.view(torch.float8_e4m3fn), scale.view(torch.float32))
    return torch.cat([latent, rope.view(torch.bfloat16).float()], 1)


def mla_cache_write(
    c_kv: torch.Tensor,
    k_rope: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> None:
    """See `deepseek_kernels.mla_cache_write`."""
    pages, page_size, _ = kv_cache.shape
    if slots.shape[0] == 0 or pages == 0:
        return
    latent = c_kv.float()
    if norm_weight is not None:
        latent = latent * torch.rsqrt(latent.square().mean(1, keepdim=True) + eps) * norm_weight.float()
    rope = mla_rope(k_rope.float()[:, None], cos_sin, positions, interleaved)[:, 0]
    rows = encode_rows(latent, rope, kv_cache.dtype)

    # A token without a slot repeats the write of one that has one; if none has, slot 0 is written with itself.
    slots = slots.long()
    has_slot = (slots >= 0) & (slots < pages * page_size)
    other = has_slot.int().argmax(0, keepdim=True)  # [1]: a 0-d index would be read on the host
    spare_slot = torch.where(has_slot.any(), slots[other], 0)
    spare_row = torch.where(has_slot.any(), rows[other], kv_cache[0, 0])
    slots = torch.where(has_slot, slots, spare_slot)
    rows = torch.where(has_slot[:, None], rows, spare_row)
    kv_cache[slots // page_size, slots % page_size] = rows
