"""Plan of `fp8_quantize` and `fp8_dequantize`: both stream a matrix once, so bytes are all that counts."""

from dataclasses import dataclass
from typing import Literal

from ..device import DeviceSpec
from ..shapes import GRANULARITIES, ceil_div
from .backend import Environment, cpu_reason, cuda_reason, triton_reason

MEMORY_LATENCY = 1e-6  # seconds from the first load of a program to its last store, without traffic


@dataclass(frozen=True)
class Problem:
    """`wide_bytes`: size of an element that is not e4m3."""

    kind: Literal["quantize", "dequantize"]
    m: int
    k: int
    granularity: str
    wide_bytes: int


@dataclass(frozen=True)
class Config:
    """A tile of `rows` x `columns` per program."""

    rows: int
    columns: int
    num_warps: int
    native_fp8: bool


def scale_shape(m: int, k: int, granularity: str) -> tuple[int, int]:
    rows, columns = GRANULARITIES[granularity]
    return ceil_div(m, rows), ceil_div(k, columns)


def flops(p: Problem) -> int:
    """One division or multiplication per element."""
    return p.m * p.k


def bytes(p: Problem) -> int:
    """Every element once in each format, every scale once."""
    scale_m, scale_k = scale_shape(p.m, p.k, p.granularity)
    return p.m * p.k * (p.wide_bytes + 1) + 4 * scale_m * scale_k


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    both = {"triton": triton_reason(device, env), "cpu": cpu_reason(f"fp8_{p.kind}", device, env)}
    return {"cuda": cuda_reason("fp8_quantize", device, env), **both} if p.kind == "quantize" else both


def candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    rows = ((2, 128, 1), (4, 128, 2), (8, 128, 4), (16, 128, 4), (32, 128, 8))
    whole_blocks = {"1x128": rows, "128x128": ((128, 128, 16),), "128x1": ((128, 32, 8), (128, 64, 16))}
    tiles = whole_blocks[p.granularity] if p.kind == "quantize" else rows
    return [Config(*tile, native_fp8=device.arch >= 89) for tile in tiles]


def cost(c: Config, p: Problem, device: DeviceSpec) -> float:
    """Seconds: every wave of programs waits for memory once, then streams its tiles."""
    programs = ceil_div(p.m, c.rows) * ceil_div(p.k, c.columns)
    resident = 32 // c.num_warps
    waves = ceil_div(max(programs, 1), device.num_sms * resident)
    tile = c.rows * c.columns * (p.wide_bytes + 1)
    return waves * (MEMORY_LATENCY + tile * resident * device.num_sms / device.bandwidth)


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    """Only the Triton kernel has a choice of tile; among equals the larger, which has fewer programs to start."""
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: (cost(c, p, device), -c.rows * c.columns))
