"""grouped_matmul's CUDA kernel in the model of tests/hopper_model, against the exact product."""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

BF16 = torch.bfloat16
TILES = {16: 1, 64: 1, 128: 2, 256: 2}  # tile_m: cluster_n


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


@functools.cache
def operands(rows, n, k, num_groups):
    generator = torch.Generator().manual_seed(rows * 7919 + n * 31 + k + num_groups)
    return tuple(torch.randn(*shape, k, generator=generator).to(BF16) for shape in ((rows,), (num_groups, n)))


def clamped(offsets, rows):
    ends = [min(max(offsets[0], 0), rows)]
    for offset in offsets[1:]:
        ends.append(max(ends[-1], min(max(offset, 0), rows)))
    return ends


def run_grouped(
    model, offsets, rows, n, k, *, tile=128, transposed=False, clusters=1, raster=2, ld_pad=0, group_pad=0,
):  # fmt: skip
    """Rows of no group are NaN in a, and so is what lies between the matrices of b."""
    num_groups = len(offsets) - 1
    a, b = operands(rows, n, k, num_groups)
    exact, magnitude = (torch.zeros(rows, n, dtype=torch.float64) for _ in range(2))
    owned = torch.zeros(rows, dtype=torch.bool)
    ends = clamped(offsets, rows)
    for g, (first, last) in enumerate(zip(ends, ends[1:])):
        owned[first:last] = True
        x, w = a[first:last].double(), b[g].double().T
        exact[first:last], magnitude[first:last] = x @ w, x.abs() @ w.abs()

    guarded = harness.Guarded(model)
    a = guarded.copy("a", torch.where(owned[:, None], a, float("nan")), stride=(k + ld_pad, 1))
    between = ((k + group_pad) * (n + ld_pad)) if transposed else (n + group_pad) * (k + ld_pad)
    b = guarded.copy("b", b, stride=(between, 1, n + ld_pad) if transposed else (between, k + ld_pad, 1))
    index = guarded.copy("groups", torch.tensor(offsets, dtype=torch.int32))
    d = guarded.empty("d", (rows, n), BF16)
    model.grouped_matmul(
        a=a.data_ptr(), b=b.data_ptr(), groups=index.data_ptr(), d=d.data_ptr(), num_rows=rows, n=n, k=k,
        num_groups=num_groups, lda=a.stride(0), ldb=b.stride(2 if transposed else 1), b_stride_g=b.stride(0),
        transposed=transposed, tile_m=tile, cluster_n=TILES[tile], raster=raster, ctas=clusters * TILES[tile],
        stream=0,
    )  # fmt: skip
    wrong = ~((d.double() - exact).abs() <= exact.abs() / 256 + 1e-5 * magnitude)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}"


CASES = {
    # offsets, rows, n, k, clusters
    "ragged": ((0, 3, 3, 70, 200), 210, 136, 144, 2),  # an empty group, n and k that end within a tile
    "rows_of_no_group": ((5, 133, 140, 141), 210, 72, 72, 1),
    "one_huge_group": ((0, 0, 0, 300, 300), 300, 264, 200, 2),
    "one_group": ((0, 130), 130, 264, 264, 1),
    "wide_and_narrow": ((0, 130, 400, 784, 912), 920, 72, 200, 1),
    "one_row": ((0, 1), 1, 8, 8, 1),
    "out_of_range": ((-9, 40, 20, 2**31 - 1), 210, 136, 64, 3),
    "all_empty": ((7, 7, 7), 30, 40, 128, 1),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["nt", "nn"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_product(model, case, tile, transposed):
    offsets, rows, n, k, clusters = CASES[case]

    def run(seed):
        run_grouped(
            model, offsets, rows, n, k, tile=tile, transposed=transposed, clusters=clusters, raster=1 + seed % 3,
            ld_pad=seed % 2 * 8, group_pad=seed % 3 * 8,
        )  # fmt: skip

    harness.under_every_schedule(run, harness.SEEDS[:20] if harness.FULL else harness.SEEDS[:3])


@pytest.mark.parametrize("num_groups", [33, 1024])
def test_many_groups(model, num_groups):
    """More groups than threads that add up their tiles, most of them empty."""
    generator = torch.Generator().manual_seed(num_groups)
    ends = torch.randint(0, 40, (num_groups,), generator=generator).sort().values.tolist()
    model.configure(seed=2)
    run_grouped(model, (0, *ends), 40, 8, 16, tile=16)


def test_the_instances_are_those_tested(model):
    compiled = {
        (tile_m, cluster_n, transposed) for tile_m, _, cluster_n, transposed, _ in model.grouped_matmul_instances
    }
    assert compiled == {(tile, cluster, t) for tile, cluster in TILES.items() for t in (False, True)}


def test_refusals(model):
    model.configure()
    arguments = dict.fromkeys(("a", "b", "groups", "d", "lda", "ldb", "b_stride_g", "stream"), 0)
    arguments |= dict(num_rows=5, n=8, k=8, num_groups=1, transposed=False, tile_m=16, cluster_n=1, raster=1, ctas=1)
    for change, message in (
        (dict(tile_m=32), "no instance for tile_m 32, cluster_n 1"),
        (dict(num_groups=1025), "num_groups = 1025"),
        (dict(n=12), "got n, k = 12, 8"),
        (dict(k=0), "got n, k = 8, 0"),
        (dict(raster=0), "raster = 0"),
        (dict(cluster_n=2), "ctas = 1, cluster_n = 2"),
        (dict(num_rows=2**30), "num_rows, n, k = 1073741824"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.grouped_matmul(**arguments | change)


RAGGED = dict(offsets=(5, 5, 40, 137, 160), rows=200, n=136, k=144)
LONG = dict(offsets=(0, 70, 150), rows=160, n=264, k=520)
WHOLE = dict(offsets=(0, 300), rows=310, n=264, k=72)  # tiles that TMA stores
BUGS = {
    "offsets_not_clamped": RAGGED | dict(offsets=(5, 40, 30, 230, 150)),
    "decrease_kept": RAGGED | dict(offsets=(5, 40, 30, 230, 150)),
    "weights_of_first_group": RAGGED,
    "rows_of_no_group_kept": RAGGED,
    "tails_stored_whole": RAGGED,
    "columns_unmasked": RAGGED,
    "groups_read_early": dict(offsets=range(61), rows=60, n=8, k=16, tile=16),
    "dependency_wait_missing": RAGGED,
    "fence_barrier_init_missing": RAGGED,
    "syncthreads_missing": RAGGED | dict(tile=16),
    "multicast_to_self_only": RAGGED,
    "expect_too_many_bytes": RAGGED,
    "rows_of_first_warpgroup": RAGGED,
    "full_wait_missing": RAGGED,
    "wgmma_fence_missing": RAGGED,
    "sums_of_last_tile_kept": LONG,
    "product_not_awaited": LONG,
    "wgmma_wait_missing": RAGGED,
    "stage_released_early": LONG,
    "stage_never_released": LONG,
    "phase_never_flipped": LONG,
    "store_wait_missing": WHOLE,
    "fence_proxy_async_missing": WHOLE,
    "barrier_before_store_missing": WHOLE,
    "staging_not_swizzled": WHOLE,
    "last_cluster_sync_missing": RAGGED,
    "narrow_too_early": RAGGED | dict(offsets=(0, 200), tile=256),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs(model, bug):
    harness.assert_caught(lambda: run_grouped(model, **BUGS[bug]), bug)
    if "tile" not in BUGS[bug]:
        harness.assert_caught(lambda: run_grouped(model, **BUGS[bug], tile=256, transposed=True), bug)
