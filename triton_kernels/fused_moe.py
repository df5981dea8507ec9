"""out[t, :] = sum_k weights[t, k] * W_down[e] (silu(W_gate[e] x[t]) * W_up[e] x[t]), e = indices[t, k], for a few
tokens: no sort, no rows moved, two launches. Every entry reads its expert's weights, which is all the work there is.

Tiling:  _activate: program (entry, j) computes ROWS values of h = weight * silu(gate) * up, from the same rows of both
         halves of w_gate_up. _down: program (t, j) computes ROWS values of out[t, :], over all k.
         Products pile up in a ROWS x COLUMNS tile of registers and are summed along the row once, at the end.
FP8:     x and h are rounded to e4m3 with 1x128 scales where they are read, COLUMNS = 128 at a time; weights are
         converted to fp32. The matmuls are of the same operands as on the tensor cores.
Bytes:   3*T*K*H*I*b. V3, T=1, K=8: 0.70 GB in bf16, 150 us at 4.8 TB/s; half of it in FP8.
"""

import torch
import triton
import triton.language as tl

from .common import e4m3_decode, e4m3_encode, fp8_scale, narrow


@triton.jit
def _wide(value, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 of a float, or of e4m3 as uint8."""
    if FP8:
        if NATIVE:
            return value.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            return e4m3_decode(value)
    else:
        return value.to(tl.float32)


@triton.jit
def _round_to_fp8(x, COLUMNS: tl.constexpr, NATIVE: tl.constexpr):
    """x [COLUMNS] quantised as one block, and back."""
    amax = tl.max(tl.reshape(tl.abs(x), (1, COLUMNS)), 1)
    is_nan = tl.max(tl.reshape((x != x).to(tl.int32), (1, COLUMNS)), 1) > 0
    scale = tl.broadcast_to(fp8_scale(amax, is_nan, POW2=False), (COLUMNS,))
    return _wide(e4m3_encode(tl.div_rn(x, scale), NATIVE), True, NATIVE) * scale


@triton.jit
def _weight(
    w, scale, row, column, mask, w_stride, scale_stride_n, scale_stride_k, FP8: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """Weights [ROWS, COLUMNS] in fp32; FP8 times their 128x128 scales (one column of blocks)."""
    value = _wide(tl.load(w + row[:, None] * w_stride + column[None, :], mask=mask, other=0), FP8, NATIVE)
    if FP8:
        of_row = scale + (row // 128) * scale_stride_n + (tl.min(column, 0) // 128) * scale_stride_k
        value *= tl.load(of_row, mask=tl.max(mask.to(tl.int32), 1) > 0, other=0.0)[:, None]
    return value


@triton.jit
def _activate(
    x, w, scale, weights, indices, h, hidden, intermediate, num_experts, expert_begin, clamp,
    x_stride, w_stride_e, w_stride_n, scale_stride_e, scale_stride_n, scale_stride_k,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLAMP: tl.constexpr, FP8: tl.constexpr,
    NATIVE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    expert = tl.load(indices + entry).to(tl.int64)
    is_ours = (expert >= expert_begin) & (expert < expert_begin + num_experts)
    expert = tl.where(is_ours, expert - expert_begin, 0)
    width = tl.where(is_ours, hidden, 0)
    w += expert * w_stride_e
    scale += expert * scale_stride_e
    x += (entry // TOP_K) * x_stride
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < intermediate
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(x + column, mask=column < hidden, other=0.0).to(tl.float32)
        if FP8:
            value = _round_to_fp8(value, COLUMNS, NATIVE)
        mask = inside[:, None] & (column < hidden)[None, :]
        gate += value[None, :] * _weight(
            w, scale, row, column, mask, w_stride_n, scale_stride_n, scale_stride_k, FP8, NATIVE
        )
        up += value[None, :] * _weight(
            w, scale, row + intermediate, column, mask, w_stride_n, scale_stride_n, scale_stride_k, FP8, NATIVE
        )
    g = narrow(tl.sum(gate, 1), KEPT).to(tl.float32)
    u = narrow(tl.sum(up, 1), KEPT).to(tl.float32)
    if CLAMP:
        g = tl.where(g > clamp, clamp, g)
        u = tl.where(u > clamp, clamp, tl.where(u < -clamp, -clamp, u))
    value = tl.div_rn(g, 1.0 + tl.exp(-g)) * u * tl.load(weights + entry)
    tl.store(h + entry * intermediate + row, value, mask=row < tl.where(is_ours, intermediate, 0))


@triton.jit
def _down(
    h, w, scale, indices, out, hidden, intermediate, num_experts, expert_begin,
    w_stride_e, w_stride_n, scale_stride_e, scale_stride_n, scale_stride_k,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < hidden
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(TOP_K):
        entry = token * TOP_K + k
        expert = tl.load(indices + entry).to(tl.int64)
        is_ours = (expert >= expert_begin) & (expert < expert_begin + num_experts)
        expert = tl.where(is_ours, expert - expert_begin, 0)
        for first in range(0, tl.where(is_ours, intermediate, 0), COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            value = tl.load(h + entry * intermediate + column, mask=column < intermediate, other=0.0)
            if FP8:
                value = _round_to_fp8(value, COLUMNS, NATIVE)
            mask = inside[:, None] & (column < intermediate)[None, :]
            total += value[None, :] * _weight(
                w + expert * w_stride_e, scale + expert * scale_stride_e, row, column, mask,
                w_stride_n, scale_stride_n, scale_stride_k, FP8, NATIVE,
            )  # fmt: skip
    tl.store(out + token * hidden + row, narrow(tl.sum(total, 1), out.dtype.element_ty), mask=inside)


_KEPT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def decode(
    config, x, w_gate_up, w_down, weights, indices, scale_gate_up, scale_down, clamp, expert_begin, kept, h, out
) -> None:  # fmt: skip
    """out [T, H] of x [T, H]; h fp32 [T * K, I] is scratch. gate_up is rounded to the dtype `kept` on the way."""
    (num_tokens, hidden), top_k, intermediate = x.shape, indices.shape[1], h.shape[1]
    is_fp8 = scale_gate_up is not None
    if is_fp8:
        w_gate_up, w_down = w_gate_up.view(torch.uint8), w_down.view(torch.uint8)
    tile = dict(
        TOP_K=top_k, ROWS=config.rows, COLUMNS=config.columns, FP8=is_fp8, NATIVE=config.native_fp8,
        num_warps=config.num_warps,
    )  # fmt: skip
    scale, strides = (scale_gate_up, scale_gate_up.stride()) if is_fp8 else (weights, (0, 0, 0))
    _activate[(num_tokens * top_k, triton.cdiv(intermediate, config.rows))](
        x, w_gate_up, scale, weights, indices, h, hidden, intermediate, w_down.shape[0], expert_begin,
        clamp if clamp is not None else 0.0, x.stride(0), w_gate_up.stride(0), w_gate_up.stride(1), *strides,
        CLAMP=clamp is not None, KEPT=_KEPT[kept], **tile,
    )  # fmt: skip
    scale, strides = (scale_down, scale_down.stride()) if is_fp8 else (weights, (0, 0, 0))
    _down[(num_tokens, triton.cdiv(hidden, config.rows))](
        h, w_down, scale, indices, out, hidden, intermediate, w_down.shape[0], expert_begin,
        w_down.stride(0), w_down.stride(1), *strides, **tile,
    )  # fmt: skip
