"""`swiglu` and `swiglu_backward`: what the contract cannot know."""

import math

import pytest
import torch
import torch.nn.functional as F

import deepseek_kernels as dk
from deepseek_kernels.device import GPUS, H200
from deepseek_kernels.plan import swiglu as plan
from deepseek_kernels.reference.fp8_quantize import fp8_dequantize, fp8_quantize
from deepseek_kernels.reference.moe_sort import moe_sort
from deepseek_kernels.testing.compare import MATMUL, SUM, Tolerance, assert_close, assert_same_bits

BACKENDS = ("reference", "triton")
NAN = float("nan")


def silu(x: float) -> float:
    return x / (1 + math.exp(-x)) if x > -700 else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    """Gate columns come first; the weight of a row is the one its entry points at."""
    gate_up = torch.tensor([[1.0, -2.0, 3.0, 4.0], [NAN, NAN, NAN, NAN], [0.5, 0.0, 2.0, 7.0]])
    weights = torch.tensor([[10.0, 0.5], [2.0, 20.0]])
    entry = torch.tensor([2, -1, 1], dtype=torch.int32)
    expected = torch.tensor([[2 * 3 * silu(1), 2 * 4 * silu(-2)], [0, 0], [0.5 * 2 * silu(0.5), 0]])
    with dk.use_backend(backend):
        assert_close(dk.swiglu(gate_up, weights, pos_to_token_topk=entry), expected, SUM)
        maps = dk.MoeMaps(torch.empty(0), entry, torch.empty(0))
        assert_close(dk.swiglu(gate_up, weights, maps=maps), expected, SUM)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_is_stable(backend):
    gate = torch.tensor([0.0, 1e-30, -1e-30, 20, -20, 87, -87, 89, -89, 1e4, -1e4, 3e38, -3e38])
    gate_up = torch.stack([gate, torch.ones_like(gate)], 1)
    with dk.use_backend(backend):
        out = dk.swiglu(gate_up)[:, 0]
        gradient, _ = torch.ops.deepseek_kernels.swiglu_backward(torch.ones(13, 1), gate_up)
    assert out.isfinite().all() and gradient.isfinite().all()
    expected = torch.tensor([silu(float(g)) for g in gate], dtype=torch.float64)
    assert_close(out, expected, SUM)
    assert_close(gradient[-4:, 0], torch.tensor([1.0, 0.0, 1.0, 0.0]), SUM)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_finite_stays_visible(backend, value):
    gate_up = torch.ones(3, 4)
    gate_up[0, 0] = gate_up[1, 3] = value
    with dk.use_backend(backend):
        out = dk.swiglu(gate_up, clamp=None if math.isinf(value) else 2.0)
    assert not out[0, 0].isfinite() and not out[1, 1].isfinite()
    assert out.isfinite().sum() == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamp_limits_gate_above_and_up_on_both_sides(backend):
    gate_up = torch.tensor([[9.0, -9.0, 9.0, -9.0]])
    with dk.use_backend(backend):
        assert_close(dk.swiglu(gate_up, clamp=2.0), torch.tensor([[silu(2) * 2, silu(-9) * -2]]), SUM)
        gradient, _ = torch.ops.deepseek_kernels.swiglu_backward(torch.ones(1, 2), gate_up, None, None, 2.0)
    assert gradient[0, 0] == 0 and gradient[0, 1] != 0 and not gradient[0, 2:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantises_the_fp32_value(backend):
    """Not its rounding to bf16, which would move some codes."""
    gate_up, weights = torch.randn(40, 512).bfloat16(), torch.rand(40)
    with dk.use_backend(backend):
        q, scale = dk.swiglu(gate_up, weights, quantize=True)
        plain = dk.swiglu(gate_up.float(), weights)
    expected_q, expected_scale = fp8_quantize(plain)
    assert_same_bits(q, expected_q)
    assert_same_bits(scale, expected_scale)
    rounded_q, _ = fp8_quantize(plain.bfloat16())
    assert not torch.equal(q.view(torch.uint8), rounded_q.view(torch.uint8))
    assert_close(fp8_dequantize(q, scale), plain, Tolerance(absolute=float("inf"), distance=1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_weights(backend):
    """Each (token, k) gets the product of its own row, and a dropped one zero."""
    indices = torch.tensor([[0, 2], [-1, 1], [2, 0]])
    t2p, p2t, _ = moe_sort(indices, 3, alignment=4)
    gate_up, grad = torch.randn(len(p2t), 64), torch.randn(len(p2t), 32)
    gate_up[p2t < 0] = grad[p2t < 0] = NAN
    weights = torch.rand(3, 2)
    with dk.use_backend(backend):
        grad_gate_up, grad_weights = torch.ops.deepseek_kernels.swiglu_backward(grad, gate_up, weights, p2t)
    assert grad_weights[1, 0] == 0
    assert not grad_gate_up[p2t < 0].any()
    gate, up = gate_up.double().chunk(2, 1)
    dots = (grad.double() * F.silu(gate) * up).sum(1)
    expected = torch.where(t2p >= 0, dots[t2p.clamp(min=0).long()], 0)
    assert_close(grad_weights, expected, MATMUL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_past_the_weights_are_no_entries(backend):
    gate_up, grad = torch.full((3, 8), NAN), torch.full((3, 4), NAN)
    entry = torch.tensor([4, 2**31 - 1, -(2**31)], dtype=torch.int32)
    weights = torch.ones(2, 2)
    with dk.use_backend(backend):
        assert not dk.swiglu(gate_up, weights, pos_to_token_topk=entry).any()
        q, scale = dk.swiglu(gate_up, weights, pos_to_token_topk=entry, quantize=True)
        assert not q.view(torch.uint8).any() and not scale.any()
        gradients = torch.ops.deepseek_kernels.swiglu_backward(grad, gate_up, weights, entry)
    assert not any(g.any() for g in gradients)


def test_quantised_output_has_no_backward():
    gate_up = torch.randn(2, 8, requires_grad=True)
    q, scale = dk.swiglu(gate_up, quantize=True)
    assert not scale.requires_grad
    with pytest.raises(NotImplementedError, match="swiglu: has no backward with quantize=True"):
        q.float().sum().backward()


def test_maps_and_their_part_at_once_are_refused():
    entry = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="swiglu: pos_to_token_topk: wanted None when maps is given"):
        dk.swiglu(torch.ones(2, 4), maps=dk.MoeMaps(entry, entry, entry), pos_to_token_topk=entry)


def test_bytes():
    p = plan.Problem("forward", 10, 256, 2, weighted=True, mapped=True)
    assert plan.bytes(p) == 10 * (3 * 512 + 8)
    assert plan.bytes(plan.Problem("forward", 10, 256, 2, quantize=True)) == 10 * (2 * 512 + 256 + 8)
    assert plan.bytes(plan.Problem("backward", 10, 256, 2, weighted=True)) == 10 * (5 * 512 + 8)
    assert plan.flops(p) == 0


@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
def test_quantising_blocks_hold_whole_scales(device):
    for p in (plan.Problem(kind, 32768, i, 2) for kind in ("forward", "backward") for i in (8, 1408, 2048)):
        c = plan.select(p, device, "triton")
        assert c.block % 128 == 0
        assert c.native_fp8 == (device.arch >= 89)


def test_many_rows_take_wide_blocks_and_one_row_narrow_ones():
    assert plan.select(plan.Problem("forward", 1, 2048, 2), H200, "triton").block <= 512
    assert plan.select(plan.Problem("forward", 131072, 2048, 2), H200, "triton").block == 2048
