"""Plan of `mla_decode`: the tile, and into how many parts each sequence is split so that every SM has work."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..device import H200, DeviceSpec
from ..shapes import FP8_CACHE_ROW, align_up, ceil_div
from .backend import Environment, cpu_reason, cpu_reference_reason, cuda_reason, triton_reason


@dataclass(frozen=True)
class Problem:
    """`s_kv`: cached tokens of every sequence; the op, which may not look, puts max_pages * page_size.
    `aligned`: whether all rows of the cache begin at multiples of 16 bytes."""

    b: int
    s_q: int
    h_q: int
    s_kv: int
    d_latent: int = 512
    d_rope: int = 64
    page_size: int = 64
    dtype: str = "bfloat16"
    fp8_cache: bool = False
    causal: bool = True
    sink: bool = False
    aligned: bool = True

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def query_bytes(self) -> int:
        return (self.d_latent + self.d_rope) * self.element_bytes

    @property
    def row_bytes(self) -> int:
        return FP8_CACHE_ROW if self.fp8_cache else self.query_bytes


@dataclass(frozen=True)
class Config:
    """`block_h`: query rows (queries times heads) and `block_n`: cached tokens of a tile; `num_splits`: parts of a
    sequence, each a program of its own; `hoist`: whether the compiler may move work out of the loop over tokens."""

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int
    hoist: bool
    native_fp8: bool


@dataclass(frozen=True)
class CudaConfig:
    """`parts`: equal ones that the tokens of all sequences are cut into; each has a CTA for every 64 query rows.
    `cluster`: of those CTAs, how many fetch the cache together."""

    parts: int
    cluster: int


def flops(p: Problem) -> int:
    """Scores over d_latent + d_rope and values over d_latent, FlashMLA's count: no discount for the mask."""
    return 2 * p.b * p.s_q * p.h_q * p.s_kv * (2 * p.d_latent + p.d_rope)


def bytes(p: Problem) -> int:
    """Queries, cached rows and outputs once each."""
    queries = p.b * p.s_q * p.h_q
    return queries * (p.query_bytes + p.d_latent * p.element_bytes + 4) + p.b * (p.s_kv * p.row_bytes + 4)


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    geometry = "" if p.d_latent in (256, 512) else f"handles d_latent 256 and 512, got {p.d_latent}"
    return {
        "cuda": _hopper_reason(p) or cuda_reason("mla_decode", device, env, archs=(90,)),
        "triton": geometry or triton_reason(device, env),
        "cpu": cpu_reason("mla_decode", device, env),
        "torch": cpu_reference_reason(device),
    }


def _hopper_reason(p: Problem) -> str:
    if p.dtype not in ("bfloat16", "float16") or p.fp8_cache:
        return f"takes bf16 and fp16, got {'FP8' if p.fp8_cache else p.dtype}"
    if (p.d_latent, p.d_rope) != (512, 64):
        return f"handles d_latent 512, got {p.d_latent}"
    if p.page_size % _BOX:
        return f"loads {_BOX} tokens of a page and more at once, got pages of {p.page_size}"
    return "" if p.aligned else f"loads rows one after the other at multiples of {ALIGNMENT} bytes, kv_cache has others"


ALIGNMENT = 16
_BOX = 8
_EVERY = (80, 89, 90, 100)
_TILES = {  # block_h, block_n, num_warps, num_stages, hoist, architectures on which it does not spill
    "16 bit": (
        (16, 32, 4, 3, True, _EVERY),
        (32, 32, 8, 3, True, (80, 89, 100)),
        (32, 64, 8, 2, True, (90,)),
        # two warpgroups, whose accumulators leave no registers for what the compiler would hoist
        (64, 32, 8, 3, False, (90,)),
        (64, 64, 8, 2, False, (90,)),
    ),
    "fp8": (
        (16, 32, 8, 3, True, (80, 89, 100)),
        (16, 32, 4, 2, True, (90,)),
        (16, 64, 8, 2, True, (90,)),
        (64, 32, 8, 2, False, (90,)),
        (64, 64, 8, 2, False, (90,)),
    ),
    "fp8 to fp16": ((16, 32, 8, 3, True, _EVERY),),
    "fp32": ((16, 16, 8, 1, True, _EVERY),),
}
_SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_TOKENS_PER_SPLIT = 128  # fewer are not worth a program and its share of the merge

