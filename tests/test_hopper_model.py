"""Every CUDA kernel, run on a CPU in the software model of tests/hopper_model, under many random schedules.

The kernels go through the launchers and bindings the GPU build has. Memory lies between guard pages and starts as NaN.
Each planted bug proves that the harness can fail. DEEPSEEK_KERNELS_FULL_TEST=1 widens shapes and schedules.
"""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_kernels.reference.fp8_quantize import fp8_quantize as reference_quantize

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

FULL = os.environ.get("DEEPSEEK_KERNELS_FULL_TEST") == "1"
SEEDS = range(1, 101 if FULL else 9)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BLOCKS = {"1x128": (1, 128), "128x128": (128, 128), "128x1": (128, 1)}
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def model():
    try:
        model = harness.load()
    except harness.Unavailable as reason:
        pytest.skip(str(reason))
    yield model
    model.configure()


def assert_caught(run, model, bug):
    """The bug shows under at least one schedule, as a report or as wrong numbers, and is gone without it."""
    for seed in SEEDS:
        model.configure(seed=seed, bug=bug)
        try:
            run()
        except (RuntimeError, AssertionError):
            break
    else:
        pytest.fail(f"{bug} went unnoticed under {len(SEEDS)} schedules")
    model.configure(seed=1)
    run()


def assert_same_bits(got, want):
    nan = want.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[want.dtype.itemsize]
    different = (got.contiguous().view(integer) != want.contiguous().view(integer)) & ~nan
    assert not different.any(), f"{int(different.sum())} of {want.numel()}, first at {different.nonzero()[0].tolist()}"


