"""What the contract cannot know of `mla_cache_write` and `mla_rope`."""

import pytest
import torch

import deepseek_kernels
from deepseek_kernels.device import A100, B200, GPUS, H100
from deepseek_kernels.plan import mla_cache_write as plan
from deepseek_kernels.reference.fp8_quantize import fp8_quantize
from deepseek_kernels.reference.mla_cache_write import decode_rows
from deepseek_kernels.testing.compare import SUM, assert_close, assert_same_bits
from deepseek_kernels.testing.samples.mla_cache_write import angles

BACKENDS = ["reference", "triton"]


def write(backend, *args, **options):
    with deepseek_kernels.use_backend(backend):
        deepseek_kernels.mla_cache_write(*args, **options)


def rope(backend, *args, **options):
    with deepseek_kernels.use_backend(backend):
        return deepseek_kernels.mla_rope(*args, **options)


def token_inputs(t, d_latent=512, d_rope=64):
    return torch.randn(t, d_latent), torch.randn(t, d_rope), torch.rand(d_latent) + 0.5, angles(32, d_rope)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_is_a_complex_product(backend):
    """DeepSeek-V3's own definition: pairs as complex numbers times exp(i angle)."""
    x, positions = torch.randn(5, 3, 8), torch.tensor([0, 1, 7, 30, 31])
    frequency = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(5, 4), positions[:, None] * frequency)
    expected = torch.view_as_real(torch.view_as_complex(x.view(5, 3, 4, 2)) * turn[:, None]).flatten(-2)
    assert_close(rope(backend, x, angles(32, 8), positions), expected, SUM)


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_are_interleaved_pairs_in_another_order(backend):
    x, positions, table = torch.randn(4, 2, 16), torch.arange(4), angles(8, 16)
    order = torch.arange(16).view(2, 8).t().flatten()  # (0, 8, 1, 9, ...)
    halves = rope(backend, x, table, positions, interleaved=False)
    pairs = rope(backend, x[..., order], table, positions)
    assert_same_bits(halves[..., order], pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_alone(backend, interleaved):
    q, k, table = torch.randn(1, 1, 64), torch.randn(1, 1, 64), angles(32, 64)

    def score(i, j):
        turned = [rope(backend, x, table, torch.tensor([n]), interleaved=interleaved) for x, n in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(27, 22), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inverse_turns_back(backend):
    x, positions, table = torch.randn(6, 2, 64), torch.arange(6) * 5, angles(32, 64)
    back = rope(backend, rope(backend, x, table, positions), table, positions, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_is_normed_latent_then_turned_key(backend):
    c_kv, k_rope, weight, table = token_inputs(3, 48, 16)
    cache, positions = torch.zeros(2, 4, 64), torch.tensor([5, 0, 31])
    write(backend, c_kv, k_rope, weight, table, positions, cache, torch.tensor([6, 0, 3]), eps=1e-3)
    latent = torch.nn.functional.rms_norm(c_kv.double(), (48,), weight.double(), 1e-3)
    key = rope("reference", k_rope[:, None].double(), table, positions)[:, 0]
    assert_close(cache.view(8, 64)[[6, 0, 3]], torch.cat([latent, key], 1), SUM)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_touches_its_own_slots_alone(backend, dtype):
    """In a strided view: not the other slots, not the bytes between rows and pages."""
    c_kv, k_rope, weight, table = token_inputs(4)
    row = 656 if dtype == torch.uint8 else 576
    memory = torch.full((5, 4, row + 32), 77, dtype=dtype)
    cache, before = memory[1:4, :3, 16 : 16 + row], memory.clone()
    write(backend, c_kv, k_rope, weight, table, torch.arange(4), cache, torch.tensor([8, -1, 9, 1], dtype=torch.int32))
    changed = (memory != before).nonzero()
    assert {tuple(x) for x in changed[:, :2].tolist()} == {(3, 2), (1, 1)}
    assert changed[:, 2].min() >= 16 and changed[:, 2].max() < 16 + row


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_range_slots_leave_the_cache_as_it_is(backend):
    c_kv, k_rope, weight, table = token_inputs(4)
    cache = torch.full((2, 2, 576), float("nan"))
    before = cache.clone()
    slots = torch.tensor([-1, 4, -(2**62), 2**62])
    write(backend, c_kv, k_rope, weight, table, torch.arange(4), cache, slots)
    assert_same_bits(cache, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_in_one_slot_leave_one_of_them(backend):
    c_kv, k_rope, weight, table = token_inputs(2, 64, 16)
    alone, both, positions = torch.zeros(2, 1, 80), torch.zeros(1, 1, 80), torch.arange(2)
    write(backend, c_kv, k_rope, weight, table, positions, alone, torch.tensor([0, 1]))
    write(backend, c_kv, k_rope, weight, table, positions, both, torch.tensor([0, 0]))
    assert any(torch.equal(both[0], one) for one in alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_are_clamped_into_the_table(backend):
    x, table = torch.randn(3, 1, 8), angles(4, 8)
    wild = torch.tensor([-(2**62), 2**62, 4])
    assert_same_bits(rope(backend, x, table, wild), rope(backend, x, table, torch.tensor([0, 3, 3])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_row_is_that_of_fp8_quantize(backend):
    """Without the norm, whose sum may be taken in another order, bit for bit."""
    c_kv, k_rope, _, table = token_inputs(5)
    c_kv[0, :128] = 0
    c_kv[1, 128:256] *= 1e-6
    c_kv[2, 300] = 1e4
    c_kv[3, 400] = float("nan")
    cache = torch.zeros(5, 1, 656, dtype=torch.uint8)
    write(backend, c_kv, k_rope, None, table, torch.zeros(5, dtype=torch.int32), cache, torch.arange(5))
    q, scale = fp8_quantize(c_kv)
    rows = cache.view(5, 656)
    assert_same_bits(rows[:, :512].contiguous().view(torch.float8_e4m3fn), q)
    assert_same_bits(rows[:, 512:528].contiguous().view(torch.float32), scale)
    assert_same_bits(rows[:, 528:].contiguous().view(torch.bfloat16), k_rope.bfloat16())  # position 0 does not turn


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_reads_back_within_half_a_step(backend):
    c_kv, k_rope, weight, table = token_inputs(4)
    positions, slots = torch.arange(4), torch.arange(4)
    exact, cache = torch.zeros(4, 1, 576), torch.zeros(4, 1, 656, dtype=torch.uint8)
    for target in (exact, cache):
        write(backend, c_kv, k_rope, weight, table, positions, target, slots)
    exact, back = exact.view(4, 576), decode_rows(cache.view(4, 656))
    amax = exact[:, :512].view(4, 4, 128).abs().amax(-1).repeat_interleave(128, 1)
    allowed = (exact[:, :512].abs() / 16).maximum(amax / 448 * 2**-10) * 1.001  # 3 bits; the smallest step is 2**-9
    assert ((back[:, :512] - exact[:, :512]).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dimensional_inputs_may_be_strided(backend):
    c_kv, k_rope, weight, table = token_inputs(3, 32, 8)
    positions, slots = torch.tensor([4, 1, 9]), torch.tensor([2, 0, 1])
    plain, strided = torch.zeros(3, 1, 40), torch.zeros(3, 1, 40)
    write(backend, c_kv, k_rope, weight, table, positions, plain, slots)
    spread = [torch.stack([t, t + 1], -1)[..., 0] for t in (weight, positions, slots)]
    write(backend, c_kv, k_rope, spread[0], table, spread[1], strided, spread[2])
    assert_same_bits(strided, plain)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_any_number_of_rows_a_program(rows):
    from deepseek_kernels.triton_kernels import mla_cache_write as kernel

    c_kv, k_rope, weight, table = token_inputs(5, 512, 64)
    expected, actual = (torch.zeros(5, 1, 656, dtype=torch.uint8) for _ in range(2))
    args = c_kv, k_rope, weight, table, torch.arange(5)
    write("triton", *args, expected, torch.arange(5))
    kernel.write(plan.Config(rows, 1, 1, False), *args, actual, torch.arange(5), 1e-6, True)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("rows, heads", [(1, 8), (2, 4), (8, 1)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_any_block_of_heads_a_program(rows, heads, interleaved):
    from deepseek_kernels.triton_kernels import mla_cache_write as kernel

    x, table, positions = torch.randn(5, 6, 24), angles(9, 24), torch.tensor([0, 8, 3, 99, -1])
    expected, actual = rope("reference", x, table, positions, interleaved=interleaved), torch.empty(5, 6, 24)
    kernel.rope(plan.Config(rows, heads, 1, False), x, table, positions, interleaved, False, actual)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
def test_plan_fills_the_device_first(device):
    few = plan.Problem("write", 64, 512, 64, 2, 1152)
    many = plan.Problem("write", 65536, 512, 64, 2, 1152)
    assert plan.select(few, device, "triton").rows == 1
    assert plan.select(many, device, "triton").rows > 1


def test_plan_numbers():
    p = plan.Problem("write", 4096, 512, 64, 2, 1152, norm=True)
    assert plan.bytes(p) == 4096 * (1152 + 1152 + 256 + 16)
    assert plan.flops(p) == 4096 * (3 * 64 + 4 * 512)
    assert [plan.select(p, d, "triton").native_fp8 for d in (A100, H100, B200)] == [False, True, True]
    assert plan.select(p, H100, "reference") is None
    assert plan.bytes(plan.Problem("rope", 4096 * 128, 0, 64, 2)) == 2 * 4096 * 128 * 128
