"""d[r, :] = a[r, :] @ b[e]^T for the rows r of expert e, zero for rows of no expert; and the gradient of b,
d[e] = sum over the rows r of expert e of grad[r, :]^T a[r, :].

Tiling:  persistent: every program takes every num_programs-th tile. Forward: tiles of BLOCK_M rows of one expert by
         BLOCK_N columns, found from the offsets on the device (_schedule.py), so that rows need no padding and the host
         no counts; GROUP_M row tiles share a weight tile before the walk goes on. Gradient: tiles of BLOCK_N by BLOCK_K
         of each expert, the rows in steps of BLOCK_M, always in order.
Pipeline: Triton's, num_stages operand tiles deep. TMA and FLATTEN as in fp8_matmul, with b read along its contiguous
         dimension; a descriptor's rows past the end of an expert are somebody else's and meet their own sums, which are
         not stored.
Bytes:   forward (R*k + E*n*k + R*n)*b, gradient R*(n+k)*b + E*n*k*b.
         E=8, 4096 rows each, n=4096, k=7168, bf16: 1.9 TFLOP and 1.2 GB; 1.9 ms at 989 TFLOP/s, 0.25 ms at 4.8 TB/s.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._schedule import clear_rows, expert_rows, expert_tile, grouped_tile, pick
from .common import dot, narrow


@triton.jit
def _forward(
    a, b, expert_offsets, d, num_rows, n, k, num_experts, a_stride, b_stride_e, b_stride_n, b_stride_k,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WHOLE_K: tl.constexpr, TMA: tl.constexpr, K_MAJOR: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    first, end = expert_rows(expert_offsets, num_experts, num_rows, EXPERTS)
    n_tiles = tl.cdiv(n, BLOCK_N)
    tiles = tl.sum(tl.cdiv(end - first, BLOCK_M), 0) * n_tiles
    depth = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row, row_end, n_tile = expert_tile(tile, first, end, n_tiles, EXPERTS, BLOCK_M, GROUP_M)
        rows = row + tl.arange(0, BLOCK_M)
        columns = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_inside = (rows < row_end)[:, None]
        column_inside = (columns < n)[None, :]
        if not TMA:
            a_tile = a + rows.to(tl.int64)[:, None] * a_stride + depth[None, :]
            b_tile = b + expert.to(tl.int64) * b_stride_e + depth.to(tl.int64)[:, None] * b_stride_k
            b_tile += columns.to(tl.int64)[None, :] * b_stride_n
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            if TMA:
                x = a.load([row, start])
                if K_MAJOR:
                    w = tl.trans(b.load([expert, n_tile * BLOCK_N, start]).reshape(BLOCK_N, BLOCK_K))
                else:
                    w = b.load([expert, start, n_tile * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            elif WHOLE_K:
                x = tl.load(a_tile, mask=row_inside, other=0.0)
                w = tl.load(b_tile, mask=column_inside, other=0.0)
            else:
                x = tl.load(a_tile, mask=row_inside & (depth < k - start)[None, :], other=0.0)
                w = tl.load(b_tile, mask=column_inside & (depth < k - start)[:, None], other=0.0)
            total = dot(x, w, total)
            if not TMA:
                a_tile += BLOCK_K
                b_tile += BLOCK_K * b_stride_k
        d_tile = d + rows.to(tl.int64)[:, None] * n + columns[None, :]
        tl.store(d_tile, narrow(total, d.dtype.element_ty), mask=row_inside & column_inside)
    clear_rows(d, 0, tl.min(first, 0), n, BLOCK_M, BLOCK_N)
    clear_rows(d, tl.max(end, 0), num_rows, n, BLOCK_M, BLOCK_N)


@triton.jit
def _wgrad(
    grad, a, expert_offsets, d, num_rows, n, k, num_experts, grad_stride, a_stride,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    first, end = expert_rows(expert_offsets, num_experts, num_rows, EXPERTS)
    n_tiles = tl.cdiv(n, BLOCK_N)
    k_tiles = tl.cdiv(k, BLOCK_K)
    step = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), num_experts * n_tiles * k_tiles, tl.num_programs(0)):
        expert = tile // (n_tiles * k_tiles)
        n_tile, k_tile = grouped_tile(tile % (n_tiles * k_tiles), n_tiles, k_tiles, GROUP_M)
        columns = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
        row_end = pick(end, expert, EXPERTS)
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for row in range(pick(first, expert, EXPERTS), row_end, BLOCK_M):
            rows = (row + step).to(tl.int64)[:, None]
            inside = rows < row_end
            g = tl.load(grad + rows * grad_stride + columns[None, :], mask=inside & (columns < n)[None, :], other=0.0)
            x = tl.load(a + rows * a_stride + depth[None, :], mask=inside & (depth < k)[None, :], other=0.0)
            total = dot(tl.trans(g), x, total)
        d_tile = d + expert.to(tl.int64) * n * k + columns.to(tl.int64)[:, None] * k + depth[None, :]
        tl.store(d_tile, narrow(total, d.dtype.element_ty), mask=(columns < n)[:, None] & (depth < k)[None, :])


def grouped_matmul(config, a, b, expert_offsets, d) -> None:
    """a [R, k] with contiguous columns, b [E, n, k] of any strides, d [R, n] contiguous. With config.tma one of the
    last two dimensions of b is contiguous, and all other strides and addresses are multiples of 16 bytes."""
    (num_rows, a_stride), (num_experts, n, k), b_strides = (a.shape[0], a.stride(0)), b.shape, b.stride()
    k_major = b.stride(2) == 1
    if config.tma:
        a = TensorDescriptor.from_tensor(a, [config.block_m, config.block_k])
        if k_major:
            b = TensorDescriptor.from_tensor(b, [1, config.block_n, config.block_k])
        else:
            b = TensorDescriptor.from_tensor(b.mT, [1, config.block_k, config.block_n])
    _forward[(config.num_programs,)](
        a, b, expert_offsets, d, num_rows, n, k, num_experts, a_stride, *b_strides,
        EXPERTS=triton.next_power_of_2(max(num_experts, 1)), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, GROUP_M=config.group_m, WHOLE_K=k % config.block_k == 0,
        TMA=config.tma, K_MAJOR=k_major, FLATTEN=config.flatten,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def grouped_matmul_wgrad(config, grad, a, expert_offsets, d) -> None:
    """grad [R, n] and a [R, k] with contiguous columns, d [E, n, k] contiguous."""
    num_experts, n, k = d.shape
    _wgrad[(config.num_programs,)](
        grad, a, expert_offsets, d, a.shape[0], n, k, num_experts, grad.stride(0), a.stride(0),
        EXPERTS=triton.next_power_of_2(max(num_experts, 1)), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, GROUP_M=config.group_m, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
