"""Plan of `fp8_matmul`: which tile, how many of them, and how k is shared out."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

from ..device import DeviceSpec
from ..shapes import BLOCK, ceil_div
from . import _fp8_hopper as hopper
from . import _fp8_wgrad as wgrad
from . import grouped_matmul as grouped
from ._fp8_wgrad import WgradConfig
from .backend import BACKENDS, Environment, cpu_reason, cuda_reason, triton_reason

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SCALE_B_ROWS = {"128x128": BLOCK, "1x128": 1}
"""Granularity of b -> rows of b that share one scale."""


@dataclass(frozen=True)
class Problem:
    m: int
    n: int
    k: int
    granularity_b: str = "128x128"
    out_dtype: str = "bfloat16"
    bias_dtype: str = ""  # empty: no bias
    accumulate: bool = False

    @property
    def blocks(self) -> int:
        """Steps of 128 along k."""
        return ceil_div(self.k, BLOCK)


@dataclass(frozen=True)
class Config:
    """Of the Triton kernel. `swap`: the transposed tile, weights as rows; `group_m`: rows of tiles that are walked
    together; `split_k`: slices of k that are summed apart, `num_programs` stay and share the tiles of each. `tma`:
    tensor descriptors load the operands; `flatten`: the loops over tiles and k are one, so that the loads of a tile
    begin while the one before is finished."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    swap: bool = False
    split_k: int = 1
    group_m: int = 1
    native_fp8: bool = True
    num_programs: int = 1
    tma: bool = False
    flatten: bool = False


@dataclass(frozen=True)
class CudaConfig(hopper.Tile):
    """Of the Hopper kernel: a compiled instance, `ctas` blocks that stay, `raster` rows of clusters walked together."""

    raster: int = 1
    ctas: int = 1


AnyConfig = Config | CudaConfig | WgradConfig


def flops(p: Problem) -> int:
    """A multiply and an add for each product of elements."""
    return 2 * p.m * p.n * p.k


def bytes(p: Problem) -> int:
    """Operands and scales once, the result once (twice where it is added to)."""
    scales = (p.m + ceil_div(p.n, SCALE_B_ROWS[p.granularity_b])) * p.blocks * 4
    out = p.m * p.n * ELEMENT_BYTES[p.out_dtype] * (1 + p.accumulate)
    bias = p.n * ELEMENT_BYTES[p.bias_dtype] if p.bias_dtype else 0
    return (p.m + p.n) * p.k + scales + out + bias


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    return {
        "cuda": _cuda(p, device, env),
        "triton": triton_reason(device, env),
        "cpu": _cpu(p, device, env),
        "torch": _torch(p, device, env),
    }


LIBRARY_MIN_ROWS = 1024
"""Rows from which torch's block-scaled matmul goes before Triton on compute capability 9.0."""


def preference(p: Problem, device: DeviceSpec) -> tuple[str, ...]:
    """Where there is no CUDA kernel, many rows on Hopper go to cuBLASLt before Triton: it has 1108 to 1255 TFLOP/s at
    1024 and 4096 rows on an H200, and takes 1.1 to 2.1 times as long as CUDA at 64. Only whole blocks, where no operand
    is padded or copied and the result is written as it is asked for: that is what torch itself tests."""
    whole = p.m % 4 == p.n % BLOCK == p.k % BLOCK == 0
    direct = not p.accumulate and (p.out_dtype, p.bias_dtype) in (
        ("bfloat16", ""), ("bfloat16", "bfloat16"), ("float32", ""),
    )  # fmt: skip
    if device.arch == 90 and p.m >= LIBRARY_MIN_ROWS and whole and direct:
        return ("cuda", "torch", "triton", "cpu", "reference")
    return BACKENDS


def _torch(p: Problem, device: DeviceSpec, env: Environment) -> str:
    """On a GPU torch.nn.functional.scaled_mm, by the rules of torch and cuBLASLt for 1x128 and 128x128 scales."""
    if device.kind == "cpu":
        return ""
    if "scaled_mm" not in env.torch_functions:
        return "needs torch.nn.functional.scaled_mm (torch 2.10 or newer)"
    if device.arch != 90:
        return f"scaled_mm takes 128-wide blocks on compute capability 9.0 only, the device has {device.arch / 10:.1f}"
    if env.cuda < (12, 9):
        return f"scaled_mm takes 128-wide blocks from CUDA 12.9 on, this torch has {'.'.join(map(str, env.cuda))}"
    if p.n % 16:
        return f"scaled_mm needs n of a multiple of 16, got {p.n}"
    if p.k == 0:
        return "scaled_mm needs k of at least 16"
    return ""


