"""Plan of `moe_sort`: how many programs share the entries, and how many each looks at in one step."""

from dataclasses import dataclass

from ..device import H200, DeviceSpec
from ..shapes import align_up, ceil_div
from .backend import Environment, cpu_reason, cuda_reason, triton_reason

MAX_EXPERTS = 4096
"""The Triton kernel keeps one counter per expert in registers, the CUDA kernel one per warp in shared memory."""

_TILE = 16384  # entries x experts compared in one step
_LAUNCH = 5  # steps that take as long as the second launch
_LAUNCH_US, _SECOND_US = 2.2, 1.5  # of the CUDA kernel


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


@dataclass(frozen=True)
class CudaConfig:
    """Tiles of `warps` * 32 * `rounds` entries; `ctas` share them; one of them takes one tile, in one launch.

    `dependent`: the second launch of several starts while the first one ends."""

    warps: int
    rounds: int
    ctas: int
    dependent: bool

    @property
    def tile(self) -> int:
        return self.warps * 32 * self.rounds


def flops(p: Problem) -> int:
    return 0


def bytes(p: Problem) -> int:
    """Every index once, every entry of the three maps once."""
    entries = p.num_tokens * p.top_k
    return entries * p.index_bytes + 4 * (entries + p.num_rows + p.num_local + 1)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    too_many = f"takes up to {MAX_EXPERTS} local experts, got {p.num_local}" if p.num_local > MAX_EXPERTS else ""
    return {
        "cuda": too_many or cuda_reason("moe_sort", device, env),
        "triton": too_many or triton_reason(device, env),
        "cpu": cpu_reason("moe_sort", device, env),
    }


def candidates(p: Problem, device: DeviceSpec, backend: str = "triton") -> list[Config] | list[CudaConfig]:
    return _cuda_candidates(p, device) if backend == "cuda" else _triton_candidates(p, device)


def _triton_candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    """Chunks that fill the registers of a program; one program, or up to one a multiprocessor."""
    experts = max(16, 1 << (p.num_local - 1).bit_length())
    chunk = min(64, max(16, _TILE // experts))
    warps = 8 if max(experts, chunk) * chunk >= _TILE // 2 else 4
    entries = p.num_tokens * p.top_k
    most = max(1, min(ceil_div(entries, chunk), device.num_sms))
    return [Config(experts, chunk, n, warps) for n in sorted({1, ceil_div(most, 4), ceil_div(most, 2), most})]


def _triton_cost(c: Config, p: Problem) -> float:
    """Steps of the longest program: two over its entries, and one over every program's counters."""
    steps = 2 * ceil_div(ceil_div(p.num_tokens * p.top_k, c.chunk), c.programs)
    return steps if c.programs == 1 else steps + ceil_div(c.programs, c.chunk) + _LAUNCH


def shared_bytes(c: CudaConfig, p: Problem) -> int:
    """Of the larger of the two launches: a histogram for each warp, two more counters per expert, sums of warps."""
    return 4 * ((c.warps + 2) * align_up(p.num_local, 4) + 1 + 32)


def _cuda_candidates(p: Problem, device: DeviceSpec) -> list[CudaConfig]:
    """One CTA whose tile holds all entries; a CTA for each tile, or for several where there are more tiles than
    multiprocessors. The fewest warps fit any device."""
    device = device if device.kind == "cuda" else H200  # in the model
    entries, found = p.num_tokens * p.top_k, []
    for warps in (4, 8, 16, 32):
        for rounds in (1, 2, 4, 8):
            one = CudaConfig(warps, rounds, 1, False)
            if warps > 4 and shared_bytes(one, p) > device.shared_memory:
                continue
            tiles = max(1, ceil_div(entries, one.tile))
            if tiles == 1:
                found.append(one)
            else:
                most = min(tiles, device.num_sms)
                found += [
                    CudaConfig(warps, rounds, n, device.arch >= 90) for n in sorted({max(2, ceil_div(most, 2)), most})
                ]
    return found


def _cuda_cost(c: CudaConfig, p: Problem, device: DeviceSpec) -> float:
    """Microseconds, from instruction counts at 1.7 GHz: ballots and histograms of each tile, one after the other, and
    what it takes to read everybody's counts, of one CTA and of all together."""
    bits = max(1, (p.num_local - 1).bit_length())
    round_us = 0.06 + c.warps * (12 + 4 * bits) / 4 / 1700
    sums_us = ceil_div(p.num_local, 32 * c.warps) * c.warps * 8 / 1700
    tile_us = 0.6 + c.rounds * round_us + sums_us
    if c.ctas == 1:
        return _LAUNCH_US + tile_us
    tiles = ceil_div(ceil_div(p.num_tokens * p.top_k, c.tile), c.ctas)
    counts = 4 * p.num_local * c.ctas
    threads_us = ceil_div(p.num_local * c.ctas, 4 * 32 * c.warps) * 0.05
    return _LAUNCH_US + _SECOND_US + tiles * (tile_us + 0.6) + counts / 1e5 + counts * c.ctas / 4e6 + threads_us


def cost(c: Config | CudaConfig, p: Problem, device: DeviceSpec) -> float:
    return _cuda_cost(c, p, device) if isinstance(c, CudaConfig) else _triton_cost(c, p)


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | CudaConfig | None:
    if backend == "cuda":
        return min(_cuda_candidates(p, device), key=lambda c: (cost(c, p, device), c.ctas, c.warps))
    if backend == "triton":
        return min(_triton_candidates(p, device), key=lambda c: (cost(c, p, device), c.programs))
    return None
