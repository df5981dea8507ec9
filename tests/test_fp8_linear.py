"""`fp8_linear` and `nn.FP8Linear`: the product and both gradients in FP8."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepseek_kernels as dk
from deepseek_kernels import nn
from deepseek_kernels.testing.compare import GRADIENT, MATMUL, assert_close, distance

UNQUANTISED = 1e-3
"""Distance of an FP8 product from that of the operands before quantisation."""
BF16 = torch.bfloat16


def tensors(m: int, n: int = 144, k: int = 272, dtype=BF16, seed: int = 0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    return normal(m, k).requires_grad_(), torch.nn.Parameter(normal(n, k)), torch.nn.Parameter(normal(n)), normal(m, n)


def exact(x, weight, bias, grad):
    """y, dx, dw and db of the linear layer in float64."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    y = torch.nn.functional.linear(x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad.double())


def rounded(t: torch.Tensor, granularity: str) -> torch.Tensor:
    """`t` in e4m3 and back."""
    t = t.detach()
    return dk.fp8_dequantize(*dk.fp8_quantize(t, granularity), granularity).double()


@pytest.mark.parametrize("m", [1, 7, 129])
def test_value_and_gradients_are_near_those_of_the_linear_layer(m):
    x, weight, bias, grad = tensors(m)
    y = nn.fp8_linear(x, weight, bias)
    y.backward(grad)
    results = {"y": y, "x": x.grad, "weight": weight.grad, "bias": bias.grad}
    for (name, actual), expected in zip(results.items(), exact(x, weight, bias, grad), strict=True):
        assert actual.dtype == BF16 and actual.shape == expected.shape
        assert distance(actual, expected) < UNQUANTISED, name


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_every_product_is_that_of_the_quantised_operands(dtype):
    """Nothing is lost beyond the quantisation of section 3.3: 1x128 of x and dy, 128x1 of them
    for the weight's gradient, 128x128 of the weight."""
    x, weight, bias, grad = tensors(65, dtype=dtype)
    y = nn.fp8_linear(x, weight, bias)
    y.backward(grad)
    in_blocks = rounded(weight, "128x128")
    assert_close(y, rounded(x, "1x128") @ in_blocks.t() + bias.double(), MATMUL, "y")
    assert_close(x.grad, rounded(grad, "1x128") @ in_blocks, MATMUL, "x")
    assert_close(weight.grad, rounded(grad, "128x1").t() @ rounded(x, "128x1"), MATMUL, "weight")
    assert_close(bias.grad, grad.double().sum(0), GRADIENT, "bias")


def test_main_grad_collects_in_fp32():
    """Two microbatches in flight: both forwards, then both backwards."""
    batches = [tensors(m, seed=m) for m in (33, 64)]
    weight = batches[0][1]
    weight.main_grad = start = torch.randn(weight.shape)
    expected = start.clone()
    for x, _, _, grad in batches:
        in_fp32 = weight.detach().float().requires_grad_()
        expected += torch.autograd.grad(nn.fp8_linear(x, in_fp32), in_fp32, grad)[0]
    ys = [nn.fp8_linear(x, weight) for x, *_ in batches]
    for y, (*_, grad) in zip(ys, batches, strict=True):
        y.backward(grad)
    assert weight.grad is None and weight.main_grad is start
    assert_close(start, expected.double(), MATMUL, "main_grad")


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_deferred_weight_gradients_are_the_same(with_main_grad):
    queue = nn.WgradQueue()
    batches = [tensors(m, seed=m) for m in (16, 40, 24)]
    now, later = (torch.nn.Parameter(batches[0][1].detach().clone()) for _ in range(2))
    if with_main_grad:
        now.main_grad, later.main_grad = (torch.zeros(now.shape) for _ in range(2))
    gradient = (lambda w: w.main_grad) if with_main_grad else (lambda w: w.grad)
    for x, _, bias, grad in batches:
        nn.fp8_linear(x, now, bias).backward(grad)
        dx, x.grad = x.grad, None
        nn.fp8_linear(x, later, bias, wgrad_queue=queue).backward(grad)
        assert torch.equal(x.grad, dx)
    assert len(queue) == 3 and not (gradient(later) is not None and gradient(later).any())
    queue.pop()
    assert len(queue) == 2 and gradient(later).any()
    queue.flush()
    assert len(queue) == 0 and torch.equal(gradient(later), gradient(now))
    with pytest.raises(IndexError):
        queue.pop()


def test_only_what_is_asked_for_is_computed():
    x, weight, bias, grad = tensors(32)
    y = nn.fp8_linear(x.detach(), weight, bias)
    y.backward(grad)
    full = weight.grad
    frozen = nn.fp8_linear(x, weight.detach())
    frozen.backward(grad)
    assert distance(x.grad, exact(x, weight, bias, grad)[1]) < UNQUANTISED
    weight.grad = None
    nn.fp8_linear(x, weight).backward(grad)
    assert torch.equal(weight.grad, full)
    with torch.no_grad():
        assert nn.fp8_linear(x, weight, bias).grad_fn is None


def test_leading_dimensions_and_no_rows():
    x, weight, bias, _ = tensors(24)
    expected = nn.fp8_linear(x, weight, bias)
    assert torch.equal(nn.fp8_linear(x.view(2, 3, 4, -1), weight, bias), expected.view(2, 3, 4, -1))
    assert torch.equal(nn.fp8_linear(x[0], weight, bias), expected[0])
    empty = x.detach()[:0].requires_grad_()
    nn.fp8_linear(empty, weight, bias).sum().backward()
    assert empty.grad.shape == empty.shape and not weight.grad.any() and not bias.grad.any()


