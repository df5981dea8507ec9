"""d[r, :] = sum over blocks j of 128 of k: scale_a[r, j] * scale_b[e, :, j] * (a[r, j] @ b[e, :, j]^T) for the rows r
of expert e, zero for rows of no expert. Contiguous: the rows of all experts one after the other. Masked: every expert
has m_max places, the first counts[e] are filled, and the others are neither used nor written. The gradient of b,
d[e] = sum over the blocks j of 128 columns of e: scale_grad[:, j] * scale_a[:, j] * (grad_t[:, j] @ a_t[:, j]^T).

Tiling:  as grouped_matmul's forward, with BLOCK_K = 128, one scale block. BLOCK_N divides 128: a tile has one weight
         scale a step. Each step's product is accumulated apart and scaled into the total, which also keeps the tensor
         core's short FP8 accumulator short. Gradient: tiles of BLOCK_M of n by BLOCK_N of k of each expert, its
         blocks in order; every program takes every num_programs-th tile.
Pipeline: Triton's, num_stages operand tiles deep. Without NATIVE the operands are e4m3 in shared memory and become
         bf16, exactly, in registers. TMA and FLATTEN as in fp8_matmul; a descriptor's rows past the end of an expert
         are somebody else's and meet their own sums, which are not stored.
Bytes:   R*k + E*n*k + 4*(R + E*n/128)*k/128 + R*n*2.
         E=8, 4096 rows each, n=4096, k=7168: 1.9 TFLOP and 0.74 GB; 0.97 ms at 1979 TFLOP/s, 0.15 ms at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._schedule import clear_rows, expert_rows, expert_tile, filled_rows, grouped_tile, pick
from .common import dot, e4m3_decode, narrow


@triton.jit
def _forward(
    a, scale_a, b, scale_b, rows_of, d, num_rows, n8, k, num_experts,
    a_stride_e, a_stride_m, scale_a_stride_e, scale_a_stride_m, scale_a_stride_k, b_stride_e, b_stride_n,
    scale_b_stride_e, scale_b_stride_n, scale_b_stride_k,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    WHOLE_K: tl.constexpr, NATIVE: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    BLOCK_K: tl.constexpr = 128
    n = n8 * 8  # so that the compiler knows that rows of d hold whole vectors
    if MASKED:
        first, end = filled_rows(rows_of, num_experts, num_rows, EXPERTS)
    else:
        first, end = expert_rows(rows_of, num_experts, num_rows, EXPERTS)
    n_tiles = tl.cdiv(n, BLOCK_N)
    tiles = tl.sum(tl.cdiv(end - first, BLOCK_M), 0) * n_tiles
    depth = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        group, row, row_end, n_tile = expert_tile(tile, first, end, n_tiles, EXPERTS, BLOCK_M, GROUP_M)
        expert = group.to(tl.int64)
        rows = row + tl.arange(0, BLOCK_M)
        columns = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_inside = rows < row_end
        column_inside = (columns < n)[None, :]
        if not TMA:
            a_tile = a + expert * a_stride_e + rows.to(tl.int64)[:, None] * a_stride_m + depth[None, :]
            b_tile = b + expert * b_stride_e + columns.to(tl.int64)[None, :] * b_stride_n + depth[:, None]
        scale_a_tile = scale_a + expert * scale_a_stride_e + rows.to(tl.int64) * scale_a_stride_m
        scale_b_tile = scale_b + expert * scale_b_stride_e + (n_tile * BLOCK_N // 128).to(tl.int64) * scale_b_stride_n
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            if TMA:
                x = a.load([group if MASKED else 0, row, start]).reshape(BLOCK_M, BLOCK_K)
                w = tl.trans(b.load([group, n_tile * BLOCK_N, start]).reshape(BLOCK_N, BLOCK_K))
            elif WHOLE_K:
                x = tl.load(a_tile, mask=row_inside[:, None], other=0.0)
                w = tl.load(b_tile, mask=column_inside, other=0.0)
            else:
                x = tl.load(a_tile, mask=row_inside[:, None] & (depth < k - start)[None, :], other=0.0)
                w = tl.load(b_tile, mask=column_inside & (depth < k - start)[:, None], other=0.0)
            if not NATIVE:
                x = e4m3_decode(x).to(tl.bfloat16)
                w = e4m3_decode(w).to(tl.bfloat16)
            scale = tl.load(scale_a_tile, mask=row_inside, other=0.0) * tl.load(scale_b_tile)
            total += dot(x, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale[:, None]
            if not TMA:
                a_tile += BLOCK_K
                b_tile += BLOCK_K
            scale_a_tile += scale_a_stride_k
            scale_b_tile += scale_b_stride_k
        d_tile = d + rows.to(tl.int64)[:, None] * n + columns[None, :]
        if MASKED:
            d_tile += expert * num_rows * n
        tl.store(d_tile, narrow(total, d.dtype.element_ty), mask=row_inside[:, None] & column_inside)
    if not MASKED:
        clear_rows(d, 0, tl.min(first, 0), n, BLOCK_M, BLOCK_N)
        clear_rows(d, tl.max(end, 0), num_rows, n, BLOCK_M, BLOCK_N)


def _launch(config, a, scale_a, b, scale_b, rows_of, d, strides: tuple[int, ...], masked: bool) -> None:
    """`strides` of a without its last dimension and of scale_a, each beginning with that of an expert."""
    num_experts, n, k = b.shape
    num_rows, b_strides = a.shape[-2], b.stride()[:2]
    if not config.native_fp8:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    if config.tma:
        a = TensorDescriptor.from_tensor(a if masked else a[None], [1, config.block_m, 128])
        b = TensorDescriptor.from_tensor(b, [1, config.block_n, 128])
    _forward[(config.num_programs,)](
        a, scale_a, b, scale_b, rows_of, d, num_rows, n // 8, k, num_experts,
        *strides, *b_strides, *scale_b.stride(),
        EXPERTS=triton.next_power_of_2(max(num_experts, 1)), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        GROUP_M=config.group_m, WHOLE_K=k % 128 == 0, NATIVE=config.native_fp8, MASKED=masked,
        TMA=config.tma, FLATTEN=config.flatten,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def fp8_grouped_matmul(config, a, scale_a, b, scale_b, expert_offsets, d) -> None:
    """a [R, k] and b [E, n, k] e4m3 with contiguous last dimensions, and with config.tma all other strides and
    addresses multiples of 16 bytes; scales of any strides, d [R, n] contiguous."""
    strides = (0, a.stride(0), 0, *scale_a.stride())
    _launch(config, a, scale_a, b, scale_b, expert_offsets, d, strides, False)


def fp8_grouped_matmul_masked(config, a, scale_a, b, scale_b, counts, d) -> None:
    """a [E, m_max, k] and b [E, n, k] e4m3 as above, scales of any strides, d [E, m_max, n] contiguous."""
    strides = (a.stride(0), a.stride(1), *scale_a.stride())
    _launch(config, a, scale_a, b, scale_b, counts, d, strides, True)


@triton.jit
def _wgrad(
    grad_t, scale_grad, a_t, scale_a, expert_offsets, d, num_columns, n, k8, num_experts,
    grad_stride, scale_grad_stride_n, scale_grad_stride_c, a_stride, scale_a_stride_k, scale_a_stride_c,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    ACCUMULATE: tl.constexpr, NATIVE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    BLOCK_K: tl.constexpr = 128
    k = k8 * 8  # so that the compiler knows that rows of d hold whole vectors
    num_blocks = num_columns // BLOCK_K
    first, end = expert_rows(expert_offsets, num_experts, num_columns, EXPERTS)
    own = tl.cdiv(end - first, BLOCK_K)
    end_block = tl.cumsum(own, 0)
    first_block = tl.minimum(end_block - own, num_blocks)
    end_block = tl.minimum(end_block, num_blocks)
    n_tiles = tl.cdiv(n, BLOCK_M)
    k_tiles = tl.cdiv(k, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_experts * n_tiles * k_tiles, tl.num_programs(0)):
        expert = tile // (n_tiles * k_tiles)
        n_tile, k_tile = grouped_tile(tile % (n_tiles * k_tiles), n_tiles, k_tiles, GROUP_M)
        rows = n_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = k_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(rows, n - 1).to(tl.int64)  # what lies outside reads the last row again and is not stored
        column = tl.minimum(columns, k - 1).to(tl.int64)
        if not TMA:
            grad_tile = grad_t + row[:, None] * grad_stride + depth[None, :]
            a_tile = a_t + column[:, None] * a_stride + depth[None, :]
        scale_grad_tile = scale_grad + row * scale_grad_stride_n
        scale_a_tile = scale_a + column * scale_a_stride_k
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(pick(first_block, expert, EXPERTS), pick(end_block, expert, EXPERTS)):
            if TMA:
                g = grad_t.load([n_tile * BLOCK_M, block * BLOCK_K])
                x = a_t.load([k_tile * BLOCK_N, block * BLOCK_K])
            block = tl.cast(block, tl.int64)
            if not TMA:
                g = tl.load(grad_tile + block * BLOCK_K)
                x = tl.load(a_tile + block * BLOCK_K)
            if not NATIVE:
                g = e4m3_decode(g).to(tl.bfloat16)
                x = e4m3_decode(x).to(tl.bfloat16)
            row_scale = tl.load(scale_grad_tile + block * scale_grad_stride_c)
            column_scale = tl.load(scale_a_tile + block * scale_a_stride_c)
            product = dot(g, tl.trans(x), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            total += product * row_scale[:, None] * column_scale[None, :]
        d_tile = d + expert.to(tl.int64) * n * k + rows.to(tl.int64)[:, None] * k + columns[None, :]
        inside = (rows < n)[:, None] & (columns < k)[None, :]
        if ACCUMULATE:
            total += tl.load(d_tile, mask=inside, other=0.0)
        tl.store(d_tile, total, mask=inside)


def fp8_grouped_matmul_wgrad(config, accumulate: bool, grad_t, scale_grad, a_t, scale_a, expert_offsets, d) -> None:
    """grad_t [n, C] and a_t [k, C] e4m3 as above, C a multiple of 128, scales of any strides, d fp32 [E, n, k]
    contiguous, k a multiple of 8."""
    num_experts, n, k = d.shape
    if not config.native_fp8:
        grad_t, a_t = grad_t.view(torch.uint8), a_t.view(torch.uint8)
    num_columns, grad_stride, a_stride = grad_t.shape[1], grad_t.stride(0), a_t.stride(0)
    if config.tma:
        grad_t = TensorDescriptor.from_tensor(grad_t, [config.block_m, 128])
        a_t = TensorDescriptor.from_tensor(a_t, [config.block_n, 128])
    _wgrad[(config.num_programs,)](
        grad_t, scale_grad, a_t, scale_a, expert_offsets, d, num_columns, n, k // 8, num_experts,
        grad_stride, *scale_grad.stride(), a_stride, *scale_a.stride(),
        EXPERTS=triton.next_power_of_2(max(num_experts, 1)), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        GROUP_M=config.group_m, ACCUMULATE=accumulate, NATIVE=config.native_fp8, TMA=config.tma,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
