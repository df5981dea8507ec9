"""Inputs of `mla_decode`."""

import torch

from ...reference.mla_cache_write import encode_rows
from ..compare import ATTENTION, LSE
from . import Bad, Sample

GARBAGE = torch.tensor([2147480000, -1, -(2**31), 2**31 - 1], dtype=torch.int32)
D_ROPE = 64


def paged(
    g: torch.Generator, lengths: list[int], page_size: int, max_pages: int, d_latent: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kv_cache, block_table, seqlens_kv: permuted pages, NaN in unused slots, garbage in unused table entries."""
    used = [-(-max(n, 0) // page_size) for n in lengths]
    total = sum(used) + 2
    latent = torch.randn(total * page_size, d_latent, generator=g) / 10  # what ATTENTION is a tolerance for
    rope = torch.randn(total * page_size, D_ROPE, generator=g) / 10
    cache = encode_rows(latent, rope, dtype).view(total, page_size, -1)
    order = torch.randperm(total, generator=g).int()
    table = GARBAGE[torch.randint(0, len(GARBAGE), (len(lengths), max_pages), generator=g)]
    unused = torch.ones(total, page_size, dtype=torch.bool)
    first = 0
    for i, (n, count) in enumerate(zip(lengths, used, strict=True)):
        pages = order[first : first + count]
        table[i, :count] = pages[:max_pages]
        for j, page in enumerate(pages.tolist()):
            unused[page, : n - j * page_size] = False
        first += count
    cache[unused] = 0xFF if dtype == torch.uint8 else float("nan")
    return cache, table, torch.tensor(lengths, dtype=torch.int32)


def decode(g: torch.Generator) -> list[Sample]:
    def case(
        name, lengths, s_q, h_q, page_size, max_pages, d_latent=512, dtype=torch.bfloat16, cache=None, causal=True,
        sink=False, seqlens=None, **options,
    ):  # fmt: skip
        kv_cache, table, seqlens_kv = paged(g, lengths, page_size, max_pages, d_latent, cache or dtype)
        if seqlens is not None:
            seqlens_kv = torch.tensor(seqlens, dtype=torch.int32)
        q = (10 * torch.randn(len(lengths), s_q, h_q, d_latent + D_ROPE, generator=g)).to(dtype)
        sinks = torch.randn(h_q, generator=g) if sink else None
        scale = (d_latent + D_ROPE) ** -0.5
        args = (q, kv_cache, table, seqlens_kv, scale, causal, sinks)
        return Sample(name, args, tolerance=(ATTENTION, LSE), **options)

    return [
        case("bf16", [37, 0, 5], 1, 16, 16, 3, any_strides=("q",)),
        case("causal", [1, 20], 3, 5, 4, 6, sink=True),
        case("cut_fp16", [150, 65], 2, 3, 64, 3, dtype=torch.float16, sink=True),
        case("fp8", [40, 9], 1, 16, 16, 3, cache=torch.uint8, sink=True),
        case("fp8_fp16", [11], 2, 2, 1, 13, dtype=torch.float16, cache=torch.uint8),
        case("narrow_fp16", [33], 2, 3, 64, 1, 256, torch.float16, causal=False),
        case("fp32", [18], 1, 4, 8, 3, 256, torch.float32, sink=True),
        case("lengths_out_of_range", [8, 0], 1, 2, 4, 2, 256, seqlens=[2**31 - 1, -(2**31)]),
        case("no_sequences", [], 1, 2, 4, 2, 256),
        case("no_queries", [4], 0, 2, 4, 2, 256),
        case("no_pages", [0], 2, 2, 4, 0, 256, sink=True),
        case("reference_latent", [9], 2, 2, 4, 3, 16, torch.float32),
    ]


def bad(g: torch.Generator) -> list[Bad]:
    cache, table, seqlens = paged(g, [5, 3], 4, 2, 512, torch.float32)
    fp8 = paged(g, [5, 3], 4, 2, 512, torch.uint8)[0]
    q = torch.randn(2, 1, 4, 576, generator=g)

    def case(name, error, match, *, q=q, cache=cache, table=table, seqlens=seqlens, sink=None):
        return Bad(name, (q, cache, table, seqlens, 0.1, True, sink), error, f"mla_decode: {match}")

    return [
        case("q_dims", ValueError, r"q: wanted shape \[\*, \*, \*, \*\]", q=q[0]),
        case("q_dtype", TypeError, "q: wanted dtype .* got float64", q=q.double()),
        case("q_width", ValueError, "q: d_latent \\+ 64: wanted at least 65", q=q[..., :64]),
        case("cache_dtype", TypeError, "kv_cache: wanted dtype bfloat16, got float32", q=q.bfloat16()),
        case("cache_width", ValueError, r"kv_cache: wanted shape \[\*, \*, 576\]", cache=cache[..., :575]),
        case("cache_stride", ValueError, "kv_cache: wanted stride 1", cache=cache.mT.contiguous().mT),
        case("cache_page", ValueError, "kv_cache: page_size: wanted at least 1", cache=cache[:, :0]),
        case("fp8_narrow", ValueError, "kv_cache: wanted d_latent 512", q=q[..., :320], cache=fp8),
        case("table_dtype", TypeError, "block_table: wanted dtype int32", table=table.long()),
        case("table_rows", ValueError, r"block_table: wanted shape \[2, \*\]", table=table[:1]),
        case("seqlens", ValueError, r"seqlens_kv: wanted shape \[2\]", seqlens=seqlens[:1]),
        case("sink", ValueError, r"sink: wanted shape \[4\], got \[3\]", sink=torch.zeros(3)),
    ]


SAMPLES = {"mla_decode": decode}
BAD = {"mla_decode": bad}
