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
    model, m, n, k, *, tile=(128, 192), cluster=(1, 1), cluster_k=1, swap=False, ctas=2, raster=2,
    out_dtype=torch.bfloat16, bias_dtype=None, accumulate=False, mn_major=True, ld_pad=0,
):  # fmt: skip
    a, scale_a, b, scale_b, exact, magnitude = matmul_problem(m, n, k)
    if bias_dtype is not None:
        bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(bias_dtype)
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    guarded = harness.Guarded(model)
    a = guarded.copy("a", a, stride=(k + ld_pad, 1))
    b = guarded.copy("b", b, stride=(k + ld_pad, 1))
    scale_a = guarded.copy("scale_a", scale_a, stride=harness.mn_major(m) if mn_major else None)
    scale_b = guarded.copy("scale_b", scale_b)
    d = guarded.empty("d", (m, n), out_dtype, stride=(n + ld_pad, 1))
    if accumulate:
        d.copy_(torch.randn(m, n, generator=torch.Generator().manual_seed(m)))
        exact, magnitude = exact + d.double(), magnitude + d.double().abs()
    model.fp8_matmul(
        a=a.data_ptr(), scale_a=scale_a.data_ptr(), b=b.data_ptr(), scale_b=scale_b.data_ptr(), d=d.data_ptr(),
        bias=0 if bias_dtype is None else guarded.copy("bias", bias).data_ptr(), m=m, n=n, k=k, lda=a.stride(0),
        ldb=b.stride(0), ldd=d.stride(0), scale_a_stride_m=scale_a.stride(0), scale_a_stride_k=scale_a.stride(1),
        scale_b_stride_n=scale_b.stride(0), scale_b_stride_k=scale_b.stride(1), out_dtype=harness.DTYPES[out_dtype],
        bias_dtype=harness.DTYPES[bias_dtype or out_dtype], accumulate=accumulate, tile_m=tile[0], tile_n=tile[1],
        cluster_m=cluster[0], cluster_n=cluster[1], cluster_k=cluster_k, swap=swap, raster=raster, ctas=ctas, stream=0,
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


@pytest.mark.parametrize("tile, cluster", [((128, 192), (1, 1)), ((128, 128), (1, 2)), ((256, 128), (1, 2))])
@pytest.mark.parametrize("m, n, k, ctas", MATMUL_SHAPES)
def test_fp8_matmul(model, m, n, k, ctas, tile, cluster):
    def run(seed):
        run_matmul(
            model, m, n, k, tile=tile, cluster=cluster, ctas=ctas * cluster[0] * cluster[1], raster=1 + seed % 3,
            mn_major=seed % 2 == 0, ld_pad=seed % 4 // 3 * 16,
            bias_dtype=(None, torch.bfloat16, torch.float32)[seed % 3],
        )  # fmt: skip

    harness.under_every_schedule(run, harness.SEEDS[:20])


def instances(model):
    dtypes = {code: dtype for dtype, code in harness.DTYPES.items()}
    for out_dtype, tile_m, tile_n, cluster_m, cluster_n, swap, cluster_k, _ in model.fp8_matmul_instances:
        yield dict(
            out_dtype=dtypes[out_dtype], tile=(tile_m, tile_n), cluster=(cluster_m, cluster_n), swap=swap,
            cluster_k=cluster_k, ctas=cluster_m * cluster_n * cluster_k,
        )  # fmt: skip


def test_every_instance_of_fp8_matmul(model):
    """Rows and columns past the last tile, two scale blocks of b in a tile, a partial block of k, more blocks than
    stages."""
    for i, options in enumerate(instances(model)):
        few = options["tile"][0] < 64 or options["cluster_k"] > 1

        def run(seed, i=i, options=options, few=few):
            m, n, k = ((3, 136, 2064), (21, 264, 144), (70, 392, 528))[(seed + i) % 3] if few else (130, 264, 272)
            run_matmul(
                model, m, n, k, **options, bias_dtype=(torch.float32, None, torch.bfloat16)[seed % 3],
                accumulate=seed % 2 == 0, mn_major=seed % 2 == 0,
            )  # fmt: skip

        harness.under_every_schedule(run, harness.SEEDS[:3])


def test_fp8_matmul_says_what_it_cannot_do(model):
    model.configure()
    with pytest.raises(RuntimeError, match="no instance for out_dtype 2, tile 128x96, cluster 1x1x1, swapped"):
        run_matmul(model, 1, 8, 16, tile=(128, 96), swap=True)
    with pytest.raises(RuntimeError, match=r"wanted .*n % 8 == 0.*, got n = 12"):
        run_matmul(model, 1, 12, 16)
    with pytest.raises(RuntimeError, match="ctas = 3, cluster = 2"):
        run_matmul(model, 1, 8, 16, tile=(128, 128), cluster=(1, 2), ctas=3)
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
}


@pytest.mark.parametrize("bug, cluster", MATMUL_BUGS.items())
def test_bugs_of_fp8_matmul(model, bug, cluster):
    tile = (256, 128) if cluster == 2 else (128, 192)
    run = functools.partial(run_matmul, model, 200, 264, 1024, tile=tile, cluster=(1, cluster), mn_major=False)
    harness.assert_caught(run, bug)


SCALE_BUGS = ("expect_too_many_bytes", "scales_of_next_block", "scale_block_past_the_end", "scales_past_the_last_step")


@pytest.mark.parametrize("bug", SCALE_BUGS)
def test_bugs_of_scales(model, bug):
    """Those of rows by TMA, those of blocks ahead of their step; the last tile has no second block."""
    harness.assert_caught(lambda: run_matmul(model, 130, 200, 1024, tile=(128, 192)), bug)


@pytest.mark.parametrize("bug", ["older_product_not_awaited", "full_wait_missing", "stage_never_released"])
def test_bugs_of_two_products_under_way(model, bug):
    harness.assert_caught(lambda: run_matmul(model, 130, 264, 1024, tile=(128, 128), cluster=(1, 2)), bug)


def test_last_cluster_sync_of_fp8_matmul(model):
    """A CTA must end before its peer lets go of the last stage, which few schedules make happen."""
    run = functools.partial(run_matmul, model, 200, 24, 16, tile=(128, 128), cluster=(1, 2))
    harness.assert_caught(run, "last_cluster_sync_missing", seeds=range(1, 101))


@pytest.mark.parametrize("bug", ["half_not_awaited", "half_overwritten"])
def test_bugs_of_tiles_whose_steps_two_warpgroups_share(model, bug):
    run = functools.partial(run_matmul, model, 16, 520, 272, tile=(16, 64), swap=True, ctas=1)
    harness.assert_caught(run, bug)


@pytest.mark.parametrize("bug", ["shares_not_awaited", "shares_overwritten"])
def test_bugs_of_clusters_that_share_out_k(model, bug):
    run = functools.partial(run_matmul, model, 16, 520, 1040, tile=(16, 64), swap=True, cluster_k=4, ctas=4)
    harness.assert_caught(run, bug)


def test_bugs_of_accumulating(model):
    run = functools.partial(run_matmul, model, 130, 24, 16, accumulate=True, ctas=1)
    harness.assert_caught(run, "previous_rows_unmasked")
    harness.assert_caught(run, "dependency_wait_missing")


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