_TILE_LATENCY = 0.7e-6  # seconds from asking for a tile to having used it
_PROGRAM_OVERHEAD = 2e-6  # seconds: queries in, accumulator out
_LAUNCH = 3e-6  # seconds the merge adds
_MMA_EFFICIENCY = {16: 0.2, 32: 0.3, 64: 0.45}  # of the peak rate, by block_h
CUDA_ROWS, CUDA_TOKENS = 64, 128  # of queries and of the cache that a CTA of the CUDA kernel takes at once
# Assumed, for no GPU has run the CUDA kernel yet:
_CUDA_EFFICIENCY = 0.75  # of the peak rate, where the cache arrives in time
_L2_BANDWIDTH = 5.5e12  # bytes per second that all multiprocessors together read
_WIDEN = 1.1e-8  # seconds an SM takes to bring an FP8 row to 16 bits


def shared_memory(c: Config, p: Problem, arch: int) -> int:
    """Bytes a program holds, as read from the compiler's output, rounded up."""
    held = c.block_h * p.query_bytes + 1024 + c.block_h * c.block_n * p.element_bytes
    if p.fp8_cache:
        wide = c.block_n * p.query_bytes
        return held + wide + max(c.num_stages - 1, 1) * c.block_n * p.row_bytes
    tile = c.block_n * p.query_bytes
    if arch == 90 and c.block_h >= 64:  # wgmma reads every stage from shared memory
        return held + c.num_stages * tile
    return held + max(c.num_stages - 1, 1) * tile


def candidates(p: Problem, device: DeviceSpec, backend: str = "triton") -> Iterator[Config] | Iterator[CudaConfig]:
    return _cuda_candidates(p, device) if backend == "cuda" else _triton_candidates(p, device)