def _cpu(p: Problem, device: DeviceSpec, env: Environment) -> str:
    if p.granularity_b != "128x128":
        return f"takes 128x128 scales of b, got {p.granularity_b}"
    return cpu_reason("fp8_matmul", device, env)


def _cuda(p: Problem, device: DeviceSpec, env: Environment) -> str:
    if p.granularity_b == "1x128" and (p.out_dtype != "float32" or p.bias_dtype):
        return "with 1x128 scales of b, writes fp32 without a bias: a weight gradient"
    if p.out_dtype == "float16" or p.bias_dtype == "float16":
        return "reads and writes bf16 and fp32, not fp16"
    if p.k == 0:
        return "needs k of at least 16"
    return cuda_reason("fp8_matmul", device, env, archs=(90,))


TILES = (
    # block_m, block_n, warps, stages
    (16, 32, 4, 6),
    (16, 64, 4, 6),
    (16, 128, 4, 4),
    (32, 64, 4, 6),
    (32, 128, 4, 4),
    (64, 64, 4, 4),
    (64, 128, 8, 3),
    (64, 128, 8, 4),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
    (128, 128, 8, 4),
)
TILES_HOPPER = (
    # block_m, block_n, warps, stages, swap
    (16, 64, 4, 4, True),
    (16, 64, 4, 6, True),
    (16, 128, 4, 4, True),
    (16, 128, 4, 6, True),
    (32, 64, 4, 6, True),
    (32, 128, 4, 4, True),
    (64, 64, 4, 4),
    (64, 64, 4, 6),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 128, 4, 6),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
    (128, 128, 8, 4),
    (128, 128, 8, 5),
)
"""From compute capability 9.0 the tensor cores take e4m3 in 64 rows, and fewer only as fp16: few tokens are columns."""
INSTANCES = {
    # tile_m, tile_n, cluster_m, cluster_n, swap, cluster_k
    "bfloat16": (
        (16, 64, 1, 1, True, 1),
        (16, 64, 1, 1, True, 2),
        (16, 64, 1, 1, True, 4),
        (16, 128, 1, 1, True, 1),
        (32, 64, 1, 1, True, 4),
        (32, 128, 1, 1, True, 1),
        (64, 64, 1, 1, True, 2),
        (64, 64, 1, 1, True, 4),
        (64, 128, 1, 2, True, 1),
        (64, 16, 1, 1, False, 1),
        (64, 32, 1, 1, False, 1),
        (128, 32, 1, 2, False, 1),
        (128, 64, 1, 2, False, 1),
        (128, 128, 1, 2, False, 1),
        (128, 192, 1, 1, False, 1),
        (256, 128, 1, 2, False, 1),
    ),
    "float32": ((64, 64, 1, 1, False, 1), (128, 128, 1, 1, False, 1)),
}
"""What csrc/fp8_matmul/launch_*.cu compile."""
TRIALS = ((32, 64, 1, 1, True, 4), (64, 64, 1, 1, True, 2), (64, 64, 1, 1, True, 4))
"""Of these, what no GPU has run yet: chosen only where `tune` has measured them. The model has them 10 to 25 % below
the others for 33 to 128 tokens and few columns (docs/performance/fp8_matmul.md)."""
SPLITS = (1, 2, 4, 8, 16)
MAX_SPLIT_ROWS = 256
"""Above, the tiles fill the device without sharing out k."""


def candidates(p: Problem, device: DeviceSpec, backend: str = "triton") -> Sequence[AnyConfig]:
    if backend == "cuda" and p.granularity_b == "1x128":
        return wgrad.candidates(_wgrad_size(p), device)
    if backend == "cuda":
        return [_cuda_config(p, device, hopper.Tile(*i)) for i in INSTANCES.get(p.out_dtype, ())]
    if device.kind == "cpu":  # what the interpreter checks: every path of the kernel over the shapes of the tests
        few, tma = p.m <= 16, p.m > 16 and p.k > 0
        return [Config(16 if few else 32, 64, 4, 3, few, 2 if few else 1, 2, False, 2, tma, tma)]
    configs = [Config(*tile, native_fp8=device.arch >= 89) for tile in TILES]
    if device.arch >= 90:
        configs = [Config(*tile, tma=tma) for tma in (True, False) for tile in TILES_HOPPER]
        configs = [replace(c, flatten=_can_flatten(c, p)) for c in configs]
    splits = [s for s in SPLITS if s == 1 or (p.m <= MAX_SPLIT_ROWS and s <= p.blocks)]
    shared_out = [_shared_out(replace(c, split_k=s), p, device) for c in configs for s in splits]
    return [c for c in shared_out if not is_legal(c, p, device)]


