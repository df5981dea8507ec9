"""Inputs of `fp8_quantize`, `fp8_quantize_both` and `fp8_dequantize`."""

import functools

import torch

from . import Bad, Sample

FP8 = torch.float8_e4m3fn


def rows(g: torch.Generator, m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Each row of another magnitude."""
    scale = torch.randn(m, 1, generator=g).exp2()
    return (torch.randn(m, k, generator=g) * scale).to(dtype)


def odd_rows(g: torch.Generator) -> torch.Tensor:
    """[3, 300] with NaN, Inf and zeros."""
    x = rows(g, 3, 300, torch.float32)
    x[0, 5], x[1, 130], x[2] = float("nan"), float("-inf"), 0.0
    return x


def quantize(g: torch.Generator) -> list[Sample]:
    x = functools.partial(rows, g)
    return [
        Sample("bf16", (x(5, 256),), any_strides=("x",)),
        Sample("tail", (x(3, 200, torch.float16), "1x128", True), any_strides=("x",)),
        Sample("mn_major", (x(6, 264), "1x128", False, "mn_major")),
        Sample("weight", (x(130, 144), "128x128"), any_strides=("x",)),
        Sample("weight_mn_major", (x(9, 300, torch.float32), "128x128", True, "mn_major")),
        Sample("columns", (x(131, 40, torch.float32), "128x1"), any_strides=("x",)),
        Sample("odd", (odd_rows(g),)),
        Sample("no_rows", (x(0, 256),)),
        Sample("no_rows_mn_major", (x(0, 256), "1x128", False, "mn_major")),
        Sample("no_columns", (x(4, 0), "128x128")),
    ]


def bad_quantize(g: torch.Generator) -> list[Bad]:
    x = torch.randn(4, 64, generator=g)
    return [
        Bad("dtype", (x.double(),), TypeError, r"fp8_quantize: x: wanted dtype .* got float64"),
        Bad("dims", (x[0],), ValueError, r"fp8_quantize: x: wanted shape \[\*, \*\], got \[64\]"),
        Bad("granularity", (x, "64x64"), ValueError, r"granularity: wanted one of '1x128', .* got '64x64'"),
        Bad("layout", (x, "1x128", False, "column"), ValueError, r"scale_layout: wanted one of 'row', 'mn_major'"),
    ]


def both(g: torch.Generator) -> list[Sample]:
    x = functools.partial(rows, g)

    def offsets(*values):
        return torch.tensor(values, dtype=torch.int32)

    return [
        Sample("bf16", (x(5, 256),), any_strides=("x",)),
        Sample("tails", (x(129, 144, torch.float16), None, True), any_strides=("x",)),
        Sample("whole", (x(128, 16, torch.float32), None, False, "mn_major")),
        Sample("odd", (odd_rows(g),)),
        Sample("experts", (x(140, 48), offsets(0, 3, 3, 132, 135)), any_strides=("x",)),
        Sample("experts_mn_major", (x(10, 136, torch.float16), offsets(0, 1, 9, 10), True, "mn_major")),
        Sample("hostile_offsets", (x(20, 16), offsets(-5, 7, 3, 1000, 2))),
        Sample("late_first", (x(20, 16), offsets(6, 9))),
        Sample("no_experts", (x(9, 40), offsets(0))),
        Sample("no_rows", (x(0, 256),)),
        Sample("no_rows_experts", (x(0, 256), offsets(0, 0, 0), False, "mn_major")),
        Sample("no_columns", (x(4, 0),)),
    ]


def bad_both(g: torch.Generator) -> list[Bad]:
    x, offsets = torch.randn(4, 64, generator=g), torch.tensor([0, 4], dtype=torch.int32)
    return [
        Bad("dtype", (x.double(),), TypeError, r"fp8_quantize_both: x: wanted dtype .* got float64"),
        Bad("dims", (x[None],), ValueError, r"x: wanted shape \[\*, \*\], got \[1, 4, 64\]"),
        Bad("offsets", (x, offsets.long()), TypeError, r"expert_offsets: wanted dtype int32, got int64"),
        Bad("offsets_dims", (x, offsets[None]), ValueError, r"expert_offsets: wanted shape \[\*\], got \[1, 2\]"),
        Bad(
            "offsets_strides", (x, torch.stack([offsets] * 2, 1)[:, 0]), ValueError, r"expert_offsets: wanted a contig"
        ),
        Bad("no_offsets", (x, offsets[:0]), ValueError, r"expert_offsets: length: wanted at least 1, got 0"),
        Bad("layout", (x, None, False, "column"), ValueError, r"scale_layout: wanted one of 'row', 'mn_major'"),
    ]


def codes(g: torch.Generator, m: int, k: int) -> torch.Tensor:
    """Every bit pattern, NaN too."""
    return torch.randint(0, 256, (m, k), generator=g, dtype=torch.uint8).view(FP8)


def dequantize(g: torch.Generator) -> list[Sample]:
    def scale(*shape):
        return torch.randn(shape, generator=g).exp2()

    return [
        Sample("finite", (torch.randn(4, 200, generator=g).to(FP8), scale(4, 2)), any_strides=("q", "scale")),
        Sample("fp32", (codes(g, 3, 40), scale(3, 1)), any_strides=("q", "scale")),
        Sample("bf16", (codes(g, 5, 264), scale(5, 3), "1x128", torch.bfloat16)),
        Sample("fp16", (codes(g, 131, 136), scale(2, 2), "128x128", torch.float16), any_strides=("q", "scale")),
        Sample("columns", (codes(g, 130, 24), scale(2, 24), "128x1"), any_strides=("q", "scale")),
        Sample("no_rows", (codes(g, 0, 256), scale(0, 2))),
        Sample("no_columns", (codes(g, 3, 0), scale(3, 0), "1x128", torch.bfloat16)),
    ]


def bad_dequantize(g: torch.Generator) -> list[Bad]:
    q, scale = codes(g, 130, 256), torch.ones(130, 2)
    return [
        Bad("dtype", (q.view(torch.uint8), scale), TypeError, r"fp8_dequantize: q: wanted dtype float8_e4m3fn"),
        Bad("scale", (q, scale, "128x128"), ValueError, r"scale: wanted shape \[2, 2\], got \[130, 2\]"),
        Bad("scale_dtype", (q, scale.half()), TypeError, r"scale: wanted dtype float32, got float16"),
        Bad("out", (q, scale, "1x128", torch.float64), ValueError, r"out_dtype: wanted one of .* got torch.float64"),
        Bad("granularity", (q, scale, "1x1"), ValueError, r"granularity: wanted one of"),
    ]


SAMPLES = {"fp8_quantize": quantize, "fp8_quantize_both": both, "fp8_dequantize": dequantize}
BAD = {"fp8_quantize": bad_quantize, "fp8_quantize_both": bad_both, "fp8_dequantize": bad_dequantize}
