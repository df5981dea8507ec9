"""Plan of `fp8_quantize`, `fp8_quantize_both` and `fp8_dequantize`: each streams a matrix once, so bytes are all that
counts."""

from dataclasses import dataclass
from typing import Literal

from ..device import DeviceSpec
from ..shapes import BLOCK, GRANULARITIES, ceil_div, padded_columns
from .backend import Environment, cpu_reason, cuda_reason, triton_reason

MEMORY_LATENCY = 1e-6  # seconds from the first load of a program to its last store, without traffic


@dataclass(frozen=True)
class Problem:
    """`wide_bytes`: size of an element that is not e4m3. `granularity`: of q; "both" has 128x1 scales beside them.
    `num_experts`: of "both", where rows belong to experts."""

    kind: Literal["quantize", "both", "dequantize"]
    m: int
    k: int
    granularity: str
    wide_bytes: int
    num_experts: int | None = None

    @property
    def width(self) -> int:
        """Columns of the transposed copy that "both" makes."""
        return padded_columns(self.m, 1 if self.num_experts is None else self.num_experts)

    @property
    def row_tiles(self) -> int:
        """Of "both": tiles of 128 rows that cover the transposed copy and, among them, the rows of no expert, which
        lie before the first and after the last."""
        return padded_columns(self.m, 1 if self.num_experts is None else self.num_experts + 2) // BLOCK


@dataclass(frozen=True)
class Config:
    """A tile of `rows` x `columns` per program; of "both" the tile is 128 x 128, read by rows and then by columns."""

    rows: int
    columns: int
    num_warps: int
    native_fp8: bool


def scale_shape(m: int, k: int, granularity: str) -> tuple[int, int]:
    rows, columns = GRANULARITIES[granularity]
    return ceil_div(m, rows), ceil_div(k, columns)


def flops(p: Problem) -> int:
    """One division or multiplication per element and scale."""
    return p.m * p.k * (2 if p.kind == "both" else 1)


def bytes(p: Problem) -> int:
    """Every element once in each format, every scale once."""
    scale_m, scale_k = scale_shape(p.m, p.k, p.granularity)
    total = p.m * p.k * (p.wide_bytes + 1) + 4 * scale_m * scale_k
    if p.kind == "both":
        total += p.k * p.width + 4 * p.k * (p.width // BLOCK)
    return total if p.num_experts is None else total + 4 * (p.num_experts + 1)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    op = "fp8_quantize_both" if p.kind == "both" else f"fp8_{p.kind}"
    return {
        "cuda": cuda_reason(op, device, env),
        "triton": triton_reason(device, env),
        "cpu": cpu_reason(op, device, env),
    }


def candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    rows = ((2, 128, 1), (4, 128, 2), (8, 128, 4), (16, 128, 4), (32, 128, 8))
    whole_blocks = {"1x128": rows, "128x128": ((128, 128, 16),), "128x1": ((128, 32, 8), (128, 128, 8))}
    both = ((32, 64, 8),)
    tiles = {"quantize": whole_blocks[p.granularity], "both": both, "dequantize": rows}[p.kind]
    return [Config(*tile, native_fp8=device.arch >= 89) for tile in tiles]


def cost(c: Config, p: Problem, device: DeviceSpec) -> float:
    """Seconds: every wave of programs waits for memory once, then streams its tiles."""
    rows, columns = (BLOCK, BLOCK) if p.kind == "both" else (c.rows, c.columns)
    programs = ceil_div(p.m, rows) * ceil_div(p.k, columns)
    resident = 32 // c.num_warps
    waves = ceil_div(max(programs, 1), device.num_sms * resident)
    tile = rows * columns * (p.wide_bytes + (2 if p.kind == "both" else 1))
    return waves * (MEMORY_LATENCY + tile * resident * device.num_sms / device.bandwidth)


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    """Only the Triton kernel has a choice of tile; among equals the larger, which has fewer programs to start."""
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: (cost(c, p, device), -c.rows * c.columns))
