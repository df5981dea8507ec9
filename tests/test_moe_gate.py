"""`moe_gate`: what the contract cannot know."""

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels.device import GPUS
from deepseek_kernels.ops import moe_gate as op
from deepseek_kernels.ops._device import spec
from deepseek_kernels.plan import moe_gate as plan
from deepseek_kernels.shapes import V2_LITE, V3
from deepseek_kernels.testing.compare import SUM, Tolerance, assert_close

BACKENDS = ("reference", "triton", "cpu")
SCORES = ("sigmoid", "softmax", "sqrtsoftplus")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with dk.use_backend(request.param):
        if dk.explain("moe_gate", torch.zeros(1, 1), None, 1).backend is None:
            pytest.skip(f"no {request.param} backend here")
        yield request.param


def deepseek_v3_gate(logits, bias, top_k, num_groups, topk_groups, score, normalize, scale):
    """`Gate.forward` of DeepSeek-V3's inference/model.py, line by line, on fp32 logits."""
    scores = logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()
    original_scores = scores
    if bias is not None:
        scores = scores + bias
    if num_groups > 1:
        scores = scores.view(logits.size(0), num_groups, -1)
        group_scores = scores.amax(dim=-1) if bias is None else scores.topk(2, dim=-1)[0].sum(dim=-1)
        indices = group_scores.topk(topk_groups, dim=-1)[1]
        mask = scores.new_ones(logits.size(0), num_groups, dtype=bool).scatter_(1, indices, False)
        scores = scores.masked_fill_(mask.unsqueeze(-1), float("-inf")).flatten(1)
    indices = torch.topk(scores, top_k, dim=-1)[1]
    weights = original_scores.gather(1, indices)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scale, indices


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups", "topk_groups"),
    [(5, 2, 1, 1), (24, 4, 3, 2), (72, 8, 9, 4), (256, 8, 8, 4), (64, 6, 1, 1)],
)
def test_is_deepseek_v3s(backend, num_experts, top_k, num_groups, topk_groups, biased, score):
    """On data without ties, biases mostly negative: a group that is out must never come back as 0."""
    logits = torch.randn(6, num_experts)
    bias = torch.randn(num_experts) * 0.1 - 1.5 if biased else None
    options = dict(top_k=top_k, num_groups=num_groups, topk_groups=topk_groups, score=score, scale=2.5)
    for normalize in (True, False):
        weights, indices = dk.moe_gate(logits, bias, normalize=normalize, **options)
        expected = deepseek_v3_gate(logits, bias, normalize=normalize, **options)
        assert torch.equal(indices, expected[1])
        assert_close(weights, expected[0], SUM)


@pytest.mark.parametrize("shape", [V3, V2_LITE], ids=lambda m: m.name)
def test_presets(backend, shape):
    options = dict(top_k=shape.top_k, num_groups=shape.num_groups, topk_groups=shape.topk_groups)
    options |= dict(score=shape.score, normalize=shape.normalize, scale=shape.routed_scale)
    bias = torch.zeros(shape.num_experts) if shape.score == "sigmoid" else None
    logits = torch.randn(3, shape.num_experts)
    weights, indices = dk.moe_gate(logits, bias, **options)
    expected = deepseek_v3_gate(logits, bias, **options)
    assert torch.equal(indices, expected[1])
    assert_close(weights, expected[0], SUM)


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lower_index(backend, score):
    logits = torch.tensor([[0.0] * 8, [1, 2, 2, 1, 2, 0, 1, 2], [0, 0, 0, 0, 3, 3, 3, 3]])
    _, indices = dk.moe_gate(logits, top_k=5, score=score)
    assert indices.tolist() == [[0, 1, 2, 3, 4], [1, 2, 4, 7, 0], [4, 5, 6, 7, 0]]


def test_many_experts_as_good_as_the_last_chosen(backend):
    """All equal; the best ones at multiples of 16; ever better ones: more than a kernel expects beyond a bound."""
    e = torch.arange(320.0)
    logits = torch.stack([torch.zeros(320), torch.where(e % 16 < 3, 1 + e / 320, -e / 320), e / 320])
    _, indices = dk.moe_gate(logits, None, top_k=8)
    assert indices.tolist() == logits.sort(dim=1, descending=True, stable=True)[1][:, :8].tolist()


