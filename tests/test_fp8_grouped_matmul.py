"""`fp8_grouped_matmul`: what the contract cannot know."""

import itertools
import re

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels.device import A100, CPU, GPUS, H100, H200, L40S
from deepseek_kernels.ops._registry import OPERATORS
from deepseek_kernels.plan import fp8_grouped_matmul as plan
from deepseek_kernels.plan.backend import Environment
from deepseek_kernels.reference.fp8_quantize import fp8_dequantize, fp8_quantize
from deepseek_kernels.shapes import align_up, padded_columns
from deepseek_kernels.testing.compare import MATMUL, assert_close, assert_same_bits, distance
from deepseek_kernels.testing.guard import guarded_allocations
from deepseek_kernels.testing.samples.fp8_grouped_matmul import in_columns, wgrad_operands
from deepseek_kernels.triton_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_matmul_wgrad

BACKENDS = ("reference", "triton")


def offsets(*ends) -> torch.Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def operands(rows: int, n: int, k: int, num_experts: int):
    """x, weights and their quantised forms a, scale_a, b, scale_b."""
    x, weights = torch.randn(rows, k), torch.randn(num_experts, n, k) * torch.rand(num_experts, 1, 1)
    quantized = [fp8_quantize(w, "128x128") for w in weights]
    return (
        x,
        weights,
        (*fp8_quantize(x), torch.stack([q for q, _ in quantized]), torch.stack([s for _, s in quantized])),
    )


def exact(a, scale_a, b, scale_b, expert_offsets) -> torch.Tensor:
    """The definition on the dequantised operands in float64."""
    x = fp8_dequantize(a, scale_a).double()
    d = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for e in range(b.shape[0]):
        rows = slice(int(expert_offsets[e]), int(expert_offsets[e + 1]))
        d[rows] = x[rows] @ fp8_dequantize(b[e], scale_b[e], "128x128").double().t()
    return d


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_experts", "n", "k"), [(1, 136, 272), (3, 264, 128), (67, 8, 16)])
def test_against_the_dequantised_operands(backend, num_experts, n, k):
    _, _, q = operands(50, n, k, num_experts)
    ends = offsets(*torch.randint(0, 48, (num_experts,)).sort().values.tolist())
    with dk.use_backend(backend):
        for dtype in (torch.bfloat16, torch.float32):
            d = dk.fp8_grouped_matmul(*q, ends, out_dtype=dtype)
            assert d.dtype == dtype
            assert_close(d, exact(*q, ends), MATMUL)


