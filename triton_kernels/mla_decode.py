"""Attention of s_q * h_q absorbed queries over one latent row per token, key as a whole, value but for its rope.

    s_rj = scale q_r . row_j        lse_r = log sum_j exp(s_rj)        out_r = sum_j exp(s_rj - lse_r) row_j[:d_latent]

Tiling:  program (sequence, split, block) has BLOCK_H of the s_q * h_q query rows and one of num_splits equal parts of
         the sequence, BLOCK_N tokens at a time. A tile is loaded once and serves as key (transposed) and as value,
         in halves of d_latent columns, or, FP8, in quarters of 128, brought to 16 bits once for both: each row's scale
         multiplies its scores and its weights, never the row.
         Blocks of one part run next to each other and share its rows in L2. Parts are cut on the device by seqlens_kv.
         With more than one split, `_combine` merges (out, lse) of the parts in order.
Bytes:   b*s_q*h_q*(2*d_latent+64)*2 + sum(seqlens_kv)*row, row = 1152 (bf16) or 656 (FP8).
         b=128 s_q=1 h_q=16 s_kv=4096, bf16: 608 MB, 127 us at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, dot, e4m3_decode, merge_weights, narrow, weighted

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _share(seqlens_kv, s_q, h_q, capacity, num_splits, causal, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """What this program does: its sequence, its part among those of all sequences, its query rows, and [begin, end) of
    its tokens."""
    num_rows = s_q * h_q
    num_blocks = tl.cdiv(num_rows, BLOCK_H)
    part = tl.program_id(0) // num_blocks
    sequence = (part // num_splits).to(tl.int64)
    row = tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    length = tl.minimum(tl.maximum(tl.load(seqlens_kv + sequence), 0), capacity)
    end_of_row = length - causal * (s_q - 1 - row // h_q)
    tokens_of_part = tl.cdiv(tl.cdiv(length, BLOCK_N), num_splits) * BLOCK_N
    begin = part % num_splits * tokens_of_part
    end = tl.minimum(tl.max(tl.where(row < num_rows, end_of_row, 0), 0), begin + tokens_of_part)
    return sequence, part, row, end_of_row, begin, end


@triton.jit
def _tile(
    kv_cache, table, start, end, pages, page_stride,
    ROW_STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tokens [start, start + BLOCK_N): their numbers, which of them are there, and where their rows begin."""
    token = start + tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:  # the tile lies in one page
        page = tl.load(table + start // PAGE_SIZE)
        present = token < tl.where((page >= 0) & (page < pages), end, 0)
        in_page = start % PAGE_SIZE + tl.arange(0, BLOCK_N)
    else:
        page = tl.load(table + token // PAGE_SIZE, mask=token < end, other=-1)
        present = (page >= 0) & (page < pages)
        in_page = token % PAGE_SIZE
    return token, present, kv_cache + (page.to(tl.int64) * page_stride + in_page.to(tl.int64) * ROW_STRIDE)


@triton.jit
def _columns(row, present, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of the rows at `row`; rows that are not there, which may hold NaN, are 0."""
    return tl.load(row[:, None] + FIRST + tl.arange(0, WIDTH)[None, :], mask=present[:, None], other=0)


@triton.jit
def _scores(q, kv, start, end):
    """q @ kv^T, where 0 <= start < end.

    Triton gives all warps of a product whose result feeds another product different rows. With 64 rows that is one
    warpgroup's worth, and the second would compute the same again; but it does not look into branches. One branch is
    not enough: the layout the weights need would be pushed into it, and the softmax be computed in every layout.
    """
    score = tl.zeros((q.shape[0], kv.shape[0]), tl.float32)
    if q.shape[0] < 64:
        score = dot(q, tl.trans(kv), score)
    elif start >= 0:
        if start < end:
            score = dot(q, tl.trans(kv), score)
    return score


@triton.jit
def _softmax(score, visible, scale, top, mass):
    """Weights of one tile, and top, mass and the factor of what came before, in base 2."""
    score = tl.where(visible, score * (scale * _LOG2_E), float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    shrink = tl.exp2(top - new_top)
    weight = tl.exp2(score - new_top[:, None])
    return weight, shrink[:, None], new_top, mass * shrink + tl.sum(weight, 1)


@triton.jit
def _finish(top, mass, sink, lse, part, row, s_q, h_q, SINK: tl.constexpr, SPLIT: tl.constexpr):
    """Store lse; return what the totals are multiplied with and the rows of `out` they go to."""
    num_rows = s_q * h_q
    inside = row < num_rows
    head = row % h_q
    seen = mass != 0.0  # NaN is seen
    mass = tl.where(seen, mass, 1.0)
    row_lse = tl.where(seen, (top + tl.log2(mass)) / _LOG2_E, float("-inf"))
    factor = 1.0 / mass
    if SINK:
        factor *= tl.sigmoid(row_lse - tl.load(sink + head, mask=inside, other=0.0))
    factor = tl.where(seen, factor, 0.0)
    first = part.to(tl.int64) * num_rows
    if SPLIT:
        tl.store(lse + first + row, row_lse, mask=inside)
    else:
        tl.store(lse + first + head * s_q + row // h_q, row_lse, mask=inside)
    return factor[:, None], first + row


@triton.jit(do_not_specialize=["s_q", "num_splits", "causal"])  # with constants for them it spills
def _attend(
    q, kv_cache, block_table, seqlens_kv, sink, out, lse, scale, s_q, h_q, pages, max_pages, capacity, num_splits,
    causal, q_stride_b, q_stride_s, q_stride_h, page_stride,
    ROW_STRIDE: tl.constexpr, D_LATENT: tl.constexpr, D_ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, SINK: tl.constexpr, SPLIT: tl.constexpr,
    HOIST: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    HALF: tl.constexpr = D_LATENT // 2
    sequence, part, row, end_of_row, begin, end = _share(
        seqlens_kv, s_q, h_q, capacity, num_splits, causal, BLOCK_H, BLOCK_N
    )
    inside = row < s_q * h_q
    q_row = q + sequence * q_stride_b + (row // h_q).to(tl.int64) * q_stride_s + (row % h_q).to(tl.int64) * q_stride_h
    q0 = _columns(q_row, inside, 0, HALF)
    q1 = _columns(q_row, inside, HALF, HALF)
    q_rope = _columns(q_row, inside, D_LATENT, D_ROPE)

    top = tl.full((BLOCK_H,), -1e30, tl.float32)  # finite: no inf - inf where nothing was seen
    mass = tl.zeros((BLOCK_H,), tl.float32)
    total0 = tl.zeros((BLOCK_H, HALF), tl.float32)
    total1 = tl.zeros((BLOCK_H, HALF), tl.float32)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=not HOIST):
        token, present, kv_row = _tile(
            kv_cache, block_table + sequence * max_pages, start, end, pages, page_stride, ROW_STRIDE, PAGE_SIZE, BLOCK_N
        )
        kv0 = _columns(kv_row, present, 0, HALF)
        kv1 = _columns(kv_row, present, HALF, HALF)
        k_rope = _columns(kv_row, present, D_LATENT, D_ROPE)

        score = _scores(q0, kv0, start, end)
        score += _scores(q1, kv1, start, end)
        score += _scores(q_rope, k_rope, start, end)
        visible = present[None, :] & (token[None, :] < end_of_row[:, None])
        weight, shrink, top, mass = _softmax(score, visible, scale, top, mass)
        weight = narrow(weight, DTYPE)
        total0 = dot(weight, kv0, total0 * shrink)
        total1 = dot(weight, kv1, total1 * shrink)

    factor, out_row = _finish(top, mass, sink, lse, part, row, s_q, h_q, SINK, SPLIT)
    OUT: tl.constexpr = out.dtype.element_ty
    target = out + out_row[:, None] * D_LATENT + tl.arange(0, HALF)[None, :]
    tl.store(target, narrow(total0 * factor, OUT), mask=inside[:, None])
    tl.store(target + HALF, narrow(total1 * factor, OUT), mask=inside[:, None])


# Four e4m3 to two registers of two bf16 or fp16.
_E4M3_TO_BF16 = tl.constexpr("""{
    .reg .b16 low, high, x, y;
    .reg .b32 pair;
    .reg .f32 wide_x, wide_y;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 pair, low;
    mov.b32 {x, y}, pair;
    cvt.f32.f16 wide_x, x;
    cvt.f32.f16 wide_y, y;
    cvt.rn.bf16x2.f32 $0, wide_y, wide_x;
    cvt.rn.f16x2.e4m3x2 pair, high;
    mov.b32 {x, y}, pair;
    cvt.f32.f16 wide_x, x;
    cvt.f32.f16 wide_y, y;
    cvt.rn.bf16x2.f32 $1, wide_y, wide_x;
}""")
_E4M3_TO_FP16 = tl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")


@triton.jit
def _widen(bits, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """e4m3 as uint8 -> bf16 or fp16, which hold every e4m3: nothing is rounded.

    By assembly that says it has side effects: Triton would load the bytes in the layouts of both products, convert
    them twice and read the values one byte at a time; past this it cannot reach, and pipelines 16-byte loads.
    """
    if NATIVE and not INTERPRETED:
        if DTYPE.is_bf16():
            return tl.inline_asm_elementwise(_E4M3_TO_BF16, "=r,=r,r", [bits], dtype=tl.bfloat16, is_pure=False, pack=4)
        else:
            return tl.inline_asm_elementwise(_E4M3_TO_FP16, "=r,=r,r", [bits], dtype=tl.float16, is_pure=False, pack=4)
    else:
        value = e4m3_decode(bits).to(DTYPE)
        if not INTERPRETED:
            value = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=2
            )
        return value


@triton.jit
def _fp8_columns(row, present, FIRST: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """128 columns of FP8 rows, not yet scaled, and their scales."""
    value = _widen(_columns(row, present, FIRST, 128), NATIVE, DTYPE)
    scales = (row + 512).to(tl.pointer_type(tl.float32), bitcast=True)
    return value, tl.load(scales + FIRST // 128, mask=present, other=0.0)[None, :]


@triton.jit
def _add_fp8(total, weight, value):
    """total + weight @ value. Scales make weights that may be too small for fp16; they are bf16 then."""
    if value.dtype == tl.float16:
        value = value.to(tl.bfloat16)
    return dot(narrow(weight, value.dtype), value, total)


@triton.jit(do_not_specialize=["s_q", "num_splits", "causal"])  # with constants for them it spills
def _attend_fp8(
    q, kv_cache, block_table, seqlens_kv, sink, out, lse, scale, s_q, h_q, pages, max_pages, capacity, num_splits,
    causal, q_stride_b, q_stride_s, q_stride_h, page_stride,
    ROW_STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    SINK: tl.constexpr, SPLIT: tl.constexpr, HOIST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    sequence, part, row, end_of_row, begin, end = _share(
        seqlens_kv, s_q, h_q, capacity, num_splits, causal, BLOCK_H, BLOCK_N
    )
    inside = row < s_q * h_q
    q_row = q + sequence * q_stride_b + (row // h_q).to(tl.int64) * q_stride_s + (row % h_q).to(tl.int64) * q_stride_h
    q0 = _columns(q_row, inside, 0, 128)
    q1 = _columns(q_row, inside, 128, 128)
    q2 = _columns(q_row, inside, 256, 128)
    q3 = _columns(q_row, inside, 384, 128)
    q_rope = _columns(q_row, inside, 512, 64)

    top = tl.full((BLOCK_H,), -1e30, tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    total0 = tl.zeros((BLOCK_H, 128), tl.float32)
    total1 = tl.zeros((BLOCK_H, 128), tl.float32)
    total2 = tl.zeros((BLOCK_H, 128), tl.float32)
    total3 = tl.zeros((BLOCK_H, 128), tl.float32)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=not HOIST):
        token, present, kv_row = _tile(
            kv_cache, block_table + sequence * max_pages, start, end, pages, page_stride, ROW_STRIDE, PAGE_SIZE, BLOCK_N
        )
        kv0, scale0 = _fp8_columns(kv_row, present, 0, NATIVE, DTYPE)
        kv1, scale1 = _fp8_columns(kv_row, present, 128, NATIVE, DTYPE)
        kv2, scale2 = _fp8_columns(kv_row, present, 256, NATIVE, DTYPE)
        kv3, scale3 = _fp8_columns(kv_row, present, 384, NATIVE, DTYPE)
        k_rope = _columns((kv_row + 528).to(tl.pointer_type(tl.bfloat16), bitcast=True), present, 0, 64).to(DTYPE)

        score = _scores(q_rope, k_rope, start, end)
        score += _scores(q0, kv0, start, end) * scale0
        score += _scores(q1, kv1, start, end) * scale1
        score += _scores(q2, kv2, start, end) * scale2
        score += _scores(q3, kv3, start, end) * scale3
        visible = present[None, :] & (token[None, :] < end_of_row[:, None])
        weight, shrink, top, mass = _softmax(score, visible, scale, top, mass)
        total0 = _add_fp8(total0 * shrink, weight * scale0, kv0)
        total1 = _add_fp8(total1 * shrink, weight * scale1, kv1)
        total2 = _add_fp8(total2 * shrink, weight * scale2, kv2)
        total3 = _add_fp8(total3 * shrink, weight * scale3, kv3)

    factor, out_row = _finish(top, mass, sink, lse, part, row, s_q, h_q, SINK, SPLIT)
    OUT: tl.constexpr = out.dtype.element_ty
    target = out + out_row[:, None] * 512 + tl.arange(0, 128)[None, :]
    tl.store(target, narrow(total0 * factor, OUT), mask=inside[:, None])
    tl.store(target + 128, narrow(total1 * factor, OUT), mask=inside[:, None])
    tl.store(target + 256, narrow(total2 * factor, OUT), mask=inside[:, None])
    tl.store(target + 384, narrow(total3 * factor, OUT), mask=inside[:, None])


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
        share = tl.sigmoid(total_lse - tl.load(sink + head))
        total *= tl.where(total_lse == float("-inf"), 0.0, share)
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
    if kv_cache.dtype == torch.uint8:
        kernel, widths = _attend_fp8, dict(NATIVE=config.native_fp8)
    else:
        kernel, widths = _attend, dict(D_LATENT=d_latent, D_ROPE=d_qk - d_latent)
    kernel[(b * config.num_splits * triton.cdiv(s_q * h_q, config.block_h),)](
        q, kv_cache, block_table, seqlens_kv, sink if sink is not None else lse, part_out if split else out,
        part_lse if split else lse, scale, s_q, h_q, pages, block_table.shape[1],
        min(block_table.shape[1] * page_size, 2**30), config.num_splits, int(causal), *q.stride()[:3],
        kv_cache.stride(0), ROW_STRIDE=kv_cache.stride(1), PAGE_SIZE=page_size, BLOCK_H=config.block_h,
        BLOCK_N=config.block_n, SINK=sink is not None and not split, SPLIT=split, **widths, HOIST=config.hoist,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        _combine[(b * s_q * h_q,)](
            part_out, part_lse, sink if sink is not None else lse, out, lse, s_q, h_q, config.num_splits,
            D=d_latent, SINK=sink is not None, num_warps=4,
        )  # fmt: skip