def _cuda_candidates(p: Problem, device: DeviceSpec) -> Iterator[CudaConfig]:
    """A CTA for each multiprocessor, as long as there are pairs of blocks for all of them."""
    device = device if device.kind == "cuda" else H200  # in the model
    tiles = _cuda_tiles(p)
    parts = max(1, min(device.num_sms // tiles, p.b * ceil_div(p.s_kv, CUDA_TOKENS)))
    for cluster in (1, 2):
        if tiles % cluster == 0:
            yield CudaConfig(parts, cluster)


def _cuda_tiles(p: Problem) -> int:
    return max(ceil_div(p.s_q * p.h_q, CUDA_ROWS), 1)


def _triton_candidates(p: Problem, device: DeviceSpec) -> Iterator[Config]:
    fp8 = "fp8" if p.dtype == "bfloat16" else "fp8 to fp16"
    kind = "fp32" if p.dtype == "float32" else fp8 if p.fp8_cache else "16 bit"
    for block_h, block_n, num_warps, num_stages, hoist, archs in _TILES[kind]:
        if device.kind == "cpu" or _family(device.arch) in archs:
            for splits in _SPLITS:
                config = Config(block_h, block_n, num_warps, num_stages, splits, hoist, device.arch >= 89)
                if not is_legal(config, p, device):
                    yield config


def _family(arch: int) -> int:
    """The newest architecture looked at that is not newer than `arch`."""
    return max((a for a in (80, 89, 90, 100) if a <= arch), default=80)


def is_legal(c: Config | CudaConfig, p: Problem, device: DeviceSpec) -> str:
    """Why `c` cannot run; empty when it can."""
    if isinstance(c, CudaConfig):
        tiles = _cuda_tiles(p)
        return _hopper_reason(p) or (f"clusters of {c.cluster} for {tiles} tiles" if tiles % c.cluster else "")
    if c.num_splits > 1 and c.num_splits * _TOKENS_PER_SPLIT > p.s_kv:
        return f"{c.num_splits} splits of {p.s_kv} tokens"
    if c.block_h > 16 and c.block_h >= 2 * p.s_q * p.h_q:
        return f"half of {c.block_h} rows and more would be padding"
    if c.block_n > 32 and p.page_size % c.block_n:
        return f"tiles of {c.block_n} tokens need pages of a multiple of that, these have {p.page_size}"
    needed = shared_memory(c, p, device.arch)
    if device.kind != "cpu" and needed > device.shared_memory:
        return f"needs {needed} bytes of shared memory, the device has {device.shared_memory}"
    return ""


def cost(c: Config | CudaConfig, p: Problem, device: DeviceSpec) -> float:
    """Seconds: waves of programs, no faster than memory allows, and the merge of the parts."""
    if isinstance(c, CudaConfig):
        return _cuda_cost(c, p, device)
    blocks = max(ceil_div(p.s_q * p.h_q, c.block_h), 1)
    resident = 8 // c.num_warps  # accumulators fill the register file
    if device.shared_memory:
        resident = max(1, min(resident, device.shared_memory // shared_memory(c, p, device.arch)))
    waves = ceil_div(p.b * c.num_splits * blocks, device.num_sms * resident)
    tiles = align_up(ceil_div(p.s_kv, c.num_splits), c.block_n) // c.block_n
    mma = 2 * c.block_h * c.block_n * (2 * p.d_latent + p.d_rope) / (
        device.rate("fp32" if p.dtype == "float32" else "bf16") * _MMA_EFFICIENCY[c.block_h]
    )  # fmt: skip
    busy = resident * device.num_sms * max(mma, c.block_n * p.row_bytes / blocks / device.bandwidth)
    if p.fp8_cache:
        busy += resident * c.block_n * _WIDEN
    seconds = waves * (_PROGRAM_OVERHEAD + tiles * max(busy, _TILE_LATENCY))
    seconds = max(seconds, bytes(p) / device.bandwidth)
    if c.num_splits > 1:
        seconds += _LAUNCH + 8 * c.num_splits * p.b * p.s_q * p.h_q * p.d_latent / device.bandwidth
    return seconds


def _cuda_cost(c: CudaConfig, p: Problem, device: DeviceSpec) -> float:
    """Seconds of the longest part, whose tiles share what they read, and of adding up partial results."""
    ctas = c.parts * _cuda_tiles(p)
    busy = min(ctas, device.num_sms)
    pairs = ceil_div(p.b * ceil_div(p.s_kv, CUDA_TOKENS), c.parts)
    mma = 2 * CUDA_ROWS * CUDA_TOKENS * (2 * p.d_latent + p.d_rope) * device.num_sms / device.rate("bf16")
    read = CUDA_TOKENS * p.row_bytes * busy
    pair = max(mma / _CUDA_EFFICIENCY, read / _cuda_tiles(p) / device.bandwidth, read / c.cluster / _L2_BANDWIDTH)
    seconds = ceil_div(ctas, device.num_sms) * (_PROGRAM_OVERHEAD + pairs * pair)
    if c.parts > 1:
        seconds += _LAUNCH + 8 * c.parts * p.s_q * p.h_q * p.d_latent / device.bandwidth
    return seconds


def select(p: Problem, device: DeviceSpec, backend: str) -> Config | CudaConfig | None:
    """Of the CUDA kernel and of the Triton one; the CPU ones have no choice."""
    if backend == "cuda":
        return min(_cuda_candidates(p, device), key=lambda c: (cost(c, p, device), c.cluster))
    if backend != "triton":
        return None
    options: Sequence[Config] = list(_triton_candidates(p, device))
    return min(options, key=lambda c: (cost(c, p, device), c.num_splits, -c.block_h, -c.block_n))
