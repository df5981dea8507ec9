"""`grouped_matmul` and `grouped_matmul_wgrad`: what the contract cannot know."""

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels.device import A100, B200, GPUS, H100, H200
from deepseek_kernels.ops import _extension
from deepseek_kernels.ops._registry import OPERATORS
from deepseek_kernels.plan import _bf16_hopper as bf16_hopper
from deepseek_kernels.plan import grouped_matmul as plan
from deepseek_kernels.plan.backend import Environment
from deepseek_kernels.reference.grouped_matmul import blocks, expert_bounds
from deepseek_kernels.testing.compare import MATMUL, assert_close, assert_same_bits
from deepseek_kernels.triton_kernels.grouped_matmul import grouped_matmul

BACKENDS = ("reference", "triton", *(["torch"] if hasattr(torch.nn.functional, "grouped_mm") else []))
NAN = float("nan")


def offsets(*ends) -> torch.Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def uneven(num_experts: int, num_rows: int) -> torch.Tensor:
    """Many experts empty, the rest of all sizes."""
    ends = torch.randint(0, num_rows + 1, (num_experts - 1,)).sort().values
    ends = torch.where(torch.rand(num_experts - 1) < 0.5, ends.roll(1), ends).cummax(0).values
    return offsets(*ends.tolist(), num_rows)


def exact(a, b, expert_offsets) -> torch.Tensor:
    """The definition, row by row in float64."""
    d = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for e in range(b.shape[0]):
        for r in range(expert_offsets[e], expert_offsets[e + 1]):
            d[r] = b[e].double() @ a[r].double()
    return d


