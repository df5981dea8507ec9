"""Inputs of `moe_permute` and `moe_unpermute`."""

import torch

from ...reference.moe_sort import moe_sort
from ..compare import SUM
from . import Bad, Sample


def routing(g: torch.Generator, num_tokens: int, top_k: int, num_experts: int, dropped: float = 0.0) -> torch.Tensor:
    """Distinct experts per token, int64 [T, K]; a share of the entries is -1."""
    scores = torch.rand(num_tokens, num_experts, generator=g)
    indices = scores.topk(top_k, dim=1).indices
    return torch.where(torch.rand(num_tokens, top_k, generator=g) < dropped, -1, indices)


def _maps(g, num_tokens, top_k, num_experts, alignment=1, dropped=0.0):
    indices = routing(g, num_tokens, top_k, num_experts, dropped)
    return moe_sort(indices, num_experts, alignment=alignment)[:2]


def permute(g: torch.Generator) -> list[Sample]:
    def x(t, h, dtype=torch.bfloat16):
        return torch.randn(t, h, generator=g).to(dtype)

    q = x(5, 136, torch.float32).to(torch.float8_e4m3fn)
    holes = _maps(g, 7, 3, 5, alignment=4, dropped=0.3)
    wild = torch.where(holes[0] < 0, torch.tensor([2**31 - 1, -(2**31), len(holes[1])], dtype=torch.int32), holes[0])
    return [
        Sample("bf16", (x(7, 264), *_maps(g, 7, 3, 5)), any_strides=("x",), grad=("x",)),
        Sample("holes", (x(7, 72, torch.float32), *holes), grad=("x",)),
        Sample("positions_out_of_range", (x(7, 24), wild, holes[1])),
        Sample(
            "scaled", (q, *_maps(g, 5, 2, 4, alignment=4), torch.rand(5, 2, generator=g)), any_strides=("x", "scale")
        ),
        Sample("quantize", (x(6, 320), *_maps(g, 6, 2, 3, alignment=2)), {"quantize": True}, any_strides=("x",)),
        Sample("quantize_tail", (x(3, 40, torch.float16), *_maps(g, 3, 1, 3)), {"quantize": True}),
        Sample("one_expert", (x(9, 24), *_maps(g, 9, 1, 1))),
        Sample("no_tokens", (x(0, 64), *_maps(g, 0, 2, 4))),
        Sample("no_columns", (x(4, 0), *_maps(g, 4, 2, 4))),
        Sample("no_rows", (x(4, 16), torch.full((4, 2), -1, dtype=torch.int32), torch.empty(0, dtype=torch.int32))),
    ]


def bad_permute(g: torch.Generator) -> list[Bad]:
    x = torch.randn(5, 64, generator=g)
    t2p, p2t = _maps(g, 5, 2, 4)
    scale = torch.ones(5, 1)
    return [
        Bad("x_dtype", (x.bool(), t2p, p2t), TypeError, r"moe_permute: x: wanted dtype .* got bool"),
        Bad("x_dims", (x[0], t2p, p2t), ValueError, r"moe_permute: x: wanted shape \[\*, \*\], got \[64\]"),
        Bad("map_dtype", (x, t2p.long(), p2t), TypeError, r"token_topk_to_pos: wanted dtype int32, got int64"),
        Bad("map_rows", (x, t2p[:3], p2t), ValueError, r"token_topk_to_pos: wanted shape \[5, \*\]"),
        Bad("map_stride", (x, t2p.t().contiguous().t(), p2t), ValueError, r"token_topk_to_pos: wanted a contiguous"),
        Bad("scale_rows", (x, t2p, p2t, scale[:4]), ValueError, r"scale: wanted shape \[5, \*\]"),
        Bad("scale_and_quantize", (x, t2p, p2t, scale, True), ValueError, r"scale: wanted None when quantize"),
    ]


def unpermute(g: torch.Generator) -> list[Sample]:
    def case(name, t, h, k, e, dtype=torch.bfloat16, alignment=1, dropped=0.0, weighted=True, **options):
        t2p, p2t = _maps(g, t, k, e, alignment, dropped)
        y = torch.randn(len(p2t), h, generator=g).to(dtype)
        y[p2t < 0] = float("nan")  # rows without an entry are never read
        weights = torch.rand(t, k, generator=g) if weighted else None
        return Sample(name, (y, t2p, p2t, weights), tolerance=SUM, **options)

    return [
        case("bf16", 7, 264, 3, 5, any_strides=("y", "weights"), grad=("y", "weights")),
        case("plain", 6, 72, 2, 4, torch.float32, weighted=False, grad=("y",)),
        case("holes", 7, 40, 3, 5, torch.float16, alignment=4, dropped=0.4),
        case("all_dropped", 3, 16, 2, 4, dropped=1.1),
        case("no_tokens", 0, 64, 2, 4),
        case("no_columns", 4, 0, 2, 4),
    ]


def bad_unpermute(g: torch.Generator) -> list[Bad]:
    t2p, p2t = _maps(g, 5, 2, 4)
    y = torch.randn(10, 64, generator=g)
    return [
        Bad("y_dtype", (y.to(torch.float8_e4m3fn), t2p, p2t), TypeError, r"moe_unpermute: y: wanted dtype"),
        Bad("y_rows", (y[:9], t2p, p2t), ValueError, r"pos_to_token_topk: wanted shape \[9\], got \[10\]"),
        Bad("weights", (y, t2p, p2t, torch.ones(5, 3)), ValueError, r"weights: wanted shape \[5, 2\], got \[5, 3\]"),
        Bad("weights_dtype", (y, t2p, p2t, torch.ones(5, 2).half()), TypeError, r"weights: wanted dtype float32"),
    ]


SAMPLES = {"moe_permute": permute, "moe_unpermute": unpermute}
BAD = {"moe_permute": bad_permute, "moe_unpermute": bad_unpermute}
