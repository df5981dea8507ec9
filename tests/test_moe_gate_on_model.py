"""moe_gate's CUDA kernel in the model of tests/hopper_model, against the reference."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels.device import H200
from deepseek_kernels.plan import moe_gate as plan
from deepseek_kernels.reference.moe_gate import SCORES
from deepseek_kernels.reference.moe_gate import moe_gate as reference
from deepseek_kernels.testing.compare import SUM, Tolerance, assert_close

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


def run_gate(
    model, logits, bias, top_k, num_groups=1, topk_groups=1, score="sigmoid", *,
    normalize=True, scale=1.0, mask=None, ld_pad=0, offset=0, warps=2, ctas=2,
):  # fmt: skip
    (num_tokens, num_experts), guarded = logits.shape, harness.Guarded(model)
    x = guarded.copy("logits", logits, stride=(num_experts + ld_pad, 1), offset=offset)
    weights = guarded.empty("weights", (num_tokens, top_k), torch.float32)
    indices = guarded.empty("indices", (num_tokens, top_k), torch.int64)
    groups = 1 if num_groups == topk_groups else num_groups
    problem = plan.Problem("forward", num_tokens, num_experts, top_k, groups, logits.element_size())
    group_lanes, per_lane = plan.lanes(problem)
    model.moe_gate(
        logits=x.data_ptr(), bias=0 if bias is None else guarded.copy("bias", bias).data_ptr(),
        mask=0 if mask is None else guarded.copy("mask", mask.view(torch.uint8)).data_ptr(),
        weights=weights.data_ptr(), indices=indices.data_ptr(), num_tokens=num_tokens, ld_logits=x.stride(0),
        num_experts=num_experts, top_k=top_k, num_groups=groups, topk_groups=topk_groups if groups > 1 else 1,
        score=list(SCORES).index(score), dtype=harness.DTYPES[logits.dtype], normalize=normalize, scale=scale,
        group_lanes=group_lanes, per_lane=per_lane, warps=warps, ctas=ctas, stream=0,
    )  # fmt: skip
    expected = reference(logits, bias, top_k, num_groups, topk_groups, score, normalize, scale, mask)
    assert torch.equal(indices, expected[1])
    assert_close(weights, expected[0], SUM)


SHAPES = [  # experts, top_k, groups, groups of a token: every number of experts a lane, whole or not, every row's end
    (1, 1, 1, 1), (33, 5, 1, 1), (64, 6, 1, 1), (72, 8, 9, 4), (32, 4, 32, 7), (160, 6, 8, 3), (256, 8, 8, 4),
    (256, 8, 1, 1), (256, 7, 8, 4), (250, 32, 5, 3), (512, 8, 1, 1), (384, 12, 2, 1),
]  # fmt: skip


def spaced(tokens, experts, generator):
    """Logits whose scores are so far apart that no rounding swaps two of them."""
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    return (order - experts / 2) * 8 / experts


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_moe_gate(model, dtype, score):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for i, (experts, top_k, groups, topk_groups) in enumerate(SHAPES):
            logits = spaced(5, experts, generator).to(dtype)
            bias = torch.randint(-4, 3, (experts,), generator=generator).float() if (seed + i) % 3 else None
            mask = torch.tensor([True, False, True, True, True]) if (seed + i) % 2 else None
            run_gate(
                model, logits, bias, top_k, groups, topk_groups, score,
                normalize=seed % 2 == 0, scale=2.5, mask=mask, ld_pad=(0, 8, 3)[seed % 3], offset=(seed + i) % 5 // 4,
            )  # fmt: skip

    harness.under_every_schedule(run)


@pytest.mark.parametrize("score", SCORES)
def test_ties_and_odd_values(model, score):
    """Few different scores, infinities and NaN in logits and bias, whole groups of them."""

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        values = torch.tensor([-1.0, 0, 0.5, 2, NAN, INF, -INF])
        for (experts, top_k, groups, topk_groups), odd in itertools.product(SHAPES[1:9], (4, 7)):
            logits = values[torch.randint(0, odd, (4, experts), generator=generator)]
            logits[0] = values[seed % 7]
            bias = values[torch.randint(0, odd, (experts,), generator=generator)] if seed % 2 else None
            run_gate(model, logits, bias, top_k, groups, topk_groups, score)

    harness.under_every_schedule(run)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_scores_keep_their_digits(model, score):
    logits = torch.cat([torch.linspace(-80, 80, 200), torch.linspace(-1, 1, 56)])[:, None]
    with harness.model_extension(), dk.use_backend("cuda"):
        weights, _ = dk.moe_gate(logits, top_k=1, score=score, normalize=False)
    x = logits.double()
    expected = x.sigmoid() if score == "sigmoid" else (x.clamp(min=0) + (-x.abs()).exp().log1p()).sqrt()
    assert_close(weights, expected, Tolerance(steps=8, absolute=1e-37))


@pytest.mark.parametrize(
    "bug", ["last_of_ties", "group_of_one", "every_group_allowed", "equal_keys_forgotten"]
)  # fmt: skip
def test_bugs_of_moe_gate(model, bug):
    logits = torch.zeros(4, 64)
    logits[0] = torch.arange(64.0) / 16 - 2
    logits[1, ::4], logits[1, 9:11] = 1.5, 1.4
    logits[2, :16] = torch.tensor([3.0, -9, -9, -9, *(2.5, 2.4, -9, -9) * 3])
    harness.assert_caught(lambda: run_gate(model, logits, torch.zeros(64), 6, 16, 3), bug)


def test_what_no_instance_takes_is_refused(model):
    x = torch.zeros(2, 64)
    arguments = dict(
        logits=x.data_ptr(), bias=0, mask=0, weights=x.data_ptr(), indices=x.data_ptr(), num_tokens=2, ld_logits=64,
        num_experts=64, top_k=2, num_groups=1, topk_groups=1, score=0, dtype=0, normalize=True, scale=1.0,
        group_lanes=32, per_lane=2, warps=1, ctas=1, stream=0,
    )  # fmt: skip
    wrong = [dict(top_k=33), dict(group_lanes=16), dict(group_lanes=3), dict(per_lane=32), dict(warps=9)]
    for w in [*wrong, dict(score=3), dict(num_groups=4)]:
        with pytest.raises(RuntimeError, match=r"launch\.cu"):
            model.moe_gate(**(arguments | w))


@pytest.mark.parametrize("num_experts", [1, 60, 64, 256, 512])
@pytest.mark.parametrize("num_groups", [1, 4])
def test_plan_fits_a_warp(num_experts, num_groups):
    p = plan.Problem("forward", 100, num_experts, 1, num_groups, 4)
    for c in plan.candidates(p, H200, "cuda"):
        assert c.group_lanes * c.per_lane >= num_experts // num_groups
        assert c.group_lanes * num_groups <= 32 and c.ctas * c.warps >= 1
