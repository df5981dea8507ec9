"""fp8_matmul's CUDA kernel in the model of tests/hopper_model, against the exact product."""

import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


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
        key = (harness.DTYPES[out_dtype], *tile)
        stages = next(i[3] for i in model.fp8_matmul_instances if i[:3] == key and i[4] == cluster)
    if bias_dtype is not None:
        bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(bias_dtype)
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    guarded = harness.Guarded(model)
    a = guarded.copy("a", a, stride=(k + ld_pad, 1))
    b = guarded.copy("b", b, stride=(k + ld_pad, 1))
    scale_a = guarded.copy("scale_a", scale_a, stride=harness.mn_major(m) if mn_major else None)
    scale_b = guarded.copy("scale_b", scale_b)
    d = guarded.empty("d", (m, n), out_dtype, stride=(n + ld_pad, 1))
    model.fp8_matmul(
        a=a.data_ptr(), scale_a=scale_a.data_ptr(), b=b.data_ptr(), scale_b=scale_b.data_ptr(), d=d.data_ptr(),
        bias=0 if bias_dtype is None else guarded.copy("bias", bias).data_ptr(), m=m, n=n, k=k, lda=a.stride(0),
        ldb=b.stride(0), ldd=d.stride(0), scale_a_stride_m=scale_a.stride(0), scale_a_stride_k=scale_a.stride(1),
        scale_b_stride_n=scale_b.stride(0), scale_b_stride_k=scale_b.stride(1), out_dtype=harness.DTYPES[out_dtype],
        bias_dtype=harness.DTYPES[bias_dtype or out_dtype], tile_m=tile[0], tile_n=tile[1], stages=stages,
        cluster=cluster, raster=raster, ctas=ctas, stream=0,
    )  # fmt: skip
    error = (d.double() - exact).abs()
    step = exact.abs() / 256 if out_dtype == torch.bfloat16 else 0
    wrong = ~(error <= step + 1e-5 * magnitude)
    assert not wrong.any(), f"{int(wrong.sum())} of {m * n} wrong, first at {wrong.nonzero()[0].tolist()}"


MATMUL_SHAPES = [  # m, n, k, ctas: each value of the full grid at least once, one tile and many a CTA
    (1, 8, 16, 1), (7, 24, 144, 1), (63, 136, 528, 2), (130, 264, 144, 3), (200, 136, 1024, 2), (300, 264, 272, 1),
]  # fmt: skip
if harness.FULL:
    grid = itertools.product((1, 7, 63, 64, 65, 130, 200, 300), (8, 24, 136, 264, 520), (16, 144, 528, 1024))
    MATMUL_SHAPES = [(m, n, k, 2) for m, n, k in grid]


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("m, n, k, ctas", MATMUL_SHAPES)
def test_fp8_matmul(model, m, n, k, ctas, cluster):
    def run(seed):
        run_matmul(
            model, m, n, k, cluster=cluster, ctas=ctas * cluster, raster=1 + seed % 3, mn_major=seed % 2 == 0,
            ld_pad=seed % 4 // 3 * 16, bias_dtype=(None, torch.bfloat16, torch.float32)[seed % 3],
        )  # fmt: skip

    harness.under_every_schedule(run, harness.SEEDS[:20])


def test_every_instance_of_fp8_matmul(model):
    dtypes = {code: dtype for dtype, code in harness.DTYPES.items()}
    for out_dtype, tile_m, tile_n, stages, cluster in model.fp8_matmul_instances:
        run = functools.partial(
            run_matmul, model, 130, 264, 144, tile=(tile_m, tile_n), stages=stages, cluster=cluster, ctas=2,
            out_dtype=dtypes[out_dtype], bias_dtype=torch.float32,
        )  # fmt: skip
        harness.under_every_schedule(lambda seed, run=run: run(), harness.SEEDS[:3])


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
    harness.assert_caught(lambda: run_matmul(model, 200, 264, 1024, cluster=cluster, mn_major=False), bug)


def test_store_wait_of_fp8_matmul(model):
    """Tiles with little to multiply follow each other closely enough to meet in the staging buffer."""
    harness.assert_caught(lambda: run_matmul(model, 200, 520, 16, ctas=1), "store_wait_missing")


def test_a_seed_replays_exactly(model):
    switches = []
    for _ in range(2):
        model.configure(seed=5)
        before = model.statistics()["switches"]
        run_matmul(model, 130, 136, 144)
        switches.append(model.statistics()["switches"] - before)
    assert switches[0] == switches[1]