def exact_wgrad(grad, a, expert_offsets) -> torch.Tensor:
    ends = expert_offsets.tolist()
    return torch.stack([grad[i:j].double().t() @ a[i:j].double() for i, j in zip(ends, ends[1:], strict=False)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    """Expert e multiplies by e + 1: every row shows whose it was."""
    a = torch.arange(1.0, 7)[:, None].expand(6, 8).bfloat16()
    b = torch.stack([(e + 1) * torch.eye(8) for e in range(3)]).bfloat16()
    with dk.use_backend(backend):
        d = dk.grouped_matmul(a, b, offsets(2, 2, 5))
        assert d[:, 0].tolist() == [1, 2, 9, 12, 15, 0]
        g = dk.grouped_matmul_wgrad(a, a, offsets(2, 2, 5))
        assert g[:, 3, 5].tolist() == [1 + 4, 0, 9 + 16 + 25]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_experts", [1, 2, 7, 67])
def test_against_the_definition(backend, num_experts):
    num_rows, n, k = 90, 24, 40
    a, grad = torch.randn(num_rows, k).bfloat16(), torch.randn(num_rows, n).bfloat16()
    b = torch.randn(num_experts, n, k).bfloat16()
    ends = uneven(num_experts, num_rows)
    with dk.use_backend(backend):
        assert_close(dk.grouped_matmul(a, b, ends), exact(a, b, ends), MATMUL)
        assert_close(dk.grouped_matmul_wgrad(grad, a, ends), exact_wgrad(grad, a, ends), MATMUL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("owner", [0, 3, 4])
def test_one_expert_with_every_row(backend, owner):
    a, b = torch.randn(70, 32).bfloat16(), torch.randn(5, 16, 32).bfloat16()
    ends = offsets(*(70 if e >= owner else 0 for e in range(5)))
    with dk.use_backend(backend):
        assert_close(dk.grouped_matmul(a, b, ends), a.double() @ b[owner].double().t(), MATMUL)
        g = dk.grouped_matmul_wgrad(a[:, :16].contiguous(), a, ends)
    assert g[owner].any() and not g[torch.arange(5) != owner].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    """NaN of one expert reaches its own rows and gradient, no other's, and never a row of no expert."""
    a, b = torch.randn(40, 32).bfloat16(), torch.randn(3, 16, 32).bfloat16()
    ends = offsets(13, 21, 33)
    b[1] = NAN
    a[5] = NAN
    a[33:] = NAN
    grad = torch.randn(40, 16).bfloat16()
    grad[33:] = float("inf")
    with dk.use_backend(backend):
        d = dk.grouped_matmul(a, b, ends)
        g = dk.grouped_matmul_wgrad(grad, a, ends)
    row = torch.arange(40)
    assert torch.equal(d.isnan().all(1), (row == 5) | ((row >= 13) & (row < 21)))
    assert torch.equal(d.isnan().any(1), d.isnan().all(1))
    assert not d[33:].any()
    assert g[0].isnan().all() and not g[1:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bad", "read_as"),
    [
        ([-5, -1, 4, 9], [0, 0, 4, 9]),
        ([0, 7, 3, 9], [0, 7, 7, 9]),
        ([0, 2**31 - 1, 2, 5], [0, 20, 20, 20]),
        ([2**31 - 1] * 4, [20, 20, 20, 20]),
        ([-(2**31)] * 4, [0, 0, 0, 0]),
        ([30, 4, 60, -9], [20, 20, 20, 20]),
    ],
)
def test_offsets_out_of_range(backend, bad, read_as):
    a, grad, b = torch.randn(20, 16).bfloat16(), torch.randn(20, 8).bfloat16(), torch.randn(3, 8, 16).bfloat16()
    bad, good = torch.tensor(bad, dtype=torch.int32), torch.tensor(read_as, dtype=torch.int32)
    assert expert_bounds(bad, 20).tolist() == read_as
    with dk.use_backend(backend):
        assert_same_bits(dk.grouped_matmul(a, b, bad), dk.grouped_matmul(a, b, good))
        assert_same_bits(dk.grouped_matmul_wgrad(grad, a, bad), dk.grouped_matmul_wgrad(grad, a, good))


def test_reference_blocks_cover_every_row_once():
    for num_experts, num_rows in ((1, 1), (1, 500), (9, 300), (300, 40)):
        ends = uneven(num_experts, num_rows) if num_experts > 1 else offsets(num_rows)
        seen = torch.full((num_rows,), -1)
        for expert, rows, inside in blocks(ends, num_rows):
            assert (seen[rows[inside]] == -1).all()
            seen[rows[inside]] = expert
        expected = torch.searchsorted(ends[1:].contiguous(), torch.arange(num_rows, dtype=torch.int32), right=True)
        assert torch.equal(seen, expected)


def test_second_derivative():
    """The gradients are differentiable themselves: both ops are each other's, with operands changed about."""
    a = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    ends = offsets(2, 2, 6)
    assert torch.autograd.gradgradcheck(lambda a, b: dk.grouped_matmul(a, b, ends), (a, b))


def test_gradient_of_rows_of_no_expert_is_zero():
    a = torch.randn(9, 8, requires_grad=True)
    b = torch.randn(2, 8, 8, requires_grad=True)
    cotangent = torch.randn(9, 8)
    cotangent[6:] = NAN
    grad_a, grad_b = torch.autograd.grad(dk.grouped_matmul(a, b, offsets(4, 6)), (a, b), cotangent)
    assert not grad_a[6:].any() and grad_a[:6].all() and grad_b.isfinite().all()


def test_fp32_result_of_bf16_operands_has_gradients_in_bf16():
    a = torch.randn(9, 16).bfloat16().requires_grad_()
    b = torch.randn(2, 8, 16).bfloat16().requires_grad_()
    d = dk.grouped_matmul(a, b, offsets(4, 9), out_dtype=torch.float32)
    assert d.dtype == torch.float32
    d.sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["forward", "wgrad"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
def test_every_problem_has_a_legal_config(device, dtype, kind):
    for rows in (1, 20, 640, 32768, 1_000_000):
        for num_experts, n, k, vectors in ((1, 8, 8, False), (256, 4096, 7168, True), (1000, 7168, 2048, True)):
            p = plan.Problem(kind, rows, n, k, num_experts, dtype, dtype, vectors)
            c = plan.select(p, device, "triton")
            assert not plan.is_legal(c, p, device)
            assert plan.shared_memory(c, p) <= device.shared_memory
            assert c.num_programs % device.num_sms == 0 and c.num_programs >= device.num_sms


def test_tile_follows_the_rows_per_expert():
    """Few rows: short tiles. Many: the widest that fit the registers of the tensor core's generation."""
    for device, most in ((A100, 128 * 128), (H100, 128 * 256), (B200, 128 * 256)):
        decode = plan.select(plan.Problem("forward", 32, 4096, 7168, 32), device, "triton")
        prefill = plan.select(plan.Problem("forward", 32768, 4096, 7168, 8), device, "triton")
        assert decode.block_m == 16
        assert prefill.block_m * prefill.block_n == most


def test_rows_that_are_not_whole_vectors_get_small_tiles():
    p = plan.Problem("forward", 32768, 4095, 7167, 8, vectors=False)
    c = plan.select(p, H100, "triton")
    assert plan.operands(c, p) <= 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k_major", [True, False])
def test_by_descriptors_and_by_pointers(dtype, k_major):
    """Rows of two tiles and more for every expert but one, a tail of k, columns that fill no tile."""
    a, b = torch.randn(150, 80).to(dtype), torch.randn(4, 48, 80).to(dtype)
    b = b if k_major else b.transpose(1, 2).contiguous().transpose(1, 2)
    ends = offsets(37, 37, 70, 144)
    for tma in (True, False):
        config = plan.replace(plan.CPU_CONFIG, tma=tma, flatten=tma)
        d = torch.full((150, 48), NAN)
        grouped_matmul(config, a, b, ends, d)
        assert_close(d, exact(a, b, ends), MATMUL)


@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
def test_descriptors_where_the_device_and_the_operands_allow_them(device):
    p = plan.Problem("forward", 32768, 4096, 7168, 8)
    c = plan.select(p, device, "triton")
    assert c.tma == c.flatten == (device.arch >= 90)
    for bad in (
        dict(kind="wgrad"), dict(dtype="float32"), dict(vectors=False), dict(aligned=False), dict(num_experts=0),
        dict(num_rows=2**31 - 100),
    ):  # fmt: skip
        without = plan.replace(p, **bad)
        assert not plan.select(without, device, "triton").tma
        assert "tensor descriptors" in plan.is_legal(c, without, device) or not c.tma


def test_aligned_is_what_descriptors_take():
    a, b = torch.zeros(20, 96).bfloat16(), torch.zeros(3, 48, 96).bfloat16()

    def aligned(a, b):
        return OPERATORS["grouped_matmul"].problem(a, b, offsets(3, 5, 20), None).aligned

    assert aligned(a, b) and aligned(a.t().contiguous().t(), b) and aligned(a[:, 8:88], b[:, :, 16:])
    assert aligned(a, b.transpose(1, 2)) and aligned(a, b[:, 16:].transpose(1, 2))
    assert not aligned(a[:, 4:84], b) and not aligned(a, b[:1].expand(3, 48, 96))
    assert not aligned(a, b.transpose(0, 1).contiguous().transpose(0, 1))


def test_illegal_configs_say_why():
    p = plan.Problem("forward", 32768, 4096, 7168, 8)
    assert "bytes of shared memory" in plan.is_legal(plan.Config(128, 256, 128, 8, 8, 4), p, H100)
    assert "accumulators" in plan.is_legal(plan.Config(256, 256, 32, 8, 8, 2), p, H100)


def test_backends():
    env = Environment(triton=True, torch_functions=frozenset({"grouped_mm"}))
    p = plan.Problem("forward", 64, 64, 64, 4)

    def reason(backend, device=H200, env=env, **changes):
        return plan.backends(plan.replace(p, **changes), device, env)[backend]

    assert not reason("triton") and not reason("torch")
    assert "synchronises" in reason("torch", A100)
    assert "synchronises" in reason("torch", dtype="float16", out_dtype="float16")
    assert "writes the dtype it reads" in reason("torch", out_dtype="float32")
    assert "16 bytes" in reason("torch", n=60)
    assert "fewer than 1023" in reason("torch", num_experts=1023)
    assert "torch 2.10" in reason("torch", env=Environment(triton=True))
    assert "at most 4096" in reason("triton", num_experts=4097)
    assert "float64" in reason("triton", dtype="float64")


@pytest.mark.parametrize("kind", ["forward", "wgrad"])
def test_what_the_hopper_kernel_takes(kind):
    op = "grouped_matmul" + "_wgrad" * (kind == "wgrad")
    built = Environment(extension_ops=frozenset({op}), extension_archs=frozenset({90}))
    p = plan.Problem(kind, 64, 64, 64, 4)

    def reason(device=H200, env=built, **changes):
        return plan.backends(plan.replace(p, **changes), device, env)["cuda"]

    assert not reason() and not reason(num_experts=1024) and not reason(vectors=False)
    assert "8.0" in reason(A100) and "10.0" in reason(B200)
    assert f"has no {op}" in reason(env=Environment())
    assert "takes bfloat16 and writes bfloat16" in reason(dtype="float16", out_dtype="float16")
    assert "got bfloat16 and float16" in reason(out_dtype="float16")
    assert bool(reason(out_dtype="float32")) == (kind == "forward")
    assert "multiples of 8" in reason(n=60) and "multiples of 8" in reason(k=60) and "k at least 8" in reason(k=0)
    assert "at most 1024 experts" in reason(num_experts=1025)


@pytest.mark.parametrize("kind", ["forward", "wgrad"])
def test_every_hopper_instance_is_somebodys_best(kind):
    picked = set()
    for rows, num_experts in ((32, 32), (640, 32), (2048, 32), (4096, 32), (32768, 8), (64, 1), (200, 1)):
        for n, k in ((512, 512), (128, 7168), (4096, 7168), (7168, 2048)):
            p = plan.Problem(kind, rows, n, k, num_experts)
            c = plan.select(p, H200, "cuda")
            assert not plan.is_legal(c, p, H200)
            assert c.raster >= 1 and c.ctas % c.cluster == 0 and c.cluster <= c.ctas <= H200.num_sms
            picked.add((c.columns, c.cluster))
    assert picked == set(bf16_hopper.INSTANCES[kind])
    assert "compiled instances" in plan.is_legal(plan.CudaConfig(32, 1), plan.Problem(kind, 8, 8, 8, 1), H200)


def test_the_hopper_kernels_tile_follows_the_rows_per_expert():
    def columns(rows, num_experts=32):
        return plan.select(plan.Problem("forward", rows * num_experts, 4096, 7168, num_experts), H200, "cuda").columns

    assert columns(1) == 16 and columns(4096, 8) == columns(512) == 256
    assert columns(1) <= columns(20) <= columns(64) <= columns(128) <= columns(512)


@pytest.mark.gpu
def test_every_hopper_instance_on_the_device():
    from deepseek_kernels.ops import _device
    from deepseek_kernels.ops.grouped_matmul import _cuda, _cuda_wgrad

    ends = offsets(7, 7, 431, 559)
    a, b, grad = torch.randn(600, 720).bfloat16(), torch.randn(4, 392, 720).bfloat16(), torch.randn(600, 392).bfloat16()
    a[559:] = grad[559:] = NAN
    want, want_wgrad = exact(a, b, ends).cuda(), exact_wgrad(grad, a, ends).cuda()
    a, b, grad, ends = (t.cuda() for t in (a, b, grad, ends))
    device = _device.spec(ends.device)
    if device.arch != 90:
        pytest.skip("needs a Hopper GPU")
    for config in plan.candidates(plan.Problem("forward", 600, 392, 720, 4), device, "cuda"):
        for weights in (b, b.mT.contiguous().mT):
            assert_close(_cuda(config, a, weights, ends, None), want, MATMUL, str(config))
    for config in plan.candidates(plan.Problem("wgrad", 600, 392, 720, 4), device, "cuda"):
        for out_dtype in (None, torch.float32):
            assert_close(_cuda_wgrad(config, grad, a, ends, out_dtype), want_wgrad, MATMUL, str(config))


def test_torch_first_on_hopper_where_it_was_measured_faster():
    def first(device, **changes):
        p = plan.Problem("forward", 4 * 8192, 4096, 7168, 4)
        order = plan.preference(plan.replace(p, **changes), device)
        return min(("torch", "triton"), key=order.index)

    assert first(H200) == "torch"
    assert first(H200, k=2048) == first(H200, num_rows=80) == first(H200, kind="wgrad") == first(A100) == "triton"


def test_automatic_choice_on_a_cpu():
    """The native kernel while reading the weights takes the time, torch's matmul once arithmetic does."""
    environment = _extension.environment()
    library = "torch" if "grouped_mm" in environment.torch_functions else "reference"
    native = "cpu" if "grouped_matmul" in environment.cpu_ops else library
    a, b = torch.randn(200, 16).bfloat16(), torch.randn(2, 8, 16).bfloat16()
    assert dk.explain("grouped_matmul", a[:5], b, offsets(2, 5)).backend == native
    assert dk.explain("grouped_matmul", a, b, offsets(100, 200)).backend == (library if library == "torch" else native)
    assert dk.explain("grouped_matmul", a.double(), b.double(), offsets(2, 5)).backend == "reference"


def test_flops_and_bytes():
    p = plan.Problem("forward", 100, 64, 128, 4)
    assert plan.flops(p) == 2 * 100 * 64 * 128
    assert plan.bytes(p) == 2 * (100 * 128 + 4 * 64 * 128 + 100 * 64) + 4 * 5
    assert plan.bytes(plan.replace(p, num_rows=2)) == 2 * (2 * 128 + 2 * 64 * 128 + 2 * 64) + 4 * 5
    assert plan.bytes(plan.replace(p, kind="wgrad")) == 2 * (100 * (64 + 128) + 4 * 64 * 128) + 4 * 5


@pytest.mark.gpu
@pytest.mark.parametrize("k_major", [True, False])
def test_every_triton_candidate_on_the_device(k_major):
    from deepseek_kernels.ops import _device
    from deepseek_kernels.ops.grouped_matmul import _triton

    a, b = torch.randn(600, 208).bfloat16(), torch.randn(3, 400, 208).bfloat16()
    ends = offsets(7, 7, 431)
    expected, device = exact(a, b, ends).cuda(), _device.spec(torch.device("cuda", 0))
    b = b if k_major else b.transpose(1, 2).contiguous().transpose(1, 2)
    a, b, ends = a.cuda(), b.cuda(), ends.cuda()
    p = plan.Problem("forward", 600, 400, 208, 3, out_dtype="float32")
    for config in plan.candidates(p, device):
        if not plan.is_legal(config, p, device):
            assert_close(_triton(config, a, b, ends, torch.float32), expected, MATMUL, str(config))
