"""Plan of `moe_gate` and its backward: one program a token, its experts in registers."""

from dataclasses import dataclass
from typing import Literal

from ..device import DeviceSpec
from .backend import Environment, cpu_reason, triton_reason

MAX_EXPERTS = 4096
"""The Triton kernel keeps one score per expert in registers."""


@dataclass(frozen=True)
class Problem:
    kind: Literal["forward", "backward"]
    num_tokens: int
    num_experts: int
    top_k: int
    num_groups: int
    element_bytes: int
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Config:
    num_warps: int


def flops(p: Problem) -> int:
    return 0


def bytes(p: Problem) -> int:
    """The logits once, weights (fp32) and ids (int64) once; backward also writes the gradient of the logits."""
    logits = p.num_tokens * p.num_experts * p.element_bytes
    return (2 if p.kind == "backward" else 1) * logits + p.num_tokens * p.top_k * (4 + 8)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    float64 = "float64 runs on the reference only" if p.dtype == "float64" else ""
    too_many = f"takes up to {MAX_EXPERTS} experts, got {p.num_experts}" if p.num_experts > MAX_EXPERTS else ""
    return {
        "triton": float64 or too_many or triton_reason(device, env),
        "cpu": float64 or cpu_reason("moe_gate", device, env),
    }


def candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    return [Config(warps) for warps in (1, 2, 4, 8)]


def cost(c: Config, p: Problem, device: DeviceSpec) -> float:
    """Steps of one token's reductions: experts a lane holds, and the exchange between lanes, then between warps."""
    return max(p.num_experts / (32 * c.num_warps), 1) + (5 if c.num_warps == 1 else 16)


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: (cost(c, p, device), c.num_warps))
