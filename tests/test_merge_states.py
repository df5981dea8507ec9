"""What the contract cannot know of `merge_states`."""

import pytest
import torch

import deepseek_kernels
from deepseek_kernels.device import GPUS
from deepseek_kernels.plan import merge_states as plan
from deepseek_kernels.testing.compare import LSE, SUM, assert_close, assert_same_bits

INF = float("inf")
BACKENDS = ["reference", "triton"]


def attention(scores: torch.Tensor, values: torch.Tensor):
    """scores [b, h, s, n], values [b, n, d] -> out [b, s, h, d], lse [b, h, s]."""
    out = torch.einsum("bhsn,bnd->bshd", scores.softmax(-1), values)
    return out, scores.logsumexp(-1)


def merge(backend, *sides):
    with deepseek_kernels.use_backend(backend):
        return deepseek_kernels.merge_states(*sides)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_are_the_whole(backend):
    scores, values = 3 * torch.randn(2, 3, 2, 17, dtype=torch.float64), torch.randn(2, 17, 20, dtype=torch.float64)
    out, lse = attention(scores, values)
    sides = (*attention(scores[..., :5], values[:, :5]), *attention(scores[..., 5:], values[:, 5:]))
    merged, merged_lse = merge(backend, *(t.float() for t in sides))
    assert_close(merged, out, SUM, "out")
    assert_close(merged_lse, lse, LSE, "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lse_a", "lse_b", "share_a", "lse"),
    [
        (-INF, 1.5, 0.0, 1.5),
        (1.5, -INF, 1.0, 1.5),
        (-INF, -INF, None, -INF),
        (INF, 1.5, 1.0, INF),
        (INF, -INF, 1.0, INF),
        (INF, INF, 0.5, INF),
        (100.0, -100.0, 1.0, 100.0),
        (3e38, -3e38, 1.0, 3e38),
    ],
)
def test_known_answers(backend, lse_a, lse_b, share_a, lse):
    a, b = torch.full((1, 1, 1, 4), 2.0), torch.full((1, 1, 1, 4), 6.0)
    a, b = (torch.full_like(x, float("nan")) if side == -INF else x for x, side in ((a, lse_a), (b, lse_b)))
    out, merged = merge(backend, a, torch.full((1, 1, 1), lse_a), b, torch.full((1, 1, 1), lse_b))
    expected = 0.0 if share_a is None else 2.0 * share_a + 6.0 * (1 - share_a)
    assert_same_bits(out, torch.full((1, 1, 1, 4), expected))
    assert_same_bits(merged, torch.full((1, 1, 1), lse))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    x = torch.ones(1, 1, 1, 4)
    out, lse = merge(backend, x, torch.full((1, 1, 1), float("nan")), x, torch.zeros(1, 1, 1))
    assert out.isnan().all() and lse.isnan().all()


def test_an_empty_side_has_no_gradient():
    out_a, out_b = torch.full((1, 1, 1, 4), float("nan")), torch.ones(1, 1, 1, 4)
    sides = [out_a, torch.full((1, 1, 1), -INF), out_b, torch.zeros(1, 1, 1)]
    leaves = [t.requires_grad_() for t in sides]
    out, lse = deepseek_kernels.merge_states(*leaves)
    (out.sum() + 3 * lse.sum()).backward()
    assert [t.grad.unique().tolist() for t in leaves] == [[0.0], [0.0], [1.0], [3.0]]


@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
def test_plan(device):
    small, large = plan.Problem(16, 512), plan.Problem(128 * 128, 512)
    assert plan.select(small, device, "triton").rows == 1
    assert plan.select(large, device, "triton") in plan.candidates(large, device)
    assert plan.bytes(large) == 3 * 128 * 128 * (512 * 2 + 4)
