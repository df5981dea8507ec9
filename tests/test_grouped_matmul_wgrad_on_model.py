"""grouped_matmul_wgrad's CUDA kernel in the model of tests/hopper_model, against the exact sums."""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

BF16 = torch.bfloat16
TILES = {128: 1, 256: 2}  # tile_n: cluster_m


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


@functools.cache
def operands(rows, n, k):
    generator = torch.Generator().manual_seed(rows * 7919 + n * 31 + k)
    return tuple(torch.randn(rows, columns, generator=generator).to(BF16) for columns in (n, k))


def clamped(offsets, rows):
    ends = [min(max(offsets[0], 0), rows)]
    for offset in offsets[1:]:
        ends.append(max(ends[-1], min(max(offset, 0), rows)))
    return ends


def run_wgrad(model, offsets, rows, n, k, *, tile=256, out_dtype=BF16, clusters=1, raster=2, ld_pad=0):
    """Rows of no group are NaN."""
    grad, a = operands(rows, n, k)
    num_groups, ends = len(offsets) - 1, clamped(offsets, rows)
    owned = torch.zeros(rows, dtype=torch.bool)
    exact, magnitude = (torch.zeros(num_groups, n, k, dtype=torch.float64) for _ in range(2))
    for g, (first, last) in enumerate(zip(ends, ends[1:])):
        owned[first:last] = True
        x, y = grad[first:last].double().T, a[first:last].double()
        exact[g], magnitude[g] = x @ y, x.abs() @ y.abs()

    guarded = harness.Guarded(model)
    grad, a = (
        guarded.copy(name, torch.where(owned[:, None], t, float("nan")), stride=(t.shape[1] + ld_pad, 1))
        for name, t in (("grad", grad), ("a", a))
    )
    index = guarded.copy("groups", torch.tensor(offsets, dtype=torch.int32))
    d = guarded.empty("d", (num_groups, n, k), out_dtype)
    model.grouped_matmul_wgrad(
        grad=grad.data_ptr(), a=a.data_ptr(), groups=index.data_ptr(), d=d.data_ptr(), num_rows=rows, n=n, k=k,
        num_groups=num_groups, ld_grad=grad.stride(0), lda=a.stride(0), out_dtype=harness.DTYPES[out_dtype],
        tile_n=tile, cluster_m=TILES[tile], raster=raster, ctas=clusters * TILES[tile], stream=0,
    )  # fmt: skip
    step = exact.abs() / 256 if out_dtype == BF16 else 0
    wrong = ~((d.double() - exact).abs() <= step + 1e-5 * magnitude)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}"


CASES = {
    # offsets, rows, n, k, clusters
    "ragged": ((0, 3, 3, 70, 200), 210, 136, 72, 2),  # an empty expert, n and k that end within a tile
    "whole_stages": ((0, 64, 256), 256, 40, 264, 1),
    "rows_of_no_expert": ((5, 133, 140, 141), 210, 24, 40, 1),
    "one_has_nearly_all": ((0, 1, 590, 591), 600, 264, 72, 1),
    "one_expert": ((0, 130), 130, 264, 264, 2),
    "one_row": ((0, 1), 1, 8, 8, 1),
    "out_of_range": ((-9, 40, 20, 2**31 - 1), 210, 72, 136, 3),
    "all_empty": ((7, 7, 7), 30, 40, 264, 2),
}


@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_gradient(model, case, tile, out_dtype):
    offsets, rows, n, k, clusters = CASES[case]

    def run(seed):
        run_wgrad(
            model, offsets, rows, n, k, tile=tile, out_dtype=out_dtype, clusters=clusters, raster=1 + seed % 3,
            ld_pad=seed % 2 * 8,
        )  # fmt: skip

    harness.under_every_schedule(run, harness.SEEDS[:20] if harness.FULL else harness.SEEDS[:4])


@pytest.mark.parametrize("valid", [1, 7, 8, 16, 33, 63])
def test_every_kind_of_tail(model, valid):
    """What lies behind an expert's rows is another's, and behind the last one's NaN."""
    model.configure(seed=valid)
    run_wgrad(model, (0, 64 + valid, 64 + 2 * valid), 300, 72, 72, tile=128)


def test_many_experts(model):
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(0, 40, (1024,), generator=generator).sort().values.tolist()
    model.configure(seed=2)
    run_wgrad(model, (0, *ends), 40, 8, 8, tile=128, clusters=4)


def test_the_instances_are_those_tested(model):
    compiled = {(dtype, tile, cluster) for dtype, _, tile, cluster, _ in model.grouped_matmul_wgrad_instances}
    assert compiled == {(dtype, *tile) for dtype in (model.BF16, model.FP32) for tile in TILES.items()}


def test_refusals(model):
    model.configure()
    arguments = dict.fromkeys(("grad", "a", "groups", "d", "ld_grad", "lda", "stream"), 0)
    arguments |= dict(num_rows=5, n=8, k=8, num_groups=1, out_dtype=2, tile_n=128, cluster_m=1, raster=1, ctas=1)
    for change, message in (
        (dict(tile_n=64), "no instance for out_dtype 2, tile_n 64, cluster_m 1"),
        (dict(out_dtype=1), "no instance for out_dtype 1"),
        (dict(num_groups=1025), "num_groups = 1025"),
        (dict(k=12), "got num_rows, k = 5, 12"),
        (dict(num_rows=0), "got num_rows, k = 0, 8"),
        (dict(raster=0), "raster = 0"),
        (dict(cluster_m=2), "ctas = 1, cluster_m = 2"),
        (dict(n=2**30), "num_rows, n, k = 5, 1073741824"),
        (dict(n=2**20, k=2**20, num_groups=64), "tiles for each of 64 experts"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.grouped_matmul_wgrad(**arguments | change)


RAGGED = dict(offsets=(5, 5, 40, 137, 160), rows=200, n=136, k=264)
LONG = dict(offsets=(0, 300, 590), rows=600, n=72, k=136)
BUGS = {
    "decrease_kept": RAGGED | dict(offsets=(5, 40, 30, 230, 150)),
    "groups_read_early": dict(offsets=range(61), rows=60, n=8, k=16),
    "rows_of_all_experts": RAGGED,
    "first_expert_only": RAGGED,
    "tail_of_x_kept": RAGGED,
    "tail_of_y_kept": RAGGED,
    "tail_not_fenced": RAGGED,
    "tail_not_awaited": RAGGED,
    "blocks_half_as_far": RAGGED,
    "steps_along_k": RAGGED,
    "rows_of_first_warpgroup": RAGGED,
    "dependency_wait_missing": RAGGED,
    "multicast_to_self_only": RAGGED,
    "expect_too_many_bytes": RAGGED,
    "full_wait_missing": RAGGED,
    "wgmma_fence_missing": RAGGED,
    "sums_of_last_tile_kept": RAGGED,
    "product_not_awaited": LONG,
    "wgmma_wait_missing": RAGGED,
    "stage_released_early": LONG,
    "stage_never_released": LONG,
    "phase_never_flipped": LONG,
    "store_wait_missing": RAGGED,
    "fence_proxy_async_missing": RAGGED,
    "barrier_before_store_missing": RAGGED,
    "staging_not_swizzled": RAGGED,
    "last_cluster_sync_missing": RAGGED,
    "columns_unmasked": RAGGED | dict(out_dtype=torch.float32),
    "rows_unmasked": RAGGED | dict(out_dtype=torch.float32),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs(model, bug):
    harness.assert_caught(lambda: run_wgrad(model, **BUGS[bug]), bug)
