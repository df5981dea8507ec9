"""Inputs of `fp8_matmul`."""

import torch

from ...shapes import BLOCK, ceil_div
from ..compare import MATMUL
from . import Bad, Sample

FP8 = torch.float8_e4m3fn


def operands(g: torch.Generator, m: int, n: int, k: int, rows_b: int = BLOCK) -> tuple[torch.Tensor, ...]:
    """(a, scale_a, b, scale_b); `rows_b` rows of b share a scale."""

    def q(rows):
        return (torch.randn(rows, k, generator=g) * 100).to(FP8)

    def scale(rows):
        return torch.randn(rows, ceil_div(k, BLOCK), generator=g).exp2() / 64

    return q(m), scale(m), q(n), scale(ceil_div(n, rows_b))


def matmul(g: torch.Generator) -> list[Sample]:
    def case(name, m, n, k, bias=None, out_dtype=None, rows_b=BLOCK, **options):
        args = (*operands(g, m, n, k, rows_b), None if bias is None else torch.randn(n, generator=g).to(bias))
        return Sample(name, (*args, out_dtype), tolerance=MATMUL, **options)

    return [
        case("bf16", 7, 136, 272, any_strides=("a", "scale_a", "scale_b")),
        case("fp32_bias", 33, 72, 144, torch.bfloat16, torch.float32, any_strides=("a",)),
        case("fp16_bias", 2, 8, 16, torch.float32, torch.float16),
        case("both_1x128", 18, 136, 144, out_dtype=torch.float32, rows_b=1, any_strides=("a", "scale_a", "scale_b")),
        case("no_rows", 0, 24, 128, torch.float32),
        case("no_columns", 3, 0, 128),
        case("no_depth", 3, 16, 0, torch.bfloat16),
    ]


def bad_matmul(g: torch.Generator) -> list[Bad]:
    a, scale_a, b, scale_b = operands(g, 4, 264, 256)
    bias = torch.zeros(264)
    wide = torch.zeros(4, 24).to(FP8)
    return [
        Bad("a_dtype", (a.float(), scale_a, b, scale_b), TypeError, r"fp8_matmul: a: wanted dtype float8_e4m3fn"),
        Bad("a_dims", (a[0], scale_a, b, scale_b), ValueError, r"fp8_matmul: a: wanted shape \[\*, \*\]"),
        Bad("k", (wide, scale_a, b, scale_b), ValueError, r"fp8_matmul: k \(columns of a\): wanted a multiple of 16"),
        Bad("b_columns", (a, scale_a, b[:, :128], scale_b), ValueError, r"b: wanted shape \[\*, 256\]"),
        Bad("n", (a, scale_a, b[:-1], scale_b), ValueError, r"n \(rows of b\): wanted a multiple of 8, got 263"),
        Bad("b_strides", (a, scale_a, b.t().contiguous().t(), scale_b), ValueError, r"b: wanted stride 1 in the last"),
        Bad("scale_a", (a, scale_a[:, :1], b, scale_b), ValueError, r"scale_a: wanted shape \[4, 2\], got \[4, 1\]"),
        Bad("scale_a_dtype", (a, scale_a.half(), b, scale_b), TypeError, r"scale_a: wanted dtype float32, got float16"),
        Bad("scale_b", (a, scale_a, b, scale_b[:2]), ValueError, r"scale_b: wanted 3 rows .* or 264 \(1x128\), got 2"),
        Bad("bias", (a, scale_a, b, scale_b, bias[:8]), ValueError, r"bias: wanted shape \[264\], got \[8\]"),
        Bad("out_dtype", (a, scale_a, b, scale_b, None, FP8), ValueError, r"out_dtype: wanted one of None, torch.bf"),
    ]


def matmul_out(g: torch.Generator) -> list[Sample]:
    def case(name, m, n, k, dtype, bias=False, accumulate=False, rows_b=BLOCK, **options):
        args = (*operands(g, m, n, k, rows_b), torch.randn(n, generator=g) if bias else None)
        out = torch.randn(m, n, generator=g).to(dtype)
        return Sample(name, (*args, out, accumulate), tolerance=MATMUL, mutated=("out",), **options)

    strided = case("strided", 5, 24, 144, torch.bfloat16)
    out = torch.randn(5, 41, generator=g).bfloat16()[:, 1:25]
    return [
        case("wgrad", 18, 136, 144, torch.float32, accumulate=True, rows_b=1, any_strides=("scale_a", "scale_b")),
        case("write", 7, 72, 272, torch.float32, any_strides=("a",)),
        case("accumulate", 20, 24, 144, torch.bfloat16, bias=True, accumulate=True),
        Sample("strided", (*strided.args[:5], out), tolerance=MATMUL, mutated=("out",)),
        case("no_rows", 0, 24, 128, torch.bfloat16),
        case("no_depth", 3, 16, 0, torch.float32, accumulate=True),
    ]


def bad_matmul_out(g: torch.Generator) -> list[Bad]:
    a, *rest = operands(g, 4, 24, 128)
    args = (a, *rest, None)
    out = torch.zeros(4, 24)
    return [
        Bad("shape", (*args, out[:3]), ValueError, r"fp8_matmul: out: wanted shape \[4, 24\], got \[3, 24\]"),
        Bad("dtype", (*args, out.double()), TypeError, r"fp8_matmul: out: wanted dtype bfloat16 or .* got float64"),
        Bad("strides", (*args, torch.zeros(24, 4).t()), ValueError, r"fp8_matmul: out: wanted stride 1"),
        Bad(
            "overlap", (*args, out[:1].expand(4, 24)), ValueError, r"fp8_matmul: out: wanted rows at least 24 elements"
        ),
        Bad("grad", (*args, out.clone().requires_grad_()), RuntimeError, r"fp8_matmul: out: requires grad"),
        Bad("grad_of_a", (a.clone().requires_grad_(), *rest, None, out), RuntimeError, r"fp8_matmul: a: requires"),
    ]


SAMPLES = {"fp8_matmul": matmul, "fp8_matmul.out": matmul_out}
BAD = {"fp8_matmul": bad_matmul, "fp8_matmul.out": bad_matmul_out}