def _can_flatten(c: Config, p: Problem) -> bool:
    """Whether there are registers for one loop over tiles and steps: not beside scales of columns, which swapping makes
    of those of rows, nor addresses of operands, nor what is added to or stored element by element."""
    in_vectors = p.n % 16 == 0 and not p.accumulate
    return c.tma and not c.swap and p.granularity_b == "128x128" and in_vectors


def _shared_out(c: Config, p: Problem, device: DeviceSpec) -> Config:
    """With as many programs as run at the same time, and the order of tiles that suits them."""
    tiles_m, concurrent = ceil_div(p.m, c.block_m), device.num_sms * resident(c, p, device)
    group = hopper.group_of(tiles_m, c.block_m, c.block_n, concurrent)
    programs = min(tiles_m * ceil_div(p.n, c.block_n), concurrent // c.split_k)
    return replace(c, group_m=group, num_programs=max(1, programs))


def _wgrad_size(p: Problem) -> wgrad.Size:
    return wgrad.Size(p.m, p.n, 1, p.blocks, bytes(p), p.accumulate)


def _cuda_config(p: Problem, device: DeviceSpec, t: hopper.Tile) -> CudaConfig:
    ctas = hopper.ctas(t, hopper.clusters(t, [p.m], p.n), device)
    return CudaConfig(*astuple(t), hopper.raster(t, p.m, device), ctas)


def _instance(c: AnyConfig) -> tuple[int | bool, ...]:
    """The compiled instance that `c` asks for, if it is one of a CUDA kernel."""
    return astuple(c)[: len(fields(hopper.Tile))] if isinstance(c, CudaConfig) else ()


def shared_memory(c: Config, p: Problem) -> int:
    """Bytes of the operand tiles in flight, and a little for scales and barriers. Where they stay in flight while a
    tile is finished, its sums are put in order beside them, else in their place."""
    exact = c.split_k > 1 or p.accumulate or p.bias_dtype
    beside = c.block_m * c.block_n * (4 if exact else ELEMENT_BYTES[p.out_dtype]) if c.flatten else 0
    return c.num_stages * (c.block_m + c.block_n) * BLOCK + beside + 1024


def is_legal(c: AnyConfig, p: Problem, device: DeviceSpec) -> str:
    """Why not; empty if it is."""
    if isinstance(c, WgradConfig):
        return wgrad.is_legal(c)
    if isinstance(c, CudaConfig):
        return "" if _instance(c) in INSTANCES.get(p.out_dtype, ()) else "not among the compiled instances"
    if shared_memory(c, p) > device.shared_memory:
        return f"needs {shared_memory(c, p)} bytes of shared memory, the device has {device.shared_memory}"
    if c.tma and 0 < device.arch < 90:
        return "tensor descriptors need compute capability 9.0"
    if c.tma and (p.k == 0 or max(p.m, p.n, p.k) > grouped.MAX_COORDINATE):
        return f"tensor descriptors address 1 to {grouped.MAX_COORDINATE} rows and columns"
    if c.flatten and not _can_flatten(c, p):
        return "one loop over tiles and k leaves no registers for addresses, scales of columns, or lone elements"
    if c.block_m >= 2 * max(p.m, 16) and device.kind != "cpu":
        return "half of the tile would be padding"
    many = c.block_m * c.block_n > 32 * 32 * c.num_warps
    if many and p.granularity_b == "1x128" and (device.arch >= 100 or device.arch == 90 and not c.tma):
        return "a scale for each row of b leaves registers for at most 32 sums a thread"
    if many and device.arch >= 100 and c.tma and not c.flatten:
        return "descriptors in a loop of their own leave registers for at most 32 sums a thread"
    if c.swap and p.accumulate and c.block_m > 16 and device.arch >= 100:
        return "a transposed tile that is added to leaves registers for 16 columns"
    if many and not c.native_fp8 and device.kind != "cpu":
        return "operands to decode leave registers for at most 32 sums a thread"
    if c.split_k > 1 and c.split_k > p.blocks:
        return f"cannot cut {p.blocks} blocks of k into {c.split_k}"
    return ""


def resident(c: Config, p: Problem, device: DeviceSpec) -> int:
    """Programs that one SM holds, by shared memory and by registers: of a thread its sums and products, scales of
    columns and operands to decode where there are any, and about 64 more."""
    threads = 32 * c.num_warps
    registers = 2 * c.block_m * c.block_n // threads + 64
    registers += 64 * (p.granularity_b == "1x128") + (c.block_m + c.block_n) * BLOCK // threads * (not c.native_fp8)
    return max(1, min(device.shared_memory // shared_memory(c, p), 65536 // (threads * min(registers, 255))))


# What a tile waits for, beyond the data sheet. Round figures of published micro-benchmarks.
LAUNCH = 3e-6  # seconds that a second kernel costs
DECODE_OPERATIONS = 3  # per e4m3 value where the tensor cores take none


def cost(c: AnyConfig, p: Problem, device: DeviceSpec) -> float:
    """Seconds: waves of tiles, each as long as the slower of its math and its reads, and never less than the memory
    traffic of the whole problem."""
    if isinstance(c, WgradConfig):
        return wgrad.seconds(c, _wgrad_size(p), device)
    return _cost_cuda(c, p, device) if isinstance(c, CudaConfig) else _cost_triton(c, p, device)


def _cost_cuda(c: CudaConfig, p: Problem, device: DeviceSpec) -> float:
    clusters = hopper.clusters(c, [p.m], p.n)
    return hopper.seconds(c, clusters, p.m, p.k, ELEMENT_BYTES[p.out_dtype], bytes(p), device)


def _cost_triton(c: Config, p: Problem, device: DeviceSpec) -> float:
    tiles = ceil_div(p.m, c.block_m) * ceil_div(p.n, c.block_n) * c.split_k
    programs = resident(c, p, device)
    busy = min(programs, ceil_div(tiles, device.num_sms))
    math = _math(c.block_m, c.block_n, device) + _promotion(c.block_m, c.block_n, device)
    loaded = (c.block_m + c.block_n) * BLOCK
    if not c.native_fp8:
        math += loaded * DECODE_OPERATIONS / (device.rate("fp32") / 2 / device.num_sms)
    if not c.tma:
        math += loaded / 16 * grouped.COPY_OPERATIONS / (device.rate("fp32") / 2 / device.num_sms)
    read = _read(busy * loaded, c.num_stages - 1)
    waves = ceil_div(tiles, device.num_sms * programs)
    steps = max(ceil_div(p.blocks, c.split_k), 1)
    seconds = waves * steps * hopper.overlap(busy * math, read)
    seconds += hopper.MEMORY_LATENCY * (1 if c.flatten else waves)
    traffic = bytes(p)
    if c.split_k > 1:
        seconds += LAUNCH
        traffic += 8 * c.split_k * p.m * p.n
    return hopper.overlap(seconds, traffic / device.bandwidth)


def _math(block_m: int, block_n: int, device: DeviceSpec) -> float:
    return 2 * block_m * block_n * BLOCK / (device.rate("fp8") / device.num_sms)


def _promotion(block_m: int, block_n: int, device: DeviceSpec) -> float:
    return 2 * block_m * block_n / (device.rate("fp32") / device.num_sms)


def _read(step_bytes: float, steps_ahead: int) -> float:
    """Seconds of one step's loads on one SM: by the rate of L2, and by how many steps are under way."""
    return max(step_bytes / hopper.L2_BYTES_PER_SM, hopper.MEMORY_LATENCY / max(steps_ahead, 1))


def select(p: Problem, device: DeviceSpec, backend: str) -> AnyConfig | None:
    """The cheapest candidate; among equals fewer slices, then the larger tile."""
    if backend not in ("cuda", "triton"):
        return None

    def order(c: AnyConfig) -> tuple[float, ...]:
        if isinstance(c, hopper.Tile):
            return cost(c, p, device), -c.tile_m * c.tile_n
        return cost(c, p, device), c.split_k, -c.block_m * c.block_n

    return min((c for c in candidates(p, device, backend) if _instance(c) not in TRIALS), key=order)
