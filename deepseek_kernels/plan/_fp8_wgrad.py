"""The weight gradient's kernel on Hopper, csrc/fp8_grouped_matmul/kernel_wgrad_sm90.cuh, for one expert and for many:
which tile, and how long it takes."""

from dataclasses import astuple, dataclass

from ..device import DeviceSpec
from ..shapes import BLOCK, ceil_div
from . import _fp8_hopper as hopper

INSTANCES = ((128, 64, 1, 1), (128, 128, 1, 2), (128, 192, 2, 1), (256, 128, 1, 2))
"""What launch_wgrad.cu compiles: tile_m of n, tile_n of k, cluster_m, cluster_n."""
STAGED = (128, 128)
"""The tile whose sums TMA stores, or adds, while the next one is multiplied."""
ONE_PRODUCT = 1.17  # times the step of the others, whose warpgroups do not multiply while they scale
ADD_ELEMENT = 1.9e-10  # seconds that a tile waits for each element it adds to,
ADD_STAGED = 0.8e-10  # and where TMA adds


@dataclass(frozen=True)
class Size:
    """d fp32 [num_experts, n, k], `accumulate`: or what is added to it; `blocks` of 128 are summed for each expert.
    `traffic` is in bytes."""

    n: int
    k: int
    num_experts: int
    blocks: int
    traffic: int
    accumulate: bool = False


@dataclass(frozen=True)
class WgradConfig(hopper.Tile):
    """A compiled instance, `ctas` blocks that stay, `raster` rows of clusters walked together."""

    raster: int = 1
    ctas: int = 1


def candidates(s: Size, device: DeviceSpec) -> list[WgradConfig]:
    return [_config(hopper.Tile(*i), s, device) for i in INSTANCES]


def _config(t: hopper.Tile, s: Size, device: DeviceSpec) -> WgradConfig:
    return WgradConfig(*astuple(t), hopper.raster(t, s.n, device), hopper.ctas(t, _clusters(t, s), device))


def _clusters(t: hopper.Tile, s: Size) -> int:
    return hopper.clusters(t, [s.n] * s.num_experts, s.k)


def is_legal(c: WgradConfig) -> str:
    return "" if astuple(c)[:4] in INSTANCES else "not among the compiled instances"


def stages(t: hopper.Tile) -> int:
    """Of 128 columns, that fit beside the sums, where they are staged; scales of y are kept for two turns of them."""
    reserved = 4 * t.tile_m * t.tile_n + 144 if (t.tile_m, t.tile_n) == STAGED else 1024
    return (hopper.SHARED_MEMORY - reserved) // ((t.tile_m + t.tile_n) * BLOCK + 4 * t.tile_m + 8 * t.tile_n + 16)


def seconds(c: WgradConfig, s: Size, device: DeviceSpec) -> float:
    """Waves of tiles, each as long as its steps and its stores, and never less than the traffic."""
    waves = ceil_div(_clusters(c, s), max(device.num_sms // c.cluster, 1))
    add = (ADD_STAGED if (c.tile_m, c.tile_n) == STAGED else ADD_ELEMENT) * s.accumulate
    finish = hopper.FINISH + (hopper.FINISH_ELEMENT + add) * c.tile_m * c.tile_n
    busy = waves * (s.blocks * _step(c, device) + finish)
    return hopper.MEMORY_LATENCY + hopper.overlap(busy, s.traffic / device.bandwidth)


def _step(t: hopper.Tile, device: DeviceSpec) -> float:
    """Seconds of one block: a wgmma of 64 rows reads them and all of y from shared memory, in which the step's operands
    are also written; every product is scaled twice; L2 gives what a cluster does not have in common."""
    rate, fma = device.rate("fp8") / device.num_sms, device.rate("fp32") / 2 / device.num_sms
    math = 2 * t.tile_m * t.tile_n * BLOCK / rate
    passed = t.tile_m // hopper.GROUP_ROWS * (hopper.GROUP_ROWS + t.tile_n) + t.tile_m + t.tile_n
    shared = math * 32 * passed / (t.tile_m * t.tile_n)
    loaded = (t.tile_m / t.cluster_n + t.tile_n / t.cluster_m) * BLOCK
    read = max(loaded / hopper.L2_BYTES_PER_SM, hopper.MEMORY_LATENCY / (stages(t) - 1))
    one = ONE_PRODUCT if (t.tile_m, t.tile_n) != STAGED else 1.0
    return one * hopper.overlap(max(math, shared, 2 * t.tile_m * t.tile_n / fma), read)
