"""fp8_grouped_matmul's CUDA kernel in the model of tests/hopper_model, against the exact product."""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

FP8 = torch.float8_e4m3fn
LARGE = dict(tile=(128, 192), cluster=(1, 2))
SWAPPED = dict(tile=(16, 128), swap=True)


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


@functools.cache
def operands(rows, n, k, num_groups):
    generator = torch.Generator().manual_seed(rows * 7919 + n * 31 + k + num_groups)
    blocks = -(-k // 128)
    a, b = (torch.randn(*shape, k, generator=generator).to(FP8) for shape in ((rows,), (num_groups, n)))
    scale_a = torch.rand(rows, blocks, generator=generator) + 0.5
    scale_b = torch.rand(num_groups, -(-n // 128), blocks, generator=generator) + 0.5
    return a, scale_a, b, scale_b


def product(a, scale_a, b, scale_b):
    """[rows, n] of one group in float64, and the same of magnitudes."""
    k, n = a.shape[1], b.shape[0]
    x = a.double() * scale_a.double().repeat_interleave(128, 1)[:, :k]
    w = b.double() * scale_b.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return x @ w.T, x.abs() @ w.abs().T


def clamped(offsets, rows):
    ends = [min(max(offsets[0], 0), rows)]
    for offset in offsets[1:]:
        ends.append(max(ends[-1], min(max(offset, 0), rows)))
    return ends


def run_grouped(
    model, groups, rows, n, k, *, masked=False, tile=(128, 128), cluster=(1, 2), swap=False, ctas=2, raster=2,
    out_dtype=torch.bfloat16, ld_pad=0, group_pad=0,
):  # fmt: skip
    """`groups`: offsets, or counts of [groups, rows] if `masked`. What a group does not own is NaN in a."""
    num_groups = len(groups) if masked else len(groups) - 1
    a, scale_a, b, scale_b = operands(rows * num_groups if masked else rows, n, k, num_groups)
    exact, magnitude = (torch.zeros(a.shape[0], n, dtype=torch.float64) for _ in range(2))
    owned = torch.zeros(a.shape[0], dtype=torch.bool)
    if masked:
        spans = [(g * rows, g * rows + min(max(count, 0), rows)) for g, count in enumerate(groups)]
    else:
        ends = clamped(groups, rows)
        spans = list(zip(ends, ends[1:]))
    for g, (first, last) in enumerate(spans):
        owned[first:last] = True
        exact[first:last], magnitude[first:last] = product(a[first:last], scale_a[first:last], b[g], scale_b[g])
    a = torch.where(owned[:, None], a.view(torch.uint8), 0x7F).view(FP8)
    scale_a = torch.where(owned[:, None], scale_a, float("nan"))

    guarded = harness.Guarded(model)
    a = guarded.copy("a", a, stride=(k + ld_pad, 1))
    b = guarded.copy("b", b, stride=((n + group_pad) * (k + ld_pad), k + ld_pad, 1))
    scale_a = guarded.copy("scale_a", scale_a, stride=harness.mn_major(len(scale_a)) if ld_pad else None)
    scale_b = guarded.copy("scale_b", scale_b)
    index = guarded.copy("groups", torch.tensor(groups, dtype=torch.int32))
    d = guarded.empty("d", (len(owned), n), out_dtype)
    before = torch.full_like(d, 7.0)
    d.copy_(before)
    model.fp8_grouped_matmul(
        a=a.data_ptr(), scale_a=scale_a.data_ptr(), b=b.data_ptr(), scale_b=scale_b.data_ptr(),
        groups=index.data_ptr(), d=d.data_ptr(), num_rows=rows, n=n, k=k, num_groups=num_groups, masked=masked,
        lda=a.stride(0), ldb=b.stride(1), a_group_rows=rows if masked else 0, b_group_rows=n + group_pad,
        scale_a_stride_g=rows * scale_a.stride(0), scale_a_stride_m=scale_a.stride(0),
        scale_a_stride_k=scale_a.stride(1), scale_b_stride_g=scale_b.stride(0), scale_b_stride_n=scale_b.stride(1),
        scale_b_stride_k=scale_b.stride(2), out_dtype=harness.DTYPES[out_dtype], tile_m=tile[0], tile_n=tile[1],
        cluster_m=cluster[0], cluster_n=cluster[1], swap=swap, raster=raster, ctas=ctas, stream=0,
    )  # fmt: skip
    if masked:
        assert torch.equal(d[~owned], before[~owned]), "rows past the count were written"
        d, exact, magnitude = d[owned], exact[owned], magnitude[owned]
    error = (d.double() - exact).abs()
    step = exact.abs() / 256 if out_dtype == torch.bfloat16 else 0
    wrong = ~(error <= step + 1e-5 * magnitude)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}"


OFFSETS = {
    "ragged": (0, 3, 3, 70, 200),
    "rows_of_no_group": (5, 133, 140, 141),
    "one_huge_group": (0, 0, 0, 300, 300),
    "out_of_range": (-9, 40, 20, 2**31 - 1),
    "all_empty": (7, 7, 7),
}


@pytest.mark.parametrize("options", [LARGE, SWAPPED | dict(cluster=(1, 1))], ids=["large", "swapped"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_contiguous(model, offsets, options):
    for seed in harness.SEEDS[:4]:
        model.configure(seed=seed)
        rows = 300 if offsets[-1] == 300 else 210
        run_grouped(
            model, offsets, rows, 136, 144, **options, ctas=2 * (1 + seed % 2), raster=1 + seed % 3,
            ld_pad=seed % 2 * 16, group_pad=seed % 3 * 8,
        )  # fmt: skip


@pytest.mark.parametrize("options", [LARGE, SWAPPED | dict(cluster=(1, 1))], ids=["large", "swapped"])
def test_masked(model, options):
    for seed in harness.SEEDS[:4]:
        model.configure(seed=seed)
        run_grouped(model, (3, 0, 40, 99, -1), 40, 136, 272, masked=True, **options, ctas=4, ld_pad=seed % 2 * 16)


def test_every_instance_of_fp8_grouped_matmul(model):
    dtypes = {code: dtype for dtype, code in harness.DTYPES.items()}
    for i, (out_dtype, tile_m, tile_n, cluster_m, cluster_n, swap, _) in enumerate(model.fp8_grouped_matmul_instances):
        model.configure(seed=i + 1)
        options = dict(tile=(tile_m, tile_n), cluster=(cluster_m, cluster_n), swap=swap, out_dtype=dtypes[out_dtype])
        run_grouped(model, (1, 20, 20, 21, 150), 151, 264, 272, **options, ctas=cluster_m * cluster_n)
        run_grouped(model, (20, 0, 1), 24, 264, 144, masked=True, **options)


@pytest.mark.parametrize("num_groups", [1, 33, 1024])
def test_many_groups(model, num_groups):
    """More groups than threads that add up their tiles, most of them empty."""
    generator = torch.Generator().manual_seed(num_groups)
    ends = torch.randint(0, 40, (num_groups,), generator=generator).sort().values.tolist()
    model.configure(seed=2)
    run_grouped(model, (0, *ends), 40, 8, 16, tile=(8, 64), cluster=(1, 1), swap=True)


def test_refusals(model):
    model.configure()
    with pytest.raises(RuntimeError, match="no instance for out_dtype 2, tile 128x128, cluster 2x1"):
        run_grouped(model, (0, 5), 5, 8, 16, cluster=(2, 1))
    with pytest.raises(RuntimeError, match="num_groups = 1025"):
        run_grouped(model, (0,) * 1026, 5, 8, 16)


def test_groups_are_read_by_all_warps_and_added_up_by_one(model):
    offsets = [0, *range(1, 61)]
    options = dict(tile=(8, 64), cluster=(1, 1), swap=True)
    harness.assert_caught(lambda: run_grouped(model, offsets, 60, 8, 16, **options), "groups_read_early")


BUGS = (
    "offsets_not_clamped", "decrease_kept", "scale_b_of_first_group", "weights_of_first_group",
    "rows_of_no_group_kept", "tails_stored_whole", "columns_unmasked",
)  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_fp8_grouped_matmul(model, bug):
    offsets = (5, 40, 30, 230, 150) if bug in ("offsets_not_clamped", "decrease_kept") else (5, 5, 40, 137, 160)
    harness.assert_caught(lambda: run_grouped(model, offsets, 200, 136, 144, ctas=2), bug)
    harness.assert_caught(lambda: run_grouped(model, offsets, 200, 136, 144, **SWAPPED, cluster=(1, 1)), bug)
