"""Plan of `moe_sort`: how many programs share the entries, and how many each looks at in one step."""

from dataclasses import dataclass

from ..device import DeviceSpec
from ..shapes import ceil_div
from .backend import Environment, cpu_reason, triton_reason

MAX_EXPERTS = 4096
"""The Triton kernel keeps one counter per expert in registers."""

_TILE = 16384  # entries x experts compared in one step
_LAUNCH = 5  # steps that take as long as the second launch


@dataclass(frozen=True)
class Problem:
    """`num_local`: experts of this rank; `num_rows`: R_max; `index_bytes`: of one entry of `indices`."""

    num_tokens: int
    top_k: int
    num_local: int
    num_rows: int
    alignment: int
    index_bytes: int


@dataclass(frozen=True)
class Config:
    """`experts`: num_local padded to a power of two; `chunk`: entries one program compares at a time;
    `programs`: share the entries and the rows; 1 counts and places in one launch."""

    experts: int
    chunk: int
    programs: int
    num_warps: int


def flops(p: Problem) -> int:
    return 0


def bytes(p: Problem) -> int:
    """Every index once, every entry of the three maps once."""
    entries = p.num_tokens * p.top_k
    return entries * p.index_bytes + 4 * (entries + p.num_rows + p.num_local + 1)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    too_many = f"takes up to {MAX_EXPERTS} local experts, got {p.num_local}" if p.num_local > MAX_EXPERTS else ""
    return {
        "triton": too_many or triton_reason(device, env),
        "cpu": cpu_reason("moe_sort", device, env),
    }


def candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    """Chunks that fill the registers of a program; one program, or up to one a multiprocessor."""
    experts = max(16, 1 << (p.num_local - 1).bit_length())
    chunk = min(128, max(16, _TILE // experts))
    warps = 8 if max(experts, chunk) * chunk >= _TILE // 2 else 4
    entries = p.num_tokens * p.top_k
    most = max(1, min(ceil_div(entries, chunk), device.num_sms))
    return [Config(experts, chunk, n, warps) for n in sorted({1, ceil_div(most, 4), ceil_div(most, 2), most})]


def cost(c: Config, p: Problem, device: DeviceSpec) -> float:
    """Steps of the longest program: two over its entries, and one over every program's counters."""
    steps = 2 * ceil_div(ceil_div(p.num_tokens * p.top_k, c.chunk), c.programs)
    return steps if c.programs == 1 else steps + ceil_div(c.programs, c.chunk) + _LAUNCH


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | None:
    if backend != "triton":
        return None
    return min(candidates(p, device), key=lambda c: (cost(c, p, device), c.programs))
