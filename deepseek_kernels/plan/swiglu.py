"""Plan of `swiglu` and `swiglu_backward`: bytes are all that counts."""

from dataclasses import dataclass
from typing import Literal

from ..device import DeviceSpec
from ..shapes import BLOCK, ceil_div
from .backend import Environment, cpu_reason, triton_reason


@dataclass(frozen=True)
class Problem:
    kind: Literal["forward", "backward"]
    num_rows: int
    intermediate: int
    element_bytes: int
    weighted: bool = False
    mapped: bool = False
    quantize: bool = False
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Config:
    """`block`: columns of the result one program takes at a time."""

    block: int
    num_warps: int
    native_fp8: bool


def flops(p: Problem) -> int:
    """Nothing a matmul unit would do."""
    return 0


def bytes(p: Problem) -> int:
    """gate_up, the result, and weight and map entry of every row once; backward also the gradients."""
    row = p.intermediate * p.element_bytes
    extra = 4 * (p.weighted + p.mapped)
    if p.kind == "backward":
        return p.num_rows * (5 * row + extra + 4 * p.weighted)
    out = p.intermediate + 4 * ceil_div(p.intermediate, BLOCK) if p.quantize else row
    return p.num_rows * (2 * row + out + extra)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    float64 = "float64 runs on the reference only" if p.dtype == "float64" else ""
    return {
        "triton": float64 or triton_reason(device, env),
        "cpu": float64 or cpu_reason("swiglu", device, env),
    }


def candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    native = device.arch >= 89
    return [Config(block, warps, native) for block, warps in ((256, 2), (512, 4), (1024, 4), (2048, 8))]


def cost(c: Config, p: Problem, device: DeviceSpec) -> float:
    """Idle lanes of the last block, plus the idle part of the last wave of programs, as a fraction of the work."""
    blocks = ceil_div(p.intermediate, c.block)
    waste = blocks * c.block / max(p.intermediate, 1)
    if p.kind == "backward":  # one program takes a whole row; narrow blocks cost steps
        return waste + 0.1 * blocks
    programs = max(p.num_rows * blocks, 1)
    resident = device.num_sms * (64 // c.num_warps)
    waves = programs / resident
    return waste * ceil_div(programs, resident) / waves if waves < 4 else waste


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    """Only the Triton kernel has a choice of block."""
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: (cost(c, p, device), -c.block))
