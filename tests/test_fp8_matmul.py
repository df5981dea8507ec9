"""`fp8_matmul`: what the contract cannot know."""

import re
from dataclasses import astuple, replace

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels.device import A100, B200, GPUS, H100, H200
from deepseek_kernels.plan import fp8_matmul as plan
from deepseek_kernels.plan.backend import Environment
from deepseek_kernels.reference.fp8_matmul import fp8_matmul as reference
from deepseek_kernels.shapes import V3_MATMULS
from deepseek_kernels.testing.compare import MATMUL, assert_close, assert_same_bits
from deepseek_kernels.testing.samples.fp8_matmul import operands

OURS = ("triton", "torch")
BACKENDS = ("reference", *OURS)
FP8 = torch.float8_e4m3fn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matmul(backend, *args, **options):
    with dk.use_backend(backend):
        return dk.fp8_matmul(*args, **options)


def exact(a, scale_a, b, scale_b, bias=None):
    """The product of the dequantised operands in float64."""
    return reference(a, scale_a, b, scale_b, bias, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example(backend):
    """Two blocks of k, the second one partial; ones times twos under the scales of each block."""
    a, b = torch.ones(2, 144).to(FP8), torch.full((8, 144), 2.0).to(FP8)
    scale_a = torch.tensor([[1.0, 10.0], [0.5, 0.0]])
    scale_b = torch.tensor([[1.0, 3.0]])
    bias = torch.arange(8, dtype=torch.float32)
    d = matmul(backend, a, scale_a, b, scale_b, bias=bias, out_dtype=torch.float32)
    assert d.tolist() == [[256 + 960 + i for i in range(8)], [128 + i for i in range(8)]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [0, 1, 7, 63, 129])
def test_ragged_shapes(backend, m):
    g = generator(m)
    for n, k in ((8, 16), (24, 144), (136, 16)):
        args = operands(g, m, n, k)
        assert_close(matmul(backend, *args, out_dtype=torch.float32), exact(*args), MATMUL)


@pytest.mark.parametrize("backend", OURS)
def test_all_products_of_two_codes(backend):
    """One product per output element: every finite e4m3 pair, subnormals too, comes out as fp32 has it."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    codes = torch.where(codes.float().isnan(), 0, codes.view(torch.uint8)).view(FP8)
    a, b = (torch.zeros(256, 16, dtype=torch.uint8).view(FP8) for _ in range(2))
    a.view(torch.uint8)[:, 3] = codes.view(torch.uint8)
    b.view(torch.uint8)[:, 3] = codes.view(torch.uint8)
    d = matmul(backend, a, torch.ones(256, 1), b, torch.ones(2, 1), out_dtype=torch.float32)
    assert torch.equal(d, codes.float()[:, None] * codes.float()[None, :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    a, scale_a, b, scale_b = operands(generator(), 20, 24, 272)
    clean = matmul(backend, a, scale_a, b, scale_b)
    a.view(torch.uint8)[3, 260] = 0x7F
    a.view(torch.uint8)[4, 0] = 0xFF
    scale_a[17, 1] = torch.nan
    d = matmul(backend, a, scale_a, b, scale_b)
    hit = torch.zeros(20, dtype=torch.bool)
    hit[[3, 4, 17]] = True
    assert d[hit].isnan().all()
    assert_same_bits(d[~hit], clean[~hit])
    b.view(torch.uint8)[5, 1] = 0x7F
    assert matmul(backend, a, scale_a, b, scale_b)[:, 5].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_k_is_not_read_into_the_sum(backend):
    """Rows that are views of wider ones, whose other columns hold NaN."""
    a, scale_a, b, scale_b = operands(generator(), 5, 24, 144)
    wide_a, wide_b = (torch.full((len(q), 160), 0x7F, dtype=torch.uint8).view(FP8) for q in (a, b))
    wide_a[:, :144], wide_b[:, :144] = a, b
    assert_same_bits(
        matmul(backend, wide_a[:, :144], scale_a, wide_b[:, :144], scale_b), matmul(backend, a, scale_a, b, scale_b)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_fp8_quantize_in_either_layout(backend):
    x, w = torch.randn(9, 200), torch.randn(136, 200)
    x, w = (torch.nn.functional.pad(t, (0, 8)) for t in (x, w))
    b, scale_b = dk.fp8_quantize(w, "128x128")
    a, scale_a = dk.fp8_quantize(x)
    _, mn_major = dk.fp8_quantize(x, scale_layout="mn_major")
    d = matmul(backend, a, scale_a, b, scale_b)
    assert mn_major.stride() == (1, 12)
    assert_same_bits(matmul(backend, a, mn_major, b, scale_b), d)
    product = (x @ w.t()).double()
    assert (d.double() - product).norm() < 0.05 * product.norm()  # what quantising costs


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradient(backend):
    """grad_w += grad_y^T x: both operands quantised 128x1 along the tokens, transposed, accumulated in fp32."""
    tokens, n, k = 144, 24, 40
    grad_y, x = torch.randn(tokens, n), torch.randn(tokens, k)
    a, scale_a = dk.fp8_quantize(grad_y, "128x1")
    b, scale_b = dk.fp8_quantize(x, "128x1")
    args = (a.t(), scale_a.t(), b.t().contiguous(), scale_b.t())
    main_grad = torch.randn(n, k)
    expected = main_grad.double() + exact(*args)
    out = matmul(backend, *args, out=main_grad, accumulate=True)
    assert out is main_grad
    assert_close(main_grad, expected, MATMUL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_leaves_its_surroundings_alone(backend):
    args = operands(generator(), 7, 24, 144)
    frame = torch.full((9, 40), 7.0, dtype=torch.bfloat16)
    matmul(backend, *args, out=frame[1:8, 3:27])
    assert_same_bits(frame[1:8, 3:27], matmul(backend, *args))
    frame[1:8, 3:27] = 7.0
    assert (frame == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulating_rounds_once(backend):
    """The neighbours of 257 in bf16 are 256 and 258: a product just above 1, rounded by itself, would add nothing."""
    a, b = torch.ones(1, 16).to(FP8), torch.full((8, 16), 2.0**-4).to(FP8)
    one = torch.ones(1, 1)
    out = torch.full((1, 8), 256.0, dtype=torch.bfloat16)
    matmul(backend, a, one, b, one, bias=torch.full((8,), 2.0**-10), out=out, accumulate=True)
    assert (out == 258).all()


def test_refusals_of_the_public_face():
    args = operands(generator(), 4, 24, 144)
    with pytest.raises(ValueError, match="fp8_matmul: accumulate: wanted False without out"):
        dk.fp8_matmul(*args, accumulate=True)
    with pytest.raises(TypeError, match="fp8_matmul: out: wanted dtype torch.float32"):
        dk.fp8_matmul(*args, out=torch.zeros(4, 24, dtype=torch.bfloat16), out_dtype=torch.float32)


SMALL = plan.Config(16, 64, 4, 3, native_fp8=False)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, split_k=2),
        replace(SMALL, split_k=4, swap=True, group_m=4),
        replace(SMALL, block_m=32, block_n=128, group_m=2),
        replace(SMALL, block_m=128, block_n=32, swap=True),
        replace(SMALL, tma=True, flatten=True),
        replace(SMALL, tma=True, flatten=True, block_m=32, split_k=4, num_programs=2),
        replace(SMALL, tma=True, swap=True, split_k=2, num_programs=99, group_m=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows_b", [128, 1])
def test_every_path_of_the_triton_kernel(config, rows_b):
    from deepseek_kernels.triton_kernels import fp8_matmul as kernel

    for m, n, k in ((20, 136, 272), (1, 8, 16)):
        g = generator(m)
        args, bias = operands(g, m, n, k, rows_b), torch.randn(n, generator=g)
        out = torch.randn(m, n, generator=g)
        expected = out.double() + exact(*args, bias)
        workspace = torch.full((config.split_k, m, n), torch.nan)
        kernel.matmul(config, rows_b, True, *args, bias, out, workspace)
        assert_close(out, expected, MATMUL)


def problem(m: int, n: int, k: int, **options) -> plan.Problem:
    return plan.Problem(m, n, k, **options)


def test_counts_of_a_published_case():
    p = problem(4096, 7168, 2048)
    assert plan.flops(p) == 2 * 4096 * 7168 * 2048
    assert plan.bytes(p) == (4096 + 7168) * 2048 + 2 * 4096 * 7168 + 4 * 16 * (4096 + 56)


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS.keys())
@pytest.mark.parametrize(("n", "k"), V3_MATMULS)
def test_tiles_for_devices_that_are_not_here(device, n, k):
    for m in (1, 16, 64, 512, 4096):
        p = problem(m, n, k)
        config = plan.select(p, device, "triton")
        assert plan.is_legal(config, p, device) == ""
        assert plan.shared_memory(config, p) <= device.shared_memory
        assert config.native_fp8 == (device.arch >= 89)
        assert config.swap == (device.arch >= 90 and m <= 16)
        if m <= 16:
            assert config.block_m == 16, "a tile is not padded far past the tokens"
        assert config.tma == (device.arch >= 90)
        assert config.flatten == (config.tma and not config.swap)
        if m == 4096:
            assert config.block_m * config.block_n >= 64 * 128 and config.split_k == 1


def test_programs_stay_and_share_the_tiles():
    for m, n in ((1, 2112), (128, 7168), (4096, 7168)):
        for device in (A100, H200, B200):
            p = problem(m, n, 7168)
            for c in plan.candidates(p, device):
                tiles = -(-m // c.block_m) * -(-n // c.block_n)
                concurrent = device.num_sms * plan.resident(c, p, device)
                assert c.num_programs == tiles or concurrent // 2 < c.num_programs * c.split_k <= concurrent


@pytest.mark.parametrize("p", [problem(64, 4096, 0), problem(2**31, 4096, 16), problem(64, 2**31, 16)], ids=str)
def test_what_descriptors_cannot_address_goes_by_pointers(p):
    for device in (H200, B200):
        configs = plan.candidates(p, device)
        assert configs and not any(c.tma for c in configs)
        why = plan.is_legal(replace(configs[0], tma=True), p, device)
        assert re.search("tensor descriptors address 1 to 2147483392", why)


def test_few_tokens_share_out_k_until_the_device_is_full():
    """2112 columns are 33 tiles of 64, too few for 132 SMs; 24576 are plenty."""
    few = plan.select(problem(1, 2112, 7168), H200, "triton")
    assert few.split_k > 1
    assert -(-2112 // few.block_n) * few.split_k >= H200.num_sms
    assert plan.select(problem(1, 24576, 1536), H200, "triton").split_k == 1


def test_wave_quantisation():
    """One column of tiles more than fills the device costs a wave; the cost knows."""
    tile = plan.Config(128, 128, 8, 4)
    full = 132 * plan.resident(tile, problem(1, 1, 7168), H100) // 12 * 128
    steps = [plan.cost(tile, problem(12 * 128, n, 7168), H100) for n in (full - 128, full, full + 128)]
    assert steps[1] < 1.1 * steps[0] and steps[2] > 1.5 * steps[1]


def test_the_plan_chooses_what_an_h200_found_fast(regrets):
    def select(m, n, k):
        p = problem(m, n, k)
        c = plan.select(p, H200, "cuda")
        assert plan.is_legal(c, p, H200) == ""
        assert c.ctas % c.cluster == 0 and c.cluster <= c.ctas <= H200.num_sms and c.raster >= 1
        return c

    found = regrets("fp8_matmul", ("m", "n", "k"), select)
    assert len(found) == 59
    assert max(found) < 1.12 and sum(found) < 1.02 * len(found)


@pytest.mark.parametrize("device", [H100, H200], ids=lambda d: d.name)
def test_few_tokens_on_hopper(device):
    def chosen(m, n, k):
        return plan.select(problem(m, n, k), device, "cuda")

    assert chosen(1, 576, 7168).cluster_k == 4, "9 tiles of 64 columns for 132 SMs"
    assert chosen(1, 2112, 7168).cluster_k == 2, "33 clusters of 4 do not fit at once"
    assert chosen(1, 32768, 512).cluster_k == 1
    assert all(chosen(m, 7168, 2048).swap for m in (1, 8, 16, 32))
    assert chosen(1, 2112, 7168).ctas == 66 and chosen(1, 32768, 512).ctas == device.num_sms


def test_every_hopper_instance_is_somebodys_best():
    ms = (1, 8, 16, 24, 32, 48, 64, 128, 192, 256, 512, 768, 1024, 4096)
    for out_dtype, instances in plan.INSTANCES.items():
        picked = set()
        for m in ms:
            for n in (576, 2112, 4096, 7168, 24576, 32768):
                for k in (512, 1536, 2048, 7168, 16384):
                    c = plan.select(problem(m, n, k, out_dtype=out_dtype), H200, "cuda")
                    picked.add(astuple(c)[:6])
        assert set(instances) - set(plan.TRIALS) == picked, set(instances) - picked


def test_larger_problems_cost_more():
    for device in (A100, H200, B200):
        costs = [
            min(plan.cost(c, p, device) for c in plan.candidates(p, device)) for p in map(_square, (512, 2048, 8192))
        ]
        assert costs == sorted(costs)
        fastest = plan.flops(_square(8192)) / costs[-1]
        assert 0.2 * device.rate("fp8") < fastest < device.rate("fp8")


def _square(n: int) -> plan.Problem:
    return problem(n, n, n)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(granularity_b="1x128"), "writes fp32 without a bias"),
        (dict(granularity_b="1x128", out_dtype="float32", bias_dtype="float32"), "writes fp32 without a bias"),
        (dict(granularity_b="1x128", out_dtype="float32", accumulate=True), ""),
        (dict(accumulate=True), ""),
        (dict(out_dtype="float16"), "not fp16"),
        (dict(bias_dtype="float16"), "not fp16"),
        (dict(), ""),
    ],
)
def test_what_the_hopper_kernel_takes(options, why):
    env = Environment(extension_ops=frozenset({"fp8_matmul"}), extension_archs=frozenset({90}))
    p = problem(64, 4096, 7168, **options)
    assert why in plan.backends(p, H200, env)["cuda"]
    assert bool(why) == bool(plan.backends(p, H200, env)["cuda"])
    assert "8.0" in plan.backends(problem(64, 4096, 7168), A100, env)["cuda"]


def test_the_weight_gradient_on_hopper_takes_large_tiles_and_clusters():
    for n, k in V3_MATMULS:
        for tokens in (1, 4096, 8192):
            p = problem(n, k, tokens, granularity_b="1x128", out_dtype="float32", accumulate=True)
            c = plan.select(p, H200, "cuda")
            assert not plan.is_legal(c, p, H200)
            assert c.ctas <= H200.num_sms and c.ctas % c.cluster == 0
            if tokens > 1:
                assert c.tile_m * c.tile_n >= 128 * 128 and c.cluster == 2
                assert 0.3 * H200.rate("fp8") < plan.flops(p) / plan.cost(c, p, H200) < 0.8 * H200.rate("fp8")
    assert plan.select(problem(24, 8, 16, granularity_b="1x128", out_dtype="float32"), H200, "cuda").ctas == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("n", "k"), V3_MATMULS)
def test_published_sizes(backend, n, k):
    g = generator()
    for m in (1, 17, 129, 1000):
        args = [t.cuda() for t in operands(g, m, n, k)]
        with dk.use_backend(backend):
            if dk.explain("fp8_matmul", *args).backend is None:
                pytest.skip(f"{backend} does not run here")
        assert_close(matmul(backend, *args), exact(*args), MATMUL)


@pytest.mark.gpu
@pytest.mark.parametrize("rows_b", [128, 1])
def test_every_candidate_on_the_device(rows_b):
    from deepseek_kernels.ops import _device
    from deepseek_kernels.triton_kernels import fp8_matmul as kernel

    m, n, k = 150, 392, 720
    args = [t.cuda() for t in operands(generator(), m, n, k, rows_b)]
    expected = exact(*args)
    device = _device.spec(args[0].device)
    p = problem(m, n, k, granularity_b="1x128" if rows_b == 1 else "128x128")
    for config in plan.candidates(p, device):
        out = torch.empty(m, n, device="cuda")
        kernel.matmul(config, rows_b, False, *args, None, out, torch.empty(config.split_k, m, n, device="cuda"))
        assert_close(out, expected, MATMUL, str(config))


@pytest.mark.gpu
def test_every_hopper_instance_on_the_device():
    from deepseek_kernels.ops import _device
    from deepseek_kernels.ops.fp8_matmul import _cuda

    for m, n, k in ((7, 392, 2064), (300, 648, 720)):
        args = [t.cuda() for t in operands(generator(), m, n, k)]
        bias, expected = torch.randn(n, device="cuda"), exact(*args).cuda()
        device = _device.spec(args[0].device)
        if device.arch != 90:
            pytest.skip("needs a Hopper GPU")
        for out_dtype in plan.INSTANCES:
            p = problem(m, n, k, out_dtype=out_dtype)
            for config in plan.candidates(p, device, "cuda"):
                out = torch.randn(m, n, device="cuda", dtype=getattr(torch, out_dtype))
                wanted = expected + bias + out.double()
                _cuda(config, *args, bias, out, True)
                assert_close(out, wanted, MATMUL, str(config))
