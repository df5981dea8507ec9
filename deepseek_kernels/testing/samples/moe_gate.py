"""Inputs of `moe_gate` and `moe_gate_backward`."""

import torch

from ..compare import EXACT, GRADIENT, SUM
from . import Bad, Sample


def gate(g: torch.Generator) -> list[Sample]:
    def logits(t, e, dtype=torch.float32):
        return torch.randn(t, e, generator=g).to(dtype)

    def bias(e):
        return torch.randn(e, generator=g) - 1.5  # mostly negative: a group that is out must be -inf, not 0

    def case(name, *args, **options):
        kwargs = {k: options.pop(k) for k in tuple(options) if k not in ("any_strides", "grad")}
        return Sample(name, args, kwargs, tolerance=(SUM, EXACT), **options)

    odd = logits(8, 6)
    odd[0] = float("nan")
    odd[1] = -float("inf")
    odd[2, :4] = float("nan")
    odd[3, 2], odd[3, 4] = float("inf"), float("nan")
    odd[4] = float("inf")
    odd[5, ::2] = -float("inf")
    ties = torch.tensor([[0.0, 1, 1, 0, 1, 0], [2, 2, 2, 2, 2, 2]])
    mask = torch.tensor([True, False, True, False, False, True, True])
    return [
        case("v3", logits(5, 32), bias(32), 4, 8, 4, scale=2.5, any_strides=("logits",), grad=("logits",)),
        case("bf16", logits(3, 24, torch.bfloat16), bias(24), 3, any_strides=("logits",), grad=("logits",)),
        case("softmax", logits(4, 5), None, 2, score="softmax", normalize=False, grad=("logits",)),
        case("softmax_groups", logits(4, 18), None, 3, 3, 2, score="softmax", scale=0.5, grad=("logits",)),
        case("sqrtsoftplus", 8 * logits(4, 12), bias(12), 3, score="sqrtsoftplus", grad=("logits",)),
        case("sqrtsoftplus_half", logits(3, 72, torch.float16), None, 8, 9, 4, score="sqrtsoftplus", normalize=False),
        case("groups_of_one", logits(4, 6), bias(6), 2, 6, 3),
        case("one_of_one", logits(3, 1), bias(1), 1),
        case("masked", logits(7, 20), bias(20), 3, 4, 2, mask=mask, grad=("logits",)),
        case("all_masked", logits(3, 8), None, 2, mask=torch.zeros(3, dtype=torch.bool)),
        case("ties", ties, None, 4),
        case("ties_groups", ties, torch.zeros(6), 3, 3, 2),
        *(case(f"odd_{s}", odd, bias(6), 4, 3, 2, score=s) for s in ("sigmoid", "softmax", "sqrtsoftplus")),
        case("no_tokens", logits(0, 8), None, 2),
    ]


def bad_gate(g: torch.Generator) -> list[Bad]:
    x, b = torch.randn(3, 12, generator=g), torch.zeros(12)
    return [
        Bad("dtype", (x.int(), b, 2), TypeError, r"moe_gate: logits: wanted dtype .*, got int32"),
        Bad("dims", (x[0], b, 2), ValueError, r"moe_gate: logits: wanted shape \[\*, \*\], got \[12\]"),
        Bad("bias_shape", (x, b[:5], 2), ValueError, r"moe_gate: bias: wanted shape \[12\], got \[5\]"),
        Bad("bias_dtype", (x, b.bfloat16(), 2), TypeError, r"moe_gate: bias: wanted dtype float32"),
        Bad(
            "mask",
            (x, b, 2, 1, 1, "sigmoid", True, 1.0, torch.ones(3)),
            TypeError,
            r"moe_gate: mask: wanted dtype bool",
        ),
        Bad("score", (x, b, 2, 1, 1, "tanh"), ValueError, r"moe_gate: score: wanted one of 'sigmoid', .*, got 'tanh'"),
        Bad("num_groups", (x, b, 2, 5), ValueError, r"moe_gate: num_groups: wanted a divisor of the 12 experts, got 5"),
        Bad("no_groups", (x, b, 2, 0), ValueError, r"moe_gate: num_groups: wanted a divisor"),
        Bad("topk_groups", (x, b, 2, 4, 5), ValueError, r"moe_gate: topk_groups: wanted 1 to 4, got 5"),
        Bad("top_k", (x, b, 7, 4, 2), ValueError, r"moe_gate: top_k: wanted 1 to 6, .*, got 7"),
        Bad("top_0", (x, b, 0), ValueError, r"moe_gate: top_k: wanted 1 to 12"),
    ]


def backward(g: torch.Generator) -> list[Sample]:
    def case(name, t, e, k, score="sigmoid", normalize=True, scale=1.0, dtype=torch.float32, **options):
        logits = torch.randn(t, e, generator=g).to(dtype)
        indices = torch.rand(t, e, generator=g).topk(k, dim=1).indices
        args = (torch.randn(t, k, generator=g), logits, indices, score, normalize, scale)
        return Sample(name, args, tolerance=GRADIENT, **options)

    holes = case("holes", 4, 10, 3, scale=2.5)
    holes.args[2][1], holes.args[2][2, 1] = -1, 2**40
    odd = case("odd", 4, 6, 3, "softmax")
    odd.args[1][0], odd.args[1][1, 2], odd.args[1][2, 1] = float("nan"), float("inf"), -float("inf")
    return [
        case("sigmoid", 5, 24, 4, scale=2.5, any_strides=("grad_weights", "logits", "indices")),
        case("softmax", 4, 20, 3, "softmax", dtype=torch.bfloat16),
        case("softmax_plain", 4, 5, 2, "softmax", normalize=False),
        case("sqrtsoftplus", 4, 12, 3, "sqrtsoftplus", dtype=torch.float16),
        case("one", 3, 7, 1, "sqrtsoftplus", normalize=False),
        holes,
        odd,
        case("no_tokens", 0, 8, 2),
        case("no_choices", 3, 8, 0),
    ]


def bad_backward(g: torch.Generator) -> list[Bad]:
    grad, x, ids = torch.ones(3, 2), torch.randn(3, 12, generator=g), torch.zeros(3, 2, dtype=torch.int64)
    return [
        Bad("grad", (grad[:, :1], x, ids, "sigmoid", True, 1.0), ValueError, r"grad_weights: wanted shape \[3, 2\]"),
        Bad("grad_dtype", (grad.half(), x, ids, "sigmoid", True, 1.0), TypeError, r"moe_gate_backward: grad_weights"),
        Bad("indices", (grad, x, ids[:2], "sigmoid", True, 1.0), ValueError, r"indices: wanted shape \[3, \*\]"),
        Bad("score", (grad, x, ids, "relu", True, 1.0), ValueError, r"moe_gate_backward: score: wanted one of"),
    ]


SAMPLES = {"moe_gate": gate, "moe_gate_backward": backward}
BAD = {"moe_gate": bad_gate, "moe_gate_backward": bad_backward}
