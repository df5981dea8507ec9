"""Inputs of `mla_cache_write` and `mla_rope`."""

import torch

from ...reference.mla_cache_write import decode_rows
from ..compare import SUM, Tolerance
from . import Bad, Sample

FP8_ROWS = Tolerance(steps=2 * 2**20, absolute=1e-6, distance=1e-5)
"""Dequantised rows: the norm's summation order may move a value across the middle of two e4m3 numbers, which are up to
2**-3 apart; `distance` keeps that rare."""


def angles(max_positions: int, d_rope: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, d_rope, 2) / d_rope)
    angle = torch.arange(max_positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def write(g: torch.Generator) -> list[Sample]:
    def case(
        name, t, d_latent=512, d_rope=64, dtype=torch.bfloat16, cache=None, norm=True, page_size=4, pages=5,
        slots=None, positions=None, index=torch.int64, kwargs=None, **options,
    ):  # fmt: skip
        fp8 = cache == torch.uint8
        c_kv = torch.randn(t, d_latent, generator=g).to(dtype)
        k_rope = torch.randn(t, d_rope, generator=g).to(dtype)
        weight = (1 + 0.1 * torch.randn(d_latent, generator=g)).to(dtype) if norm else None
        positions = torch.randint(0, 16, (t,), generator=g) if positions is None else torch.tensor(positions)
        slots = torch.randperm(pages * page_size, generator=g)[:t] if slots is None else torch.tensor(slots)
        width = 656 if fp8 else d_latent + d_rope
        wide = torch.zeros(pages, page_size + 1, width + 16, dtype=cache or dtype)  # the view below has gaps
        if not fp8:
            wide.normal_(generator=g)
        kv_cache = wide[:, 1:, :width] if pages else torch.empty(0, page_size, width, dtype=cache or dtype)
        args = (c_kv, k_rope, weight, angles(16, d_rope), positions.to(index), kv_cache, slots.to(index))
        defined = (lambda rows: (decode_rows(rows.flatten(0, 1)),)) if fp8 else None
        tolerance = FP8_ROWS if fp8 else SUM
        return Sample(name, args, kwargs or {}, tolerance, ("kv_cache",), defined=defined, **options)

    return [
        case("bf16", 7, any_strides=("c_kv", "k_rope")),
        case("fp8", 6, cache=torch.uint8),
        case("fp8_from_fp32", 5, dtype=torch.float32, cache=torch.uint8, norm=False),
        case("halves", 5, 256, 32, torch.float16, page_size=1, pages=9, kwargs={"interleaved": False, "eps": 1e-3}),
        case("narrow_fp32", 3, 24, 8, torch.float32, index=torch.int32),
        case("fp32_into_bf16", 3, 40, 8, torch.float32, torch.bfloat16),
        case(
            "out_of_range", 6, 16, 8, slots=[-1, 3, 20, -(2**40), 2**40, 7], positions=[0, -1, 2, 3, 2**40, -(2**40)]
        ),
        case("no_slots", 3, 16, 8, slots=[-1, -1, 20]),
        case("no_tokens", 0, 16, 8),
        case("no_pages", 2, 16, 8, pages=0, slots=[0, -1]),
    ]  # fmt: skip


def bad_write(g: torch.Generator) -> list[Bad]:
    c_kv, k_rope, weight = torch.randn(3, 512, generator=g), torch.randn(3, 64, generator=g), torch.ones(512)
    positions, slots = torch.arange(3), torch.arange(3)
    cache, fp8 = torch.zeros(2, 4, 576), torch.zeros(2, 4, 656, dtype=torch.uint8)

    def case(name, error, match, **new):
        values = dict(
            c_kv=c_kv, k_rope=k_rope, norm_weight=weight, cos_sin=angles(8, 64), positions=positions, kv_cache=cache,
            slots=slots,
        )  # fmt: skip
        return Bad(name, tuple((values | new).values()), error, f"mla_cache_write: {match}")

    short, unaligned = c_kv[:, :8], torch.zeros(2, 4, 660, dtype=torch.uint8)[..., :656]
    return [
        case("c_kv", TypeError, "c_kv: wanted dtype .* got int64", c_kv=c_kv.long()),
        case("k_rope_rows", ValueError, r"k_rope: wanted shape \[3, \*\]", k_rope=k_rope[:2]),
        case("odd_rope", ValueError, "d_rope: wanted a multiple of 2, got 63", k_rope=k_rope[:, :63]),
        case("norm_weight", ValueError, r"norm_weight: wanted shape \[512\]", norm_weight=weight[:511]),
        case("cos_sin", ValueError, r"cos_sin: wanted shape \[\*, 64\]", cos_sin=angles(8, 128)),
        case("cos_sin_empty", ValueError, "cos_sin: max_positions: wanted at least 1", cos_sin=angles(0, 64)),
        case("positions", TypeError, "positions: wanted dtype int32 or int64", positions=positions.float()),
        case("slots", ValueError, r"slots: wanted shape \[3\]", slots=torch.arange(4)),
        case("cache_width", ValueError, r"kv_cache: wanted shape \[\*, \*, 576\]", kv_cache=cache[..., :575]),
        case("cache_stride", ValueError, "kv_cache: wanted stride 1", kv_cache=cache.transpose(1, 2).contiguous().mT),
        case("fp8_width", ValueError, r"kv_cache: wanted shape \[\*, \*, 656\]", kv_cache=fp8[..., :640]),
        case("fp8_latent", ValueError, "kv_cache: wanted d_latent 512", kv_cache=fp8, c_kv=short, norm_weight=None),
        case("fp8_alignment", ValueError, r"kv_cache: stride\(1\): wanted a multiple of 16", kv_cache=unaligned),
        case("requires_grad", RuntimeError, "c_kv: requires grad", c_kv=c_kv.clone().requires_grad_()),
    ]  # fmt: skip


def rope(g: torch.Generator) -> list[Sample]:
    def case(name, t, h, d, dtype=torch.bfloat16, kwargs=None, index=torch.int64, **options):
        x = torch.randn(t, h, d, generator=g).to(dtype)
        positions = torch.randint(-2, 18, (t,), generator=g).to(index)  # some out of range
        return Sample(name, (x, angles(16, d), positions), kwargs or {}, SUM, **options)

    return [
        case("bf16", 5, 3, 64, any_strides=("x",), grad=("x",)),
        case("halves", 4, 2, 64, torch.float32, {"interleaved": False}, torch.int32, grad=("x",)),
        case("inverse", 3, 5, 24, torch.float16, {"inverse": True}, grad=("x",)),
        case("one_pair", 2, 1, 2),
        case("no_tokens", 0, 3, 64),
        case("no_heads", 2, 0, 64),
    ]


def bad_rope(g: torch.Generator) -> list[Bad]:
    x, table, positions = torch.randn(3, 2, 8, generator=g), angles(4, 8), torch.arange(3)
    return [
        Bad("dims", (x[0], table, positions), ValueError, r"mla_rope: x: wanted shape \[\*, \*, \*\]"),
        Bad("odd", (x[..., :7], table, positions), ValueError, "mla_rope: d_rope: wanted a multiple of 2, got 7"),
        Bad("table", (x, table[:, :4], positions), ValueError, r"mla_rope: cos_sin: wanted shape \[\*, 8\]"),
        Bad("table_dtype", (x, table.half(), positions), TypeError, "mla_rope: cos_sin: wanted dtype float32"),
        Bad("positions", (x, table, positions[:2]), ValueError, r"mla_rope: positions: wanted shape \[3\]"),
    ]


SAMPLES = {"mla_cache_write": write, "mla_rope": rope}
BAD = {"mla_cache_write": bad_write, "mla_rope": bad_rope}
