"""The bf16 kernels of csrc/common/bf16_sm90.cuh, which csrc/grouped_matmul has: which tile, and how long it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..device import DeviceSpec
from ..shapes import ceil_div
from . import _fp8_hopper as hopper

# No GPU has run these kernels yet. Rates of L2, latencies and the end of a tile are those of the FP8 kernels on an
# H200, whose pipeline is the same; the rest is counted in the header of the kernel.
ROWS = 128  # of x, the operand that wgmma takes 64 rows of
STEP = 64  # of k
CUDA_MAX_EXPERTS = 1024
OFFSETS = 4 * (CUDA_MAX_EXPERTS + 1)  # bytes of shared memory for the first row of every group

INSTANCES = {"forward": ((16, 1), (64, 1), (128, 2), (256, 2)), "wgrad": ((128, 1), (256, 2))}
"""What csrc/grouped_matmul compiles: rows of y a tile, and how many CTAs have them in common. Forward, y are the rows
of a, and x those of b; the gradient has n as x and k as y."""
OUT_DTYPES = {"forward": ("bfloat16",), "wgrad": ("bfloat16", "float32")}
NARROW = {256: 0.625}
"""Columns -> what the last tile of an expert costs, in tiles, where its rows are at most half of that."""


@dataclass(frozen=True)
class CudaConfig:
    """A compiled instance: tiles of 128 rows of x by `columns` of y, `cluster` of them side by side along x; `ctas`
    blocks that stay, `raster` rows of clusters of d walked together."""

    columns: int
    cluster: int
    raster: int = 1
    ctas: int = 1


@dataclass(frozen=True)
class Size:
    """`experts` that have `rows` each, as far as the host knows; `spread`: all of them may have any number, not just
    one. `traffic` is in bytes."""

    kind: str
    rows: int
    n: int
    k: int
    experts: int
    spread: bool
    traffic: int


def candidates(s: Size, device: DeviceSpec) -> Sequence[CudaConfig]:
    return [_config(columns, cluster, s, device) for columns, cluster in INSTANCES[s.kind]]


def _config(columns: int, cluster: int, s: Size, device: DeviceSpec) -> CudaConfig:
    resident = max(device.num_sms // cluster, 1)
    if s.kind == "forward":  # the host does not know how many tiles there are: all CTAs start
        raster = hopper.group_of(ceil_div(s.rows, columns), columns, ROWS * cluster, resident)
        return CudaConfig(columns, cluster, raster, resident * cluster)
    raster = hopper.group_of(ceil_div(s.n, ROWS * cluster), ROWS * cluster, columns, resident)
    ctas = cluster * max(1, min(resident, ceil(_clusters(columns, cluster, s))))
    return CudaConfig(columns, cluster, raster, ctas)


def is_legal(c: CudaConfig, kind: str) -> str:
    return "" if (c.columns, c.cluster) in INSTANCES[kind] else "not among the compiled instances"


def stages(columns: int, kind: str, out_dtype: str = "bfloat16") -> int:
    """That fit beside the result, which is staged if it is of bf16, and the offsets; forward also the first tile of
    every group."""
    reserved = OFFSETS * (2 if kind == "forward" else 1)
    room = hopper.SHARED_MEMORY - reserved - (ROWS * columns * 2 + 128 if out_dtype == "bfloat16" else 1152)
    return room // ((ROWS + columns) * STEP * 2 + 16)


def _clusters(columns: int, cluster: int, s: Size) -> float:
    """Of whole tiles. Experts of any number of rows fill all of their tiles but the last one, and on average half of
    that."""
    along_x = ceil_div(s.n, ROWS * cluster)
    if s.kind == "wgrad":
        return s.experts * along_x * ceil_div(s.k, columns)
    narrow = NARROW.get(columns, 1.0)
    if s.spread:
        return s.experts * along_x * max(narrow, s.rows / columns - 0.5 + (1 + narrow) / 2)
    whole, rest = divmod(s.rows, columns)
    return s.experts * along_x * (whole + (narrow if 0 < 2 * rest <= columns else rest > 0))


def seconds(c: CudaConfig, s: Size, device: DeviceSpec) -> float:
    """Waves of tiles, each as long as the slower of its math and its reads, and never less than the traffic of the
    whole problem; the first load and the last store overlap with nothing."""
    waves = ceil(_clusters(c.columns, c.cluster, s) / max(device.num_sms // c.cluster, 1))
    steps = ceil_div(s.k if s.kind == "forward" else s.rows, STEP)
    finish = hopper.FINISH + hopper.FINISH_ELEMENT * ROWS * c.columns
    busy = waves * steps * _step(c, s, device) + (waves - 1) * finish
    return hopper.START + hopper.MEMORY_LATENCY + hopper.overlap(busy, s.traffic / device.bandwidth) + finish


def _step(c: CudaConfig, s: Size, device: DeviceSpec) -> float:
    """Seconds of 64 of k. Each wgmma reads its 64 rows of x and all of y from shared memory, where the step's operands
    are also written, at 128 bytes a clock; the math takes 4 clocks a column."""
    math = 2 * ROWS * c.columns * STEP / (device.rate("bf16") / device.num_sms)
    passed = 2 * (hopper.GROUP_ROWS + c.columns) + ROWS + c.columns
    math *= max(1.0, passed / (4 * c.columns))
    loaded = (ROWS + c.columns / c.cluster) * STEP * 2
    read = max(loaded / hopper.L2_BYTES_PER_SM, hopper.MEMORY_LATENCY / (stages(c.columns, s.kind) - 1))
    return hopper.overlap(math, read) + (hopper.PEER_LATENCY if c.cluster > 1 else 0)
