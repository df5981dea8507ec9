"""Plan of `moe_permute` and `moe_unpermute`: both move rows, so bytes are all that counts."""

from dataclasses import dataclass
from typing import Literal

from ..device import DeviceSpec
from ..shapes import BLOCK, ceil_div
from .backend import Environment, cpu_reason, cuda_reason, triton_reason


@dataclass(frozen=True)
class Problem:
    kind: Literal["permute", "unpermute"]
    num_tokens: int
    hidden: int
    top_k: int
    num_rows: int
    element_bytes: int
    scale_columns: int = 0
    quantize: bool = False
    weighted: bool = False
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Config:
    """`block`: columns one program moves; `zero_rows`: rows one program looks at for zero filling."""

    block: int
    zero_rows: int
    num_warps: int
    native_fp8: bool


def flops(p: Problem) -> int:
    """Multiply-adds of the weighted sum; moving rows costs none."""
    return (2 if p.weighted else 1) * p.num_tokens * p.top_k * p.hidden if p.kind == "unpermute" else 0


def bytes(p: Problem) -> int:
    """Every token row once, every expert row once, the maps once."""
    rows = p.num_tokens * p.top_k
    maps = 4 * rows
    if p.kind == "unpermute":
        return rows * p.hidden * p.element_bytes + p.num_tokens * p.hidden * p.element_bytes + maps * (1 + p.weighted)
    token = p.hidden * p.element_bytes
    row = p.hidden + 4 * ceil_div(p.hidden, BLOCK) if p.quantize else token + 4 * p.scale_columns
    token += 4 * p.scale_columns
    return p.num_tokens * token + p.num_rows * (row + 4) + maps


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    float64 = "float64 runs on the reference only" if p.dtype == "float64" else ""
    quantizer = cpu_reason("fp8_quantize", device, env) if p.quantize else ""
    return {
        "cuda": float64 or cuda_reason(f"moe_{p.kind}", device, env),
        "triton": float64 or triton_reason(device, env),
        "cpu": float64 or quantizer or cpu_reason(f"moe_{p.kind}", device, env),
    }


def candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    native = device.arch >= 89
    return [Config(block, 16, warps, native) for block, warps in ((512, 4), (1024, 4), (2048, 8))]


def cost(c: Config, p: Problem, device: DeviceSpec) -> float:
    """Bytes of whole blocks, plus the idle part of the last wave of programs, as a fraction of the work."""
    blocks = ceil_div(p.hidden, c.block)
    waste = blocks * c.block / max(p.hidden, 1)
    programs = max(p.num_tokens * blocks, 1)
    resident = device.num_sms * (64 // c.num_warps)
    waves = programs / resident
    return waste * ceil_div(programs, resident) / waves if waves < 4 else waste


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    """Only the Triton kernel has a choice of tile."""
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: (cost(c, p, device), -c.block))
