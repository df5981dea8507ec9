"""`fused_moe`: what the contract cannot know."""

import pytest
import torch
import torch.nn.functional as F

import deepseek_kernels as dk
from deepseek_kernels.device import GPUS, H200
from deepseek_kernels.ops import fused_moe as op
from deepseek_kernels.plan import fused_moe as plan
from deepseek_kernels.reference.fp8_quantize import fp8_dequantize, fp8_quantize
from deepseek_kernels.shapes import V3
from deepseek_kernels.testing.compare import (
    MATMUL,
    MOE_GRADIENT,
    SUM,
    Tolerance,
    assert_close,
    assert_same_bits,
    distance,
)
from deepseek_kernels.testing.guard import guarded_allocations
from deepseek_kernels.testing.samples.fused_moe import quantized
from deepseek_kernels.testing.samples.moe_permute import routing

BACKENDS = ("reference", "triton", "cpu", "torch")
T, H, I, E, K = 5, 32, 16, 6, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton means its interpreter


@pytest.fixture(params=BACKENDS)
def backend(request):
    with dk.use_backend(request.param):
        if dk.explain("fused_moe", *arguments()).backend is None:
            pytest.skip(f"no {request.param} backend here")
        yield request.param


def arguments(dtype=torch.float32, dropped=0.0, num_tokens=T):
    x = torch.randn(num_tokens, H)
    w_gate_up, w_down = torch.randn(E, 2 * I, H) * H**-0.5, torch.randn(E, H, I) * I**-0.5
    indices = routing(torch.default_generator, num_tokens, K, E, dropped)
    return x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype), torch.rand(num_tokens, K), indices


def naive(x, w_gate_up, w_down, weights, indices, clamp=None):
    """Token by token and choice by choice, in the dtype of x."""
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for k, expert in enumerate(indices[t].tolist()):
            if 0 <= expert < len(w_down):
                gate, up = (w_gate_up[expert] @ x[t]).chunk(2)
                if clamp is not None:
                    gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
                total = total + weights[t, k] * (w_down[expert] @ (F.silu(gate) * up))
        out.append(total)
    return torch.stack(out)


def in_double(args):
    return (*(a.double() for a in args[:4]), args[4])


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("dropped", [0.0, 0.4])
def test_is_the_naive_loop(backend, dropped, clamp):
    args = arguments(dropped=dropped)
    assert_close(dk.fused_moe(*args, clamp=clamp), naive(*in_double(args), clamp), MATMUL)


def test_is_the_naive_loop_in_bf16(backend):
    args = arguments(torch.bfloat16)
    assert_close(dk.fused_moe(*args), naive(*in_double(args)), MATMUL)


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_every_tile_of_the_decode_path(rows, columns, clamp):
    args = arguments(dropped=0.3)
    there = (a.to(DEVICE) for a in args)
    with guarded_allocations():
        out = op._inference(plan.Config(rows, columns, 4, False), *there, None, None, clamp, 0, -1)
    assert_close(out.cpu(), naive(*in_double(args), clamp), MATMUL)


def test_composition_and_decode_path_agree():
    """The same call on either side of the plan's choice, FP8 included."""
    x, w_gate_up, w_down, weights, indices = arguments()
    (q_gate_up, scale_gate_up), (q_down, scale_down) = quantized(w_gate_up), quantized(w_down)
    args = (x.bfloat16(), q_gate_up, q_down, weights, indices, scale_gate_up, scale_down, None, 0, -1)
    args = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)
    with dk.use_backend("triton"):
        composed = op._inference(None, *args)
    assert_close(op._inference(plan.Config(8, 128, 4, False), *args), composed, MATMUL)


def test_fp8_is_the_formula_on_rounded_operands(backend):
    """x and h rounded to e4m3 in blocks of 1x128, gate_up to bf16, and nothing else."""
    x, w_gate_up, w_down, weights, indices = arguments()
    x = x.bfloat16()
    (q_gate_up, scale_gate_up), (q_down, scale_down) = quantized(w_gate_up), quantized(w_down)
    out = dk.fused_moe(x, q_gate_up, q_down, weights, indices, scale_gate_up=scale_gate_up, scale_down=scale_down)
    w_gate_up = torch.stack([fp8_dequantize(*w, "128x128") for w in zip(q_gate_up, scale_gate_up)])
    w_down = torch.stack([fp8_dequantize(*w, "128x128") for w in zip(q_down, scale_down)])
    expected = torch.zeros(T, H)
    for t in range(T):
        for k, expert in enumerate(indices[t].tolist()):
            rounded = fp8_dequantize(*fp8_quantize(x[t : t + 1]))
            gate, up = (rounded @ w_gate_up[expert].t()).bfloat16().float().chunk(2, dim=1)
            h = fp8_dequantize(*fp8_quantize(F.silu(gate) * up * weights[t, k]))
            expected[t] += (h @ w_down[expert].t())[0]
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, MATMUL)


