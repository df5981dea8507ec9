"""Which tile comes next, when only the device knows how many rows each expert has."""

import triton
import triton.language as tl


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def expert_rows(expert_offsets, num_experts, num_rows, EXPERTS: tl.constexpr):
    """(first, end), each int32 [EXPERTS]: the rows of each expert, none for lanes past the last expert.

    Offsets are clamped to [0, num_rows] and raised where they decrease, so that no row has two experts and no address
    is out of bounds whatever the offsets hold.
    """
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    first = tl.load(expert_offsets + expert, mask=inside, other=0)
    end = tl.load(expert_offsets + expert + 1, mask=inside, other=0)
    first = tl.associative_scan(tl.minimum(tl.maximum(first, 0), num_rows), 0, _larger)
    return first, tl.maximum(first, tl.minimum(tl.maximum(end, 0), num_rows))


@triton.jit
def filled_rows(counts, num_experts, m_max, EXPERTS: tl.constexpr):
    """(first, end), each int32 [EXPERTS], where the rows of every expert are counted from 0; clamped to [0, m_max]."""
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < num_experts, other=0)
    return tl.zeros_like(count), tl.minimum(tl.maximum(count, 0), m_max)


@triton.jit
def pick(values, lane, LANES: tl.constexpr):
    """values[lane]."""
    return tl.sum(tl.where(tl.arange(0, LANES) == lane, values, 0), 0)


@triton.jit
def grouped_tile(local, m_tiles, n_tiles, group_m):
    """(m tile, n tile) of the `local`-th tile: `group_m` row tiles at a time walk all columns, row tiles first."""
    group = local // (group_m * n_tiles)
    height = tl.minimum(m_tiles - group * group_m, group_m)
    rest = local % (group_m * n_tiles)
    return group * group_m + rest % height, rest // height


@triton.jit
def expert_tile(tile, first, end, n_tiles, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(expert, row the tile starts with, row the expert ends before, n tile) of the `tile`-th tile of all experts."""
    tile_end = tl.cumsum(tl.cdiv(end - first, BLOCK_M), 0) * n_tiles
    done = tile_end <= tile
    expert = tl.sum(done.to(tl.int32), 0)
    local = tile - tl.max(tl.where(done, tile_end, 0), 0)
    expert_first = pick(first, expert, EXPERTS)
    expert_end = pick(end, expert, EXPERTS)
    m_tile, n_tile = grouped_tile(local, tl.cdiv(expert_end - expert_first, BLOCK_M), n_tiles, GROUP_M)
    return expert, expert_first + m_tile * BLOCK_M, expert_end, n_tile


@triton.jit
def clear_rows(d, begin, end, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zero into rows [begin, end) of the contiguous d [*, n], shared among all programs."""
    n_tiles = tl.cdiv(n, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(end - begin, BLOCK_M) * n_tiles, tl.num_programs(0)):
        rows = begin + tile // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        zero = tl.zeros((BLOCK_M, BLOCK_N), d.dtype.element_ty)
        mask = (rows < end)[:, None] & (columns < n)[None, :]
        tl.store(d + rows.to(tl.int64)[:, None] * n + columns[None, :], zero, mask=mask)
