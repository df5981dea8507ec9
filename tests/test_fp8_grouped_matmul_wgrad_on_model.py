"""The weight gradient's CUDA kernel, of one expert and of many, in the model of tests/hopper_model, against the exact
sums."""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

FP8 = torch.float8_e4m3fn
TILES = {(128, 64): (1, 1), (128, 128): (1, 2), (128, 192): (2, 1), (256, 128): (1, 2)}


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


@functools.cache
def operands(n, k, columns):
    """grad_t, scale_grad, a_t, scale_a, and both dequantised."""
    generator = torch.Generator().manual_seed(n * 7919 + k * 31 + columns)
    made, exact = [], []
    for rows in (n, k):
        q = torch.randn(rows, columns, generator=generator).to(FP8)
        scale = torch.rand(rows, -(-columns // 128), generator=generator) + 0.5
        made += [q, scale]
        exact.append(q.double() * scale.double().repeat_interleave(128, 1)[:, :columns])
    return made, exact


def blocks_of(offsets, columns):
    """(first, end) of each expert."""
    last, end, spans = min(max(offsets[0], 0), columns), 0, []
    for offset in offsets[1:]:
        following = max(last, min(max(offset, 0), columns))
        first, end = end, min(end - (last - following) // 128, columns // 128)
        spans.append((first, end))
        last = following
    return spans


def run_wgrad(
    model, n, k, columns, offsets=None, *, tile=(128, 64), ctas=1, raster=2, accumulate=False, mn_major=False, ld_pad=0,
):  # fmt: skip
    """`offsets` None: one expert of all columns. Columns of no expert are NaN."""
    (grad_t, scale_grad, a_t, scale_a), (exact_g, exact_a) = operands(n, k, columns)
    spans = [(0, -(-columns // 128))] if offsets is None else blocks_of(offsets, columns)
    cluster = TILES[tile]
    generator = torch.Generator().manual_seed(n + k)
    before = torch.randn(len(spans), n, k, generator=generator)
    exact = before.double() * accumulate
    magnitude = before.double().abs() * accumulate
    for e, (first, end) in enumerate(spans):
        of_expert = slice(first * 128, end * 128)
        exact[e] += exact_g[:, of_expert] @ exact_a[:, of_expert].T
        magnitude[e] += exact_g[:, of_expert].abs() @ exact_a[:, of_expert].abs().T
    owned = spans[-1][1]
    guarded = harness.Guarded(model)

    def codes(name, q):
        t = guarded.copy(name, q, stride=(columns + ld_pad, 1))
        t.view(torch.uint8)[:, owned * 128 :] = 0x7F
        return t

    def scales(name, s):
        t = guarded.copy(name, s, stride=harness.mn_major(s.shape[0]) if mn_major else None)
        t[:, owned:] = float("nan")
        return t

    grad_t, a_t = codes("grad_t", grad_t), codes("a_t", a_t)
    scale_grad, scale_a = scales("scale_grad", scale_grad), scales("scale_a", scale_a)
    ldd = k + ld_pad // 4
    d = guarded.copy("d", before, stride=(n * ldd, ldd, 1))
    if not accumulate:
        d.fill_(float("nan"))
    if offsets is not None:
        offsets = guarded.copy("expert_offsets", torch.tensor(offsets, dtype=torch.int32))
    model.fp8_grouped_matmul_wgrad(
        grad_t=grad_t.data_ptr(), scale_grad=scale_grad.data_ptr(), a_t=a_t.data_ptr(), scale_a=scale_a.data_ptr(),
        expert_offsets=0 if offsets is None else offsets.data_ptr(), d=d.data_ptr(), n=n, k=k, columns=columns,
        num_experts=len(spans), ld_grad=grad_t.stride(0), ld_a=a_t.stride(0), ldd=d.stride(1), d_stride_e=d.stride(0),
        scale_grad_stride_n=scale_grad.stride(0), scale_grad_stride_c=scale_grad.stride(1),
        scale_a_stride_k=scale_a.stride(0), scale_a_stride_c=scale_a.stride(1), accumulate=accumulate,
        tile_m=tile[0], tile_n=tile[1], cluster_m=cluster[0], cluster_n=cluster[1], raster=raster,
        ctas=ctas * cluster[0] * cluster[1], stream=0,
    )  # fmt: skip
    wrong = ~((d.double() - exact).abs() <= 1e-5 * magnitude)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}"


DENSE = [(1, 8, 16, 1), (130, 72, 528, 1), (200, 264, 400, 2), (300, 136, 1168, 1)]  # n, k, columns, clusters
GROUPS = [
    # n, k, columns, offsets, clusters
    (24, 40, 640, (0, 130, 130, 300), 1),  # an empty expert, a filled up block each
    (136, 200, 512, (3, 4, 4, 4, 260), 2),  # rows before the first expert, empty ones in a row
    (264, 72, 1280, (0, 1, 1150, 1151), 1),  # one has nearly all
    (130, 136, 256, (0, 0, 0, 0), 2),  # nobody has any
    (20, 24, 384, (-5, 130, 2, 2**31 - 1, -(2**31)), 1),  # out of range
    (20, 24, 384, (0, 1, 2, 384, 384), 2),  # more blocks than there are
]


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
def test_one_expert(model, tile):
    for n, k, columns, ctas in DENSE:

        def run(seed, n=n, k=k, columns=columns, ctas=ctas):
            run_wgrad(
                model, n, k, columns, tile=tile, ctas=ctas, raster=1 + seed % 3, accumulate=seed % 2 == 0,
                mn_major=seed % 4 < 2, ld_pad=seed % 3 // 2 * 16,
            )  # fmt: skip

        harness.under_every_schedule(run, harness.SEEDS[:20] if harness.FULL else harness.SEEDS[:3])


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("case", range(len(GROUPS)))
def test_experts(model, case, tile):
    n, k, columns, offsets, ctas = GROUPS[case]

    def run(seed):
        run_wgrad(
            model, n, k, columns, offsets, tile=tile, ctas=ctas, raster=1 + seed % 3, accumulate=seed % 2 == 0,
            mn_major=seed % 4 < 2, ld_pad=seed % 3 // 2 * 16,
        )  # fmt: skip

    harness.under_every_schedule(run, harness.SEEDS[:20] if harness.FULL else harness.SEEDS[:3])


def test_says_what_it_cannot_do(model):
    model.configure()
    with pytest.raises(RuntimeError, match=r"wanted p.columns > 0 .*, got columns = 144"):
        run_wgrad(model, 8, 8, 144, (0, 1))
    with pytest.raises(RuntimeError, match="wanted p.k % 2 == 0 .*, got k, ldd, d_stride_e = 9"):
        run_wgrad(model, 8, 9, 128)
    with pytest.raises(RuntimeError, match="raster = 0"):
        run_wgrad(model, 8, 8, 128, raster=0)


SPREAD = dict(n=24, k=40, columns=640, offsets=(0, 130, 130, 300))
WIDE = dict(n=200, k=136, columns=1280, offsets=(0, 1, 1150, 1151))
BUGS = {
    "offsets_unclamped": dict(n=20, k=24, columns=384, offsets=(-300, 130, 2, 2**31 - 1, -(2**31))),
    "scales_of_first_block": SPREAD,
    "decreasing_offset_kept": dict(n=20, k=24, columns=384, offsets=(0, 250, 2, 200)),
    "blocks_rounded_down": SPREAD,
    "blocks_past_the_end": dict(n=20, k=24, columns=384, offsets=(0, 1, 2, 384, 384)),
    "columns_unmasked": SPREAD,
    "rows_unmasked": SPREAD,
    "first_expert_only": SPREAD,
    "dependency_wait_missing": SPREAD,
    "scales_stay_one_turn": WIDE,
    "store_wait_missing": dict(n=300, k=264, columns=128, tile=(128, 128)),
    "fence_proxy_async_missing": SPREAD | dict(tile=(128, 128)),
    "barrier_before_store_missing": SPREAD | dict(tile=(128, 128)),
    "stored_for_added": SPREAD | dict(tile=(128, 128), accumulate=True),
    "stage_released_early": WIDE | dict(tile=(128, 192)),
    "stage_never_released": WIDE,
    "phase_never_flipped": WIDE,
    "scales_do_not_wait": WIDE,
    "scale_rows_unmasked": SPREAD,
    "scale_of_next_row": SPREAD,
    "full_wait_missing": SPREAD,
    "wgmma_fence_missing": SPREAD,
    "wgmma_wait_missing": SPREAD | dict(tile=(128, 192)),
    "older_product_not_awaited": WIDE,
    "multicast_to_self_only": WIDE | dict(tile=(128, 128)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs(model, bug):
    harness.assert_caught(lambda: run_wgrad(model, **BUGS[bug]), bug)
