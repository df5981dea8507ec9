"""Inputs of `fp8_grouped_matmul`."""

import torch

from ...reference.fp8_quantize import fp8_quantize
from ...reference.grouped_matmul import expert_bounds
from ...shapes import BLOCK, align_up, padded_columns
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


def in_columns(x: torch.Tensor, expert_offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q [w, C], scale [w, C/128]) of rows x [R, w]: transposed, each expert's from a multiple of 128, filled up with
    zeros."""
    columns = padded_columns(x.shape[0], len(expert_offsets) - 1)
    spread, end = x.new_zeros(columns, x.shape[1]), 0
    bounds = expert_bounds(expert_offsets, x.shape[0]).tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        spread[end : end + last - first] = x[first:last]
        end += align_up(last - first, BLOCK)
    q, scale = fp8_quantize(spread.t().contiguous(), "1x128")
    if expert_offsets[-1] >= 0:  # columns of no expert are never read
        q.view(torch.uint8)[:, end:] = 0x7F
        scale[:, end // BLOCK :] = NAN
    return q, scale


def wgrad_operands(
    g: torch.Generator, rows: int, n: int, k: int, expert_offsets: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """grad_t, scale_grad, a_t, scale_a of rows whose magnitude differs."""

    def random(width):
        return torch.randn(rows, width, generator=g) * torch.randn(rows, 1, generator=g).exp2()

    return *in_columns(random(n), expert_offsets), *in_columns(random(k), expert_offsets)


WGRAD_CASES = {
    # rows, n, k, offsets
    "three_experts": (300, 24, 40, offsets(130, 130, 300)),
    "wide": (20, 136, 72, offsets(5, 20)),
    "many_blocks": (700, 5, 24, offsets(600, 700)),
    "rows_of_no_expert": (300, 24, 16, offsets(2, 129, 140)),
    "offsets_out_of_range": (140, 24, 16, HOSTILE),
    "first_offset_above_0": (290, 24, 16, torch.tensor([150, 151, 290], dtype=torch.int32)),
    "no_experts": (3, 24, 16, offsets()),
    "no_rows": (0, 24, 16, offsets(0, 0)),
    "no_columns": (4, 24, 0, offsets(1, 4)),
}


def wgrad(g: torch.Generator) -> list[Sample]:
    strides = ("grad_t", "scale_grad", "a_t", "scale_a")
    return [
        Sample(
            name, (*wgrad_operands(g, *case), case[-1]), tolerance=MATMUL,
            any_strides=strides if name == "three_experts" else (),
        )
        for name, case in WGRAD_CASES.items()
    ]  # fmt: skip


def wgrad_out(g: torch.Generator) -> list[Sample]:
    def case(name, accumulate, **options):
        rows, n, k, expert_offsets = WGRAD_CASES[name]
        out = torch.randn(len(expert_offsets) - 1, n, k, generator=g)
        args = (*wgrad_operands(g, rows, n, k, expert_offsets), expert_offsets, out, accumulate)
        label = f"{name}_{'accumulate' if accumulate else 'write'}"
        return Sample(label, args, tolerance=MATMUL, mutated=("out",), **options)

    return [
        case("three_experts", True, any_strides=("grad_t", "scale_a")),
        case("wide", False),
        case("rows_of_no_expert", True),
        case("offsets_out_of_range", True),
        case("no_rows", True),
        case("no_rows", False),
    ]


def bad_wgrad(g: torch.Generator) -> list[Bad]:
    ends = offsets(2, 5)
    grad_t, scale_grad, a_t, scale_a = wgrad_operands(g, 5, 24, 16, ends)
    rest, op = (scale_grad, a_t, scale_a, ends), "fp8_grouped_matmul_wgrad"

    def case(name, error, match, *args):
        return Bad(name, args, error, rf"{op}: {match}")

    narrow = (grad_t[:, :80], scale_grad[:, :1], a_t[:, :80], scale_a[:, :1], ends)
    return [
        case("grad_dtype", TypeError, "grad_t: wanted dtype float8_e4m3fn", grad_t.float(), *rest),
        case("grad_dims", ValueError, r"grad_t: wanted shape \[\*, \*\]", grad_t[0], *rest),
        case("columns", ValueError, "grad_t: columns: wanted a multiple of 128, got 80", *narrow),
        case("scale_grad", ValueError, r"scale_grad: wanted shape \[24, 2\]", grad_t, scale_grad[:, :1], *rest[1:]),
        case("a_dtype", TypeError, "a_t: wanted dtype float8", grad_t, scale_grad, a_t.float(), scale_a, ends),
        case(
            "a_columns", ValueError, r"a_t: wanted shape \[\*, 256\]", grad_t, scale_grad, a_t[:, :128], scale_a, ends
        ),
        case("k", ValueError, "a_t: k: wanted a multiple of 8, got 12", grad_t, scale_grad, a_t[:12], scale_a, ends),
        case(
            "scale_a", TypeError, "scale_a: wanted dtype float32", grad_t, scale_grad, a_t, scale_a.double(), ends
        ),
        case(
            "offsets", TypeError, "expert_offsets: wanted dtype int32", grad_t, scale_grad, a_t, scale_a, ends.long()
        ),
        case(
            "offsets_empty", ValueError, "expert_offsets: length: wanted at least 1",
            grad_t, scale_grad, a_t, scale_a, ends[:0],
        ),
    ]  # fmt: skip


def bad_wgrad_out(g: torch.Generator) -> list[Bad]:
    ends = offsets(2, 5)
    operands = (*wgrad_operands(g, 5, 24, 16, ends), ends)
    out, op = torch.zeros(2, 24, 16), "fp8_grouped_matmul_wgrad"
    leaf = operands[1].clone().requires_grad_()
    return [
        Bad("shape", (*operands, out[0]), ValueError, rf"{op}: out: wanted shape \[2, 24, 16\], got \[24, 16\]"),
        Bad("dtype", (*operands, out.bfloat16()), TypeError, rf"{op}: out: wanted dtype float32, got bfloat16"),
        Bad("strides", (*operands, torch.zeros(2, 16, 24).mT), ValueError, rf"{op}: out: wanted a contiguous tensor"),
        Bad("grad", (*operands, out.clone().requires_grad_()), RuntimeError, rf"{op}: out: requires grad"),
        Bad("grad_of_scale", (operands[0], leaf, *operands[2:], out), RuntimeError, rf"{op}: scale_grad: requires"),
    ]


SAMPLES = {
    "fp8_grouped_matmul": samples,
    "fp8_grouped_matmul_masked": masked_samples,
    "fp8_grouped_matmul_wgrad": wgrad,
    "fp8_grouped_matmul_wgrad.out": wgrad_out,
}
BAD = {
    "fp8_grouped_matmul": bad,
    "fp8_grouped_matmul_masked": masked_bad,
    "fp8_grouped_matmul_wgrad": bad_wgrad,
    "fp8_grouped_matmul_wgrad.out": bad_wgrad_out,
}
