"""`moe_permute` and `moe_unpermute`: what the contract cannot know."""

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels import shapes
from deepseek_kernels.device import GPUS, H200
from deepseek_kernels.plan import moe_permute as plan
from deepseek_kernels.reference.moe_sort import moe_sort
from deepseek_kernels.testing.compare import assert_same_bits

BACKENDS = ("reference", "triton")


def maps(indices, num_experts, alignment=1) -> dk.MoeMaps:
    return dk.MoeMaps(*moe_sort(torch.as_tensor(indices), num_experts, alignment=alignment))


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example(backend):
    """The example of MoeMaps' docstring, row by row."""
    m = maps([[0, 2], [2, 1], [0, -1]], 3)
    assert m.token_topk_to_pos.tolist() == [[0, 3], [4, 2], [1, -1]]
    assert m.pos_to_token_topk.tolist() == [0, 4, 3, 1, 2, -1]
    assert m.expert_offsets.tolist() == [0, 2, 3, 5]
    x = torch.tensor([[1.0], [2.0], [3.0]])
    with dk.use_backend(backend):
        rows = dk.moe_permute(x, m)
        assert rows.flatten().tolist() == [1, 3, 2, 1, 2, 0]
        assert dk.moe_unpermute(rows, m).flatten().tolist() == [2, 4, 3]
        weights = torch.tensor([[0.5, 0.25], [2.0, 1.0], [4.0, 100.0]])
        assert dk.moe_unpermute(rows, m, weights).flatten().tolist() == [0.75, 6, 12]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_moves_every_bit_pattern(backend, dtype):
    """Movement is of bits: NaN payloads, infinities, subnormals and negative zeros arrive as they left."""
    codes = torch.randint(-(2**31), 2**31 - 1, (4, 24), dtype=torch.int32)
    x = codes.view(torch.uint8)[:, : 16 * dtype.itemsize].contiguous().view(dtype)
    m = maps([[1, 0], [0, 2], [2, 1], [1, 2]], 3, alignment=2)
    with dk.use_backend(backend):
        rows = dk.moe_permute(x, m)
    for t in range(4):
        for k in range(2):
            moved = rows[m.token_topk_to_pos[t, k]]
            assert torch.equal(moved.view(torch.uint8), x[t].view(torch.uint8))
    assert not rows.view(torch.uint8)[m.pos_to_token_topk < 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_is_quantise_then_move(backend):
    x = torch.randn(5, 200, dtype=torch.bfloat16)
    x[1] = 0
    x[2, 130] = float("nan")
    x[3, 7] = float("inf")
    m = maps(torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), 2, alignment=4)
    with dk.use_backend("reference"):
        q, scale = torch.ops.deepseek_kernels.moe_permute(x, m.token_topk_to_pos, m.pos_to_token_topk, None, True)
    with dk.use_backend(backend):
        rows, row_scale = dk.moe_permute(x, m, quantize=True)
    assert_same_bits(rows, q)
    assert_same_bits(row_scale, scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpermute_adds_in_the_order_of_k(backend):
    """1 + 2^24 - 2^24 in fp32 is 0 or 1 depending on the order; the order is k."""
    y = torch.tensor([[1.0], [2.0**24], [-(2.0**24)]])
    t2p = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    m = dk.MoeMaps(t2p, torch.arange(3, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32))
    with dk.use_backend(backend):
        assert dk.moe_unpermute(y, m).item() == 0.0
        swapped = m._replace(token_topk_to_pos=torch.tensor([[1, 2, 0]], dtype=torch.int32))
        assert dk.moe_unpermute(y, swapped).item() == 1.0


def test_zero_weight_times_infinity_is_not_hidden():
    """A row that exists is part of the sum, whatever its weight: 0 * inf is NaN, as in plain torch."""
    m = maps([[0]], 1)
    y = torch.tensor([[float("inf")]])
    for backend in BACKENDS:
        with dk.use_backend(backend):
            assert dk.moe_unpermute(y, m, torch.zeros(1, 1)).isnan().all()


def test_round_trip_gradient_is_count_of_experts():
    x = torch.randn(6, 8, requires_grad=True)
    m = maps([[0, 1], [1, -1], [-1, -1], [2, 0], [2, 1], [0, 2]], 3)
    dk.moe_unpermute(dk.moe_permute(x, m), m).sum().backward()
    assert x.grad[:, 0].tolist() == [2, 1, 0, 2, 2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpermute_gradient_of_a_row_whose_entry_is_out_of_range(backend):
    m = maps([[0, 1], [1, 2]], 3)
    m = m._replace(pos_to_token_topk=torch.tensor([0, 1, 99, 3], dtype=torch.int32))
    y, weights = torch.randn(4, 8, requires_grad=True), torch.rand(2, 2, requires_grad=True)
    with dk.use_backend(backend):
        dk.moe_unpermute(y, m, weights).sum().backward()
    expected = weights.detach().flatten()[[0, 1, 0, 3]] * torch.tensor([1, 1, 0, 1])
    assert torch.equal(y.grad, expected[:, None].expand(4, 8))


def test_quantize_has_no_backward():
    x = torch.randn(2, 128, requires_grad=True)
    rows, _ = dk.moe_permute(x, maps([[0], [1]], 2), quantize=True)
    with pytest.raises(NotImplementedError, match="moe_permute: has no backward with quantize=True"):
        rows.float().sum().backward()


def v3_problem(num_tokens: int, **options) -> plan.Problem:
    rows = num_tokens * shapes.V3.top_k
    return plan.Problem("permute", num_tokens, shapes.V3.hidden, shapes.V3.top_k, rows, 2, **options)


def test_bytes_of_the_published_case():
    """T=4096, H=7168, K=8 in bf16: every row read once and written eight times, plus two maps."""
    assert plan.bytes(v3_problem(4096)) == 4096 * 7168 * 2 * 9 + 2 * 4096 * 8 * 4


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS.keys())
@pytest.mark.parametrize("num_tokens", [1, 128, 8192])
def test_plan_for_devices_that_are_not_here(device, num_tokens):
    config = plan.select(v3_problem(num_tokens), device, "triton")
    assert config in plan.candidates(v3_problem(num_tokens), device)
    assert config.native_fp8 == (device.arch >= 89)


def test_plan_splits_rows_when_tokens_are_few():
    assert plan.select(v3_problem(1), H200, "triton").block <= plan.select(v3_problem(8192), H200, "triton").block


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_past_2_to_the_31(backend):
    """T*K*H of 2^31 and more elements."""
    num_tokens, hidden, top_k = 37_500, 7168, 8
    x = torch.randint(0, 255, (num_tokens, hidden), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    rows = torch.randperm(num_tokens * top_k, device="cuda", dtype=torch.int32)
    inverse = torch.empty_like(rows)
    inverse[rows.long()] = torch.arange(num_tokens * top_k, dtype=torch.int32, device="cuda")
    m = dk.MoeMaps(rows.view(num_tokens, top_k), inverse, torch.zeros(2, dtype=torch.int32, device="cuda"))
    with dk.use_backend(backend):
        out = dk.moe_permute(x, m)
    last = int(rows.argmax())
    assert torch.equal(out[-1].view(torch.uint8), x[last // top_k].view(torch.uint8))
