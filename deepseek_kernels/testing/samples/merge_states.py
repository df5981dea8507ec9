"""Inputs of `merge_states`."""

import torch

from ..compare import LSE, SUM
from . import Bad, Sample

INF = float("inf")


def merge(g: torch.Generator) -> list[Sample]:
    def case(name, b, s_q, h_q, d_v, dtype=torch.bfloat16, lse_a=None, lse_b=None, poison=False, **options):
        def side(given):
            out = torch.randn(b, s_q, h_q, d_v, generator=g).to(dtype)
            lse = 3 * torch.randn(b, h_q, s_q, generator=g)
            if given is not None:
                lse = torch.where(torch.rand(lse.shape, generator=g) < 0.5, given, lse)
            if poison:
                out[lse.isneginf().transpose(1, 2)] = float("nan")  # what an empty side holds is ignored
            return out, lse

        (out_a, lse_a), (out_b, lse_b) = side(lse_a), side(lse_b)
        return Sample(name, (out_a, lse_a, out_b, lse_b), tolerance=(SUM, LSE), **options)

    everything = ("out_a", "lse_a", "out_b", "lse_b")
    return [
        case("bf16", 2, 3, 5, 40, any_strides=everything, grad=everything),
        case("fp32", 1, 2, 16, 512, torch.float32, grad=everything),
        case("empty_sides", 3, 2, 4, 24, torch.float16, -INF, -INF, poison=True),
        case("infinite", 2, 2, 4, 8, torch.float32, INF, INF),
        case("infinite_and_empty", 2, 3, 4, 8, torch.float32, INF, -INF, poison=True),
        case("no_sequences", 0, 2, 4, 8),
        case("no_columns", 2, 1, 3, 0),
    ]


def bad(g: torch.Generator) -> list[Bad]:
    out, lse = torch.randn(2, 1, 4, 8, generator=g), torch.randn(2, 4, 1, generator=g)
    return [
        Bad("dtype", (out.int(), lse, out, lse), TypeError, "merge_states: out_a: wanted dtype"),
        Bad("dtypes_differ", (out, lse, out.half(), lse), TypeError, "merge_states: out_b: wanted dtype float32"),
        Bad("shape", (out, lse, out[:1], lse), ValueError, r"merge_states: out_b: wanted shape \[2, 1, 4, 8\]"),
        Bad("lse_layout", (out, lse.transpose(1, 2), out, lse), ValueError, r"lse_a: wanted shape \[2, 4, 1\]"),
        Bad("lse_dtype", (out, lse, out, lse.half()), TypeError, "merge_states: lse_b: wanted dtype float32"),
    ]


SAMPLES = {"merge_states": merge}
BAD = {"merge_states": bad}