@pytest.mark.parametrize("biased", [True, False])
def test_group_ties_go_to_the_lower_group(backend, biased):
    """Groups 0 and 2 tie for the second place: 0 takes it, though 2 would come first in any order of experts."""
    logits = torch.tensor([[1.0, 0, 2, 2, 0, 1, -1, -1]])
    _, indices = dk.moe_gate(logits, torch.zeros(8) if biased else None, top_k=4, num_groups=4, topk_groups=2)
    assert indices.tolist() == [[2, 3, 0, 1]]


def test_bias_selects_and_does_not_weigh(backend):
    logits = torch.tensor([[4.0, 3, 2, 1]])
    bias = torch.tensor([-10.0, 0, 0, 10])
    weights, indices = dk.moe_gate(logits, bias, top_k=2, normalize=False)
    assert indices.tolist() == [[3, 1]]
    assert_close(weights, torch.sigmoid(torch.tensor([[1.0, 3.0]])), SUM)


def test_group_score_is_the_sum_of_two(backend):
    """The best expert's group loses to one with two good ones, with a bias; without, it wins."""
    logits = torch.tensor([[3.0, -9, 2.5, 2.4]])
    assert dk.moe_gate(logits, torch.zeros(4), top_k=1, num_groups=2)[1].item() == 2
    assert dk.moe_gate(logits, top_k=1, num_groups=2)[1].item() == 0


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("num_groups", "topk_groups"), [(1, 1), (4, 2), (12, 6)])
@pytest.mark.parametrize("biased", [True, False])
def test_odd_logits_give_distinct_ids_in_range(backend, biased, num_groups, topk_groups, score):
    logits = torch.randn(9, 12)
    for row, value in enumerate((NAN, -INF, INF)):
        logits[row] = value
        logits[row + 3][torch.rand(12) < 0.7] = value
    logits[6, ::3], logits[6, 1::3], logits[6, 2::3] = NAN, INF, -INF
    bias = torch.randn(12) if biased else None
    if biased:
        bias[3], bias[4], bias[5] = NAN, INF, -INF
    options = dict(top_k=6, num_groups=num_groups, topk_groups=topk_groups, score=score)
    weights, indices = dk.moe_gate(logits, bias, **options)
    assert indices.min() >= 0 and indices.max() < 12
    assert all(len(set(row)) == 6 for row in indices.tolist())
    assert weights.isfinite().all() and (weights >= 0).all()
    chosen = logits.gather(1, indices)
    assert (weights[chosen.isnan() | (chosen == -INF)] == 0).all()
    assert all(len({e // (12 // num_groups) for e in row}) <= topk_groups for row in indices.tolist())
    with dk.use_backend("reference"):
        expected = dk.moe_gate(logits, bias, **options)
    assert torch.equal(indices, expected[1])
    assert_close(weights, expected[0], SUM)


def test_odd_logits_by_name(backend):
    """NaN and -inf after everything finite, lowest index first; +inf before."""
    logits = torch.tensor([[NAN, -5.0, INF, -INF, 1.0], [NAN] * 5, [INF, INF, 0, INF, NAN], [-INF, NAN, -INF, 7, NAN]])
    weights, indices = dk.moe_gate(logits, top_k=4)
    assert indices.tolist() == [[2, 4, 1, 0], [0, 1, 2, 3], [0, 1, 3, 2], [3, 0, 1, 2]]
    sigmoid = torch.sigmoid(torch.tensor([0.0, 1, -5]))
    expected = torch.stack(
        [torch.tensor([1, sigmoid[1], sigmoid[2], 0]), torch.zeros(4), torch.zeros(4), torch.zeros(4)]
    )
    expected[2], expected[3, 0] = torch.tensor([1, 1, 1, sigmoid[0]]), 1.0
    assert_close(weights, expected / expected.sum(1, keepdim=True).clamp(min=1e-20), SUM)


def test_a_group_with_one_usable_expert_counts_for_it(backend):
    """-inf for a whole group because one of its two best is -inf would hide the best expert."""
    logits = torch.tensor([[NAN, NAN, NAN, 3.0, 0.0, -1.0]])
    _, indices = dk.moe_gate(logits, torch.zeros(6), top_k=1, num_groups=3)
    assert indices.item() == 3


@pytest.mark.parametrize("score", SCORES)
def test_masked_tokens(backend, score):
    logits = torch.randn(5, 8)
    logits[1] = NAN
    mask = torch.tensor([True, False, True, False, True])
    weights, indices = dk.moe_gate(logits, top_k=3, score=score, mask=mask)
    assert (indices[~mask] == -1).all() and (weights[~mask] == 0).all()
    plain = dk.moe_gate(logits[mask], top_k=3, score=score)
    assert torch.equal(weights[mask], plain[0]) and torch.equal(indices[mask], plain[1])


def test_one_expert_normalised_weighs_scale(backend):
    """Whatever its score, unless that is 0."""
    logits = torch.tensor([[-8.0, -9.0], [5.0, 6.0], [-INF, NAN]])
    weights, _ = dk.moe_gate(logits, top_k=1, scale=2.5)
    assert_close(weights, torch.tensor([[2.5], [2.5], [0.0]]), SUM)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_scores_keep_their_digits(backend, score):
    """Far from 0 too: 8 fp32 steps of fp64, relative, where a plain 1 + exp(x) has none left."""
    logits = torch.cat([torch.linspace(-80, 80, 200), torch.linspace(-1, 1, 56)])[None]
    options = dict(top_k=256, score=score, normalize=False)
    weights, indices = dk.moe_gate(logits, **options)
    x = logits.double().gather(1, indices)
    expected = x.sigmoid() if score == "sigmoid" else (x.clamp(min=0) + (-x.abs()).exp().log1p()).sqrt()
    assert_close(weights, expected, Tolerance(steps=8, absolute=1e-37))


def test_fp32_of_narrow_logits(backend):
    """bf16 logits are widened before anything else: no new ties among scores, and fp32 weights."""
    logits = torch.randn(4, 64).bfloat16()
    weights, indices = dk.moe_gate(logits, top_k=6)
    wide = dk.moe_gate(logits.float(), top_k=6)
    assert weights.dtype == torch.float32 and indices.dtype == torch.int64
    assert torch.equal(weights, wide[0]) and torch.equal(indices, wide[1])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_is_that_of_the_formula(backend, score, normalize):
    logits, cotangent = torch.randn(4, 12), torch.randn(4, 3)
    leaf = logits.clone().requires_grad_()
    weights, indices = dk.moe_gate(leaf, torch.randn(12), top_k=3, score=score, normalize=normalize, scale=2.0)
    weights.backward(cotangent)
    x = logits.double().requires_grad_()
    scores = {
        "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1),
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }[score](x).gather(1, indices)  # fmt: skip
    if normalize:
        scores = scores / (scores.sum(1, keepdim=True) + 1e-20)
    (scores * 2.0).backward(cotangent.double())
    assert_close(leaf.grad, x.grad, Tolerance(steps=16, absolute=1e-6))


def test_gradient_of_odd_rows_is_zero_or_finite(backend):
    logits = torch.randn(5, 6)
    logits[0], logits[1], logits[2, :3], logits[3, 1] = NAN, -INF, NAN, INF
    mask = torch.tensor([True, True, True, True, False])
    for score in SCORES:
        leaf = logits.clone().requires_grad_()
        dk.moe_gate(leaf, top_k=4, score=score, mask=mask)[0].square().sum().backward()
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[[0, 1, 4]] == 0).all() and (leaf.grad[2, :3] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 128, 8192])
def test_the_cuda_kernel_at_real_sizes_on_a_gpu(num_tokens, dtype, score):
    """Every configuration, as Triton chooses, but where rounding made a tie."""
    logits = torch.randn(num_tokens, 256, device="cuda").to(dtype)
    bias = torch.randn(256, device="cuda") * 0.1
    args = (logits, bias, 8, 8, 4, score, True, 2.5, None)
    with dk.use_backend("cuda"):
        if dk.explain("moe_gate", *args).backend is None:
            pytest.skip("no cuda backend here")
    expected = torch.ops.deepseek_kernels.moe_gate(*args)
    for config in plan.candidates(op._problem(*args), spec(logits.device), "cuda"):
        weights, indices = op._cuda(config, *args)
        same = (indices == expected[1]).all(1)
        assert same.float().mean() > 0.999, config
        assert_close(weights[same], expected[0][same], SUM)


def test_bias_has_no_gradient(backend):
    logits, bias = torch.randn(3, 6, requires_grad=True), torch.zeros(6, requires_grad=True)
    dk.moe_gate(logits, bias, top_k=2)[0].sum().backward()
    assert bias.grad is None and logits.grad is not None


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("num_experts", [1, 64, 256, 1024, 4096])
def test_plan_keeps_experts_in_registers(num_experts, device):
    p = plan.Problem("forward", 8, num_experts, 1, 1, 4, "float32")
    config = plan.select(p, device, "triton")
    assert num_experts / (32 * config.num_warps) <= 16
    assert config.num_warps == 1 or num_experts > 256
