"""Attention of s_q * h_q absorbed queries over one latent row per token, key as a whole, value but for its rope.

    s_rj = scale q_r . row_j        lse_r = log sum_j exp(s_rj)        out_r = sum_j exp(s_rj - lse_r) row_j[:d_latent]

Tiling:  program (sequence, split, block) has BLOCK_H of the s_q * h_q query rows and one of num_splits equal parts of
         the sequence, BLOCK_N tokens at a time. The latent is held in quarters, each with one FP8 scale, which
         multiplies a row's scores and weights instead of the row; a tile is loaded once and serves as key
         (transposed) and as value.
         Blocks of one part run next to each other and share its rows in L2. Parts are cut on the device by seqlens_kv.
         With more than one split, `_combine` merges (out, lse) of the parts in order.
Bytes:   b*s_q*h_q*(2*d_latent+64)*2 + sum(seqlens_kv)*row, row = 1152 (bf16) or 656 (FP8).
         b=128 s_q=1 h_q=16 s_kv=4096, bf16: 608 MB, 127 us at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl

from .common import dot, e4m3_decode, merge_weights, narrow, weighted

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_quarter(
    row, present, WIDTH: tl.constexpr, PART: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr
):
    """Columns [PART * WIDTH, (PART + 1) * WIDTH) of the latents at `row` [BLOCK_N], unscaled, and their scales.

    Absent rows, which may hold NaN, are 0. Every e4m3 is a bf16 and a fp16, so nothing is rounded.
    """
    column = PART * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(row[:, None] + column[None, :], mask=present[:, None], other=0)
    if FP8:
        if NATIVE:
            value = value.to(tl.float8e4nv, bitcast=True).to(DTYPE)
        else:
            value = e4m3_decode(value).to(DTYPE)
        scale = tl.load((row + 4 * WIDTH).to(tl.pointer_type(tl.float32), bitcast=True) + PART, mask=present, other=0.0)
    else:
        scale = tl.full(row.shape, 1.0, tl.float32)
    return value, scale


@triton.jit
def _add_score(score, q, key, scale, FP8: tl.constexpr):
    """score + scale * (q . key)"""
    if FP8:
        score += dot(q, tl.trans(key), tl.zeros_like(score)) * scale[None, :]
    else:
        score = dot(q, tl.trans(key), score)
    return score


@triton.jit
def _add_value(total, shrink, weight, value, scale, FP8: tl.constexpr):
    """total * shrink + (weight * scale) @ value

    Weights times scales may be too small for fp16; with FP8 values they are bf16 then.
    """
    if FP8:
        weight *= scale[None, :]
        if value.dtype == tl.float16:
            value = value.to(tl.bfloat16)
    return dot(narrow(weight, value.dtype), value, total * shrink[:, None])


@triton.jit
def _attend(
    q, kv_cache, block_table, seqlens_kv, sink, out, lse, scale, s_q, h_q, pages, max_pages, capacity, num_splits,
    q_stride_b, q_stride_s, q_stride_h, page_stride,
    ROW_STRIDE: tl.constexpr, WIDTH: tl.constexpr, D_ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SINK: tl.constexpr, SPLIT: tl.constexpr,
    FP8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    num_rows = s_q * h_q
    num_blocks = tl.cdiv(num_rows, BLOCK_H)
    part = tl.program_id(0) // num_blocks
    split = part % num_splits
    sequence = (part // num_splits).to(tl.int64)

    row = tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = row < num_rows
    query = row // h_q
    head = row % h_q
    length = tl.minimum(tl.maximum(tl.load(seqlens_kv + sequence), 0), capacity)
    if CAUSAL:
        end_of_row = length - s_q + query + 1
    else:
        end_of_row = tl.zeros_like(row) + length
    end = tl.max(tl.where(inside, end_of_row, 0), 0)
    tokens_of_part = tl.cdiv(tl.cdiv(length, BLOCK_N), num_splits) * BLOCK_N
    begin = split * tokens_of_part
    end = tl.minimum(end, begin + tokens_of_part)

    table = block_table + sequence * max_pages
    column = tl.arange(0, WIDTH)
    rope_column = 4 * WIDTH + tl.arange(0, D_ROPE)
    q_row = q + sequence * q_stride_b + (query.to(tl.int64) * q_stride_s + head.to(tl.int64) * q_stride_h)[:, None]
    q0 = tl.load(q_row + column[None, :], mask=inside[:, None], other=0.0)
    q1 = tl.load(q_row + WIDTH + column[None, :], mask=inside[:, None], other=0.0)
    q2 = tl.load(q_row + 2 * WIDTH + column[None, :], mask=inside[:, None], other=0.0)
    q3 = tl.load(q_row + 3 * WIDTH + column[None, :], mask=inside[:, None], other=0.0)
    q_rope = tl.load(q_row + rope_column[None, :], mask=inside[:, None], other=0.0)

    top = tl.full((BLOCK_H,), -1e30, tl.float32)  # finite: no inf - inf where nothing was seen
    mass = tl.zeros((BLOCK_H,), tl.float32)
    total0 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    total1 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    total2 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    total3 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        if PAGE_SIZE % BLOCK_N == 0:  # the tile lies in one page
            page = tl.load(table + start // PAGE_SIZE)
            present = token < tl.where((page >= 0) & (page < pages), end, 0)
            in_page = start % PAGE_SIZE + tl.arange(0, BLOCK_N)
        else:
            page = tl.load(table + token // PAGE_SIZE, mask=token < end, other=-1)
            present = (page >= 0) & (page < pages)
            in_page = token % PAGE_SIZE
        kv_row = kv_cache + (page.to(tl.int64) * page_stride + in_page.to(tl.int64) * ROW_STRIDE)
        kv0, scale0 = _load_quarter(kv_row, present, WIDTH, 0, FP8, NATIVE, DTYPE)
        kv1, scale1 = _load_quarter(kv_row, present, WIDTH, 1, FP8, NATIVE, DTYPE)
        kv2, scale2 = _load_quarter(kv_row, present, WIDTH, 2, FP8, NATIVE, DTYPE)
        kv3, scale3 = _load_quarter(kv_row, present, WIDTH, 3, FP8, NATIVE, DTYPE)
        if FP8:
            rope = (kv_row + 4 * WIDTH + 16).to(tl.pointer_type(tl.bfloat16), bitcast=True) - 4 * WIDTH
        else:
            rope = kv_row
        k_rope = tl.load(rope[:, None] + rope_column[None, :], mask=present[:, None], other=0.0).to(DTYPE)

        score = dot(q_rope, tl.trans(k_rope), tl.zeros((BLOCK_H, BLOCK_N), tl.float32))
        score = _add_score(score, q0, kv0, scale0, FP8)
        score = _add_score(score, q1, kv1, scale1, FP8)
        score = _add_score(score, q2, kv2, scale2, FP8)
        score = _add_score(score, q3, kv3, scale3, FP8)
        visible = present[None, :] & (token[None, :] < end_of_row[:, None])
        score = tl.where(visible, score * (scale * _LOG2_E), float("-inf"))

        new_top = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[:, None])
        mass = mass * shrink + tl.sum(weight, 1)
        total0 = _add_value(total0, shrink, weight, kv0, scale0, FP8)
        total1 = _add_value(total1, shrink, weight, kv1, scale1, FP8)
        total2 = _add_value(total2, shrink, weight, kv2, scale2, FP8)
        total3 = _add_value(total3, shrink, weight, kv3, scale3, FP8)
        top = new_top

    seen = mass != 0.0  # NaN is seen
    row_lse = tl.where(seen, (top + tl.log2(mass)) / _LOG2_E, float("-inf"))
    factor = tl.where(seen, 1.0 / mass, 0.0)
    if SINK:
        factor *= tl.sigmoid(row_lse - tl.load(sink + head, mask=inside, other=0.0))
    if SPLIT:
        first = (sequence * num_splits + split) * num_rows
        lse_at = first + row
    else:
        first = sequence * num_rows
        lse_at = first + head * s_q + query
    tl.store(lse + lse_at, row_lse, mask=inside)
    OUT: tl.constexpr = out.dtype.element_ty
    factor = factor[:, None]
    target = out + (first + row)[:, None] * (4 * WIDTH) + column[None, :]
    tl.store(target, narrow(total0 * factor, OUT), mask=inside[:, None])
    tl.store(target + WIDTH, narrow(total1 * factor, OUT), mask=inside[:, None])
    tl.store(target + 2 * WIDTH, narrow(total2 * factor, OUT), mask=inside[:, None])
    tl.store(target + 3 * WIDTH, narrow(total3 * factor, OUT), mask=inside[:, None])


@triton.jit
def _combine(
    part_out, part_lse, sink, out, lse, s_q, h_q, num_splits,
    D: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    num_rows = s_q * h_q
    sequence = (tl.program_id(0) // num_rows).to(tl.int64)
    row = tl.program_id(0) % num_rows
    head = row % h_q
    query = row // h_q
    column = tl.arange(0, D)
    total = tl.zeros((D,), tl.float32)
    total_lse = tl.full((1,), float("-inf"), tl.float32)
    for split in range(num_splits):
        at = (sequence * num_splits + split) * num_rows + row
        value = tl.load(part_out + at * D + column)
        weight_total, weight_part, total_lse = merge_weights(total_lse, tl.load(part_lse + at + tl.arange(0, 1)))
        total = total * weight_total + weighted(weight_part, value)
    if SINK:
        total = weighted(tl.sigmoid(total_lse - tl.load(sink + head)), total)
    tl.store(out + (sequence * num_rows + row) * D + column, narrow(total, out.dtype.element_ty))
    tl.store(lse + sequence * num_rows + head * s_q + query + tl.arange(0, 1), total_lse)


def decode(config, q, kv_cache, block_table, seqlens_kv, scale, causal, sink, part_out, part_lse, out, lse) -> None:
    """q and kv_cache with contiguous rows, the rest contiguous.

    part_out fp32 [b, num_splits, s_q * h_q, d_latent] and part_lse fp32 [b, num_splits, s_q * h_q] are scratch of
    more than one split; None for one.
    """
    b, s_q, h_q, d_qk = q.shape
    pages, page_size, _ = kv_cache.shape
    d_latent = out.shape[3]
    split = config.num_splits > 1
    _attend[(b * config.num_splits * triton.cdiv(s_q * h_q, config.block_h),)](
        q, kv_cache, block_table, seqlens_kv, sink if sink is not None else lse, part_out if split else out,
        part_lse if split else lse, scale, s_q, h_q, pages, block_table.shape[1],
        min(block_table.shape[1] * page_size, 2**30), config.num_splits, q.stride(0), q.stride(1), q.stride(2),
        kv_cache.stride(0), ROW_STRIDE=kv_cache.stride(1), WIDTH=d_latent // 4, D_ROPE=d_qk - d_latent,
        PAGE_SIZE=page_size, BLOCK_H=config.block_h, BLOCK_N=config.block_n, CAUSAL=causal and s_q > 1,
        SINK=sink is not None and not split, SPLIT=split, FP8=kv_cache.dtype == torch.uint8, NATIVE=config.native_fp8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        _combine[(b * s_q * h_q,)](
            part_out, part_lse, sink if sink is not None else lse, out, lse, s_q, h_q, config.num_splits,
            D=d_latent, SINK=sink is not None, num_warps=4,
        )  # fmt: skip
