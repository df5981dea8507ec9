"""row = rmsnorm(c_kv[t]) * norm_weight ++ rope(k_rope[t]) into slot slots[t] of the paged cache; and rope alone.

rmsnorm(x) = x / sqrt(mean(x^2) + eps) in fp32; rope turns the pair (x, y) into (x cos - y sin, y cos + x sin) in place.
An FP8 row is 512 e4m3 | 4 fp32 scales of 128 each | 64 bf16 rope: 656 bytes.

Tiling:  a program handles ROWS tokens, each whole (rope alone: HEADS heads of each, which share its cosines).
Bytes:   T * (row read + row written + 4 d_rope of cos_sin + 16). T=4096, V3, bf16: 10.6 MB, 2.2 us at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl

from .common import e4m3_encode, fp8_scale, narrow, scaled


@triton.jit
def _cos_sin(cos_sin, position, inside, max_positions, D_ROPE: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """Cosines and sines [ROWS, pairs] at `position` [ROWS], clamped into the table."""
    pair = tl.arange(0, BLOCK_PAIRS)
    position = tl.minimum(tl.maximum(position.to(tl.int64), 0), max_positions - 1)
    at = cos_sin + position[:, None] * D_ROPE + pair[None, :]
    valid = inside[:, None] & (pair < D_ROPE // 2)[None, :]
    return tl.load(at, mask=valid, other=0.0), tl.load(at + D_ROPE // 2, mask=valid, other=0.0)


@triton.jit
def _rotate(
    source, target, inside, stored, cos, sin,
    D_ROPE: tl.constexpr, BLOCK_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows at `source`, pointers [..., 1], turned by `cos`, `sin` [..., pairs], to `target`."""
    DTYPE: tl.constexpr = target.dtype.element_ty
    pair = tl.arange(0, BLOCK_PAIRS)
    if INTERLEAVED:  # whole rows are loaded, so that a thread moves 16 bytes and holds both halves of its pairs
        column = tl.arange(0, 2 * BLOCK_PAIRS)
        row = tl.load(source + column, mask=inside & (column < D_ROPE), other=0.0).to(tl.float32)
        x, y = tl.split(tl.reshape(row, row.shape[:-1] + [BLOCK_PAIRS, 2]))
        row = tl.reshape(tl.join(x * cos - y * sin, y * cos + x * sin), row.shape)
        tl.store(target + column, narrow(row, DTYPE), mask=stored & (column < D_ROPE))
    else:
        x = tl.load(source + pair, mask=inside & (pair < D_ROPE // 2), other=0.0).to(tl.float32)
        y = tl.load(source + D_ROPE // 2 + pair, mask=inside & (pair < D_ROPE // 2), other=0.0).to(tl.float32)
        stored = stored & (pair < D_ROPE // 2)
        tl.store(target + pair, narrow(x * cos - y * sin, DTYPE), mask=stored)
        tl.store(target + D_ROPE // 2 + pair, narrow(y * cos + x * sin, DTYPE), mask=stored)


@triton.jit
def _write(
    c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots, num_tokens, num_slots, max_positions, eps,
    c_stride, k_stride, page_stride, row_stride,
    D_LATENT: tl.constexpr, BLOCK_LATENT: tl.constexpr, D_ROPE: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = token < num_tokens  # loads do not wait for the slot
    slot = tl.load(slots + token, mask=inside, other=-1).to(tl.int64)
    position = tl.load(positions + token, mask=inside, other=0)
    has_slot = (slot >= 0) & (slot < num_slots)
    slot = tl.where(has_slot, slot, 0)
    target = kv_cache + (slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * row_stride)

    column = tl.arange(0, BLOCK_LATENT)
    latent = tl.load(
        c_kv + token[:, None] * c_stride + column[None, :],
        mask=inside[:, None] & (column < D_LATENT)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    element = has_slot[:, None] & (column < D_LATENT)[None, :]
    if NORM:
        mean_square = tl.sum(latent * latent, 1) / D_LATENT
        weight = tl.load(norm_weight + column, mask=column < D_LATENT, other=0.0).to(tl.float32)
        latent = latent * tl.rsqrt(mean_square + eps)[:, None] * weight[None, :]
    if FP8:
        group = tl.arange(0, 4)
        blocks = tl.reshape(latent, (ROWS, 4, 128))
        is_nan = tl.max((blocks != blocks).to(tl.int32), 2) > 0
        scale = fp8_scale(tl.max(tl.abs(blocks), 2), is_nan, POW2=False)
        code = e4m3_encode(scaled(blocks, scale[:, :, None]), NATIVE)
        tl.store(target[:, None] + column[None, :], tl.reshape(code, (ROWS, BLOCK_LATENT)), mask=element)
        scales = (target + D_LATENT).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scales[:, None] + group[None, :], scale, mask=has_slot[:, None] & (group >= 0)[None, :])
        rope = (target + D_LATENT + 16).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    else:
        tl.store(target[:, None] + column[None, :], narrow(latent, kv_cache.dtype.element_ty), mask=element)
        rope = target + D_LATENT

    cos, sin = _cos_sin(cos_sin, position, inside, max_positions, D_ROPE, BLOCK_PAIRS)
    source = (k_rope + token * k_stride)[:, None]
    _rotate(source, rope[:, None], inside[:, None], has_slot[:, None], cos, sin, D_ROPE, BLOCK_PAIRS, INTERLEAVED)


@triton.jit
def _rope(
    x, cos_sin, positions, out, num_tokens, heads, max_positions, token_stride, head_stride,
    D_ROPE: tl.constexpr, BLOCK_PAIRS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    head_blocks = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // head_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(0) % head_blocks * HEADS + tl.arange(0, HEADS)
    inside = token < num_tokens
    position = tl.load(positions + token, mask=inside, other=0)
    cos, sin = _cos_sin(cos_sin, position, inside, max_positions, D_ROPE, BLOCK_PAIRS)
    if INVERSE:
        sin = -sin
    source = x + (token * token_stride)[:, None, None] + (head.to(tl.int64) * head_stride)[None, :, None]
    target = out + ((token * heads)[:, None, None] + head[None, :, None]) * D_ROPE
    element = inside[:, None, None] & (head < heads)[None, :, None]
    _rotate(source, target, element, element, cos[:, None, :], sin[:, None, :], D_ROPE, BLOCK_PAIRS, INTERLEAVED)


def write(config, c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots, eps, interleaved) -> None:
    """c_kv [T, d_latent] and k_rope [T, d_rope] with contiguous rows into kv_cache [pages, page_size, row]; the rest
    contiguous."""
    num_tokens, d_latent = c_kv.shape
    d_rope = k_rope.shape[1]
    pages, page_size, _ = kv_cache.shape
    _write[(triton.cdiv(num_tokens, config.rows),)](
        c_kv, k_rope, norm_weight if norm_weight is not None else c_kv, cos_sin, positions, kv_cache, slots,
        num_tokens, pages * page_size, cos_sin.shape[0], eps, c_kv.stride(0), k_rope.stride(0), kv_cache.stride(0),
        kv_cache.stride(1), D_LATENT=d_latent, BLOCK_LATENT=triton.next_power_of_2(d_latent), D_ROPE=d_rope,
        BLOCK_PAIRS=triton.next_power_of_2(d_rope // 2), PAGE_SIZE=page_size, ROWS=config.rows,
        NORM=norm_weight is not None, INTERLEAVED=interleaved, FP8=kv_cache.dtype == torch.uint8,
        NATIVE=config.native_fp8, num_warps=config.num_warps,
    )  # fmt: skip


def rope(config, x, cos_sin, positions, interleaved, inverse, out) -> None:
    """x [T, h, d_rope] with contiguous rows into out, contiguous like the rest."""
    num_tokens, heads, d_rope = x.shape
    _rope[(triton.cdiv(num_tokens, config.rows) * triton.cdiv(heads, config.heads),)](
        x, cos_sin, positions, out, num_tokens, heads, cos_sin.shape[0], x.stride(0), x.stride(1), D_ROPE=d_rope,
        BLOCK_PAIRS=triton.next_power_of_2(d_rope // 2), ROWS=config.rows, HEADS=config.heads,
        INTERLEAVED=interleaved, INVERSE=inverse, num_warps=config.num_warps,
    )  # fmt: skip
