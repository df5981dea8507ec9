"""Inputs of `grouped_matmul` and `grouped_matmul_wgrad`."""

import torch

from ..compare import MATMUL
from . import Bad, Sample

NAN = float("nan")


def offsets(*ends: int) -> torch.Tensor:
    """Expert offsets from the end of each expert's rows."""
    return torch.tensor([0, *ends], dtype=torch.int32)


HOSTILE = torch.tensor([-7, 5, 3, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
"""Five experts of 13 rows; read as [0, 5, 5, 5, 13, 13]."""


def _normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def forward(g: torch.Generator) -> list[Sample]:
    def case(name, rows, n, k, expert_offsets, dtype=torch.bfloat16, out_dtype=None, transposed=False, **options):
        num_experts = len(expert_offsets) - 1
        a = _normal(g, rows, k, dtype=dtype)
        if expert_offsets[-1] >= 0:
            a[int(expert_offsets[-1]) :] = NAN  # rows of no expert are never read
        b = _normal(g, num_experts, n, k, dtype=dtype)
        if transposed:
            b = b.transpose(1, 2).contiguous().transpose(1, 2)
        return Sample(name, (a, b, expert_offsets), {"out_dtype": out_dtype}, tolerance=MATMUL, **options)

    return [
        case("bf16", 23, 40, 72, offsets(3, 3, 20, 23), any_strides=("a", "b"), grad=("a", "b")),
        case("fp16", 19, 24, 40, offsets(1, 18), torch.float16, grad=("a", "b")),
        case("fp32", 9, 33, 35, offsets(4, 9), torch.float32, any_strides=("a", "b"), grad=("a", "b")),
        case("fp32_out", 9, 24, 24, offsets(4, 9), out_dtype=torch.float32),
        case("transposed", 21, 40, 24, offsets(20, 21), transposed=True),
        case("odd_sizes", 7, 5, 13, offsets(2, 7)),
        case("rows_of_no_expert", 37, 24, 16, offsets(2, 18, 19), grad=("a", "b")),
        case("offsets_out_of_range", 13, 24, 16, HOSTILE),
        case("first_offset_above_0", 20, 24, 16, torch.tensor([18, 19, 20], dtype=torch.int32)),
        case("no_experts", 3, 24, 16, offsets()),
        case("no_rows", 0, 24, 16, offsets(0, 0)),
        case("no_columns", 4, 0, 16, offsets(1, 4)),
        case("no_depth", 4, 24, 0, offsets(1, 4)),
    ]


def wgrad(g: torch.Generator) -> list[Sample]:
    def case(name, rows, n, k, expert_offsets, dtype=torch.bfloat16, out_dtype=None, **options):
        grad, a = _normal(g, rows, n, dtype=dtype), _normal(g, rows, k, dtype=dtype)
        if expert_offsets[-1] >= 0:
            grad[int(expert_offsets[-1]) :] = a[int(expert_offsets[-1]) :] = NAN
        return Sample(name, (grad, a, expert_offsets), {"out_dtype": out_dtype}, tolerance=MATMUL, **options)

    return [
        case("bf16", 23, 40, 72, offsets(3, 3, 20, 23), any_strides=("grad", "a"), grad=("grad", "a")),
        case("fp16", 19, 24, 40, offsets(1, 18), torch.float16),
        case("fp32", 9, 33, 35, offsets(4, 9), torch.float32, any_strides=("grad", "a")),
        case("fp32_out", 9, 24, 24, offsets(4, 9), out_dtype=torch.float32),
        case("odd_sizes", 7, 5, 13, offsets(2, 7)),
        case("rows_of_no_expert", 37, 24, 16, offsets(2, 18, 19)),
        case("offsets_out_of_range", 13, 24, 16, HOSTILE),
        case("first_offset_above_0", 20, 24, 16, torch.tensor([18, 19, 20], dtype=torch.int32)),
        case("no_experts", 3, 24, 16, offsets()),
        case("no_rows", 0, 24, 16, offsets(0, 0)),
        case("no_columns", 4, 0, 16, offsets(1, 4)),
    ]


def bad_forward(g: torch.Generator) -> list[Bad]:
    a, b, ends = _normal(g, 5, 16), _normal(g, 2, 8, 16), offsets(2, 5)
    op = "grouped_matmul"
    return [
        Bad("a_dtype", (a.int(), b, ends), TypeError, rf"{op}: a: wanted dtype .* got int32"),
        Bad("a_dims", (a[0], b, ends), ValueError, rf"{op}: a: wanted shape \[\*, \*\], got \[16\]"),
        Bad("b_dtype", (a, b.float(), ends), TypeError, rf"{op}: b: wanted dtype bfloat16, got float32"),
        Bad("b_depth", (a, b[..., :8], ends), ValueError, rf"{op}: b: wanted shape \[\*, \*, 16\], got \[2, 8, 8\]"),
        Bad("offsets_dtype", (a, b, ends.long()), TypeError, rf"{op}: expert_offsets: wanted dtype int32, got int64"),
        Bad("offsets_length", (a, b, ends[:2]), ValueError, rf"{op}: expert_offsets: wanted shape \[3\], got \[2\]"),
        Bad("offsets_stride", (a, b, ends.repeat(2)[::2]), ValueError, rf"{op}: expert_offsets: wanted a contiguous"),
        Bad("out_dtype", (a, b, ends, torch.int8), ValueError, rf"{op}: out_dtype: wanted one of"),
    ]


def bad_wgrad(g: torch.Generator) -> list[Bad]:
    grad, a, ends = _normal(g, 5, 8), _normal(g, 5, 16), offsets(2, 5)
    op = "grouped_matmul_wgrad"
    return [
        Bad("grad_dtype", (grad.int(), a, ends), TypeError, rf"{op}: grad: wanted dtype .* got int32"),
        Bad("a_dtype", (grad, a.float(), ends), TypeError, rf"{op}: a: wanted dtype bfloat16, got float32"),
        Bad("a_rows", (grad, a[:4], ends), ValueError, rf"{op}: a: wanted shape \[5, \*\], got \[4, 16\]"),
        Bad("offsets_dtype", (grad, a, ends.long()), TypeError, rf"{op}: expert_offsets: wanted dtype int32"),
        Bad("offsets_empty", (grad, a, ends[:0]), ValueError, rf"{op}: expert_offsets: length: wanted at least 1"),
        Bad("out_dtype", (grad, a, ends, torch.int8), ValueError, rf"{op}: out_dtype: wanted one of"),
    ]


SAMPLES = {"grouped_matmul": forward, "grouped_matmul_wgrad": wgrad}
BAD = {"grouped_matmul": bad_forward, "grouped_matmul_wgrad": bad_wgrad}
