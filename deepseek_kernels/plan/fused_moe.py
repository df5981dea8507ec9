"""Plan of `fused_moe` and its gradient: a kernel for a few tokens, or the other ops, which choose for themselves."""

from dataclasses import dataclass
from typing import Literal

from ..device import DeviceSpec
from ..shapes import BLOCK, ceil_div
from .backend import Environment, cpu_reason, cpu_reference_reason, triton_reason

_LAUNCH = 3e-6  # seconds
_COMPOSED_LAUNCHES = 7


@dataclass(frozen=True)
class Problem:
    """`num_experts`: those of this rank; `needs`: the gradients asked for (x, w_gate_up, w_down, weights)."""

    kind: Literal["inference", "forward", "backward"]
    num_tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    element_bytes: int
    weight_bytes: int
    dtype: str = "bfloat16"
    needs: tuple[bool, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * self.weight_bytes

    @property
    def busy_experts(self) -> float:
        """Experts with a row, expected of tokens that choose evenly and independently."""
        return self.num_experts * (1 - (1 - min(self.top_k / max(self.num_experts, 1), 1)) ** self.num_tokens)


@dataclass(frozen=True)
class Config:
    """Of the decode path: weights one program multiplies at a time. Without a Config the ops are composed."""

    rows: int
    columns: int
    num_warps: int
    native_fp8: bool


def flops(p: Problem) -> int:
    """Three matmuls a row, those of entries without an expert included: the counts are not known to the host."""
    matmul = 2 * p.num_rows * p.hidden * p.intermediate
    if p.kind != "backward":
        return 3 * matmul
    x, w_gate_up, w_down, weights = p.needs
    return matmul * ((x or w_gate_up or weights) + 2 * x + 2 * w_gate_up + w_down)


def bytes(p: Problem) -> int:
    """Tokens, routing and gate_up once; the weights of as many experts as the tokens can reach; their gradients all."""
    tokens = p.num_tokens * p.hidden * p.element_bytes
    routing = p.num_rows * (4 + 8)
    gate_up = p.num_rows * 2 * p.intermediate * p.element_bytes
    experts = min(p.num_experts, p.num_rows) * p.expert_bytes
    if p.kind != "backward":
        return 2 * tokens + routing + experts + (gate_up if p.kind == "forward" else 0)
    x, w_gate_up, w_down, weights = p.needs
    gradients = p.num_experts * (2 * w_gate_up + w_down) * p.expert_bytes // 3
    return (2 + x) * tokens + routing + gate_up + experts + gradients + 4 * weights * p.num_rows


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    float64 = "float64 runs on the reference only" if p.dtype == "float64" else ""
    parts = ("moe_sort", "moe_permute", "grouped_matmul", "swiglu", "fp8_quantize")
    cpu = next((why for part in parts if (why := cpu_reason(part, device, env))), "")
    return {
        "triton": float64 or triton_reason(device, env),
        "cpu": float64 or cpu,
        "torch": float64 or cpu_reference_reason(device),
    }


def candidates(p: Problem, device: DeviceSpec) -> list[Config | None]:
    if p.kind != "inference":
        return [None]
    columns = (BLOCK,) if p.weight_bytes == 1 else (BLOCK, 256)  # FP8: one scale of x at a time
    return [None, *(Config(rows, c, 4, device.arch >= 89) for rows in (8, 16) for c in columns)]


def cost(c: Config | None, p: Problem, device: DeviceSpec) -> float:
    """Seconds for the weights and the launches. Composed, each expert is read once; decoding, once per entry."""
    if c is None:
        return p.busy_experts * p.expert_bytes / device.bandwidth + _COMPOSED_LAUNCHES * _LAUNCH
    waste = ceil_div(p.hidden, c.columns) * c.columns / max(p.hidden, 1)
    programs = p.num_tokens * ceil_div(p.hidden, c.rows)  # of the second launch, the smaller one
    idle = max(1.0, 2 * device.num_sms / max(programs, 1))
    reread = 1 + 1 / (8 * c.rows)  # every tile reads the token again, from L2
    return p.num_rows * p.expert_bytes * waste * idle * reread / device.bandwidth + 2 * _LAUNCH


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: cost(c, p, device))
