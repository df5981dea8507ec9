"""Plan of `mla_cache_write` and `mla_rope`: both read a row and write a row, so bytes are all that counts."""

from dataclasses import dataclass
from typing import Literal

from ..device import DeviceSpec
from ..shapes import ceil_div
from .backend import Environment, cpu_reason, triton_reason


@dataclass(frozen=True)
class Problem:
    """`num_rows`: tokens (write), or tokens times `heads` (rope), which has no latent."""

    kind: Literal["write", "rope"]
    num_rows: int
    d_latent: int
    d_rope: int
    element_bytes: int
    cache_row_bytes: int = 0
    norm: bool = False
    dtype: str = "bfloat16"
    heads: int = 1


@dataclass(frozen=True)
class Config:
    """`rows`: tokens one program handles, and `heads` of each (rope)."""

    rows: int
    heads: int
    num_warps: int
    native_fp8: bool


def flops(p: Problem) -> int:
    """Four products and two sums a rotated pair; the square, the sum and two products of the norm."""
    return p.num_rows * (3 * p.d_rope + (4 * p.d_latent if p.norm else 0))


def bytes(p: Problem) -> int:
    """Each row read and written once, its position, slot and row of cos_sin."""
    row = (p.d_latent + p.d_rope) * p.element_bytes
    if p.kind == "rope":
        return 2 * p.num_rows * row
    return p.num_rows * (row + p.cache_row_bytes + 4 * p.d_rope + 16)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    float64 = "float64 runs on the reference only" if p.dtype == "float64" else ""
    op = "mla_cache_write" if p.kind == "write" else "mla_rope"
    return {
        "triton": float64 or triton_reason(device, env),
        "cpu": float64 or cpu_reason(op, device, env),
    }


def candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    """A warp for each row of a latent, for every 16 rows of rope alone: heads of one token first, which share its
    cosines."""
    native = device.arch >= 89
    if p.kind == "write":
        return [Config(warps, 1, warps, native) for warps in (1, 2, 4, 8)]
    most = 1 << max(p.heads - 1, 0).bit_length()
    blocks = [(16 * warps, min(16 * warps, most), warps) for warps in (1, 2, 4, 8)]
    return [Config(rows // heads, heads, warps, native) for rows, heads, warps in blocks]


def cost(c: Config, p: Problem, device: DeviceSpec) -> float:
    """Warps that the busiest SM runs, and a quarter of one to start each program."""
    tokens = p.num_rows // max(p.heads, 1)
    programs = ceil_div(tokens, c.rows) * ceil_div(p.heads, c.heads)
    return ceil_div(programs, device.num_sms) * (c.num_warps + 0.25)


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    """Only the Triton kernel has a choice of tile."""
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: (cost(c, p, device), c.num_warps))
