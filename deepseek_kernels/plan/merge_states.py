"""Plan of `merge_states`: it reads two results and writes one."""

from dataclasses import dataclass

from ..device import DeviceSpec
from ..shapes import ceil_div
from .backend import Environment, cpu_reason, triton_reason


@dataclass(frozen=True)
class Problem:
    num_rows: int  # b * s_q * h_q
    d_v: int
    element_bytes: int = 2
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Config:
    """`rows`: (sequence, query, head) rows one program merges."""

    rows: int
    num_warps: int


def flops(p: Problem) -> int:
    """Two products and a sum per element."""
    return 3 * p.num_rows * p.d_v


def bytes(p: Problem) -> int:
    return 3 * p.num_rows * (p.d_v * p.element_bytes + 4)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    float64 = "float64 runs on the reference only" if p.dtype == "float64" else ""
    return {
        "triton": float64 or triton_reason(device, env),
        "cpu": float64 or cpu_reason("merge_states", device, env),
    }


def candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    return [Config(1, 1), Config(4, 4), Config(8, 8)]


def cost(c: Config, p: Problem, device: DeviceSpec) -> float:
    """Warps that the busiest SM runs, and a quarter of one to start each program."""
    return ceil_div(ceil_div(p.num_rows, c.rows), device.num_sms) * (c.num_warps + 0.25)


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    """Only the Triton kernel has a choice of tile."""
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: (cost(c, p, device), c.rows))
