"""Plan of `grouped_matmul` and `grouped_matmul_wgrad`: tiles for rows whose counts only the device knows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..device import DeviceSpec
from ..shapes import ceil_div
from . import _bf16_hopper as bf16
from ._bf16_hopper import CudaConfig
from .backend import BACKENDS, Environment, cpu_reason, cuda_reason, triton_reason

ELEMENT_BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
RATES = {"float8_e4m3fn": "fp8", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MAX_EXPERTS = 4096
"""The kernel holds one counter per expert in registers."""
COPY_OPERATIONS = 4
"""Per 16 bytes, of the threads' own copies and addresses; one thread asks for all that a descriptor loads."""
MAX_COORDINATE = 2**31 - 256
"""Where a tile that a descriptor loads may begin, as an int32, with room for its rows."""

CPU_MAX_ROWS = 32
"""Rows per busy expert up to which the CPU kernel, which streams the weights, is the first choice."""

TORCH_MIN_ROWS, TORCH_MIN_K = 512, 4096
"""Rows per busy expert and k from which grouped_mm wins on Hopper. H200, ms, Triton by pointers and torch, k=7168:
4x8192 rows 3.54 and 3.05, 32x512 1.89 and 1.75, 32x20 0.45 and 0.66; k=2048: 4x8192 1.80 and 2.05, 32x512 0.91 and
1.15."""


@dataclass(frozen=True)
class Problem:
    """`num_rows` is the upper bound that the host knows. `vectors`: sizes and strides are multiples of 16 elements;
    `aligned`: and rows of both operands begin at multiples of 16 bytes and lie apart."""

    kind: Literal["forward", "wgrad"]
    num_rows: int
    n: int
    k: int
    num_experts: int
    dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    vectors: bool = True
    aligned: bool = True

    @property
    def busy_experts(self) -> int:
        """At most so many experts have rows."""
        return min(self.num_experts, self.num_rows)


@dataclass(frozen=True)
class Config:
    """One tile: `forward` block_m rows by block_n columns in steps of block_k; `wgrad` block_n by block_k in steps of
    block_m rows. `group_m` row tiles walk the columns together; `num_programs` stay resident and share the tiles.
    `tma` and `flatten` as in `fp8_matmul`, of forward only."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    num_programs: int = 0
    tma: bool = False
    flatten: bool = False


AnyConfig = Config | CudaConfig


def flops(p: Problem) -> int:
    """Multiply-adds count two; as if every row had an expert."""
    return 2 * p.num_rows * p.n * p.k


def bytes(p: Problem) -> int:
    """Rows once, weights of the experts that can have rows once, the result once. wgrad writes every expert."""
    element, out = ELEMENT_BYTES[p.dtype], ELEMENT_BYTES[p.out_dtype]
    offsets = 4 * (p.num_experts + 1)
    if p.kind == "wgrad":
        return p.num_rows * (p.n + p.k) * element + p.num_experts * p.n * p.k * out + offsets
    return p.num_rows * p.k * element + p.busy_experts * p.n * p.k * element + p.num_rows * p.n * out + offsets


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    return {
        "cuda": _cuda(p, device, env),
        "triton": _triton(p, device, env),
        "torch": _torch(p, device, env),
        "cpu": _cpu(p, device, env),
    }


def preference(p: Problem, device: DeviceSpec) -> tuple[str, ...]:
    """On a CPU our kernel wins while the time is that of reading the weights, torch's matmul once it is arithmetic; on
    Hopper torch's forward wins where much is multiplied for each output."""
    rows = p.num_rows / max(p.busy_experts, 1)
    if p.kind == "forward" and device.arch == 90 and rows >= TORCH_MIN_ROWS and p.k >= TORCH_MIN_K:
        return "cuda", "torch", "triton", "cpu", "reference"
    if p.kind == "forward" and rows <= CPU_MAX_ROWS:
        return BACKENDS
    return "cuda", "triton", "torch", "cpu", "reference"


def _cuda(p: Problem, device: DeviceSpec, env: Environment) -> str:
    if p.dtype != "bfloat16" or p.out_dtype not in bf16.OUT_DTYPES[p.kind]:
        return f"takes bfloat16 and writes {' or '.join(bf16.OUT_DTYPES[p.kind])}, got {p.dtype} and {p.out_dtype}"
    if p.n % 8 or p.k % 8 or p.k == 0:
        return f"needs n and k to be multiples of 8, k at least 8, got {p.n} and {p.k}"
    if p.num_experts > bf16.CUDA_MAX_EXPERTS:
        return f"needs at most {bf16.CUDA_MAX_EXPERTS} experts, got {p.num_experts}"
    return cuda_reason("grouped_matmul" + "_wgrad" * (p.kind == "wgrad"), device, env, archs=(90,))


