"""The compiled extension: raw addresses, sizes, strides in elements and a stream; no torch, no logic.

Every pointer is a device address as `int` (0 where "may be 0"). Matrices are row-major with a unit last stride and a
leading stride `ld*` unless two strides are given. The caller sets the current device, keeps the memory alive until the
stream has passed, and has validated shapes and dtypes: what is checked here raises RuntimeError, everything else is
undefined. No function synchronises or allocates; all may be captured in a CUDA graph. All release the GIL.
"""

from typing import Final

FP32: Final[int]
FP16: Final[int]
BF16: Final[int]
"""Codes of the `*dtype` arguments."""

architectures: tuple[str, ...]
"""What the kernels were compiled for, as in ("80", "90a", "100"); empty without CUDA."""
cuda_version: int
"""CUDART_VERSION of the build, as in 13000; 0 without CUDA."""
ops: tuple[str, ...]
"""The functions below that were compiled in. `fp8_matmul` needs "90a" among the architectures."""

fp8_matmul_instances: tuple[tuple[int, int, int, int, int], ...]
"""What `fp8_matmul` was compiled for: (out_dtype, tile_m, tile_n, stages, cluster). Only there if it is in `ops`."""

def fp8_quantize(
    *,
    x: int,
    q: int,
    scale: int,
    m: int,
    k: int,
    dtype: int,
    block_m: int,
    block_k: int,
    ldx: int,
    ldq: int,
    scale_stride_m: int,
    scale_stride_k: int,
    pow2_scale: bool,
    stream: int,
) -> None:
    """q = saturate_e4m3(x / scale), scale = max(amax, 1e-4) / 448 over each block of x [m, k].

    (block_m, block_k) is (1, 128), (128, 128) or (128, 1); scale [ceil(m/block_m), ceil(k/block_k)] has any two
    strides, so MN-major scales are written directly. `pow2_scale` rounds each scale up to a power of two. A NaN makes
    its block's scale and q NaN (q as 0x7F); an Inf makes the scale Inf, q 0 for finite elements and NaN for infinite.
    Any m, k >= 0 and any alignment; 16-byte aligned rows of x and q are the fast path.
    """

def moe_permute(
    *,
    x: int,
    scale: int,
    token_topk_to_pos: int,
    pos_to_token_topk: int,
    out: int,
    out_scale: int,
    num_tokens: int,
    top_k: int,
    num_rows: int,
    row_bytes: int,
    ldx_bytes: int,
    ld_out_bytes: int,
    scale_columns: int,
    scale_stride_t: int,
    scale_stride_s: int,
    out_scale_stride_r: int,
    out_scale_stride_s: int,
    stream: int,
) -> None:
    """out[token_topk_to_pos[t, k]] = x[t]; rows r of out with pos_to_token_topk[r] == -1 become zero.

    x [num_tokens, row_bytes] and out [num_rows, row_bytes] in bytes; both maps int32 and contiguous. Positions outside
    [0, num_rows) are ignored. scale fp32 [num_tokens, scale_columns] moves along into out_scale [num_rows,
    scale_columns]; both may be 0 with scale_columns 0. Any alignment; 16-byte aligned rows are the fast path.
    """

def moe_permute_quantize(
    *,
    x: int,
    token_topk_to_pos: int,
    pos_to_token_topk: int,
    out: int,
    out_scale: int,
    num_tokens: int,
    top_k: int,
    num_rows: int,
    hidden: int,
    dtype: int,
    ldx: int,
    ld_out: int,
    out_scale_stride_r: int,
    out_scale_stride_s: int,
    pow2_scale: bool,
    stream: int,
) -> None:
    """moe_permute of fp8_quantize(x, 1x128) in one pass, bit for bit.

    x [num_tokens, hidden] of `dtype`, out e4m3 [num_rows, hidden], out_scale fp32 [num_rows, ceil(hidden/128)].
    """

def moe_unpermute(
    *,
    y: int,
    token_topk_to_pos: int,
    weights: int,
    out: int,
    num_tokens: int,
    top_k: int,
    num_rows: int,
    hidden: int,
    dtype: int,
    ldy: int,
    ld_out: int,
    stream: int,
) -> None:
    """out[t] = sum over k in order of weights[t, k] * y[token_topk_to_pos[t, k]], fused multiply-adds in fp32.

    y [num_rows, hidden] and out [num_tokens, hidden] of `dtype`; weights fp32 [num_tokens, top_k] contiguous, may be 0
    (then a plain sum). Positions outside [0, num_rows) add nothing.
    """

def fp8_matmul(
    *,
    a: int,
    scale_a: int,
    b: int,
    scale_b: int,
    bias: int,
    d: int,
    m: int,
    n: int,
    k: int,
    lda: int,
    ldb: int,
    ldd: int,
    scale_a_stride_m: int,
    scale_a_stride_k: int,
    scale_b_stride_n: int,
    scale_b_stride_k: int,
    out_dtype: int,
    bias_dtype: int,
    tile_m: int,
    tile_n: int,
    stages: int,
    cluster: int,
    raster: int,
    ctas: int,
    stream: int,
) -> None:
    """d[m, n] = sum over 128-wide blocks kb of scale_a[m, kb] * scale_b[n/128, kb] * (a[m, k] @ b[n, k]^T) + bias[n].

    a, b e4m3; scale_a [m, ceil(k/128)] and scale_b [ceil(n/128), ceil(k/128)] fp32 with any two strides; d of
    `out_dtype` BF16 or FP32; bias of `bias_dtype` BF16 or FP32, may be 0. sm_90a only.
    Needs a, b, d 16-byte aligned, lda % 16 == 0, ldb % 16 == 0, ldd * itemsize % 16 == 0, k % 16 == 0, n % 8 == 0.
    Anything not among `fp8_matmul_instances` raises. `ctas` CTAs run, a multiple of `cluster`; a cluster of 2 takes two
    tiles along m and shares b. `raster` >= 1: that many rows of clusters are walked before the next column of tiles, so
    that their operands stay in L2.
    """
