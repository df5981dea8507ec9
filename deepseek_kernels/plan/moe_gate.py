"""Plan of `moe_gate` and its backward: one program or warp a token, its experts in registers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..device import H200, DeviceSpec
from ..shapes import ceil_div
from .backend import Environment, cpu_reason, cuda_reason, triton_reason

MAX_EXPERTS = 4096
"""The Triton kernel keeps one score per expert in registers."""
_WARPS = 32  # of the CUDA kernel that a multiprocessor runs at once


PER_LANE = (2, 4, 8, 16)
"""Experts that a lane of the CUDA kernel may hold."""
MAX_TOP_K = 32
"""The CUDA kernel keeps one choice a lane."""


@dataclass(frozen=True)
class Problem:
    """`num_groups`: 1 where every group may be used."""

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


@dataclass(frozen=True)
class CudaConfig:
    """A warp has a token: `group_lanes` lanes hold a group, `per_lane` experts each; `ctas` of `warps` share them."""

    group_lanes: int
    per_lane: int
    warps: int
    ctas: int


def flops(p: Problem) -> int:
    return 0


def bytes(p: Problem) -> int:
    """The logits once, weights (fp32) and ids (int64) once; backward also writes the gradient of the logits."""
    logits = p.num_tokens * p.num_experts * p.element_bytes
    return (2 if p.kind == "backward" else 1) * logits + p.num_tokens * p.top_k * (4 + 8)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    float64 = "float64 runs on the reference only" if p.dtype == "float64" else ""
    too_many = f"takes up to {MAX_EXPERTS} experts, got {p.num_experts}" if p.num_experts > MAX_EXPERTS else ""
    reasons = {
        "triton": float64 or too_many or triton_reason(device, env),
        "cpu": float64 or cpu_reason("moe_gate", device, env),
    }
    if p.kind == "forward":
        reasons["cuda"] = float64 or _warp_reason(p) or cuda_reason("moe_gate", device, env)
    return reasons


def lanes(p: Problem) -> tuple[int, int]:
    """(lanes of a group, experts each of them holds) in a warp of the CUDA kernel; (0, 0) where they do not fit."""
    members, group_lanes = p.num_experts // p.num_groups, 32 >> (p.num_groups - 1).bit_length()
    if group_lanes == 0 or members > group_lanes * PER_LANE[-1]:
        return 0, 0
    return group_lanes, next(n for n in PER_LANE if members <= group_lanes * n)


def _warp_reason(p: Problem) -> str:
    if p.top_k > MAX_TOP_K:
        return f"takes top_k up to {MAX_TOP_K}, got {p.top_k}"
    if not lanes(p)[0]:
        return f"takes what fits a warp, {PER_LANE[-1]} experts a lane, got {p.num_experts} in {p.num_groups} groups"
    return ""


def candidates(p: Problem, device: DeviceSpec, backend: str = "triton") -> list[Config] | list[CudaConfig]:
    """CUDA: few warps a CTA, so that few tokens have a multiprocessor each; as many CTAs as run at once."""
    if backend != "cuda":
        return [Config(warps) for warps in (1, 2, 4, 8)]
    device = device if device.kind == "cuda" else H200  # in the model
    found = []
    for warps in (1, 2, 4, 8):
        ctas = max(1, min(ceil_div(p.num_tokens, warps), device.num_sms * _WARPS // warps))
        found.append(CudaConfig(*lanes(p), warps, ctas))
    return found


def cost(c: Config | CudaConfig, p: Problem, device: DeviceSpec) -> float:
    """Steps of one token's reductions: experts a lane holds, and the exchange between lanes, then between warps.

    CUDA: tokens of the busiest multiprocessor, and what it takes to start its CTAs."""
    if isinstance(c, CudaConfig):
        ctas = ceil_div(c.ctas, device.num_sms)
        return ctas * c.warps * ceil_div(p.num_tokens, c.ctas * c.warps) + ctas / 4
    return max(p.num_experts / (32 * c.num_warps), 1) + (5 if c.num_warps == 1 else 16)


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | CudaConfig | None:
    if backend not in ("cuda", "triton"):
        return None
    options: Sequence[Config | CudaConfig] = candidates(p, device, backend)
    return min(options, key=lambda c: cost(c, p, device))
