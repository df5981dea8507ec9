"""The tiles of csrc/common/fp8_sm90.cuh: what they are made of, and how long they take."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from ..device import DeviceSpec
from ..shapes import BLOCK, ceil_div

SHARED_MEMORY = 232_448
MAX_STAGES = 24
GROUP_ROWS = 64
"""Rows of a wgmma. Two warpgroups share the rows of a tile that has more, and the steps of one that has not."""

# Fitted to 59 problems that an H200 ran with every tile (benchmarks/results/nvidia-h200): the tile that is chosen takes
# 1 % longer than the fastest, 11 % at worst, and the time itself is off by 13 % (rms).
START = 2.5e-6  # seconds of a launch
L2_BYTES_PER_SM = 110e9  # per second
MEMORY_LATENCY = 1e-6  # seconds from a load to its data, under traffic
STEP_LATENCY = 2e-7  # seconds that a warpgroup waits for its own wgmma
ONE_PRODUCT = 1.06  # times the math where a warpgroup cannot multiply while it scales
PEER_LATENCY = 4e-8  # seconds a step that the CTAs of a cluster wait for each other
SHARE_LATENCY = 1e-7  # for the CTAs that share out k to add up what they have
FINISH = 9e-7  # seconds from the last product of a tile to the next tile's first, and
FINISH_ELEMENT = 2.5e-11  # for each element of the tile


@dataclass(frozen=True)
class Tile:
    """A compiled instance. A cluster has rows of b in common along m, rows of a along n, and shares out a tile along k;
    two of the three are 1. `swap`: the weights take the side of wgmma that has 64 rows, and the tokens the one that may
    have 8."""

    tile_m: int
    tile_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    swap: bool = False
    cluster_k: int = 1

    @property
    def cluster(self) -> int:
        return self.cluster_m * self.cluster_n * self.cluster_k

    @property
    def rows(self) -> int:
        return self.tile_n if self.swap else self.tile_m

    @property
    def columns(self) -> int:
        return self.tile_m if self.swap else self.tile_n


def stages(t: Tile, out_bytes: int, reserved: int = 0) -> int:
    """Of 128 along k, that fit beside the staged result and `reserved` bytes."""
    scales = 32 * ceil_div(t.tile_m, 32)
    halves = t.tile_m * t.tile_n * 4 * t.cluster_k if t.rows == GROUP_ROWS else 0
    room = SHARED_MEMORY - reserved - t.tile_m * t.tile_n * out_bytes - halves - 144
    return min(room // ((t.tile_m + t.tile_n) * BLOCK + 4 * scales + 16), MAX_STAGES)


def raster(t: Tile, m: int, device: DeviceSpec) -> int:
    """Rows of clusters to walk together, see `group_of`."""
    rows = ceil_div(m, t.tile_m * t.cluster_m)
    return group_of(rows, t.tile_m * t.cluster_m, t.tile_n * t.cluster_n, device.num_sms // t.cluster)


def group_of(tiles_m: int, block_m: int, block_n: int, concurrent: int) -> int:
    """Rows of tiles to walk together so that the tiles that run at the same time touch the fewest rows of a and b: a
    power of two near the square root, and no more than there are."""
    group = 1
    while group < tiles_m and 2 * group <= 1.5 * sqrt(concurrent * block_n / block_m):
        group *= 2
    return group


def clusters(t: Tile, group_rows: Sequence[int], n: int) -> int:
    """Of the tiles of every group of rows."""
    rows = sum(ceil_div(m, t.tile_m * t.cluster_m) for m in group_rows)
    return rows * ceil_div(n, t.tile_n * t.cluster_n)


def resident_clusters(t: Tile, device: DeviceSpec) -> int:
    """That run at the same time. A cluster lies within a GPC, of which an H100 or H200 has eight of 16 or 18 SMs."""
    sms = device.num_sms if t.cluster <= 2 else device.num_sms - device.num_sms % 16
    return max(1, sms // t.cluster)


def ctas(t: Tile, clusters: int, device: DeviceSpec) -> int:
    """To start: those that run at the same time, or as many as there is work for."""
    return max(1, min(clusters, resident_clusters(t, device))) * t.cluster


def seconds(
    t: Tile, clusters: int, m: int, k: int, out_bytes: int, traffic: int, device: DeviceSpec, reserved: int = 0
) -> float:
    """Waves of tiles, each as long as the slower of its math and its reads, and never less than the `traffic` of the
    whole problem; the first load and the last store overlap with nothing. `m`: rows of a that a tile may find."""
    waves = ceil_div(clusters, resident_clusters(t, device))
    finish = FINISH + FINISH_ELEMENT * t.tile_m * t.tile_n
    main = max(ceil_div(ceil_div(k, BLOCK), t.cluster_k), 1) * _step(t, m, stages(t, out_bytes, reserved), device)
    busy = waves * main + (waves - 1) * finish
    shared = SHARE_LATENCY * (t.cluster_k > 1)
    return START + MEMORY_LATENCY + overlap(busy, traffic / device.bandwidth) + finish + shared


def _step(t: Tile, m: int, stages: int, device: DeviceSpec) -> float:
    """Seconds of one block of k."""
    rate, fma = device.rate("fp8") / device.num_sms, device.rate("fp32") / 2 / device.num_sms
    # a wgmma reads its 64 rows of x and all of y from shared memory, which takes longer than the math of few columns
    math = 2 * t.rows * t.columns * BLOCK / rate * max(1.0, (GROUP_ROWS + t.columns) / (2 * t.columns))
    promotion = t.rows * t.columns / fma
    alone = math + promotion + STEP_LATENCY  # of a warpgroup with a step to itself, while the other has the next one
    math = max(math, promotion if t.rows > GROUP_ROWS else alone / 2)
    math *= ONE_PRODUCT if t.columns > BLOCK else 1.0
    loaded = (min(t.tile_m, m) / t.cluster_n + t.tile_n / t.cluster_m) * BLOCK
    read = max(loaded / L2_BYTES_PER_SM, MEMORY_LATENCY / max(stages - 1, 1))
    return overlap(math, read) + (PEER_LATENCY if t.cluster > 1 else 0)


def overlap(a: float, b: float) -> float:
    """What runs at the same time takes as long as the longer, and a little more: nothing overlaps perfectly."""
    return max(a, b) + 0.1 * min(a, b)
