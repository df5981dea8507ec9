"""mla_decode's CUDA kernel in the model of tests/hopper_model, against the reference."""

import sys
from pathlib import Path

import pytest
import torch

from deepseek_kernels.reference.mla_decode import mla_decode as reference
from deepseek_kernels.testing.compare import ATTENTION, LSE, assert_close
from deepseek_kernels.testing.samples.mla_decode import paged

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


def run_decode(
    model, lengths, s_q=1, h_q=16, page_size=64, *, max_pages=None, causal=True, sink=None, parts=2, seed=0,
    dtype=BF16, seqlens=None, absent=(), poisoned=None, no_pages=False, cluster=1, scale=576**-0.5, row_pad=0,
    page_pad=0, head_pad=0,
):  # fmt: skip
    """`absent`: (sequence, page) whose entry of the block table names no page; `poisoned`: the query that is NaN."""
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)
    max_pages = max_pages or max(1, -(-max(lengths, default=1) // page_size))
    cache, table, seqlens_kv = paged(g, lengths, page_size, max_pages, 512, dtype)
    for i, (sequence, page) in enumerate(absent):
        table[sequence, page] = (-1, len(cache), 2**31 - 1, -(2**31))[i % 4]
    if seqlens is not None:
        seqlens_kv = torch.tensor(seqlens, dtype=torch.int32)
    if no_pages:
        cache = cache[:0]
    q = (10 * torch.randn(b, s_q, h_q, 576, generator=g)).to(dtype)
    if poisoned:
        q[poisoned] = float("nan")
    expected = reference(q, cache, table, seqlens_kv, scale, causal, sink)

    guarded = harness.Guarded(model)
    stride_r, stride_h = 576 + row_pad, 576 + head_pad
    q = guarded.copy("q", q, stride=(s_q * h_q * stride_h, h_q * stride_h, stride_h, 1))
    cache = guarded.copy("kv_cache", cache, stride=(page_size * stride_r + page_pad, stride_r, 1))
    table, seqlens_kv = guarded.copy("block_table", table), guarded.copy("seqlens_kv", seqlens_kv)
    sink = None if sink is None else guarded.copy("sink", sink)
    out = guarded.empty("out", (b, s_q, h_q, 512), dtype)
    lse = guarded.empty("lse", (b, h_q, s_q), torch.float32)
    part_out = guarded.empty("part_out", (2 * parts, s_q * h_q, 512), torch.float32)
    part_lse = guarded.empty("part_lse", (2 * parts, s_q * h_q), torch.float32)
    heads = guarded.empty("heads", (parts, 2), torch.int32)
    model.mla_decode(
        q=q.data_ptr(), kv_cache=cache.data_ptr(), block_table=table.data_ptr(), seqlens_kv=seqlens_kv.data_ptr(),
        sink=0 if sink is None else sink.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(),
        part_out=part_out.data_ptr(), part_lse=part_lse.data_ptr(), heads=heads.data_ptr(), b=b, s_q=s_q, h_q=h_q,
        num_pages=len(cache), page_size=page_size, max_pages=table.shape[1], q_stride_b=q.stride(0),
        q_stride_row=q.stride(2), page_stride=cache.stride(0), row_stride=cache.stride(1), scale=scale, causal=causal,
        dtype=harness.DTYPES[dtype], parts=parts, cluster=cluster, stream=0,
    )  # fmt: skip
    if poisoned:
        return out, lse
    assert_close(out, expected[0], ATTENTION, "out")
    assert_close(lse, expected[1], LSE, "lse")
    return out, lse


LENGTHS = {
    "ragged": [37, 0, 300, 129],
    "one_token": [1],
    "whole_blocks": [64, 128, 192],
    "nothing": [0, 0],
    "one_long": [0, 700, 3],
    "much_work": [1500, 0, 900, 64],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths_and_parts(model, lengths):
    """Whole sequences, heads, tails and middles of them, and parts without work; work enough to count pieces too."""

    def run(seed):
        run_decode(model, lengths, 1 + seed % 3, (16, 5)[seed % 2], parts=(1, 2, 3, 7, 12)[seed % 5], seed=seed)

    harness.under_every_schedule(run)


@pytest.mark.parametrize(("s_q", "h_q"), [(1, 1), (1, 128), (2, 64), (2, 100), (3, 3)])
def test_heads_and_queries(model, s_q, h_q):
    """Tiles of queries that are full or not, and that hold the heads of several queries; sequences shorter than s_q."""

    def run(seed):
        sink = torch.randn(h_q, generator=torch.Generator().manual_seed(seed)) if seed % 2 else None
        causal = seed % 3 > 0
        run_decode(model, [2, 150, 66], s_q, h_q, parts=1 + seed % 3, causal=causal, sink=sink, head_pad=8, seed=seed)

    harness.under_every_schedule(run, harness.SEEDS[:4])


@pytest.mark.parametrize(("s_q", "h_q", "page_size"), [(1, 128, 64), (2, 50, 16), (1, 256, 192)])
def test_clusters(model, s_q, h_q, page_size):
    """Two CTAs that fetch every block together, one half of its rows each; the same bits as when each fetches all."""

    def run(seed):
        options = dict(parts=1 + seed % 3, absent=[(0, 1)], seed=seed)
        apart = run_decode(model, [300, 0, 70], s_q, h_q, page_size, **options)
        together = run_decode(model, [300, 0, 70], s_q, h_q, page_size, cluster=2, **options)
        assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))

    harness.under_every_schedule(run, harness.SEEDS[:4])


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("page_size", [8, 16, 48, 64, 128, 192])
def test_pages(model, page_size, dtype):
    """Several loads a block, pages of several blocks, entries that name no page, rows and pages far apart."""

    def run(seed):
        run_decode(
            model, [130, 40, 257], 2, 3, page_size, parts=1 + seed % 2 * 3, dtype=dtype, max_pages=40,
            absent=[(0, 0), (2, 1), (2, 257 // page_size - 1)], row_pad=seed % 2 * 8, page_pad=seed % 3 * 64, seed=seed,
        )  # fmt: skip

    harness.under_every_schedule(run, harness.SEEDS[:4])


def test_more_sequences_than_lanes(model):
    """Many short ones and a long one: a run of them for each lane that adds up, several whole ones in a part."""
    g = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in torch.randint(0, 9, (70,), generator=g)]
    lengths[40] = 1000
    for seed in harness.SEEDS[:2]:
        model.configure(seed=seed)
        run_decode(model, lengths, 1, 2, page_size=16, parts=(5, 40)[seed % 2], seed=seed)


def test_sinks_and_scales_without_bound(model):
    inf = float("inf")
    model.configure(seed=1)
    run_decode(model, [70, 300], 1, 4, parts=3, sink=torch.tensor([-inf, inf, 100.0, -100.0]))
    for scale in (0.0, -0.05, 5.0):
        run_decode(model, [70, 300], 1, 4, parts=3, scale=scale)


def test_nan_stays_in_its_row(model):
    """A query that is NaN gives NaN, and only there."""
    model.configure(seed=1)
    out, lse = run_decode(model, [70, 300], 1, 4, parts=3, poisoned=(1, 0, 2))
    bad = torch.zeros(2, 1, 4, dtype=torch.bool)
    bad[1, 0, 2] = True
    assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(lse.isnan(), bad.transpose(1, 2))


def test_lengths_out_of_range(model):
    for seed in harness.SEEDS[:2]:
        model.configure(seed=seed)
        run_decode(model, [128, 64, 0], 1, 4, parts=3, max_pages=2, seqlens=[2**31 - 1, 64, -(2**31)], seed=seed)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_same_bits_under_every_schedule(model, parts):
    first = None
    for seed in harness.SEEDS[:4]:
        model.configure(seed=seed)
        got = run_decode(model, [37, 300], 2, 16, parts=parts)
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


def test_refusals(model):
    model.configure()
    with pytest.raises(RuntimeError, match="page_size = 12"):
        run_decode(model, [5], page_size=12)
    with pytest.raises(RuntimeError, match="parts = 0"):
        run_decode(model, [5], parts=0)
    for cluster, h_q in ((0, 128), (2, 64), (3, 128)):
        with pytest.raises(RuntimeError, match=f"cluster = {cluster} for {h_q // 64} tiles"):
            run_decode(model, [5], h_q=h_q, cluster=cluster)
    with pytest.raises(RuntimeError, match="no instance for dtype 0"):
        run_decode(model, [5], dtype=torch.float32)


def test_no_pages_and_no_queries(model):
    model.configure()
    run_decode(model, [0, 0], no_pages=True)
    run_decode(model, [5], h_q=0)
    run_decode(model, [], h_q=4)


BUGS = {
    "absent_pages_seen": dict(absent=[(0, 2), (0, 4)]),
    "dependency_wait_missing": {},
    "empty_pieces_exchange": dict(lengths=[65, 0, 0, 40, 0], parts=1),
    "fence_barrier_init_missing": {},
    "fence_proxy_async_missing": {},
    "first_not_awaited": {},
    "first_scale_forgotten": dict(lengths=[700], parts=1),
    "half_never_released": {},
    "last_cluster_sync_missing": dict(h_q=128, cluster=2),
    "multicast_to_self_only": dict(h_q=128, cluster=2),
    "released_to_self_only": dict(h_q=128, cluster=2),
    "keys_not_awaited": {},
    "length_not_clamped": dict(lengths=[128, 64], max_pages=2, seqlens=[300, 64]),
    "loaded_over_readers": {},
    "mask_of_last_row": dict(lengths=[128], s_q=2),
    "mass_not_awaited": {},
    "mass_not_scaled": {},
    "merge_does_not_wait": {},
    "pages_not_checked": dict(absent=[(0, 1), (0, 2)]),
    "phase_never_flipped": {},
    "queries_not_awaited": {},
    "queries_of_first_sequence": {},
    "queries_of_first_tile": dict(h_q=100),
    "queries_overwritten": dict(parts=1),
    "rows_unmasked": {},
    "second_not_awaited": {},
    "second_scale_forgotten": dict(lengths=[700], parts=1),
    "syncthreads_missing": {},
    "table_read_past_the_length": dict(lengths=[300, 60]),
    "values_past_the_end_kept": {},
    "values_stride_halved": {},
    "weights_not_swizzled": {},
    "weights_over_keys": {},
    "zeros_not_awaited": {},
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_mla_decode(model, bug):
    options = dict(lengths=[300, 60], h_q=4, parts=2) | BUGS[bug]
    harness.assert_caught(lambda: run_decode(model, **options), bug)
