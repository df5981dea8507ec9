"""Inputs of `fp8_grouped_matmul`."""

import torch

from ...reference.fp8_quantize import fp8_quantize
from ..compare import MATMUL
from . import Bad, Sample
from .grouped_matmul import HOSTILE, NAN, offsets


def quantized(g: torch.Generator, rows: int, n: int, k: int, num_experts: int) -> tuple[torch.Tensor, ...]:
    """a, scale_a, b, scale_b of random values whose magnitude differs from block to block."""
    a, scale_a = fp8_quantize(torch.randn(rows, k, generator=g) * torch.rand(rows, 1, generator=g).exp2())
    weights = [fp8_quantize(torch.randn(n, k, generator=g), "128x128") for _ in range(num_experts)]
    if not weights:
        return a, scale_a, a.new_empty(0, n, k), scale_a.new_empty(0, -(-n // 128), -(-k // 128))
    return a, scale_a, torch.stack([w for w, _ in weights]), torch.stack([s for _, s in weights])


def samples(g: torch.Generator) -> list[Sample]:
    def case(name, rows, n, k, expert_offsets, out_dtype=None, **options):
        a, scale_a, b, scale_b = quantized(g, rows, n, k, len(expert_offsets) - 1)
        end = int(expert_offsets[-1])
        if end >= 0:  # rows of no expert are never read
            a.view(torch.uint8)[end:] = 0x7F
            scale_a[end:] = NAN
        args = (a, scale_a, b, scale_b, expert_offsets)
        return Sample(name, args, {"out_dtype": out_dtype}, tolerance=MATMUL, **options)

    strides = ("a", "scale_a", "scale_b")
    return [
        case("bf16", 23, 40, 144, offsets(3, 3, 20, 23), any_strides=strides),
        case("fp32_out", 19, 136, 256, offsets(1, 18), torch.float32),
        case("rows_of_no_expert", 37, 24, 48, offsets(2, 18, 19)),
        case("offsets_out_of_range", 13, 24, 16, HOSTILE),
        case("no_experts", 3, 24, 16, offsets()),
        case("no_rows", 0, 24, 16, offsets(0, 0)),
        case("no_columns", 4, 0, 16, offsets(1, 4)),
        case("no_depth", 4, 24, 0, offsets(1, 4)),
    ]


def bad(g: torch.Generator) -> list[Bad]:
    a, scale_a, b, scale_b = quantized(g, 5, 16, 144, 2)
    ends = offsets(2, 5)
    op = "fp8_grouped_matmul"
    column_major = b.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(b.dtype)
    return [
        Bad("a_dtype", (a.float(), scale_a, b, scale_b, ends), TypeError, rf"{op}: a: wanted dtype float8_e4m3fn"),
        Bad("k", (a[:, :40], scale_a[:, :1], b[..., :40], scale_b[..., :1], ends), ValueError, rf"{op}: a: k: wanted"),
        Bad("n", (a, scale_a, b[:, :12], scale_b, ends), ValueError, rf"{op}: b: n: wanted a multiple of 8, got 12"),
        Bad("scale_a", (a, scale_a[:, :1], b, scale_b, ends), ValueError, rf"{op}: scale_a: wanted shape \[5, 2\]"),
        Bad("scale_b", (a, scale_a, b, scale_b[0], ends), ValueError, rf"{op}: scale_b: wanted shape \[2, 1, 2\]"),
        Bad("scale_dtype", (a, scale_a.double(), b, scale_b, ends), TypeError, rf"{op}: scale_a: wanted dtype float32"),
        Bad("b_strides", (a, scale_a, column_major, scale_b, ends), ValueError, rf"{op}: b: wanted stride 1 in the"),
        Bad("offsets", (a, scale_a, b, scale_b, ends[:2]), ValueError, rf"{op}: expert_offsets: wanted shape \[3\]"),
        Bad("out_dtype", (a, scale_a, b, scale_b, ends, torch.float16), ValueError, rf"{op}: out_dtype: wanted one of"),
    ]


def masked_samples(g: torch.Generator) -> list[Sample]:
    def case(name, m_max, n, k, *counts, out_dtype=None, **options):
        a, scale_a, b, scale_b = quantized(g, len(counts) * m_max, n, k, len(counts))
        a, scale_a = (t.unflatten(0, (len(counts), m_max)) for t in (a, scale_a))
        rows = torch.tensor(counts, dtype=torch.int32)
        unfilled = torch.arange(m_max) >= rows[:, None]
        a.view(torch.uint8)[unfilled] = 0x7F  # these rows are never used
        scale_a[unfilled] = NAN

        def filled(out):
            return (out.masked_fill(unfilled.to(out.device)[..., None], 0),)

        return Sample(
            name, (a, scale_a, b, scale_b, rows), {"out_dtype": out_dtype},
            tolerance=MATMUL, defined=filled, **options,
        )  # fmt: skip

    strides = ("a", "scale_a", "scale_b")
    return [
        case("all_filled", 5, 40, 144, 5, 5, 5),  # the first is also compared by what knows of no undefined rows
        case("some_filled", 21, 136, 256, 3, 0, 21, 17, out_dtype=torch.float32, any_strides=strides),
        case("counts_out_of_range", 6, 24, 16, -1, 7, 2**31 - 1, -(2**31), 4),
        case("nothing_filled", 6, 24, 16, 0, 0),
        case("no_experts", 6, 24, 16),
        case("no_rows", 0, 24, 16, 0, 3),
        case("no_columns", 4, 0, 16, 1, 4),
        case("no_depth", 4, 24, 0, 1, 4),
    ]


def masked_bad(g: torch.Generator) -> list[Bad]:
    a, scale_a, b, scale_b = quantized(g, 6, 16, 144, 2)
    a, scale_a = a.view(2, 3, 144), scale_a.view(2, 3, 2)
    counts = torch.tensor([3, 1], dtype=torch.int32)
    args = (a, scale_a, b, scale_b, counts)
    op = "fp8_grouped_matmul_masked"
    column_major = b.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(b.dtype)

    def case(name, error, match, *changed, **kwargs):
        return Bad(name, changed + args[len(changed) :], error, rf"{op}: {match}", kwargs)

    return [
        case("a_dtype", TypeError, "a: wanted dtype float8_e4m3fn", a.float()),
        case("a_shape", ValueError, r"a: wanted shape \[\*, \*, \*\], got", a[0]),
        case("k", ValueError, "a: k: wanted", a[..., :40], scale_a[..., :1], b[..., :40], scale_b[..., :1]),
        case("n", ValueError, "b: n: wanted a multiple of 8, got 12", a, scale_a, b[:, :12]),
        case("scale_a", ValueError, r"scale_a: wanted shape \[2, 3, 2\]", a, scale_a[..., :1]),
        case("scale_b", ValueError, r"scale_b: wanted shape \[2, 1, 2\]", a, scale_a, b, scale_b[0]),
        case("experts", ValueError, r"b: wanted shape \[2, \*, \*\]", a, scale_a, b[:1], scale_b[:1]),
        case("b_strides", ValueError, "b: wanted stride 1 in the", a, scale_a, column_major),
        case("counts", ValueError, r"counts: wanted shape \[2\]", a, scale_a, b, scale_b, counts[:1]),
        case("counts_dtype", TypeError, "counts: wanted dtype int32", a, scale_a, b, scale_b, counts.long()),
        case("out_dtype", ValueError, "out_dtype: wanted one of", out_dtype=torch.float16),
        case("expected_m", ValueError, "expected_m: wanted at least 0, got -1", expected_m=-1),
    ]


SAMPLES = {"fp8_grouped_matmul": samples, "fp8_grouped_matmul_masked": masked_samples}
BAD = {"fp8_grouped_matmul": bad, "fp8_grouped_matmul_masked": masked_bad}
