"""Plan of `fp8_grouped_matmul`, its masked form and its gradient: the tiles of `grouped_matmul`, one FP8 block deep."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from math import ceil
from typing import Literal

from ..device import DeviceSpec
from ..shapes import BLOCK, ceil_div
from . import _fp8_hopper as hopper
from . import _fp8_wgrad as wgrad
from . import grouped_matmul as grouped
from ._fp8_wgrad import WgradConfig
from .backend import Environment, cpu_reason, cuda_reason, triton_reason
from .fp8_matmul import CudaConfig


@dataclass(frozen=True)
class Problem:
    """`num_rows` is the upper bound that the host knows; in the masked layout what the caller expects, if he says. In
    the layout of wgrad, the gradient of b, it is the number of columns, each expert's filled up to a block. `aligned`:
    the rows of both operands begin at multiples of 16 bytes and lie apart."""

    num_rows: int
    n: int
    k: int
    num_experts: int
    out_dtype: str = "bfloat16"
    layout: Literal["contiguous", "masked", "wgrad"] = "contiguous"
    accumulate: bool = False
    aligned: bool = True


@dataclass(frozen=True)
class Config:
    """As `grouped_matmul`'s forward, with block_k = 128; for the gradient block_m is of n, block_n of k, and a step 128
    columns. Without `native_fp8` the operands become bf16 in registers. `tma` and `flatten` as in `fp8_matmul`."""

    block_m: int
    block_n: int
    group_m: int
    num_warps: int
    num_stages: int
    native_fp8: bool
    num_programs: int = 0
    tma: bool = False
    flatten: bool = False


AnyConfig = Config | CudaConfig | WgradConfig


def _unscaled(p: Problem) -> grouped.Problem:
    kind: Literal["forward", "wgrad"] = "wgrad" if p.layout == "wgrad" else "forward"
    return grouped.Problem(kind, p.num_rows, p.n, p.k, p.num_experts, "float8_e4m3fn", p.out_dtype)


def _tile(c: Config, p: Problem) -> grouped.Config:
    sides = (BLOCK, c.block_m, c.block_n) if p.layout == "wgrad" else (c.block_m, c.block_n, BLOCK)
    return grouped.Config(*sides, c.group_m, c.num_warps, c.num_stages, c.num_programs, c.tma, c.flatten)


def flops(p: Problem) -> int:
    return grouped.flops(_unscaled(p))


def bytes(p: Problem) -> int:
    """Operands with their scales and the result, each once; the result twice where it is added to. Of the weights those
    of the experts that can have rows; the gradient is written for all."""
    if p.layout == "wgrad":
        scales, read = 4 * (p.n + p.k) * (p.num_rows // BLOCK), 4 * p.num_experts * p.n * p.k * p.accumulate
        return grouped.bytes(_unscaled(p)) + scales + read
    blocks = ceil_div(p.k, BLOCK)
    weight_scales = min(p.num_experts, p.num_rows) * ceil_div(p.n, BLOCK) * blocks
    counts = 4 if p.layout == "masked" else 0  # one fewer than offsets
    return grouped.bytes(_unscaled(p)) + 4 * (p.num_rows * blocks + weight_scales) - counts


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    too_many = f"needs at most {grouped.MAX_EXPERTS} experts, got {p.num_experts}"
    return {
        "cuda": _cuda(p, device, env),
        "triton": too_many if p.num_experts > grouped.MAX_EXPERTS else triton_reason(device, env),
        "cpu": _cpu(p, device, env),
    }


def _cuda(p: Problem, device: DeviceSpec, env: Environment) -> str:
    if p.layout == "wgrad":
        return cuda_reason("fp8_grouped_matmul_wgrad", device, env, archs=(90,))
    if p.num_experts > CUDA_MAX_EXPERTS:
        return f"needs at most {CUDA_MAX_EXPERTS} experts, got {p.num_experts}"
    if p.k == 0:
        return "needs k of at least 16"
    return cuda_reason("fp8_grouped_matmul", device, env, archs=(90,))


def _cpu(p: Problem, device: DeviceSpec, env: Environment) -> str:
    if p.layout == "wgrad":
        return "the gradient runs on the reference, which multiplies a block at a time with torch's own matmul"
    return cpu_reason("grouped_matmul", device, env)


TILES = (
    # block_m, block_n, warps, stages; block_n divides 128, so that a tile has one weight scale a step
    (16, 64, 4, 4),
    (16, 128, 4, 4),
    (32, 64, 4, 4),
    (32, 128, 4, 4),
    (64, 32, 4, 4),
    (64, 64, 4, 4),
    (64, 64, 8, 4),
    (64, 128, 4, 4),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
    (128, 128, 8, 4),
)
TILES_HOPPER = ((64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 8, 5))
"""From compute capability 9.0 the tensor cores take e4m3 in 64 rows."""
TILES_WGRAD = ((64, 32, 4, 4), (64, 64, 4, 4), (128, 64, 8, 4), (64, 128, 4, 4), (128, 128, 8, 4))
INSTANCES = {
    # tile_m, tile_n, cluster_m, cluster_n, swap; no cluster lies along m, where its tiles could belong to two groups
    "bfloat16": (
        (8, 64, 1, 1, True),
        (16, 128, 1, 1, True),
        (32, 128, 1, 1, True),
        (64, 128, 1, 2, True),
        (128, 128, 1, 2, False),
        (128, 192, 1, 2, False),
    ),
    "float32": ((64, 64, 1, 2, False), (128, 128, 1, 2, False)),
}
"""What csrc/fp8_grouped_matmul/launch_*.cu compile."""
CUDA_MAX_EXPERTS = 1024
CUDA_RESERVED = 8 * (CUDA_MAX_EXPERTS + 1)
"""Bytes of shared memory in which every CTA keeps where groups begin."""
CPU_CONFIG = Config(16, 32, 2, 4, 1, False, 3)
"""Small, so that the interpreter meets several tiles and programs on small shapes."""


def candidates(p: Problem, device: DeviceSpec, backend: str = "triton") -> Sequence[AnyConfig]:
    if backend == "cuda" and p.layout == "wgrad":
        return wgrad.candidates(_wgrad_size(p), device)
    if backend == "cuda":
        return [_cuda_config(p, device, hopper.Tile(*i)) for i in INSTANCES[p.out_dtype]]
    return _triton_candidates(p, device)


def _wgrad_size(p: Problem) -> wgrad.Size:
    blocks = ceil_div(p.num_rows // BLOCK, max(p.num_experts, 1))
    return wgrad.Size(p.n, p.k, p.num_experts, blocks, bytes(p), p.accumulate)


def _triton_candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    flat = p.layout != "wgrad"  # there the steps of a tile are as many as its expert has blocks
    if device.kind == "cpu":
        tma = not _descriptor_reason(p)
        return [replace(CPU_CONFIG, tma=tma, flatten=tma and flat)]
    native = device.arch >= 89
    tiles = TILES_WGRAD if p.layout == "wgrad" else TILES_HOPPER if device.arch >= 90 else TILES
    configs = [Config(m, n, 8, warps, stages, native) for m, n, warps, stages in tiles]
    if device.arch >= 90 and not _descriptor_reason(p):
        configs += [replace(c, tma=True, flatten=flat) for c in configs]
    return [replace(c, num_programs=device.num_sms * resident(c, p, device)) for c in configs]


def _descriptor_reason(p: Problem) -> str:
    """Why tensor descriptors cannot address the operands; empty if they can."""
    if not p.aligned:
        return "tensor descriptors need rows that begin at multiples of 16 bytes"
    if p.num_experts * p.k == 0 or max(p.num_rows, p.n, p.k) > grouped.MAX_COORDINATE:
        return f"tensor descriptors address 1 to {grouped.MAX_COORDINATE} rows and columns"
    return ""


def resident(c: Config, p: Problem, device: DeviceSpec) -> int:
    """Programs that fit on one SM; every step is accumulated apart and then scaled, so accumulators count twice."""
    registers = 32 * c.num_warps * min(3 * grouped.accumulators(_tile(c, p), _unscaled(p)) + 64, 255)
    return max(1, min(device.shared_memory // shared_memory(c, p), 65536 // registers, 4))


def shared_memory(c: Config, p: Problem) -> int:
    """As `grouped_matmul`'s; without `native_fp8` one step's bf16 operands come on top."""
    widened = 0 if c.native_fp8 else 2 * (c.block_m + c.block_n) * BLOCK
    return grouped.shared_memory(_tile(c, p), _unscaled(p)) + widened


def is_legal(c: AnyConfig, p: Problem, device: DeviceSpec) -> str:
    if isinstance(c, WgradConfig):
        return wgrad.is_legal(c)
    if isinstance(c, CudaConfig):
        known = astuple(c)[:5] in INSTANCES[p.out_dtype]
        return "" if known else "not among the compiled instances"
    if device.kind == "cpu":
        return ""
    if c.tma and (device.arch < 90 or _descriptor_reason(p)):
        return _descriptor_reason(p) or "tensor descriptors need compute capability 9.0"
    if shared_memory(c, p) > device.shared_memory:
        return f"needs {shared_memory(c, p)} bytes of shared memory, {device.name} has {device.shared_memory}"
    if c.flatten and not (c.tma and p.layout != "wgrad"):
        return "one loop over tiles and k needs the loads of descriptors, and the same k for all tiles"
    if device.arch >= 90 and c.block_m < 64:
        return "below 64 rows the tensor core has no FP8"
    masked = p.layout == "masked"  # the expert's own addresses take registers
    if not c.native_fp8 and grouped.operands(_tile(c, p), _unscaled(p)) > (80 if masked else 96):
        return "more than 96 operands a thread to decode, masked 80, leave no room for the rest"
    crowded = not c.native_fp8 or device.arch >= 100  # operands to decode, or sums to fetch from tensor memory
    sums = grouped.accumulators(_tile(c, p), _unscaled(p))
    if p.layout == "wgrad" and sums > (most := (16 if crowded else 32) * (2 if c.tma else 1)):
        return f"scales of rows and columns leave registers for at most {most} sums a thread"
    if sums > (32 if masked and device.arch < 90 else 64):
        return "two sets of more than 64 accumulators a thread, masked without wgmma 32, leave no room for the rest"
    return ""


def cost(c: AnyConfig, p: Problem, device: DeviceSpec) -> float:
    """Seconds, as for `grouped_matmul` and for `fp8_matmul`."""
    if isinstance(c, WgradConfig):
        return wgrad.seconds(c, _wgrad_size(p), device)
    if isinstance(c, CudaConfig):
        size, clusters = grouped.ELEMENT_BYTES[p.out_dtype], _expected_clusters(c, p)
        return hopper.seconds(c, clusters, _rows_per_group(p), p.k, size, bytes(p), device, CUDA_RESERVED)
    return grouped.cost(_tile(c, p), _unscaled(p), device)


def _busy(p: Problem) -> int:
    """Experts that have rows, if rows are few and spread out."""
    return max(min(p.num_experts, p.num_rows), 1)


def _rows_per_group(p: Problem) -> int:
    return max(ceil_div(p.num_rows, _busy(p)), 1)


def _expected_clusters(t: hopper.Tile, p: Problem) -> int:
    """A group of any number of rows fills all of its tiles but the last one, and on average half of that; a single one
    has the rows there are."""
    tiles = max(1.0, _rows_per_group(p) / (t.tile_m * t.cluster_m) + 0.5)
    if _busy(p) == 1:
        tiles = ceil(tiles - 0.5)
    return ceil(_busy(p) * tiles) * ceil_div(p.n, t.tile_n * t.cluster_n)


def _cuda_config(p: Problem, device: DeviceSpec, t: hopper.Tile) -> CudaConfig:
    """The host does not know how many tiles there are: all CTAs start."""
    ctas = max(device.num_sms // t.cluster, 1) * t.cluster
    return CudaConfig(*astuple(t), hopper.raster(t, _rows_per_group(p), device), ctas)


def select(p: Problem, device: DeviceSpec, backend: str) -> AnyConfig | None:
    if backend == "cuda":
        return min(candidates(p, device, backend), key=lambda c: cost(c, p, device))
    if backend != "triton":
        return None
    legal = [c for c in _triton_candidates(p, device) if not is_legal(c, p, device)]
    return min(legal, key=lambda c: (cost(c, p, device), c.block_m, c.block_n, c.num_stages))