def test_ranks_sum_to_the_whole(backend):
    x, w_gate_up, w_down, weights, indices = arguments()
    whole = dk.fused_moe(x, w_gate_up, w_down, weights, indices)
    parts = [
        dk.fused_moe(x, w_gate_up[a:b], w_down[a:b], weights, indices, expert_range=(a, b)) for a, b in ((0, 2), (2, 6))
    ]
    assert_close(sum(parts), whole, Tolerance(steps=8, absolute=1e-5))


def test_nothing_to_do(backend):
    x, w_gate_up, w_down, weights, indices = arguments()
    assert dk.fused_moe(x[:0], w_gate_up, w_down, weights[:0], indices[:0]).shape == (0, H)
    for ids in (torch.full_like(indices, -1), torch.full_like(indices, E), torch.full_like(indices, -(2**63))):
        assert (dk.fused_moe(x, w_gate_up, w_down, weights, ids) == 0).all()
    assert (dk.fused_moe(x, w_gate_up, w_down, weights[:, :0], indices[:, :0]) == 0).all()


def test_weights_of_skipped_ids_are_not_read(backend):
    x, w_gate_up, w_down, weights, indices = arguments(dropped=0.5)
    weights = torch.where(indices < 0, float("nan"), weights)
    assert dk.fused_moe(x, w_gate_up, w_down, weights, indices).isfinite().all()


def test_experts_nobody_chose_are_not_read(backend):
    x, w_gate_up, w_down, weights, indices = arguments()
    indices = indices % 3 * 2  # even experts, some of them twice
    w_gate_up[1::2], w_down[1::2] = float("nan"), float("nan")
    out = dk.fused_moe(x, w_gate_up, w_down, weights, indices)
    assert_close(out, naive(*in_double((x, w_gate_up, w_down, weights, indices))), MATMUL)


def gradients(function, args, cotangent):
    leaves = [a.clone().requires_grad_() for a in args[:4]]
    return torch.autograd.grad(function(*leaves, args[4]), leaves, cotangent)


NAMES = ("x", "w_gate_up", "w_down", "weights")


