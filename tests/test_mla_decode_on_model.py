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
    dtype=BF16, seqlens=None, absent=(), scale=576**-0.5, row_pad=0, page_pad=0, head_pad=0,
):  # fmt: skip
    """`absent`: (sequence, page) whose entry of the block table names no page."""
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)
    max_pages = max_pages or max(1, -(-max(lengths, default=1) // page_size))
    cache, table, seqlens_kv = paged(g, lengths, page_size, max_pages, 512, dtype)
    for i, (sequence, page) in enumerate(absent):
        table[sequence, page] = (-1, len(cache), 2**31 - 1, -(2**31))[i % 4]
    if seqlens is not None:
        seqlens_kv = torch.tensor(seqlens, dtype=torch.int32)
    q = (10 * torch.randn(b, s_q, h_q, 576, generator=g)).to(dtype)
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
        dtype=harness.DTYPES[dtype], parts=parts, stream=0,
    )  # fmt: skip
    assert_close(out, expected[0], ATTENTION, "out")
    assert_close(lse, expected[1], LSE, "lse")
    return out, lse