def _cpu(p: Problem, device: DeviceSpec, env: Environment) -> str:
    if p.dtype == "float64":
        return "float64 runs on the reference only"
    return cpu_reason("grouped_matmul", device, env)


def _triton(p: Problem, device: DeviceSpec, env: Environment) -> str:
    if p.dtype == "float64":
        return "float64 runs on the reference only"
    if p.num_experts > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, got {p.num_experts}"
    return triton_reason(device, env)


def _torch(p: Problem, device: DeviceSpec, env: Environment) -> str:
    """torch.nn.functional.grouped_mm: off its fast path it loops over experts on the host, which synchronises.

    Rows without an expert cost it launches of their own.
    """
    if "grouped_mm" not in env.torch_functions:
        return "needs torch.nn.functional.grouped_mm (torch 2.10 or newer)"
    if p.dtype == "float64":
        return "float64 runs on the reference only"
    if p.out_dtype != p.dtype:
        return "grouped_mm writes the dtype it reads"
    if (p.n | p.k) * ELEMENT_BYTES[p.dtype] % 16:
        return "grouped_mm needs rows of n and of k elements to be whole 16 bytes"
    if device.kind == "cpu":
        return ""
    if device.arch not in (90, 100) or p.dtype != "bfloat16":
        return "grouped_mm synchronises with the host except in bf16 on compute capability 9.0 and 10.0"
    if p.num_experts >= 1023:
        return f"grouped_mm needs fewer than 1023 experts, got {p.num_experts}"
    return ""


