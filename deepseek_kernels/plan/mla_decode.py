"""Plan of `mla_decode`: tile, and how many parts each sequence is split into so that every SM has work."""

from dataclasses import dataclass

from ..device import DeviceSpec
from ..shapes import FP8_CACHE_ROW
from .backend import Environment


@dataclass(frozen=True)
class Problem:
    """`s_kv`: cached tokens of every sequence; the op, which may not look, puts max_pages * page_size."""

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

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def row_bytes(self) -> int:
        return FP8_CACHE_ROW if self.fp8_cache else (self.d_latent + self.d_rope) * self.element_bytes


def flops(p: Problem) -> int:
    """Scores over d_latent + d_rope and values over d_latent, FlashMLA's count: no discount for the mask."""
    return 2 * p.b * p.s_q * p.h_q * p.s_kv * (2 * p.d_latent + p.d_rope)


def bytes(p: Problem) -> int:
    """Queries, cached rows and outputs once each."""
    queries = p.b * p.s_q * p.h_q
    return queries * ((2 * p.d_latent + p.d_rope) * p.element_bytes + 4) + p.b * p.s_kv * p.row_bytes


def backends(p: Problem, device: DeviceSpec, env: Environment) -> dict[str, str]:
    return {}