def test_against_the_unquantised_operands():
    x, weights, q = operands(60, 128, 512, 2)
    d = dk.fp8_grouped_matmul(*q, offsets(25, 60))
    expected = torch.cat([x[:25] @ weights[0].t(), x[25:] @ weights[1].t()])
    assert distance(d, expected) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_scale_meets_its_block(backend):
    """Operands of ones: the result is the sum of the products of scales, all different powers of two."""
    a = torch.ones(4, 272).to(torch.float8_e4m3fn)
    b = torch.ones(2, 136, 272).to(torch.float8_e4m3fn)
    scale_a = 2.0 ** torch.arange(12.0).view(4, 3)
    scale_b = 2.0 ** -torch.arange(12.0).view(2, 2, 3)
    with dk.use_backend(backend):
        d = dk.fp8_grouped_matmul(a, scale_a, b, scale_b, offsets(1, 4), out_dtype=torch.float32)
    width = torch.tensor([128.0, 128.0, 16.0])
    for r, e in enumerate((0, 1, 1, 1)):
        for j, columns in enumerate((slice(0, 128), slice(128, 136))):
            assert (d[r, columns] == (scale_a[r] * scale_b[e, j] * width).sum()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    _, _, (a, scale_a, b, scale_b) = operands(30, 16, 144, 3)
    b[1].view(torch.uint8).fill_(0x7F)
    scale_a[4, 1] = float("nan")
    scale_a[25:] = float("inf")
    a[25:].view(torch.uint8).fill_(0xFF)
    with dk.use_backend(backend):
        d = dk.fp8_grouped_matmul(a, scale_a, b, scale_b, offsets(10, 17, 25))
    row = torch.arange(30)
    assert torch.equal(d.isnan().all(1), (row == 4) | ((row >= 10) & (row < 17)))
    assert torch.equal(d.isnan().any(1), d.isnan().all(1))
    assert not d[25:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_out_of_range(backend):
    _, _, q = operands(20, 16, 32, 3)
    with dk.use_backend(backend):
        for bad, read_as in (([-9, 4, 2, 900], [0, 4, 4, 20]), ([2**31 - 1, 0, 0, 0], [20] * 4)):
            d = dk.fp8_grouped_matmul(*q, torch.tensor(bad, dtype=torch.int32))
            assert_same_bits(d, dk.fp8_grouped_matmul(*q, torch.tensor(read_as, dtype=torch.int32)))


def masked(rows: int, n: int, k: int, num_experts: int):
    """Operands of the masked layout, `rows` places for each expert."""
    _, _, (a, scale_a, b, scale_b) = operands(num_experts * rows, n, k, num_experts)
    return a.view(num_experts, rows, k), scale_a.view(num_experts, rows, -1), b, scale_b


def test_masked_is_contiguous_with_gaps():
    """Every filled row has the bits of the contiguous op, and no other row is written."""
    a, scale_a, b, scale_b = masked(37, 72, 272, 5)
    counts = torch.tensor([0, 37, 1, 19, 33], dtype=torch.int32)
    filled = torch.arange(37) < counts[:, None]
    packed = a.view(torch.uint8)[filled].view(a.dtype), scale_a[filled], b, scale_b, offsets(*counts.cumsum(0).tolist())
    for backend in ("triton", "cpu"):
        with dk.use_backend(backend), guarded_allocations():
            d = dk.fp8_grouped_matmul_masked(a, scale_a, b, scale_b, counts)
            assert_same_bits(d[filled], dk.fp8_grouped_matmul(*packed))
            assert (d[~filled].view(torch.int16) == -1).all(), "a row without an entry was written"


@pytest.mark.parametrize("backend", (*BACKENDS, "cpu"))
def test_masked_counts_are_clamped(backend):
    operands = masked(7, 16, 32, 4)
    with dk.use_backend(backend):
        d = dk.fp8_grouped_matmul_masked(*operands, torch.tensor([-1, 8, 2**31 - 1, 3], dtype=torch.int32))
        expected = dk.fp8_grouped_matmul_masked(*operands, torch.tensor([0, 7, 7, 3], dtype=torch.int32))
    assert_same_bits(d[1:3], expected[1:3])
    assert_same_bits(d[3, :3], expected[3, :3])


@pytest.mark.parametrize("backend", (*BACKENDS, "cpu"))
def test_masked_nan_of_one_row_stays_there(backend):
    a, scale_a, b, scale_b = masked(9, 16, 144, 2)
    scale_a[0, 2] = float("nan")
    a[:, 5:].view(torch.uint8).fill_(0x7F)
    with dk.use_backend(backend):
        d = dk.fp8_grouped_matmul_masked(a, scale_a, b, scale_b, torch.tensor([5, 4], dtype=torch.int32))
    assert d[0, 2].isnan().all() and not d[0, [0, 1, 3, 4]].isnan().any() and not d[1, :4].isnan().any()


def test_masked_against_the_dequantised_operands():
    a, scale_a, b, scale_b = masked(20, 136, 272, 3)
    counts = torch.tensor([20, 7, 0], dtype=torch.int32)
    ends = offsets(20, 40, 60)
    expected = exact(a.flatten(0, 1), scale_a.flatten(0, 1), b, scale_b, ends).view(3, 20, 136)
    for backend in (*BACKENDS, "cpu"):
        with dk.use_backend(backend):
            d = dk.fp8_grouped_matmul_masked(a, scale_a, b, scale_b, counts, out_dtype=torch.float32)
        assert_close(d[0], expected[0], MATMUL)
        assert_close(d[1, :7], expected[1, :7], MATMUL)


def test_masked_tile_follows_what_is_expected():
    args = [torch.empty(*s, dtype=t, device="meta") for s, t in (
        ((32, 4096, 7168), torch.float8_e4m3fn), ((32, 4096, 56), torch.float32),
        ((32, 4096, 7168), torch.float8_e4m3fn), ((32, 32, 56), torch.float32), ((32,), torch.int32),
    )]  # fmt: skip
    op = OPERATORS["fp8_grouped_matmul_masked"]
    few, many = (op.problem(*args, None, expected) for expected in (20, None))
    assert (few.num_rows, many.num_rows) == (32 * 20, 32 * 4096)
    assert plan.select(few, H100, "triton").block_m < plan.select(many, H100, "triton").block_m
    assert plan.bytes(few) == 32 * (20 * (7168 + 4 * 56 + 2 * 4096) + 4096 * 7168 + 4 * 32 * 56 + 4)


def test_both_ways_to_read_e4m3_agree():
    """The kernel with e4m3 operands, and the one that decodes them to bf16 for sm_80: products of both are exact."""
    _, _, q = operands(37, 40, 256, 2)
    for native, tma in itertools.product((False, True), (False, True)):
        config = plan.replace(plan.CPU_CONFIG, native_fp8=native, tma=tma)
        d = torch.empty(37, 40)
        fp8_grouped_matmul(config, *q, offsets(20, 37), d)
        assert_close(d, exact(*q, offsets(20, 37)), MATMUL)


@pytest.mark.parametrize("device", [CPU, *GPUS.values()], ids=lambda d: d.name)
@pytest.mark.parametrize("layout", ["contiguous", "masked", "wgrad"])
def test_descriptors_where_the_device_and_the_operands_allow_them(device, layout):
    for rows in (1, 640, 32768):
        p = plan.Problem(128 * rows, 4096, 7168, 8, "float32", layout)
        c = plan.select(p, device, "triton")
        assert c.tma == (device.arch in (0, 90, 100)) and c.flatten == (c.tma and layout != "wgrad")
        for bad in (dict(aligned=False), dict(num_rows=2**31 - 100), dict(k=0), dict(num_experts=0)):
            without = plan.replace(p, **bad)
            assert not plan.select(without, device, "triton").tma
            if device.kind == "cuda":
                assert "tensor descriptors" in plan.is_legal(c, without, device) or not c.tma


def test_aligned_is_what_descriptors_take():
    _, _, (a, scale_a, b, scale_b) = operands(24, 40, 144, 3)
    ends, counts = offsets(3, 20, 24), torch.tensor([8, 0, 3], dtype=torch.int32)
    wide = torch.zeros(3, 40, 176, dtype=torch.uint8).view(b.dtype)

    def contiguous(a, b):
        return OPERATORS["fp8_grouped_matmul"].problem(a, scale_a, b, scale_b, ends, None).aligned

    def masked(a, b):
        return OPERATORS["fp8_grouped_matmul_masked"].problem(a, scale_a, b, scale_b, counts, None, None).aligned

    assert contiguous(a, b) and contiguous(a.t().contiguous().t(), b) and contiguous(a, wide[:, :, 16:160])
    assert not contiguous(a, wide[:, :, 8:152]) and not contiguous(a, b[:1].expand(3, 40, 144))
    assert not contiguous(wide[0, :24, 1:145], b) and not contiguous(a[:1].expand(24, 144), b)
    assert masked(a.view(3, 8, 144), b) and masked(wide[:, :8, :144], b)
    assert not masked(a.view(8, 3, 144).transpose(0, 1), b)


def test_a_storage_that_begins_anywhere():
    """Its address is not part of the problem: what descriptors cannot address is copied."""
    _, _, (a, scale_a, b, scale_b) = operands(24, 40, 144, 2)

    def moved(t):
        buffer = bytearray(t.numel() + 32)
        odd = next(i for i in range(16) if torch.frombuffer(buffer, dtype=torch.uint8, offset=i).data_ptr() % 16 == 5)
        there = torch.frombuffer(buffer, dtype=torch.uint8, offset=odd, count=t.numel()).view(t.dtype).view(t.shape)
        return there.copy_(t)

    with dk.use_backend("triton"):
        d = dk.fp8_grouped_matmul(a, scale_a, b, scale_b, offsets(3, 24))
        assert_same_bits(dk.fp8_grouped_matmul(moved(a), scale_a, moved(b), scale_b, offsets(3, 24)), d)


def exact_wgrad(grad_t, scale_grad, a_t, scale_a, columns) -> torch.Tensor:
    """The definition in float64; `columns`: each expert's slice."""
    g, x = fp8_dequantize(grad_t, scale_grad).double(), fp8_dequantize(a_t, scale_a).double()
    return torch.stack([g[:, c] @ x[:, c].t() for c in columns])


@pytest.mark.parametrize("backend", BACKENDS)
def test_wgrad_against_the_dequantised_operands(backend):
    counts = torch.tensor([0, 1, 128, 129, 0, 257, 3, 0])
    operands = wgrad_operands(torch.Generator().manual_seed(0), 518, 24, 136, ends := offsets(*counts.cumsum(0)))
    blocks = (counts + 127) // 128
    columns = [slice(128 * int(last - own), 128 * int(last)) for own, last in zip(blocks, blocks.cumsum(0))]
    with dk.use_backend(backend):
        d = dk.fp8_grouped_matmul_wgrad(*operands, ends)
        assert_close(d, exact_wgrad(*operands, columns), MATMUL)
        assert not d[counts == 0].any()
        total = d.clone()
        dk.fp8_grouped_matmul_wgrad(*operands, ends, out=total, accumulate=True)
        assert_same_bits(total, d + d)
        into = torch.full_like(d, float("nan"))
        assert dk.fp8_grouped_matmul_wgrad(*operands, ends, out=into) is into
        assert_same_bits(into, d)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wgrad_is_the_gradient_of_the_rows(backend):
    """Against the same rows unquantised, and none of them counted twice or left out."""
    g = torch.Generator().manual_seed(0)
    grad, x = torch.randn(200, 16, generator=g), torch.randn(200, 24, generator=g)
    ends = offsets(40, 40, 171)
    with dk.use_backend(backend):
        d = dk.fp8_grouped_matmul_wgrad(*in_columns(grad, ends), *in_columns(x, ends), ends)
    expected = torch.stack([grad[r].t() @ x[r] for r in (slice(0, 40), slice(40, 40), slice(40, 171))])
    assert distance(d, expected) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_scale_of_wgrad_meets_its_block(backend):
    """Operands of ones: the result is the sum of the products of scales, all different powers of two."""
    ends = offsets(1, 130, 258)
    grad_t, a_t = torch.ones(4, 512).to(torch.float8_e4m3fn), torch.ones(8, 512).to(torch.float8_e4m3fn)
    scale_grad = 2.0 ** torch.arange(16.0).view(4, 4)
    scale_a = 2.0 ** -torch.arange(32.0).view(8, 4)
    with dk.use_backend(backend):
        d = dk.fp8_grouped_matmul_wgrad(grad_t, scale_grad, a_t, scale_a, ends)
    for e, blocks in enumerate(([0], [1, 2], [3])):
        assert torch.equal(d[e], 128 * sum(scale_grad[:, b, None] * scale_a[None, :, b] for b in blocks))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_one_expert_stays_there(backend):
    ends = offsets(100, 150, 290)
    grad_t, scale_grad, a_t, scale_a = wgrad_operands(torch.Generator().manual_seed(0), 290, 8, 16, ends)
    scale_a[3, 1] = float("nan")
    grad_t.view(torch.uint8)[5, 200] = 0x7F
    with dk.use_backend(backend):
        d = dk.fp8_grouped_matmul_wgrad(grad_t, scale_grad, a_t, scale_a, ends)
    expected = torch.zeros(3, 8, 16, dtype=torch.bool)
    expected[1, :, 3] = expected[1, 5] = True
    assert torch.equal(d.isnan(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_wgrad_out_of_range(backend):
    """Read as clamped to the columns there are; nothing but the experts' own gradients is written."""
    operands = wgrad_operands(torch.Generator().manual_seed(0), 300, 8, 16, offsets(300))
    for bad, read_as in (
        ([-9, 130, 2, 2**31 - 1], [0, 130, 130, 384]),
        ([2**31 - 1, 0, -5, 7], [384] * 4),
        ([0, 384, 385, 500], [0, 384, 384, 384]),
        ([0, 1, 2, 384], [0, 1, 2, 130]),  # three blocks of one row, two rows and as many as are left
    ):
        with dk.use_backend(backend):
            frame = torch.full((5, 8, 16), 7.0)
            dk.fp8_grouped_matmul_wgrad(*operands, torch.tensor(bad, dtype=torch.int32), out=frame[1:4])
            good = dk.fp8_grouped_matmul_wgrad(*operands, torch.tensor(read_as, dtype=torch.int32))
        assert_same_bits(frame[1:4], good)
        assert (frame[0] == 7).all() and (frame[4] == 7).all()


def test_wgrad_accumulates_into_out_only():
    operands = wgrad_operands(torch.Generator().manual_seed(0), 5, 8, 16, ends := offsets(5))
    with pytest.raises(ValueError, match="fp8_grouped_matmul_wgrad: accumulate: wanted False without out, got True"):
        dk.fp8_grouped_matmul_wgrad(*operands, ends, accumulate=True)


def test_both_ways_to_read_e4m3_agree_in_wgrad():
    operands = wgrad_operands(torch.Generator().manual_seed(0), 300, 40, 24, ends := offsets(20, 300))
    for native, tma in itertools.product((False, True), (False, True)):
        config = plan.replace(plan.CPU_CONFIG, native_fp8=native, tma=tma)
        fp8_grouped_matmul_wgrad(config, False, *operands, ends, d := torch.empty(2, 40, 24))
        assert_close(d, exact_wgrad(*operands, (slice(0, 128), slice(128, 512))), MATMUL)


@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
def test_every_problem_has_a_legal_config(device):
    for rows in (1, 20, 640, 32768, 1_000_000):
        for num_experts, n, k in ((1, 8, 16), (256, 4096, 7168), (1000, 7168, 2048)):
            p = plan.Problem(rows, n, k, num_experts)
            c = plan.select(p, device, "triton")
            assert not plan.is_legal(c, p, device)
            assert plan.shared_memory(c, p) <= device.shared_memory
            assert 128 % c.block_n == 0
            assert c.native_fp8 == (device.arch >= 89)


@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
def test_every_wgrad_has_a_legal_config(device):
    for columns in (0, 128, 32768, 1_000_064):
        for num_experts, n, k in ((1, 8, 16), (256, 4096, 7168), (1000, 7168, 2048)):
            p = plan.Problem(columns, n, k, num_experts, "float32", "wgrad")
            c = plan.select(p, device, "triton")
            assert not plan.is_legal(c, p, device)
            assert plan.shared_memory(c, p) <= device.shared_memory
            assert c.native_fp8 == (device.arch >= 89)


def test_every_wgrad_has_a_compiled_instance():
    for columns in (0, 128, 33_152):
        for num_experts, n, k in ((0, 8, 16), (1, 8, 16), (8, 4096, 7168), (1000, 7168, 2048)):
            p = plan.Problem(columns, n, k, num_experts, "float32", "wgrad")
            c = plan.select(p, H100, "cuda")
            assert not plan.is_legal(c, p, H100)
            assert 0 < c.ctas <= H100.num_sms and c.ctas % c.cluster == 0 and c.raster >= 1
    large = plan.select(plan.Problem(33_152, 4096, 7168, 8, "float32", "wgrad"), H100, "cuda")
    assert large.tile_m * large.tile_n >= 128 * 192 and large.cluster == 2


def test_tile_follows_rows_and_hardware():
    decode, prefill = plan.Problem(32, 4096, 7168, 32), plan.Problem(32768, 4096, 7168, 8)
    assert plan.select(decode, A100, "triton").block_m == 16
    assert plan.select(decode, L40S, "triton").block_m == 16
    assert plan.select(decode, H100, "triton").block_m == 64, "wgmma has no FP8 below 64 rows"
    large = plan.select(prefill, H100, "triton")
    assert (large.block_m, large.block_n) == (128, 128)


def test_scales_are_counted():
    p = plan.Problem(100, 136, 272, 4)
    weights = 4 * (136 * 272 + 4 * 2 * 3)
    assert plan.bytes(p) == 100 * (272 + 4 * 3) + weights + 100 * 136 * 2 + 4 * 5
    assert plan.flops(p) == 2 * 100 * 136 * 272
    wgrad = plan.Problem(384, 24, 40, 3, "float32", "wgrad")
    operands = (24 + 40) * (384 + 4 * 3)
    assert plan.bytes(wgrad) == operands + 3 * 24 * 40 * 4 + 4 * 4
    assert plan.bytes(plan.replace(wgrad, accumulate=True)) == operands + 2 * 3 * 24 * 40 * 4 + 4 * 4
    assert plan.flops(wgrad) == 2 * 384 * 24 * 40


def test_padded_columns_is_the_least_bound():
    widest = [0] * 300
    for num_experts in range(4):
        assert [padded_columns(r, num_experts) for r in range(300)] == widest
        widest = [max(widest[r - own] + align_up(own, 128) for own in range(r + 1)) for r in range(300)]


def _hopper_tile(rows: int, num_experts: int, n: int, k: int, device=H100, **options) -> plan.CudaConfig:
    p = plan.Problem(rows, n, k, num_experts, **options)
    c = plan.select(p, device, "cuda")
    assert plan.is_legal(c, p, device) == ""
    assert c.cluster_m == 1, "a cluster along m could have rows of two experts"
    assert c.ctas == device.num_sms and c.ctas % c.cluster == 0 and c.raster >= 1
    return c


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_the_plan_chooses_what_an_h200_found_fast(layout, regrets):
    op = "fp8_grouped_matmul" + "_masked" * (layout == "masked")
    found = regrets(
        op, ("experts", "rows", "n", "k"), lambda e, rows, n, k: _hopper_tile(e * rows, e, n, k, H200, layout=layout)
    )
    assert len(found) >= 8
    assert max(found) < 1.12 and sum(found) < 1.04 * len(found)


def test_every_hopper_instance_is_somebodys_best():
    for out_dtype, instances in plan.INSTANCES.items():
        picked = set()
        for rows, num_experts in ((8, 8), (1024, 1), (4096, 256), (640, 32), (6144, 32), (32768, 256), (32768, 8)):
            for n, k in ((512, 7168), (4096, 7168), (7168, 2048)):
                c = _hopper_tile(rows, num_experts, n, k, out_dtype=out_dtype)
                picked.add((c.tile_m, c.tile_n, c.cluster_m, c.cluster_n, c.swap))
        assert picked == set(instances), set(instances) - picked


@pytest.mark.parametrize(
    ("p", "why"),
    [
        (plan.Problem(8, 16, 0, 2), "needs k of at least 16"),
        (plan.Problem(8, 16, 32, 1025), "at most 1024 experts"),
        (plan.Problem(8, 16, 32, 1024), "^$"),
    ],
)
def test_what_the_hopper_kernel_takes(p, why):
    env = Environment(extension_ops=frozenset({"fp8_grouped_matmul"}), extension_archs=frozenset({90}))
    assert re.search(why, plan.backends(p, H100, env)["cuda"])
    assert "8.0" in plan.backends(plan.Problem(8, 16, 32, 2), A100, env)["cuda"]


@pytest.mark.gpu
def test_every_hopper_instance_on_the_device():
    from deepseek_kernels.ops import _device
    from deepseek_kernels.ops.fp8_grouped_matmul import _cuda, _cuda_masked

    _, _, q = operands(600, 392, 720, 3)
    ends = offsets(7, 7, 431)
    expected = exact(*q, ends).cuda()
    q, ends = [t.cuda() for t in q], ends.cuda()
    a, scale_a = (t[:600].view(3, 200, -1) for t in q[:2])
    counts = torch.tensor([200, 0, 33], dtype=torch.int32, device="cuda")
    device = _device.spec(ends.device)
    if device.arch != 90:
        pytest.skip("needs a Hopper GPU")
    for out_dtype in plan.INSTANCES:
        dtype = getattr(torch, out_dtype)
        for config in plan.candidates(plan.Problem(600, 392, 720, 3, out_dtype), device, "cuda"):
            assert_close(_cuda(config, *q, ends, dtype), expected, MATMUL, str(config))
            d = _cuda_masked(config, a, scale_a, *q[2:], counts, dtype, None)
            for e, count in enumerate(counts.tolist()):
                one = offsets(*[0] * e, *[count] * (3 - e))
                want = exact(a[e].cpu(), scale_a[e].cpu(), q[2].cpu(), q[3].cpu(), one)[:count]
                assert_close(d[e, :count].cpu(), want, MATMUL, str(config))


@pytest.mark.gpu
def test_every_triton_candidate_on_the_device():
    from deepseek_kernels.ops import _device
    from deepseek_kernels.ops.fp8_grouped_matmul import _triton, _triton_masked, _triton_wgrad

    def legal(p):
        return [c for c in plan.candidates(p, device) if not plan.is_legal(c, p, device)]

    _, _, q = operands(600, 392, 720, 3)
    ends = offsets(7, 7, 431)
    expected, device = exact(*q, ends).cuda(), _device.spec(torch.device("cuda", 0))
    q, ends_here = [t.cuda() for t in q], ends.cuda()
    for config in legal(plan.Problem(600, 392, 720, 3, "float32")):
        assert_close(_triton(config, *q, ends_here, torch.float32), expected, MATMUL, str(config))
    a, scale_a = (t[:600].view(3, 200, -1) for t in q[:2])
    counts = torch.tensor([200, 0, 33], dtype=torch.int32, device="cuda")
    for config in legal(plan.Problem(600, 392, 720, 3, "float32", "masked")):
        d = _triton_masked(config, a, scale_a, *q[2:], counts, torch.float32, None)
        for e, count in enumerate(counts.tolist()):
            one = offsets(*[0] * e, *[count] * (3 - e))
            want = exact(a[e].cpu(), scale_a[e].cpu(), q[2].cpu(), q[3].cpu(), one)[:count]
            assert_close(d[e, :count].cpu(), want, MATMUL, str(config))
    grads = wgrad_operands(torch.Generator().manual_seed(0), 300, 392, 136, ends := offsets(20, 300))
    expected = exact_wgrad(*grads, (slice(0, 128), slice(128, 512))).cuda()
    grads = [t.cuda() for t in grads]
    for config in legal(plan.Problem(grads[0].shape[1], 392, 136, 2, "float32", "wgrad", True)):
        d = torch.ones_like(expected, dtype=torch.float32)
        _triton_wgrad(config, *grads, ends.cuda(), d, True)
        assert_close(d, expected + 1, MATMUL, str(config))