def test_autocast_sets_the_dtype_of_the_result():
    x, weight, bias, _ = tensors(16, dtype=torch.float32)
    assert nn.fp8_linear(x, weight, bias).dtype == torch.float32
    with torch.autocast("cpu", BF16):
        y = nn.fp8_linear(x, weight, bias)
    assert y.dtype == BF16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_compiles_whole(with_main_grad):
    compiled = torch.compile(nn.fp8_linear, fullgraph=True, backend="aot_eager")
    results = []
    for run in (nn.fp8_linear, compiled):
        batches = [tensors(m) for m in (40, 40)]
        weight = batches[0][1]
        if with_main_grad:
            weight.main_grad = torch.zeros(weight.shape)
        ys = [run(x, weight, bias) for x, _, bias, _ in batches]
        for y, (*_, grad) in zip(ys, batches, strict=True):
            y.backward(grad)
        results.append((*ys, *(x.grad for x, *_ in batches), weight.main_grad if with_main_grad else weight.grad))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    x, weight, bias, grad = tensors(40)
    nn.fp8_linear(x, weight, bias).backward(grad)
    expected = x.grad, weight.grad
    x.grad = weight.grad = None
    checkpoint(nn.fp8_linear, x, weight, bias, use_reentrant=reentrant).backward(grad)
    assert torch.equal(x.grad, expected[0]) and torch.equal(weight.grad, expected[1])


def test_a_weight_that_changes_before_the_backward_pass_is_an_error():
    x, weight, _, grad = tensors(16)
    y = nn.fp8_linear(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def test_there_is_no_second_derivative():
    x, weight, _, grad = tensors(16)
    (dx,) = torch.autograd.grad(nn.fp8_linear(x, weight), x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_powers_of_two_as_scales():
    x, weight, bias, grad = tensors(64)
    y = nn.fp8_linear(x, weight, bias, pow2_scale=True)
    y.backward(grad)
    for actual, expected in zip((y, x.grad, weight.grad), exact(x, weight, bias, grad), strict=False):
        assert distance(actual, expected) < UNQUANTISED


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 24)}, ValueError, r"k \(columns of x\): wanted a multiple of 16, got 24"),
        ({"x": torch.zeros(4, 32).long()}, TypeError, "x: wanted dtype bfloat16"),
        ({"x": torch.zeros(())}, ValueError, "x: dimensions: wanted at least 1, got 0"),
        ({"weight": torch.zeros(32, 48)}, ValueError, r"weight: wanted shape \[\*, 32\], got \[32, 48\]"),
        ({"weight": torch.zeros(24, 32)}, ValueError, r"n \(rows of weight\): wanted a multiple of 16, got 24"),
        ({"bias": torch.zeros(16)}, ValueError, r"bias: wanted shape \[32\], got \[16\]"),
        ({"main_grad": torch.zeros(32, 16)}, ValueError, r"weight.main_grad: wanted shape \[32, 32\]"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    given = {"x": torch.zeros(4, 32), "weight": torch.zeros(32, 32), "bias": torch.zeros(32)} | change
    if "main_grad" in given:
        given["weight"].main_grad = given.pop("main_grad")
    with pytest.raises(error, match="fp8_linear: " + message):
        nn.fp8_linear(**given)


def test_the_layer_trains_the_parameters_it_was_made_from():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, dtype=BF16)
    layer = nn.FP8Linear.from_linear(linear, train=True)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.quantized
    assert set(layer.state_dict()) == set(linear.state_dict())
    target = torch.randn(256, 48)
    x = torch.randn(256, 64, dtype=BF16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    layer.wgrad_queue = nn.WgradQueue()
    optimizer.zero_grad()
    layer(x).sum().backward()
    assert layer.weight.grad is None and len(layer.wgrad_queue) == 1


def test_from_training_to_serving():
    linear = torch.nn.Linear(64, 48, dtype=BF16)
    x = torch.randn(5, 64, dtype=BF16)
    layer = nn.FP8Linear.from_linear(copy.deepcopy(linear), train=True)
    trained = layer(x)
    assert layer.float().weight.dtype == torch.float32
    layer.bfloat16().quantize_()
    assert layer.quantized and layer.weight.dtype == torch.float8_e4m3fn and not layer.bias.requires_grad
    assert torch.equal(layer(x), trained)
    assert torch.equal(layer(x), nn.FP8Linear.from_linear(linear)(x))
    assert layer.bfloat16().weight_scale_inv.dtype == torch.float32


def test_an_mlp_of_training_layers():
    torch.manual_seed(0)
    mlp = nn.SwigluMLP(64, 48, dtype=BF16)
    plain = copy.deepcopy(mlp)
    for name in ("gate_up_proj", "down_proj"):
        setattr(mlp, name, nn.FP8Linear.from_linear(getattr(mlp, name), train=True))
    x = torch.randn(40, 64, dtype=BF16)
    for module in (mlp, plain):
        module(x).sum().backward()
    for (name, p), q in zip(mlp.named_parameters(), plain.parameters(), strict=True):
        assert distance(p.grad, q.grad) < 2 * UNQUANTISED, name
    assert mlp.quantize_()(x).shape == x.shape