def hostile(shape, dtype, generator):
    x = torch.randn(shape, generator=generator) * 10 ** torch.randint(-5, 4, (shape[0], 1), generator=generator).float()
    x[:, :2] = -0.0
    x[x.shape[0] // 2, x.shape[1] // 2] = float("nan")
    x[-1, -1] = -float("inf")
    return x.to(dtype)


def transposed(rows):
    """The strides of MN-major scales."""
    return 1, -(-rows // 4) * 4


def run_quantize(model, x, granularity, *, pow2_scale=False, mn_major=False, ld_pad=0, offset=0):
    (m, k), (block_m, block_k) = x.shape, BLOCKS[granularity]
    rows, columns = -(-m // block_m), -(-k // block_k)
    guarded = harness.Guarded(model)
    xs = guarded.copy("x", x, stride=(k + ld_pad, 1), offset=offset)
    q = guarded.empty("q", (m, k), FP8, stride=(k + ld_pad, 1), offset=offset)
    scale = guarded.empty("scale", (rows, columns), torch.float32, stride=transposed(rows) if mn_major else None)
    model.fp8_quantize(
        x=xs.data_ptr(), q=q.data_ptr(), scale=scale.data_ptr(), m=m, k=k, dtype=DTYPES[x.dtype],
        block_m=block_m, block_k=block_k, ldx=xs.stride(0), ldq=q.stride(0), scale_stride_m=scale.stride(0),
        scale_stride_k=scale.stride(1), pow2_scale=pow2_scale, stream=0,
    )  # fmt: skip
    want_q, want_scale = reference_quantize(x, granularity, pow2_scale)
    assert_same_bits(scale, want_scale)
    assert_same_bits(q, want_q)


QUANTIZE_SHAPES = [(1, 128), (7, 1000), (63, 5), (130, 264), (200, 144)]


@pytest.mark.parametrize("granularity", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_fp8_quantize(model, dtype, granularity):
    generator = torch.Generator().manual_seed(0)
    for (m, k), seed in itertools.product(QUANTIZE_SHAPES, SEEDS):
        model.configure(seed=seed)
        layout = dict(ld_pad=(0, 16, 3)[seed % 3], offset=seed % 4 // 3, mn_major=seed % 3 == 0)
        run_quantize(model, hostile((m, k), dtype, generator), granularity, pow2_scale=seed % 2 == 0, **layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_fp8_quantize_every_16_bit_pattern(model, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(512, 128)
    run_quantize(model, x, "1x128")
    largest = x.float().abs().nan_to_num(0, 0, 0).amax(1, keepdim=True)
    shuffled = (torch.rand(512, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1) * largest
    run_quantize(model, shuffled.to(dtype), "1x128")


def test_fp8_quantize_divides_exactly(model):
    """Quotients next to the midpoint of two FP8 values, where a multiplication by the reciprocal goes wrong."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(64, 1, generator=generator) * 3 + 1e-3
    middle = (torch.arange(8, 16) + 0.5).repeat(16)[:127] * 2.0 ** torch.randint(-3, 4, (64, 127), generator=generator)
    x = torch.cat([448 * scale, middle * scale], 1)
    for nudge in (-1, 0, 1):
        nudged = x.clone()
        nudged[:, 1:] = (x[:, 1:].view(torch.int32) + nudge).view(torch.float32)
        run_quantize(model, nudged, "1x128")


def test_fp8_quantize_of_nothing(model):
    for m, k in [(0, 128), (5, 0), (0, 0)]:
        run_quantize(model, torch.empty(m, k), "1x128")


@pytest.mark.parametrize(
    "bug, granularity",
    [
        ("column_tail_unmasked", "1x128"),
        ("row_tail_unmasked", "1x128"),
        ("lanes_not_reduced", "1x128"),
        ("syncthreads_missing", "128x128"),
        ("syncthreads_missing", "128x1"),
    ],
)
def test_bugs_of_fp8_quantize(model, bug, granularity):
    x = torch.randn(130, 265, generator=torch.Generator().manual_seed(0))
    assert_caught(lambda: run_quantize(model, x, granularity), model, bug)


def random_maps(num_tokens, top_k, num_rows, generator):
    """Every entry has a row of its own, some have none, some point outside; (token_topk_to_pos, pos_to_token_topk)."""
    entries = torch.randperm(num_tokens * top_k, generator=generator)[: num_rows * 3 // 4].int()
    rows = torch.randperm(num_rows, generator=generator)[: len(entries)].int()
    to_pos = torch.full((num_tokens * top_k,), -1, dtype=torch.int32)
    to_pos[entries.long()] = rows[: len(entries)]
    outside = (to_pos < 0).nonzero().flatten()[::3]
    wild = torch.tensor([num_rows, 2**31 - 1, -(2**31), -2], dtype=torch.int32)
    to_pos[outside] = wild[torch.arange(len(outside)) % 4]
    to_entry = torch.full((num_rows,), -1, dtype=torch.int32)
    to_entry[rows.long()] = entries
    return to_pos.view(num_tokens, top_k), to_entry


def expected_rows(x, to_pos, num_rows):
    out = torch.zeros(num_rows, x.shape[1], dtype=x.dtype)
    for token, k in itertools.product(range(to_pos.shape[0]), range(to_pos.shape[1])):
        if 0 <= to_pos[token, k] < num_rows:
            out[to_pos[token, k]] = x[token]
    return out


def maps_arguments(guarded, to_pos, to_entry):
    return dict(
        token_topk_to_pos=guarded.copy("token_topk_to_pos", to_pos).data_ptr(),
        pos_to_token_topk=guarded.copy("pos_to_token_topk", to_entry).data_ptr(),
        num_tokens=to_pos.shape[0], top_k=to_pos.shape[1], num_rows=to_entry.shape[0],
    )  # fmt: skip


def run_permute(model, x, scale, to_pos, to_entry, *, ld_pad=0, offset=0):
    (_, hidden), num_rows = x.shape, to_entry.shape[0]
    columns = 0 if scale is None else scale.shape[1]
    guarded = harness.Guarded(model)
    xs = guarded.copy("x", x, stride=(hidden + ld_pad, 1), offset=offset)
    out = guarded.empty("out", (num_rows, hidden), x.dtype, stride=(hidden + ld_pad, 1), offset=offset)
    scales = guarded.copy("scale", scale, stride=(1, x.shape[0])) if columns else None
    out_scale = guarded.empty("out_scale", (num_rows, columns), torch.float32) if columns else None
    model.moe_permute(
        **maps_arguments(guarded, to_pos, to_entry), x=xs.data_ptr(), out=out.data_ptr(),
        scale=scales.data_ptr() if columns else 0, out_scale=out_scale.data_ptr() if columns else 0,
        row_bytes=hidden * x.element_size(), ldx_bytes=xs.stride(0) * x.element_size(),
        ld_out_bytes=out.stride(0) * x.element_size(), scale_columns=columns,
        scale_stride_t=1, scale_stride_s=x.shape[0], out_scale_stride_r=columns, out_scale_stride_s=1, stream=0,
    )  # fmt: skip
    assert_same_bits(out, expected_rows(x, to_pos, num_rows))
    if columns:
        assert_same_bits(out_scale, expected_rows(scale, to_pos, num_rows))


def run_permute_quantize(model, x, to_pos, to_entry, *, pow2_scale=False, offset=0):
    (_, hidden), num_rows = x.shape, to_entry.shape[0]
    guarded = harness.Guarded(model)
    xs = guarded.copy("x", x, offset=offset)
    out = guarded.empty("out", (num_rows, hidden), FP8, offset=offset)
    out_scale = guarded.empty("out_scale", (num_rows, -(-hidden // 128)), torch.float32)
    model.moe_permute_quantize(
        **maps_arguments(guarded, to_pos, to_entry), x=xs.data_ptr(), out=out.data_ptr(),
        out_scale=out_scale.data_ptr(), hidden=hidden, dtype=DTYPES[x.dtype], ldx=hidden, ld_out=hidden,
        out_scale_stride_r=out_scale.stride(0), out_scale_stride_s=1, pow2_scale=pow2_scale, stream=0,
    )  # fmt: skip
    q, scale = reference_quantize(x, "1x128", pow2_scale)
    assert_same_bits(out, expected_rows(q.view(torch.uint8), to_pos, num_rows).view(FP8))
    assert_same_bits(out_scale, expected_rows(scale, to_pos, num_rows))


def run_unpermute(model, y, weights, to_pos, *, ld_pad=0, offset=0):
    (num_rows, hidden), num_tokens = y.shape, to_pos.shape[0]
    guarded = harness.Guarded(model)
    ys = guarded.copy("y", y, stride=(hidden + ld_pad, 1), offset=offset)
    out = guarded.empty("out", (num_tokens, hidden), y.dtype, stride=(hidden + ld_pad, 1), offset=offset)
    arguments = maps_arguments(guarded, to_pos, torch.empty(num_rows, dtype=torch.int32))
    del arguments["pos_to_token_topk"]
    model.moe_unpermute(
        **arguments, y=ys.data_ptr(), weights=0 if weights is None else guarded.copy("weights", weights).data_ptr(),
        out=out.data_ptr(), hidden=hidden, dtype=DTYPES[y.dtype], ldy=ys.stride(0), ld_out=out.stride(0), stream=0,
    )  # fmt: skip
    want = torch.zeros(num_tokens, hidden)
    for token, k in itertools.product(range(num_tokens), range(to_pos.shape[1])):
        if 0 <= to_pos[token, k] < num_rows:
            weight = 1.0 if weights is None else weights[token, k].double()
            want[token] = (want[token].double() + weight * y[to_pos[token, k]].double()).float()
    assert_same_bits(out, want.to(y.dtype))


MOE_SHAPES = [(1, 1, 8), (7, 3, 40), (5, 8, 136), (3, 6, 2100)]  # tokens, top_k, hidden


@pytest.mark.parametrize("dtype", [*DTYPES, FP8], ids=lambda d: str(d).removeprefix("torch."))
def test_moe_permute(model, dtype):
    generator = torch.Generator().manual_seed(0)
    for (tokens, top_k, hidden), seed in itertools.product(MOE_SHAPES, SEEDS):
        model.configure(seed=seed)
        x = torch.randn(tokens, hidden + seed % 2, generator=generator).to(dtype)
        scale = torch.rand(tokens, 3, generator=generator) if seed % 3 else None
        maps = random_maps(tokens, top_k, tokens * top_k + 35, generator)
        run_permute(model, x, scale, *maps, ld_pad=seed % 4 // 2 * 16, offset=seed % 5 // 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_moe_permute_quantize(model, dtype):
    generator = torch.Generator().manual_seed(0)
    for (tokens, top_k, hidden), seed in itertools.product(MOE_SHAPES, SEEDS):
        model.configure(seed=seed)
        x = hostile((tokens, hidden + seed % 2 * 8), dtype, generator)
        maps = random_maps(tokens, top_k, tokens * top_k + 35, generator)
        run_permute_quantize(model, x, *maps, pow2_scale=seed % 3 == 0, offset=seed % 5 // 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_moe_unpermute(model, dtype):
    generator = torch.Generator().manual_seed(0)
    for (tokens, top_k, hidden), seed in itertools.product(MOE_SHAPES, SEEDS):
        model.configure(seed=seed)
        y = torch.randn(tokens * top_k + 3, hidden + seed % 2, generator=generator).to(dtype)
        # Products and sums of small integers are exact, so the order of rounding cannot matter in the comparison.
        y, weights = (y * 8).round(), torch.randint(-8, 9, (tokens, top_k), generator=generator) / 4
        to_pos, _ = random_maps(tokens, top_k, len(y), generator)
        run_unpermute(model, y, weights if seed % 2 else None, to_pos, ld_pad=seed % 4 // 2 * 16, offset=seed % 5 // 4)


def test_moe_permute_of_nothing(model):
    nothing, no_tokens = torch.empty(0, 16), torch.empty(0, 2, dtype=torch.int32)
    for num_rows in (0, 5):
        run_permute(model, nothing, None, no_tokens, torch.full((num_rows,), -1, dtype=torch.int32))
    run_unpermute(model, nothing, None, torch.full((3, 2), -1, dtype=torch.int32))


@pytest.mark.parametrize("bug", ["position_not_checked", "last_expert_forgotten", "empty_rows_kept", "weight_of_first"])
def test_bugs_of_moe_permute(model, bug):
    generator = torch.Generator().manual_seed(0)
    to_pos, to_entry = random_maps(7, 4, 31, generator)
    if bug == "weight_of_first":
        y, weights = torch.randint(-8, 9, (31, 40), generator=generator).float(), torch.arange(28.0).view(7, 4)
        assert_caught(lambda: run_unpermute(model, y, weights, to_pos), model, bug)
    else:
        x = torch.randn(7, 40, generator=generator)
        assert_caught(lambda: run_permute(model, x, None, to_pos, to_entry), model, bug)


def test_bugs_of_moe_permute_quantize(model):
    generator = torch.Generator().manual_seed(0)
    x, maps = torch.randn(7, 264, generator=generator), random_maps(7, 4, 63, generator)
    assert_caught(lambda: run_permute_quantize(model, x, *maps), model, "lanes_not_reduced")


@functools.cache
def matmul_problem(m, n, k):
    """Inputs, the exact product of the dequantised operands, and the same of their magnitudes."""
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    blocks = -(-k // 128)
    a = torch.randn(m, k, generator=generator).to(FP8)
    b = torch.randn(n, k, generator=generator).to(FP8)
    scale_a = torch.rand(m, blocks, generator=generator) + 0.5
    scale_b = torch.rand(-(-n // 128), blocks, generator=generator) + 0.5
    exact_a = a.double() * scale_a.double().repeat_interleave(128, 1)[:, :k]
    exact_b = b.double() * scale_b.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return a, scale_a, b, scale_b, exact_a @ exact_b.T, exact_a.abs() @ exact_b.abs().T


def run_matmul(
    model, m, n, k, *, tile=(128, 128), stages=None, cluster=1, ctas=2, raster=2, out_dtype=torch.bfloat16,
    bias_dtype=None, mn_major=True, ld_pad=0,
):  # fmt: skip
    a, scale_a, b, scale_b, exact, magnitude = matmul_problem(m, n, k)
    if stages is None:
        key = (DTYPES[out_dtype], *tile)
        stages = next(i[3] for i in model.fp8_matmul_instances if i[:3] == key and i[4] == cluster)
    if bias_dtype is not None:
        bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(bias_dtype)
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    guarded = harness.Guarded(model)
    a = guarded.copy("a", a, stride=(k + ld_pad, 1))
    b = guarded.copy("b", b, stride=(k + ld_pad, 1))
    scale_a = guarded.copy("scale_a", scale_a, stride=transposed(m) if mn_major else None)
    scale_b = guarded.copy("scale_b", scale_b)
    d = guarded.empty("d", (m, n), out_dtype, stride=(n + ld_pad, 1))
    model.fp8_matmul(
        a=a.data_ptr(), scale_a=scale_a.data_ptr(), b=b.data_ptr(), scale_b=scale_b.data_ptr(), d=d.data_ptr(),
        bias=0 if bias_dtype is None else guarded.copy("bias", bias).data_ptr(), m=m, n=n, k=k, lda=a.stride(0),
        ldb=b.stride(0), ldd=d.stride(0), scale_a_stride_m=scale_a.stride(0), scale_a_stride_k=scale_a.stride(1),
        scale_b_stride_n=scale_b.stride(0), scale_b_stride_k=scale_b.stride(1), out_dtype=DTYPES[out_dtype],
        bias_dtype=DTYPES[bias_dtype or out_dtype], tile_m=tile[0], tile_n=tile[1], stages=stages, cluster=cluster,
        raster=raster, ctas=ctas, stream=0,
    )  # fmt: skip
    error = (d.double() - exact).abs()
    step = exact.abs() / 256 if out_dtype == torch.bfloat16 else 0
    wrong = ~(error <= step + 1e-5 * magnitude)
    assert not wrong.any(), f"{int(wrong.sum())} of {m * n} wrong, first at {wrong.nonzero()[0].tolist()}"


MATMUL_SHAPES = [  # m, n, k, ctas: each value of the full grid at least once, one tile and many a CTA
    (1, 8, 16, 1), (7, 24, 144, 1), (63, 136, 528, 2), (130, 264, 144, 3), (200, 136, 1024, 2), (300, 264, 272, 1),
]  # fmt: skip
if FULL:
    grid = itertools.product((1, 7, 63, 64, 65, 130, 200, 300), (8, 24, 136, 264, 520), (16, 144, 528, 1024))
    MATMUL_SHAPES = [(m, n, k, 2) for m, n, k in grid]


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("m, n, k, ctas", MATMUL_SHAPES)
def test_fp8_matmul(model, m, n, k, ctas, cluster):
    for seed in SEEDS:
        model.configure(seed=seed)
        run_matmul(
            model, m, n, k, cluster=cluster, ctas=ctas * cluster, raster=1 + seed % 3, mn_major=seed % 2 == 0,
            ld_pad=seed % 4 // 3 * 16, bias_dtype=(None, torch.bfloat16, torch.float32)[seed % 3],
        )  # fmt: skip


def test_every_instance_of_fp8_matmul(model):
    dtypes = {code: dtype for dtype, code in DTYPES.items()}
    for out_dtype, tile_m, tile_n, stages, cluster in model.fp8_matmul_instances:
        for seed in SEEDS[:3]:
            model.configure(seed=seed)
            run_matmul(
                model, 130, 264, 144, tile=(tile_m, tile_n), stages=stages, cluster=cluster, ctas=2,
                out_dtype=dtypes[out_dtype], bias_dtype=torch.float32,
            )  # fmt: skip


def test_fp8_matmul_says_what_it_cannot_do(model):
    model.configure()
    with pytest.raises(RuntimeError, match="no instance for out_dtype 2, tile 128x96, 5 stages, cluster 1"):
        run_matmul(model, 1, 8, 16, tile=(128, 96), stages=5)
    with pytest.raises(RuntimeError, match=r"wanted .*n % 8 == 0.*, got n = 12"):
        run_matmul(model, 1, 12, 16)
    with pytest.raises(RuntimeError, match="ctas = 3, cluster = 2"):
        run_matmul(model, 1, 8, 16, cluster=2, ctas=3)
    with pytest.raises(RuntimeError, match="row stride not a multiple of 16"):
        run_matmul(model, 2, 8, 16, ld_pad=1)


MATMUL_BUGS = {
    "phase_never_flipped": 1,
    "expect_too_many_bytes": 1,
    "scale_b_of_m_tile": 1,
    "scales_do_not_wait": 1,
    "scale_rows_unmasked": 1,
    "scale_of_next_row": 1,
    "descriptor_stride_halved": 1,
    "k_step_doubled": 1,
    "full_wait_missing": 1,
    "stage_released_early": 2,
    "wgmma_fence_missing": 1,
    "wgmma_wait_missing": 1,
    "stage_never_released": 1,
    "scale_read_after_release": 1,
    "fence_proxy_async_missing": 1,
    "barrier_before_store_missing": 1,
    "staging_not_swizzled": 1,
    "fence_barrier_init_missing": 1,
    "syncthreads_missing": 1,
    "multicast_to_self_only": 2,
    "last_cluster_sync_missing": 2,
}


@pytest.mark.parametrize("bug, cluster", MATMUL_BUGS.items())
def test_bugs_of_fp8_matmul(model, bug, cluster):
    assert_caught(lambda: run_matmul(model, 200, 264, 1024, cluster=cluster, mn_major=False), model, bug)


def test_store_wait_of_fp8_matmul(model):
    """Tiles with little to multiply follow each other closely enough to meet in the staging buffer."""
    assert_caught(lambda: run_matmul(model, 200, 520, 16, ctas=1), model, "store_wait_missing")


def test_every_planted_bug_is_tested():
    sources = [p.read_text() for p in harness.ROOT.glob("csrc/*/kernel*.cuh")]
    planted = {part.split(")")[0] for text in sources for part in text.split("BUG(")[1:]}
    tested = Path(__file__).read_text()
    assert {bug for bug in planted if f'"{bug}"' not in tested} == set()


def run_primitives(program, folder):
    folder.mkdir()
    subprocess.run([program, folder], check=True)
    return {p.stem: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def primitives_in_model(model, tmp_path):
    return run_primitives(harness.build("primitives"), tmp_path / "model")


@pytest.fixture
def primitives_for_gpu(tmp_path):
    if harness.nvcc() is None:
        pytest.skip("needs nvcc")
    program, sources = tmp_path / "primitives", harness.ROOT / "csrc"
    command = [harness.nvcc(), "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-I", sources]
    command += ["--expt-relaxed-constexpr", "-o", program, harness.HERE / "primitives.cu"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return program


def test_primitives_in_the_model(primitives_in_model):
    got = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in primitives_in_model.items()}
    assert (got["elect"][:128] == 1).all()
    i = torch.arange(40 * 128)
    matrix = (i * 37 + i // 128).to(torch.uint8).view(40, 128)
    corners = got["tma_load_128"][: 6 * 32 * 128].view(3, 2, 32, 128)[:, 1]
    padded = torch.zeros(72, 160, dtype=torch.uint8)
    padded[16:56, 16:144] = matrix
    for corner, (x, y) in zip(corners, [(0, 0), (16, 24), (-16, -3)]):
        assert torch.equal(corner, padded[16 + y : 48 + y, 16 + x : 144 + x])


def test_primitives_compile_for_a_gpu(primitives_for_gpu):
    assert primitives_for_gpu.exists()


@pytest.mark.gpu
def test_primitives_do_on_a_gpu_what_they_do_in_the_model(primitives_in_model, primitives_for_gpu, tmp_path):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    on_gpu = run_primitives(primitives_for_gpu, tmp_path / "gpu")
    assert on_gpu.keys() == primitives_in_model.keys()
    assert [name for name in on_gpu if on_gpu[name] != primitives_in_model[name]] == []


def test_writes_past_the_end_are_reported(model):
    model.configure()
    guarded = harness.Guarded(model)
    x = guarded.copy("x", torch.ones(1, 128))
    small = guarded.empty("too_small", (1, 100), FP8)
    scale = guarded.empty("scale", (1, 1), torch.float32)
    arguments = dict(x=x.data_ptr(), scale=scale.data_ptr(), m=1, k=128, dtype=0, block_m=1, block_k=128, ldx=128)
    arguments |= dict(ldq=128, scale_stride_m=1, scale_stride_k=1, pow2_scale=False, stream=0)
    with pytest.raises(RuntimeError, match="past the end of 'too_small'"):
        model.fp8_quantize(q=small.data_ptr(), **arguments)


def test_a_seed_replays_exactly(model):
    switches = []
    for _ in range(2):
        model.configure(seed=5)
        before = model.statistics()["switches"]
        run_matmul(model, 130, 136, 144)
        switches.append(model.statistics()["switches"] - before)
    assert switches[0] == switches[1]


def test_the_ops_can_call_the_model(model):
    from deepseek_kernels.ops import _extension

    with harness.model_extension(seed=3):
        assert _extension.module() is model
    assert _extension._substitute is None
