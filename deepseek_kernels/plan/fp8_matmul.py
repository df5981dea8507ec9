"""Plan of `fp8_matmul`: which tile, how many of them, and how k is shared out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from ..device import DeviceSpec
from ..shapes import BLOCK, ceil_div
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
    together; `split_k`: slices of k that are summed apart."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    swap: bool = False
    split_k: int = 1
    group_m: int = 1
    native_fp8: bool = True


@dataclass(frozen=True)
class CudaConfig:
    """Of the Hopper kernel: a compiled instance, `ctas` blocks that stay, `raster` rows of clusters walked together."""

    tile_m: int
    tile_n: int
    stages: int
    cluster: int
    raster: int = 1
    ctas: int = 1


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
    """Many rows on Hopper go to cuBLASLt before Triton: published measurements of large m have it at 1000 to 1240
    TFLOP/s, between 1.1 times DeepGEMM and par, and straightforward Triton at a third of that; at 128 rows and fewer it
    is the slowest (pytorch/ao#2784, vllm#49932). Only whole blocks, where no operand is padded or copied and the result
    is written as it is asked for: that is what torch itself tests. A validated CUDA kernel goes before both."""
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
    if p.granularity_b != "128x128":
        return f"takes 128x128 scales of b, got {p.granularity_b}"
    if p.accumulate:
        return "does not accumulate"
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
    # tile_m, tile_n, stages, cluster
    "bfloat16": (
        (128, 128, 5, 1),
        (128, 128, 5, 2),
        (64, 128, 8, 1),
        (64, 64, 10, 1),
        (64, 32, 12, 1),
        (64, 16, 12, 1),
    ),
    "float32": ((128, 128, 4, 1), (128, 128, 4, 2), (64, 64, 10, 1)),
}
"""What csrc/fp8_matmul/launch.cu compiles."""
SPLITS = (1, 2, 4, 8, 16)
MAX_SPLIT_ROWS = 256
"""Above, the tiles fill the device without sharing out k."""


def candidates(p: Problem, device: DeviceSpec, backend: str = "triton") -> Sequence[Config | CudaConfig]:
    if backend == "cuda":
        return [_cuda_config(p, device, *i) for i in INSTANCES.get(p.out_dtype, ())]
    if device.kind == "cpu":  # what the interpreter checks: every path of the kernel over the shapes of the tests
        few = p.m <= 16
        return [Config(16 if few else 32, 64, 4, 3, few, 2 if few else 1, 2, native_fp8=False)]
    splits = [s for s in SPLITS if s == 1 or (p.m <= MAX_SPLIT_ROWS and s <= p.blocks)]
    configs = []
    for tile in TILES_HOPPER if device.arch >= 90 else TILES:
        config = replace(Config(*tile), native_fp8=device.arch >= 89)
        concurrent = device.num_sms * resident(config, device)
        group = _group(ceil_div(p.m, config.block_m), config.block_m, config.block_n, concurrent)
        configs += [replace(config, split_k=s, group_m=group) for s in splits]
    return [c for c in configs if not is_legal(c, p, device)]


def _cuda_config(p: Problem, device: DeviceSpec, tile_m: int, tile_n: int, stages: int, cluster: int) -> CudaConfig:
    clusters_m = ceil_div(p.m, tile_m * cluster)
    clusters = min(clusters_m * ceil_div(p.n, tile_n), max(device.num_sms // cluster, 1))
    raster = _group(clusters_m, tile_m * cluster, tile_n, device.num_sms // cluster)
    return CudaConfig(tile_m, tile_n, stages, cluster, raster, max(clusters, 1) * cluster)


def _group(tiles_m: int, block_m: int, block_n: int, concurrent: int) -> int:
    """Rows of tiles to walk together so that the tiles that run at the same time touch the fewest rows of a and b: a
    power of two near the square root, and no more than there are."""
    group = 1
    while group < tiles_m and 2 * group <= 1.5 * sqrt(concurrent * block_n / block_m):
        group *= 2
    return group


def shared_memory(c: Config) -> int:
    """Bytes of the operand tiles in flight, and a little for scales and barriers."""
    return c.num_stages * (c.block_m + c.block_n) * BLOCK + 1024


def is_legal(c: Config | CudaConfig, p: Problem, device: DeviceSpec) -> str:
    """Why not; empty if it is."""
    if isinstance(c, CudaConfig):
        known = (c.tile_m, c.tile_n, c.stages, c.cluster) in INSTANCES.get(p.out_dtype, ())
        return "" if known else "not among the compiled instances"
    if shared_memory(c) > device.shared_memory:
        return f"needs {shared_memory(c)} bytes of shared memory, the device has {device.shared_memory}"
    if p.granularity_b == "1x128" and device.arch >= 100 and c.block_m * c.block_n > 32 * 32 * c.num_warps:
        return "a scale for each row of b leaves registers for at most 32 sums a thread"
    if c.split_k > 1 and c.split_k > p.blocks:
        return f"cannot cut {p.blocks} blocks of k into {c.split_k}"
    return ""


def resident(c: Config, device: DeviceSpec) -> int:
    """Programs that one SM holds, by shared memory and by registers (sums, products and about 64 more a thread)."""
    threads = 32 * c.num_warps
    registers = threads * min(2 * c.block_m * c.block_n // threads + 64, 255)
    return max(1, min(device.shared_memory // shared_memory(c), 65536 // registers))


# What a tile waits for, beyond the data sheet. Round figures of published micro-benchmarks.
L2_BYTES_PER_SM = 64e9  # per second
MEMORY_LATENCY = 1e-6  # seconds from a load to its data, under traffic
LAUNCH = 3e-6  # seconds that a second kernel costs
DECODE_OPERATIONS = 3  # per e4m3 value where the tensor cores take none


def cost(c: Config | CudaConfig, p: Problem, device: DeviceSpec) -> float:
    """Seconds: waves of tiles, each as long as the slower of its math and its reads, and never less than the memory
    traffic of the whole problem."""
    return _cost_cuda(c, p, device) if isinstance(c, CudaConfig) else _cost_triton(c, p, device)


def _cost_cuda(c: CudaConfig, p: Problem, device: DeviceSpec) -> float:
    tiles = ceil_div(ceil_div(p.m, c.tile_m), c.cluster) * c.cluster * ceil_div(p.n, c.tile_n)
    math, promotion = _math(c.tile_m, c.tile_n, device), _promotion(c.tile_m, c.tile_n, device)
    # two warpgroups take turns: one scales while the other multiplies; one alone does both
    math = max(math, promotion) if c.tile_m > 64 else math + promotion
    read = _read((min(c.tile_m, p.m) + c.tile_n / c.cluster) * BLOCK, c.stages - 1)
    seconds = ceil_div(tiles, device.num_sms) * (max(p.blocks, 1) * _overlap(math, read) + MEMORY_LATENCY)
    return _overlap(seconds, bytes(p) / device.bandwidth)


def _cost_triton(c: Config, p: Problem, device: DeviceSpec) -> float:
    tiles = ceil_div(p.m, c.block_m) * ceil_div(p.n, c.block_n) * c.split_k
    programs = resident(c, device)
    busy = min(programs, ceil_div(tiles, device.num_sms))
    math = _math(c.block_m, c.block_n, device) + _promotion(c.block_m, c.block_n, device)
    if not c.native_fp8:
        math += (c.block_m + c.block_n) * BLOCK * DECODE_OPERATIONS / (device.rate("fp32") / 2 / device.num_sms)
    read = _read(busy * (c.block_m + c.block_n) * BLOCK, c.num_stages - 1)
    waves = ceil_div(tiles, device.num_sms * programs)
    steps = max(ceil_div(p.blocks, c.split_k), 1)
    seconds = waves * (steps * _overlap(busy * math, read) + MEMORY_LATENCY)
    traffic = bytes(p)
    if c.split_k > 1:
        seconds += LAUNCH
        traffic += 8 * c.split_k * p.m * p.n
    return _overlap(seconds, traffic / device.bandwidth)


def _overlap(a: float, b: float) -> float:
    """What runs at the same time takes as long as the longer, and a little more: nothing overlaps perfectly."""
    return max(a, b) + 0.1 * min(a, b)


def _math(block_m: int, block_n: int, device: DeviceSpec) -> float:
    return 2 * block_m * block_n * BLOCK / (device.rate("fp8") / device.num_sms)


def _promotion(block_m: int, block_n: int, device: DeviceSpec) -> float:
    return 2 * block_m * block_n / (device.rate("fp32") / device.num_sms)


def _read(step_bytes: float, steps_ahead: int) -> float:
    """Seconds of one step's loads on one SM: by the rate of L2, and by how many steps are under way."""
    return max(step_bytes / L2_BYTES_PER_SM, MEMORY_LATENCY / max(steps_ahead, 1))


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | CudaConfig | None:
    """The cheapest candidate; among equals fewer slices, then the larger tile."""
    if backend not in ("cuda", "triton"):
        return None

    def order(c: Config | CudaConfig) -> tuple[float, ...]:
        if isinstance(c, CudaConfig):
            return cost(c, p, device), -c.tile_m * c.tile_n
        return cost(c, p, device), c.split_k, -c.block_m * c.block_n

    options: Sequence[Config | CudaConfig] = candidates(p, device, backend)
    return min(options, key=order)
