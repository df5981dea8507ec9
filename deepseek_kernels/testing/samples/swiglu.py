"""Inputs of `swiglu` and `swiglu_backward`."""

import torch

from ...reference.moe_sort import moe_sort
from ..compare import FP8_STEP, MATMUL, SUM
from . import Bad, Sample
from .moe_permute import routing

NAN = float("nan")
EXTREME = [0.0, -0.0, 88.0, -88.0, 104.0, -104.0, 3e4, -3e4]


def _normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def _mapped(g, num_tokens, top_k, intermediate, dtype=torch.bfloat16, dropped=0.0):
    """gate_up, weights, pos_to_token_topk with NaN in every row without an entry."""
    indices = routing(g, num_tokens, top_k, 5, dropped)
    entry = moe_sort(indices, 5, alignment=4)[1]
    gate_up = _normal(g, len(entry), 2 * intermediate, dtype=dtype)
    gate_up[entry < 0] = NAN
    return gate_up, torch.rand(num_tokens, top_k, generator=g), entry


def forward(g: torch.Generator) -> list[Sample]:
    def case(name, args, tolerance=SUM, **options):
        kwargs = {k: options.pop(k) for k in ("quantize", "clamp") if k in options}
        return Sample(name, args, kwargs, tolerance=tolerance, **options)

    gate_up, weights, entry = _mapped(g, 6, 2, 24)
    wild = entry.clone()
    wild[entry < 0] = torch.tensor([2**31 - 1, -(2**31), 12], dtype=torch.int32).repeat(99)[: int((entry < 0).sum())]
    extreme = torch.tensor(EXTREME).repeat(2).view(1, -1)
    rows = _normal(g, 7, 2 * 264)
    plain = (rows, torch.rand(7, generator=g))
    return [
        case("bf16", plain, any_strides=("gate_up",), grad=("gate_up", "weights")),
        case("unweighted", (_normal(g, 5, 48, dtype=torch.float32),), grad=("gate_up",)),
        case("mapped", _mapped(g, 6, 3, 40, torch.float16, 0.3), any_strides=("weights",), grad=("gate_up", "weights")),
        case("clamp", (2 * _normal(g, 5, 48), torch.rand(5, generator=g)), clamp=1.25, grad=("gate_up", "weights")),
        case("map_without_weights", (gate_up, None, entry), grad=("gate_up",)),
        case("entries_out_of_range", (gate_up, weights, wild)),
        case("extreme", (extreme,)),
        case("quantize", (*plain, None), quantize=True, tolerance=(FP8_STEP, SUM), any_strides=("gate_up",)),
        case("quantize_mapped", _mapped(g, 5, 2, 40, dropped=0.3), quantize=True, tolerance=(FP8_STEP, SUM), clamp=1.0),
        case("no_rows", (_normal(g, 0, 16), None, None), quantize=True),
        case("no_columns", (_normal(g, 4, 0), torch.rand(4, generator=g))),
        case("no_tokens", (gate_up[:3], torch.empty(0, 2), torch.full((3,), -1, dtype=torch.int32))),
    ]


def backward(g: torch.Generator) -> list[Sample]:
    def case(name, args, any_strides=(), **kwargs):
        grad = _normal(g, args[0].shape[0], args[0].shape[1] // 2, dtype=args[0].dtype)
        if len(args) > 2:
            grad[args[2] < 0] = NAN
        return Sample(name, (grad, *args), kwargs, tolerance=(SUM, MATMUL), any_strides=any_strides)

    gate_up, _, entry = _mapped(g, 4, 2, 24)
    return [
        case("bf16", (_normal(g, 7, 2 * 264), torch.rand(7, generator=g)), any_strides=("grad", "gate_up")),
        case("unweighted", (_normal(g, 5, 48, dtype=torch.float32),)),
        case("mapped", _mapped(g, 6, 3, 40, torch.float16, 0.3)),
        case("map_without_weights", (gate_up, None, entry)),
        case("clamp", (2 * _normal(g, 5, 48), torch.rand(5, generator=g)), clamp=1.25),
        case("extreme", (torch.tensor(EXTREME).repeat(2).view(1, -1), torch.ones(1))),
        case("no_rows", (_normal(g, 0, 16), torch.rand(3, 2, generator=g), torch.empty(0, dtype=torch.int32))),
        case("no_columns", (_normal(g, 4, 0), torch.rand(4, generator=g))),
    ]


def bad_forward(g: torch.Generator) -> list[Bad]:
    gate_up, weights, entry = _mapped(g, 4, 2, 16)
    return [
        Bad("gate_up_dtype", (gate_up.int(),), TypeError, r"swiglu: gate_up: wanted dtype .* got int32"),
        Bad("odd_columns", (gate_up[:, :5],), ValueError, r"swiglu: gate_up: columns: wanted a multiple of 2, got 5"),
        Bad("row_weights", (gate_up, weights), ValueError, r"swiglu: weights: wanted shape \[\d+\], got \[4, 2\]"),
        Bad("weights_dtype", (gate_up, weights.half(), entry), TypeError, r"swiglu: weights: wanted dtype float32"),
        Bad("map_rows", (gate_up, weights, entry[:2]), ValueError, r"swiglu: pos_to_token_topk: wanted shape"),
        Bad("map_dtype", (gate_up, weights, entry.long()), TypeError, r"pos_to_token_topk: wanted dtype int32"),
        Bad("clamp", (gate_up, weights, entry, False, -1.0), ValueError, r"swiglu: clamp: wanted a number above 0"),
        Bad("fp64", (gate_up.double(), None, None, True), TypeError, r"swiglu: gate_up: wanted dtype .* got float64"),
    ]


def bad_backward(g: torch.Generator) -> list[Bad]:
    gate_up, weights, entry = _mapped(g, 4, 2, 16)
    grad = gate_up[:, :16]
    return [
        Bad("grad_dtype", (grad.float(), gate_up), TypeError, r"swiglu_backward: grad: wanted dtype bfloat16"),
        Bad("grad_shape", (grad[:, :8], gate_up), ValueError, r"swiglu_backward: grad: wanted shape \[\d+, 16\]"),
        Bad("weights", (grad, gate_up, weights), ValueError, r"swiglu_backward: weights: wanted shape"),
        Bad(
            "clamp", (grad, gate_up, weights, entry, 0.0), ValueError, r"swiglu_backward: clamp: wanted a number above"
        ),
    ]


SAMPLES = {"swiglu": forward, "swiglu_backward": backward}
BAD = {"swiglu": bad_forward, "swiglu_backward": bad_backward}