TILES = (
    # block_m, block_n, block_k, warps, stages
    (16, 64, 32, 4, 4),
    (64, 64, 32, 4, 4),
    (16, 64, 128, 4, 4),
    (16, 128, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (32, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 256, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
)
TILES_FP32 = ((16, 64, 32, 4, 3), (32, 64, 32, 4, 3), (64, 64, 32, 4, 3), (128, 64, 32, 8, 3))
TILES_WGRAD = (
    (32, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 128, 8, 3),
    (64, 128, 128, 8, 4),
    (64, 128, 256, 8, 3),
)
TILES_WGRAD_FP32 = ((32, 64, 64, 4, 2), (32, 64, 64, 4, 3))
CPU_CONFIG = Config(16, 32, 32, 2, 4, 1, 3)
"""Small, so that the interpreter meets several tiles, steps and programs on small shapes."""


def candidates(p: Problem, device: DeviceSpec, backend: str = "triton") -> Sequence[AnyConfig]:
    return bf16.candidates(_size(p), device) if backend == "cuda" else _triton_candidates(p, device)


def _size(p: Problem) -> bf16.Size:
    experts = p.num_experts if p.kind == "wgrad" else max(p.busy_experts, 1)
    rows = max(ceil_div(p.num_rows, max(experts, 1)), 1)
    return bf16.Size(p.kind, rows, p.n, p.k, experts, experts > 1, bytes(p))


def _triton_candidates(p: Problem, device: DeviceSpec) -> list[Config]:
    tma = _descriptor_reason(p) == ""
    if device.kind == "cpu":
        return [replace(CPU_CONFIG, tma=tma, flatten=tma)]
    fp32 = p.dtype == "float32"
    tiles: tuple[tuple[int, int, int, int, int], ...]
    if p.kind == "wgrad":
        tiles = TILES_WGRAD_FP32 if fp32 else TILES_WGRAD
    else:
        tiles = TILES_FP32 if fp32 else TILES
    configs = [Config(m, n, k, 8, warps, stages) for m, n, k, warps, stages in tiles]
    if device.arch >= 90 and tma:
        configs += [replace(c, tma=True, flatten=True) for c in configs]
    return [replace(c, num_programs=device.num_sms * resident(c, p, device)) for c in configs]


def _descriptor_reason(p: Problem) -> str:
    """Why tensor descriptors cannot address the operands; empty if they can."""
    if p.kind == "wgrad" or p.dtype not in ("bfloat16", "float16"):
        return "tensor descriptors load the 16-bit operands of forward"
    if not (p.vectors and p.aligned):
        return "tensor descriptors need rows that begin at multiples of 16 bytes"
    if p.num_experts * p.k == 0 or max(p.num_rows, p.n, p.k) > MAX_COORDINATE:
        return f"tensor descriptors address 1 to {MAX_COORDINATE} rows and columns"
    return ""


def _per_step(c: Config, p: Problem) -> int:
    """Elements of one step's operand tiles."""
    return (c.block_m + c.block_n) * c.block_k if p.kind == "forward" else c.block_m * (c.block_n + c.block_k)


def shared_memory(c: Config, p: Problem) -> int:
    """Bytes of the operand tiles in flight, and a little for barriers; with `flatten` also of a tile's sums, which are
    put in order beside the next tile's operands."""
    beside = c.block_m * c.block_n * ELEMENT_BYTES[p.out_dtype] if c.flatten else 0
    return c.num_stages * _per_step(c, p) * ELEMENT_BYTES[p.dtype] + beside + 1024


def accumulators(c: Config, p: Problem) -> int:
    """fp32 registers that one thread accumulates in."""
    return (c.block_m if p.kind == "forward" else c.block_k) * c.block_n // (32 * c.num_warps)


def operands(c: Config, p: Problem) -> int:
    """Elements of one step's operand tiles that one thread loads."""
    return _per_step(c, p) // (32 * c.num_warps)


def resident(c: Config, p: Problem, device: DeviceSpec) -> int:
    """Programs that fit on one SM: by shared memory, and by registers at twice the accumulators and 64 besides."""
    registers = 32 * c.num_warps * min(2 * accumulators(c, p) + 64, 255)
    return max(1, min(device.shared_memory // shared_memory(c, p), 65536 // registers, 4))


def is_legal(c: AnyConfig, p: Problem, device: DeviceSpec) -> str:
    if isinstance(c, CudaConfig):
        return bf16.is_legal(c, p.kind)
    if device.kind == "cpu":
        return ""
    if c.tma and (device.arch < 90 or _descriptor_reason(p)):
        return _descriptor_reason(p) or "tensor descriptors need compute capability 9.0"
    if shared_memory(c, p) > device.shared_memory:
        return f"needs {shared_memory(c, p)} bytes of shared memory, {device.name} has {device.shared_memory}"
    if c.flatten and not c.tma:
        return "one loop over tiles and k needs the loads of descriptors"
    if not p.vectors and operands(c, p) > 32:
        return f"loads {operands(c, p)} operands a thread one by one, 32 leave room for their addresses"
    most = 128 if device.arch in (90, 100) else 64  # wgmma reads its operands from shared memory, mma from registers
    if accumulators(c, p) > most:
        return f"needs {accumulators(c, p)} accumulators a thread, {most} leave room for the rest"
    return ""


def cost(c: AnyConfig, p: Problem, device: DeviceSpec) -> float:
    """Seconds, if every busy expert had the average number of rows.

    Triton: waves of resident programs, each as long as its tile's matmul or its tile's loads from L2, whichever is
    longer. A tensor core below 64 rows runs at about half its rate. Without descriptors the threads' copies come on
    top.
    """
    if isinstance(c, CudaConfig):
        return bf16.seconds(c, _size(p), device)
    element = ELEMENT_BYTES[p.dtype]
    rows = ceil_div(p.num_rows, max(p.busy_experts, 1))
    if p.kind == "wgrad":
        tiles = p.num_experts * ceil_div(p.n, c.block_n) * ceil_div(p.k, c.block_k)
        depth = ceil_div(ceil_div(p.num_rows, max(p.num_experts, 1)), c.block_m) * c.block_m
        height, width = c.block_n, c.block_k
    else:
        tiles = p.busy_experts * ceil_div(rows, c.block_m) * ceil_div(p.n, c.block_n)
        depth = ceil_div(p.k, c.block_k) * c.block_k
        height, width = c.block_m, c.block_n
    share = max(c.num_programs // device.num_sms, 1)
    rate = device.rate(RATES[p.dtype]) / device.num_sms / share * (1.0 if height >= 64 else 0.5)
    l2 = 1.5 * device.bandwidth / device.num_sms / share
    tile = max(2 * height * width * depth / rate, (height + width) * depth * element / l2)
    copies = 0 if c.tma else tiles * (height + width) * depth * element / 16
    return ceil_div(tiles, c.num_programs) * tile + copies * COPY_OPERATIONS / (device.rate("fp32") / 2)


def select(p: Problem, device: DeviceSpec, backend: str) -> AnyConfig | None:
    if backend == "cuda":
        return min(candidates(p, device, backend), key=lambda c: cost(c, p, device))
    if backend != "triton":
        return None
    legal = [c for c in _triton_candidates(p, device) if not is_legal(c, p, device)]
    return min(legal, key=lambda c: (cost(c, p, device), c.block_m, c.block_n, c.num_stages))
