"""Inputs of `fused_moe`, `fused_moe_forward` and `fused_moe_backward`."""

import torch

from ...reference import fused_moe as reference
from ...reference.fp8_quantize import fp8_quantize
from ..compare import EXACT, GRADIENT, MATMUL, MOE_GRADIENT, REQUANTIZED
from . import Bad, Sample
from .moe_permute import routing

GRAD = ("x", "w_gate_up", "w_down", "weights")


def _arguments(g, t, h, i, e, k, dtype=torch.bfloat16, dropped=0.0):
    x = torch.randn(t, h, generator=g).to(dtype)
    w_gate_up = (torch.randn(e, 2 * i, h, generator=g) * h**-0.5).to(dtype)
    w_down = (torch.randn(e, h, i, generator=g) * i**-0.5).to(dtype)
    return x, w_gate_up, w_down, torch.rand(t, k, generator=g), routing(g, t, k, e, dropped)


def quantized(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, n, k] as e4m3 with 128x128 scales."""
    q, scale = zip(*(fp8_quantize(m, "128x128") for m in w))
    return torch.stack([m.view(torch.uint8) for m in q]).view(torch.float8_e4m3fn), torch.stack(scale)


def _fp8(g, t, h, i, e, k, dtype=torch.bfloat16, dropped=0.0):
    x, w_gate_up, w_down, weights, indices = _arguments(g, t, h, i, e, k, torch.float32, dropped)
    (w_gate_up, scale_gate_up), (w_down, scale_down) = quantized(w_gate_up), quantized(w_down)
    return x.to(dtype), w_gate_up, w_down, weights, indices, scale_gate_up, scale_down


def fused(g: torch.Generator) -> list[Sample]:
    def case(name, *args, **options):
        return Sample(name, args, tolerance=REQUANTIZED if name.startswith("fp8") else MATMUL, **options)

    x, w_gate_up, w_down, weights, indices = _arguments(g, 4, 32, 16, 6, 3, torch.float32)
    garbage = torch.where(indices == 2, 2**33 + 1, torch.where(indices == 4, -(2**63), indices))
    experts = (None, None, None, 2, 5)
    no_ids = torch.full_like(indices, -1)
    return [
        case("bf16", *_arguments(g, 5, 64, 24, 4, 2), any_strides=("x",)),
        case("fp32_clamp", x, w_gate_up, w_down, weights, indices, None, None, 0.5, grad=GRAD),
        case("half_of_the_experts", x, w_gate_up[2:5], w_down[2:5], weights, indices, *experts, grad=GRAD),
        case("garbage", x.half(), w_gate_up.half(), w_down.half(), weights, garbage),
        case("int32", x, w_gate_up, w_down, weights, indices.int()),
        case("no_ids", x, w_gate_up, w_down, weights, no_ids, grad=GRAD),
        case("fp8", *_fp8(g, 3, 144, 48, 3, 2)),
        case("fp8_holes", *_fp8(g, 3, 64, 32, 4, 2, torch.float16, 0.4), 2.0),
        case("no_tokens", x[:0], w_gate_up, w_down, weights[:0], indices[:0]),
        case("no_choices", x, w_gate_up, w_down, weights[:, :0], indices[:, :0]),
        case("no_experts", x, w_gate_up[:0], w_down[:0], weights, indices, grad=GRAD),
    ]


def forward(g: torch.Generator) -> list[Sample]:
    def as_forward(s):
        return Sample(s.name, s.args, tolerance=(s.tolerance, MATMUL, EXACT, EXACT, EXACT), grad=s.grad)

    return [
        as_forward(s)
        for s in fused(g)
        if s.name in ("bf16", "fp32_clamp", "half_of_the_experts", "fp8", "no_ids", "no_experts")
    ]


def backward(g: torch.Generator) -> list[Sample]:
    def case(name, *args, clamp=None, needs=(True,) * 4, dropped=0.0, **dtype):
        x, w_gate_up, w_down, weights, indices = _arguments(g, *args, dropped=dropped, **dtype)
        _, *kept = reference.fused_moe_forward(x, w_gate_up, w_down, weights, indices, clamp=clamp)
        grad = torch.randn(x.shape, generator=g).to(x.dtype)
        tolerance = GRADIENT if x.dtype == torch.float32 else MOE_GRADIENT
        return Sample(name, (grad, x, w_gate_up, w_down, weights, *kept, clamp, list(needs)), tolerance=tolerance)

    return [
        case("bf16", 5, 64, 24, 4, 2, dropped=0.2),
        case("fp32_clamp", 4, 32, 16, 5, 2, clamp=0.5, dtype=torch.float32),
        case("x_alone", 4, 32, 16, 3, 2, needs=(True, False, False, False), dtype=torch.float32),
        case("w_down_alone", 4, 32, 16, 3, 2, needs=(False, False, True, False), dtype=torch.float32),
        case("weights_alone", 3, 32, 16, 3, 2, needs=(False, False, False, True), dtype=torch.float32),
        case("no_tokens", 0, 32, 16, 3, 2),
    ]


def _bad(op: str):
    def bad(g: torch.Generator) -> list[Bad]:
        x, up, down, w, ids = _arguments(g, 4, 32, 16, 3, 2)
        x8, up8, down8, w8, ids8, s_up, s_down = _fp8(g, 4, 32, 16, 3, 2)
        return [
            Bad("x_dtype", (x.int(), up, down, w, ids), TypeError, rf"{op}: x: wanted dtype .*, got int32"),
            Bad("w_dtype", (x, up.float(), down, w, ids), TypeError, rf"{op}: w_gate_up: wanted dtype bfloat16"),
            Bad("w_hidden", (x, up[..., :16], down, w, ids), ValueError, r"w_gate_up: wanted shape \[\*, \*, 32\]"),
            Bad("w_odd", (x, up[:, :31], down, w, ids), ValueError, r"w_gate_up: rows: wanted a multiple of 2, got 31"),
            Bad("w_down", (x, up, down[:2], w, ids), ValueError, r"w_down: wanted shape \[3, 32, 16\], got \[2,"),
            Bad("w_stride", (x, up.mT.contiguous().mT, down, w, ids), ValueError, r"w_gate_up: wanted stride 1"),
            Bad("weights", (x, up, down, w.half(), ids), TypeError, rf"{op}: weights: wanted dtype float32"),
            Bad("indices", (x, up, down, w, ids[:, :1]), ValueError, r"indices: wanted shape \[4, 2\], got \[4, 1\]"),
            Bad("range", (x, up, down, w, ids, None, None, None, 1, 3), ValueError, r"expert_range: wanted 3 ids"),
            Bad("clamp", (x, up, down, w, ids, None, None, 0.0), ValueError, r"clamp: wanted a number above 0, got 0"),
            Bad("scale", (x, up, down, w, ids, s_up, s_down), ValueError, r"scale_gate_up: wanted scales with e4m3"),
            Bad("no_scale", (x8, up8, down8, w8, ids8), ValueError, r"scale_gate_up: wanted scales .* got None"),
            Bad("scale_shape", (x8, up8, down8, w8, ids8, s_up[:2], s_down), ValueError, r"scale_gate_up: wanted sh"),
            Bad(
                "fp8_hidden", _fp8(g, 2, 24, 16, 2, 1), ValueError, r"x: columns: wanted a multiple of 16, got 24"
            ),
            Bad(
                "fp8_intermediate", _fp8(g, 2, 32, 24, 2, 1), ValueError, r"w_down: columns: wanted a multiple of 16"
            ),
        ]  # fmt: skip

    return bad


def bad_backward(g: torch.Generator) -> list[Bad]:
    args = backward(g)[0].args

    def replaced(index, value):
        return (*args[:index], value, *args[index + 1 :])

    return [
        Bad("grad", replaced(0, args[0][:2]), ValueError, r"fused_moe_backward: grad: wanted shape \[5, 64\]"),
        Bad("gate_up", replaced(5, args[5].float()), TypeError, r"gate_up: wanted dtype bfloat16, got float32"),
        Bad("w_down", replaced(3, args[3][:, :, :8]), ValueError, r"w_down: wanted shape \[4, 64, 24\]"),
        Bad("maps", replaced(6, args[6][:3]), ValueError, r"token_topk_to_pos: wanted shape \[5, 2\]"),
        Bad("needs", replaced(10, [True]), ValueError, r"fused_moe_backward: needs: wanted 4 values, got 1"),
    ]


SAMPLES = {"fused_moe": fused, "fused_moe_forward": forward, "fused_moe_backward": backward}
BAD = {
    "fused_moe": _bad("fused_moe"),
    "fused_moe_forward": _bad("fused_moe_forward"),
    "fused_moe_backward": bad_backward,
}
