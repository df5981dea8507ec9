"""q = saturate(x / scale), scale = max(amax, 1e-4) / 448 over each block of x [m, k]; and back, out = q * scale.

Tiling:  one tile of ROWS x COLUMNS per program, k fastest. Quantising, a tile holds whole blocks (1x128: ROWS of
         them, 128x1: COLUMNS of them, 128x128: one), so the amax never leaves the program. Dequantising, it lies
         inside one block along every blocked dimension.
         The maximum is taken over the bits of |x|: as integers they order as the floats do, with NaN on top.
Bytes:   m*k*(b+1) + 4 per block. m=4096 k=7168 bf16: 89 MB, 19 us at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl

from .common import e4m3_decode, e4m3_encode, fp8_scale, narrow


@triton.jit
def _tile(m, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(tile row, tile column, rows [ROWS, 1], columns [1, COLUMNS], inside) of this program."""
    tiles_k = tl.cdiv(k, COLUMNS)
    tile_m = tl.program_id(0) // tiles_k
    tile_k = tl.program_id(0) % tiles_k
    rows = (tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tile_k * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return tile_m, tile_k, rows, columns, (rows < m) & (columns < k)


@triton.jit
def _scale_pointers(
    scale, tile_m, tile_k, m, k, scale_stride_m, scale_stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pointers to the scales of a tile, one per block along each dimension, and which of them exist."""
    rows = (tile_m.to(tl.int64) * ROWS // BLOCK_M + tl.arange(0, (ROWS + BLOCK_M - 1) // BLOCK_M))[:, None]
    columns = (tile_k.to(tl.int64) * COLUMNS // BLOCK_K + tl.arange(0, (COLUMNS + BLOCK_K - 1) // BLOCK_K))[None, :]
    inside = (rows * BLOCK_M < m) & (columns * BLOCK_K < k)
    return scale + rows * scale_stride_m + columns * scale_stride_k, inside


@triton.jit
def _quantize(
    x, q, scale, m, k, x_stride, scale_stride_m, scale_stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    POW2: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k, rows, columns, inside = _tile(m, k, ROWS, COLUMNS)
    value = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    amax = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if BLOCK_K > 1:
        amax = tl.max(amax, 1, keep_dims=True)
    if BLOCK_M > 1:
        amax = tl.max(amax, 0, keep_dims=True)
    block_scale = fp8_scale(amax.to(tl.float32, bitcast=True), amax > 0x7F800000, POW2)
    code = e4m3_encode(tl.div_rn(value, tl.broadcast_to(block_scale, (ROWS, COLUMNS))), NATIVE)
    tl.store(q + rows * k + columns, code, mask=inside)
    pointers, exists = _scale_pointers(
        scale, tile_m, tile_k, m, k, scale_stride_m, scale_stride_k, ROWS, COLUMNS, BLOCK_M, BLOCK_K
    )
    tl.store(pointers, block_scale, mask=exists)


@triton.jit
def _dequantize(
    q, scale, out, m, k, q_stride, scale_stride_m, scale_stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k, rows, columns, inside = _tile(m, k, ROWS, COLUMNS)
    code = tl.load(q + rows * q_stride + columns, mask=inside, other=0)
    pointers, exists = _scale_pointers(
        scale, tile_m, tile_k, m, k, scale_stride_m, scale_stride_k, ROWS, COLUMNS, BLOCK_M, BLOCK_K
    )
    block_scale = tl.load(pointers, mask=exists, other=0.0)
    if NATIVE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = e4m3_decode(code)
    tl.store(out + rows * k + columns, narrow(value * block_scale, out.dtype.element_ty), mask=inside)


def _grid(config, m: int, k: int) -> tuple[int]:
    return (triton.cdiv(m, config.rows) * triton.cdiv(k, config.columns),)


def quantize(config, block_m: int, block_k: int, pow2_scale: bool, x, q, scale) -> None:
    """x [m, k] (rows may be strided) into q e4m3 [m, k] contiguous and scale fp32 of any strides."""
    m, k = x.shape
    _quantize[_grid(config, m, k)](
        x, q.view(torch.uint8), scale, m, k, x.stride(0), *scale.stride(),
        ROWS=config.rows, COLUMNS=config.columns, BLOCK_M=block_m, BLOCK_K=block_k, POW2=pow2_scale,
        NATIVE=config.native_fp8, num_warps=config.num_warps,
    )  # fmt: skip


def dequantize(config, block_m: int, block_k: int, q, scale, out) -> None:
    """q e4m3 [m, k] (rows may be strided) and scale fp32 of any strides into out [m, k] contiguous."""
    m, k = q.shape
    _dequantize[_grid(config, m, k)](
        q.view(torch.uint8), scale, out, m, k, q.stride(0), *scale.stride(),
        ROWS=config.rows, COLUMNS=config.columns, BLOCK_M=block_m, BLOCK_K=block_k, NATIVE=config.native_fp8,
        num_warps=config.num_warps,
    )  # fmt: skip