@pytest.mark.parametrize("call", [dk.fused_moe, torch.ops.deepseek_kernels.fused_moe], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_naive_loop(backend, dtype, call):
    args = arguments(dtype, dropped=0.2)
    cotangent = torch.randn(T, H).to(dtype)
    actual = gradients(call, args, cotangent)
    expected = gradients(naive, in_double(args), cotangent.double())
    tolerance = MOE_GRADIENT if dtype == torch.bfloat16 else Tolerance(steps=64, absolute=1e-6, of_norm=1e-5)
    for name, a, e in zip(NAMES, actual, expected):
        assert_close(a, e, tolerance, f"gradient of {name}")
        assert distance(a, e) < 1e-5
    unused = [e for e in range(E) if e not in args[4]]
    assert (actual[1][unused] == 0).all() and (actual[2][unused] == 0).all()


def test_gradients_nobody_needs_are_not_computed(monkeypatch):
    args = arguments()
    calls = []
    plain = torch.ops.deepseek_kernels.fused_moe_backward
    monkeypatch.setattr(op.ops, "fused_moe_backward", lambda *a: calls.append(a[-1]) or plain(*a))
    for i, name in enumerate(NAMES):
        leaves = list(args)
        leaves[i] = args[i].clone().requires_grad_()
        dk.fused_moe(*leaves).sum().backward()
        assert calls.pop() == [n == name for n in NAMES]
        full = gradients(dk.fused_moe, args, torch.ones(T, H))
        calls.clear()
        assert_same_bits(leaves[i].grad, full[i])


def kept_bytes(function) -> int:
    total = {}

    def pack(t):
        total[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(total.values())


def test_keeps_x_and_gate_up():
    """x, gate_up, the routing and nothing else of the activations: at most 0.30 of what autograd keeps by itself."""
    num_tokens, hidden, intermediate, top_k = 16, 448, 128, 8  # V3's proportions
    x = torch.randn(num_tokens, hidden, requires_grad=True)
    w_gate_up = torch.randn(8, 2 * intermediate, hidden, requires_grad=True)
    w_down = torch.randn(8, hidden, intermediate, requires_grad=True)
    weights = torch.rand(num_tokens, top_k, requires_grad=True)
    indices = routing(torch.default_generator, num_tokens, top_k, 8)
    ours = kept_bytes(lambda: dk.fused_moe(x, w_gate_up, w_down, weights, indices)) - w_gate_up.nbytes - w_down.nbytes
    rows = num_tokens * top_k
    assert ours == x.nbytes + rows * 2 * intermediate * 4 + weights.nbytes + 4 * (2 * rows + 9)

    def plain():
        token = torch.arange(num_tokens).repeat_interleave(top_k)
        order = indices.flatten().argsort(stable=True)
        counts = torch.bincount(indices.flatten(), minlength=8).tolist()
        rows = x[token[order]].split(counts)
        gate_up = torch.cat([F.linear(r, w) for r, w in zip(rows, w_gate_up.unbind())])
        gate, up = gate_up.chunk(2, dim=1)
        h = (F.silu(gate) * up).split(counts)
        y = torch.cat([F.linear(r, w) for r, w in zip(h, w_down.unbind())]) * weights.flatten()[order, None]
        return torch.zeros(num_tokens, hidden).index_add(0, token[order], y)

    assert ours <= 0.30 * (kept_bytes(plain) - w_gate_up.nbytes - w_down.nbytes)


def test_keeps_nothing_without_a_gradient(monkeypatch):
    args = arguments()
    monkeypatch.setattr(op.ops, "fused_moe_forward", lambda *a: pytest.fail("no gradient is to come"))
    dk.fused_moe(*args)
    leaves = [a.clone().requires_grad_() for a in args[:4]]
    with torch.no_grad():
        dk.fused_moe(*leaves, args[4])


def test_fp8_refuses_backward():
    x, w_gate_up, w_down, weights, indices = arguments()
    (q_gate_up, scale_gate_up), (q_down, scale_down) = quantized(w_gate_up), quantized(w_down)
    x.requires_grad_()
    out = dk.fused_moe(x, q_gate_up, q_down, weights, indices, scale_gate_up=scale_gate_up, scale_down=scale_down)
    with pytest.raises(NotImplementedError, match="fused_moe: has no backward with e4m3 weights"):
        out.sum().backward()


def test_face_refuses_a_range_without_an_end():
    with pytest.raises(ValueError, match=r"fused_moe: expert_range: wanted 0 <= begin <= end, got \(1, -1\)"):
        dk.fused_moe(*arguments(), expert_range=(1, -1))


def test_face_compiles_with_its_gradient():
    args = arguments()
    compiled = torch.compile(dk.fused_moe, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(T, H)
    for a, e in zip(gradients(compiled, args, cotangent), gradients(dk.fused_moe, args, cotangent)):
        assert_close(a, e, SUM)


def problem(num_tokens, kind="inference", weight_bytes=2):
    return plan.Problem(kind, num_tokens, V3.hidden, V3.intermediate, 256, V3.top_k, 2, weight_bytes)


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
def test_plan_decodes_few_tokens_and_composes_many(device):
    assert plan.select(problem(1), device, "triton") is not None
    assert plan.select(problem(1, weight_bytes=1), device, "triton").columns == 128
    for kind in ("inference", "forward", "backward"):
        assert plan.select(problem(4096, kind), device, "triton") is None
    assert plan.select(problem(1, "forward"), device, "triton") is None


def test_plan_counts_the_published_figures():
    """DeepSeek-V3, T = 4096: 2.89 TFLOP forward, twice that backward, and 88 MB of bf16 weights per expert."""
    p = problem(4096)
    assert plan.flops(p) == pytest.approx(2.89e12, rel=1e-2)
    backward = plan.Problem("backward", *list(vars(p).values())[1:8], needs=(True,) * 4)
    assert plan.flops(backward) == 2 * plan.flops(p)
    assert p.expert_bytes == pytest.approx(88e6, rel=1e-2)
    assert plan.cost(None, problem(1), H200) > 8 * p.expert_bytes / H200.bandwidth * 0.99
