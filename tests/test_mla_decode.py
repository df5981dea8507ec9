"""What the contract cannot know of `mla_decode`."""

import pytest
import torch

import deepseek_kernels
from deepseek_kernels.device import A100, B200, GPUS, H100, H200, L40S
from deepseek_kernels.ops import mla_decode as op
from deepseek_kernels.plan import mla_decode as plan
from deepseek_kernels.reference.mla_cache_write import decode_rows, encode_rows
from deepseek_kernels.testing.compare import ATTENTION, LSE, assert_close, assert_same_bits
from deepseek_kernels.testing.guard import guarded_allocations
from deepseek_kernels.testing.samples.mla_decode import paged

FP8 = torch.uint8
SCALE = 320**-0.5


def example():
    q, cache = torch.zeros(1, 1, 2, 320), torch.zeros(1, 4, 320)
    return q, cache, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), SCALE


def runs(backend: str) -> bool:
    with deepseek_kernels.use_backend(backend):
        return deepseek_kernels.explain("mla_decode", *example()).backend is not None


BACKENDS = [b for b in ("reference", "triton", "cpu", "torch") if runs(b)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def queries(b, s_q, h_q, d_latent=256, dtype=torch.float32):
    return (10 * torch.randn(b, s_q, h_q, d_latent + 64)).to(dtype)


def decode(backend, *args, scale=SCALE, **options):
    with deepseek_kernels.use_backend(backend):
        return deepseek_kernels.mla_decode(*args, scale=scale, **options)


def rows_of(kv_cache, block_table, i, length):
    page_size = kv_cache.shape[1]
    rows = [kv_cache[block_table[i, j // page_size], j % page_size] for j in range(length)]
    return decode_rows(torch.stack(rows)).double() if rows else torch.zeros(0, 1)


def literal(q, kv_cache, block_table, seqlens, causal=True, sink=None, scale=SCALE):
    """One softmax per sequence, query and head, in fp64."""
    b, s_q, h_q, d_qk = q.shape
    out, lse = torch.zeros(b, s_q, h_q, d_qk - 64).double(), torch.full((b, h_q, s_q), float("-inf")).double()
    for i, length in enumerate(seqlens):
        rows = rows_of(kv_cache, block_table, i, length)
        for s in range(s_q):
            seen = rows[: max(length - s_q + s + 1, 0)] if causal else rows
            if len(seen) == 0:
                continue
            scores = q[i, s].double() @ seen.t() * scale
            lse[i, :, s] = scores.logsumexp(-1)
            mass = lse[i, :, s].exp() + (0 if sink is None else sink.double().exp())
            out[i, s] = scores.exp() @ seen[:, :-64] / mass[:, None]
    return out, lse


def check(actual, expected):
    assert_close(actual[0], expected[0], ATTENTION, "out")
    assert_close(actual[1], expected[1], LSE, "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "s_q", "h_q", "page_size", "dtype"),
    [
        ([13, 0, 1], 1, 5, 4, torch.float32),
        ([33, 2], 3, 4, 16, torch.float16),
        ([5], 2, 17, 1, torch.bfloat16),
        ([70], 1, 1, 64, torch.bfloat16),
    ],
)
def test_literal_attention(backend, causal, lengths, s_q, h_q, page_size, dtype):
    cache, table, seqlens = paged(generator(), lengths, page_size, 33, 256, dtype)
    q, sink = queries(len(lengths), s_q, h_q, dtype=dtype), torch.randn(h_q)
    for given in (None, sink):
        actual = decode(backend, q, cache, table, seqlens, causal=causal, sink=given)
        check(actual, literal(q, cache, table, lengths, causal, given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_is_attention_over_the_dequantised_rows(backend, dtype):
    cache, table, seqlens = paged(generator(), [9, 20], 8, 3, 512, FP8)
    q = queries(2, 2, 3, 512, dtype)
    check(decode(backend, q, cache, table, seqlens), literal(q, cache, table, [9, 20]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_scales_too_small_for_fp16(backend):
    rows = encode_rows(torch.randn(8, 512) * 1e-4, torch.randn(8, 64), FP8).view(2, 4, 656)
    table, seqlens = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    q = queries(1, 1, 2, 512, torch.float16)
    out, lse = decode(backend, q, rows, table, seqlens)
    expected, expected_lse = literal(q, rows, table, [7])
    assert_close(lse, expected_lse, LSE)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=5e-7)
    assert out.abs().max() > 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_size_does_not_change_a_bit(backend, page_size):
    rows = (torch.randn(128, 320) / 10).bfloat16()
    q, seqlens = queries(2, 1, 4, dtype=torch.bfloat16), torch.tensor([64, 37], dtype=torch.int32)

    def at(page_size):
        pages = 128 // page_size
        order = torch.randperm(pages, generator=generator(page_size))
        cache = torch.empty(pages, page_size, 320, dtype=torch.bfloat16)
        cache[order] = rows.view(pages, page_size, 320)
        return decode(backend, q, cache, order.int().view(2, -1), seqlens)

    for actual, expected in zip(at(page_size), at(32), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8])
def test_what_is_not_used_may_hold_anything(backend, cache_dtype):
    d_latent = 512 if cache_dtype == FP8 else 256
    cache, table, seqlens = paged(generator(), [6, 0, 9], 4, 4, d_latent, cache_dtype)
    q = queries(3, 2, 3, d_latent)
    poisoned = decode(backend, q, cache, table, seqlens)
    unused = (cache == 0xFF if cache_dtype == FP8 else cache.isnan()).all(-1, keepdim=True)
    clean = torch.where(unused, 0, cache)
    used = torch.arange(4) < (seqlens[:, None] + 3) // 4
    for actual, expected in zip(poisoned, decode(backend, q, clean, torch.where(used, table, 0), seqlens), strict=True):
        assert actual.isfinite().logical_or(actual.isneginf()).all()
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_in_a_page_that_does_not_exist_are_absent(backend):
    cache, table, seqlens = paged(generator(), [12], 4, 3, 256, torch.float32)
    q = queries(1, 1, 2)
    broken, without = table.clone(), table[:, [0, 2]].contiguous()
    for wild in (-1, len(cache), 2**31 - 1):
        broken[0, 1] = wild
        check(decode(backend, q, cache, broken, seqlens), decode(backend, q, cache, without, seqlens - 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_are_clamped(backend):
    cache, table, seqlens = paged(generator(), [8, 8], 4, 2, 256, torch.float32)
    q = queries(2, 2, 2)
    wild = torch.tensor([2**31 - 1, -7], dtype=torch.int32)
    bounded = torch.tensor([8, 0], dtype=torch.int32)
    for actual, expected in zip(
        decode(backend, q, cache, table, wild), decode(backend, q, cache, table, bounded), strict=True
    ):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_queries_are_single_queries_of_shorter_sequences(backend):
    cache, table, seqlens = paged(generator(), [40, 2], 8, 5, 256, torch.float32)
    q = queries(2, 3, 4)
    out, lse = decode(backend, q, cache, table, seqlens)
    for s in range(3):
        one = decode(backend, q[:, s : s + 1], cache, table, seqlens - 2 + s)
        check((out[:, s : s + 1], lse[..., s : s + 1]), one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink_takes_its_share(backend):
    cache, table, seqlens = paged(generator(), [5, 0], 4, 2, 256, torch.float32)
    q = queries(2, 1, 3)
    out, lse = decode(backend, q, cache, table, seqlens)
    sink = torch.stack([torch.tensor(float("-inf")), lse[0, 1, 0], torch.tensor(float("inf"))])
    shared, same = decode(backend, q, cache, table, seqlens, sink=sink)
    assert_same_bits(same, lse)
    torch.testing.assert_close(shared[0, 0], out[0, 0] * torch.tensor([1.0, 0.5, 0.0])[:, None], rtol=1e-6, atol=0)
    assert not shared[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_parts_of_the_cache_merge_to_the_whole(backend):
    cache, table, _ = paged(generator(), [24, 24], 8, 3, 256, torch.float32)
    q = queries(2, 1, 4)
    lengths = [torch.tensor(n, dtype=torch.int32) for n in ([24, 5], [8, 5], [16, 0])]
    whole = decode(backend, q, cache, table, lengths[0])
    first = decode(backend, q, cache, table[:, :1].contiguous(), lengths[1])
    second = decode(backend, q, cache, table[:, 1:].contiguous(), lengths[2])
    with deepseek_kernels.use_backend("reference"):
        check(deepseek_kernels.merge_states(*first, *second), whole)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("num_splits", [2, 3, 7])
def test_splits_change_little_and_write_nothing_else(num_splits, cache_dtype):
    """Sequences shorter than a tile, of no token, and of unequal parts; some parts have nothing to do."""
    d_latent = 512 if cache_dtype == FP8 else 256
    cache, table, seqlens = paged(generator(), [70, 0, 3], 16, 5, d_latent, cache_dtype)
    q, sink = queries(3, 2, 3, d_latent, torch.bfloat16), torch.randn(3)
    config = plan.Config(16, 16, 4, 1, num_splits, True, False)
    with guarded_allocations():
        split = op._triton(config, q, cache, table, seqlens, SCALE, True, sink)
    check(split, decode("reference", q, cache, table, seqlens, sink=sink))
    again = op._triton(config, q, cache, table, seqlens, SCALE, True, sink)
    for a, b in zip(split, again, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(("block_h", "block_n"), [(16, 64), (64, 32)])
def test_any_tile(block_h, block_n, cache_dtype):
    d_latent = 512 if cache_dtype == FP8 else 256
    cache, table, seqlens = paged(generator(), [70, 9], 64, 2, d_latent, cache_dtype)
    q = queries(2, 2, 20, d_latent, torch.bfloat16)
    config = plan.Config(block_h, block_n, 4, 1, 1, True, False)
    actual = op._triton(config, q, cache, table, seqlens, SCALE, True, None)
    check(actual, decode("reference", q, cache, table, seqlens))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8])
def test_reads_what_cache_write_wrote_into_a_strided_view(backend, cache_dtype):
    row = 656 if cache_dtype == FP8 else 576
    memory = torch.full((3, 7, row + 16), 0xFF if cache_dtype == FP8 else float("nan"), dtype=cache_dtype)
    cache = memory[:, 1:5, :row]
    table, seqlens = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    c_kv, k_rope = torch.randn(6, 512), torch.randn(6, 64)
    cos_sin = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1)  # no rotation
    slots = torch.tensor([8, 9, 10, 11, 0, 1])
    with deepseek_kernels.use_backend("reference"):
        deepseek_kernels.mla_cache_write(c_kv, k_rope, None, cos_sin, torch.zeros(6, dtype=torch.int32), cache, slots)
    q = queries(1, 1, 2, 512) / 100
    check(decode(backend, q, cache, table, seqlens), literal(q, cache, table, [6]))


def test_a_cache_that_begins_elsewhere_is_checked_again():
    memory = torch.zeros(2 * 4 * 656 + 16, dtype=torch.uint8)
    args = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    deepseek_kernels.mla_decode(queries(1, 1, 2, 512), memory[:-16].view(2, 4, 656), *args, scale=SCALE)
    with pytest.raises(ValueError, match="mla_decode: kv_cache: storage_offset: wanted a multiple of 16, got 4"):
        deepseek_kernels.mla_decode(queries(1, 1, 2, 512), memory[4:-12].view(2, 4, 656), *args, scale=SCALE)


def hopper(**options):
    env = plan.Environment(triton=True, extension_ops=frozenset({"mla_decode"}), extension_archs=frozenset({90}))
    problem = plan.Problem(**(dict(b=4, s_q=1, h_q=16, s_kv=4096) | options))
    return plan.backends(problem, H200, env)["cuda"]


def test_what_the_hopper_kernel_takes():
    for options in ({}, dict(page_size=8), dict(page_size=192), dict(dtype="float16", s_q=3, h_q=100, sink=True)):
        assert hopper(**options) == "", options
    assert "bf16 and fp16, got float32" in hopper(dtype="float32")
    assert "bf16 and fp16, got FP8" in hopper(fp8_cache=True)
    assert "d_latent 512, got 256" in hopper(d_latent=256)
    assert "got pages of 4" in hopper(page_size=4)
    assert "multiples of 16 bytes" in hopper(aligned=False)
    env = plan.Environment(extension_ops=frozenset({"mla_decode"}), extension_archs=frozenset({80, 90}))
    assert "8.0" in plan.backends(plan.Problem(1, 1, 16, 64), A100, env)["cuda"]


def test_rows_that_tma_cannot_address_are_seen():
    memory = torch.zeros(2, 8, 584, dtype=torch.bfloat16)
    args = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), SCALE, True, None
    q = queries(1, 1, 2, 512, torch.bfloat16)
    assert op._problem(q, memory[:, :, :576], *args).aligned
    assert not op._problem(q, memory[:, :, 4:580], *args).aligned
    assert not op._problem(q, torch.zeros(2, 8, 580, dtype=torch.bfloat16)[:, :, :576], *args).aligned
    assert op._problem(q, memory[:1, :, 8:], *args).aligned
    rows = torch.zeros(8, 2, 576, dtype=torch.bfloat16)
    assert op._problem(q, rows.transpose(0, 1), *args).aligned
    assert not op._problem(q, rows[:, :1].expand(-1, 4, -1), *args).aligned, "the same row in every place of a page"
    assert not op._problem(q, rows[:1].expand(8, -1, -1), *args).aligned, "the same page eight times"


def test_queries_are_copied_only_where_tma_cannot_fetch_them():
    q = torch.zeros(2, 3, 4, 576, dtype=torch.bfloat16)
    wide = torch.zeros(2, 3, 4, 600, dtype=torch.bfloat16)
    for given, row in (
        (q, 576),
        (wide[..., :576], 600),
        (wide[:, 1:2, :, 8:584], 600),
        (wide[:, :, 1:2, 16:592], 2400),
    ):
        kept, distance = op._queries_in_rows(given)
        assert kept is given and distance == row
    for given in (
        wide[..., 4:580],
        wide[:, :, 1:3, :576],
        q[:1].expand(2, -1, -1, -1),
        q[:, :1, :1].expand(-1, 3, 4, -1),
    ):
        copied, distance = op._queries_in_rows(given)
        assert copied.is_contiguous() and distance == 576 and torch.equal(copied, given)


@pytest.mark.parametrize(
    ("s_q", "h_q", "parts", "clusters"),
    [(1, 16, 132, [1]), (1, 128, 66, [1, 2]), (2, 128, 33, [1, 2]), (3, 64, 44, [1]), (80, 128, 1, [1, 2])],
)
def test_plan_of_the_hopper_kernel(s_q, h_q, parts, clusters):
    """A CTA for every multiprocessor; no more parts than there are pairs of blocks; clusters of whole tiles."""
    many, few = plan.Problem(128, s_q, h_q, 4096), plan.Problem(1, s_q, h_q, 1000)
    assert list(plan.candidates(many, H200, "cuda")) == [plan.CudaConfig(parts, c) for c in clusters]
    assert plan.select(many, H200, "cuda") in plan.candidates(many, H200, "cuda")
    assert plan.select(few, H200, "cuda").parts == min(parts, 8)
    assert plan.select(plan.Problem(0, s_q, h_q, 0), H200, "cuda").parts == 1
    assert "for 1 tiles" in plan.is_legal(plan.CudaConfig(1, 2), plan.Problem(1, 1, 64, 64), H200)


def test_cost_of_the_hopper_kernel():
    """No less than memory and multiplication take; more tokens cost more."""
    for b, h_q, s_kv in ((1, 16, 4096), (128, 16, 4096), (128, 128, 4096), (128, 128, 32768)):
        p = plan.Problem(b, 1, h_q, s_kv)
        seconds = plan.cost(plan.select(p, H200, "cuda"), p, H200)
        assert seconds >= b * s_kv * p.row_bytes / H200.bandwidth and seconds >= plan.flops(p) / H200.rate("bf16")
        longer = plan.Problem(b, 1, h_q, 2 * s_kv)
        assert plan.cost(plan.select(longer, H200, "cuda"), longer, H200) >= seconds


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "s_q", "h_q", "page_size"), [(128, 1, 16, 64), (40, 2, 128, 64), (3, 3, 100, 16)])
def test_the_hopper_kernel_at_real_sizes(b, s_q, h_q, page_size, dtype):
    """Lengths from none to a few thousand, more than there are multiprocessors; twice, with the same bits."""
    g = generator(b)
    lengths = [0, 40, 64, 5000, *torch.randint(20, 3000, (b,), generator=g).tolist()][:b]
    cache, table, seqlens = (t.cuda() for t in paged(g, lengths, page_size, 5120 // page_size, 512, dtype))
    q, sink = queries(b, s_q, h_q, 512, dtype).cuda(), torch.randn(h_q).cuda()
    with deepseek_kernels.use_backend("cuda"):
        if deepseek_kernels.explain("mla_decode", q, cache, table, seqlens, SCALE).backend is None:
            pytest.skip("no cuda backend here")
    problem = op._problem(q, cache, table, seqlens, SCALE, True, None)
    for config in plan.candidates(problem, H200, "cuda"):
        for given in (None, sink):
            first = op._cuda(config, q, cache, table, seqlens, SCALE, True, given)
            check(first, decode("reference", q, cache, table, seqlens, sink=given))
            again = op._cuda(config, q, cache, table, seqlens, SCALE, True, given)
            for actual, expected in zip(again, first, strict=True):
                assert_same_bits(actual, expected)


def test_automatic_choice():
    assert deepseek_kernels.explain("mla_decode", *example()).backend in ("cpu", "torch")
    wide = plan.Problem(1, 1, 4, 64, d_latent=320)
    env = plan.Environment(triton=True)
    assert "d_latent 256 and 512, got 320" in plan.backends(wide, H100, env)["triton"]
    assert plan.backends(plan.Problem(1, 1, 4, 64), H100, env)["triton"] == ""


CASES = [
    plan.Problem(b, s_q, h_q, s_kv, page_size=page_size, dtype=dtype, fp8_cache=fp8)
    for b, s_q, h_q, s_kv in (
        (1, 1, 16, 4096), (1, 1, 128, 32768), (32, 1, 16, 4096), (128, 2, 128, 8192), (4, 1, 5, 100)
    )
    for page_size in (1, 64)
    for dtype, fp8 in (("bfloat16", False), ("bfloat16", True), ("float32", False))
]  # fmt: skip


@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
def test_plan_is_legal_everywhere(device):
    for p in CASES:
        config = plan.select(p, device, "triton")
        assert not plan.is_legal(config, p, device), (p, config)
        assert plan.shared_memory(config, p, device.arch) <= device.shared_memory
        assert config.native_fp8 == (device.arch >= 89)


def test_plan_of_known_cases():
    one = plan.select(plan.Problem(1, 1, 16, 4096), H200, "triton")
    assert one.block_h == 16 and one.num_splits >= 16, "one sequence is spread over the device"
    many = plan.select(plan.Problem(1024, 1, 16, 4096), H200, "triton")
    assert many.num_splits == 1, "many sequences fill it by themselves"
    wide = plan.select(plan.Problem(128, 2, 128, 8192), H200, "triton")
    assert (wide.block_h, wide.block_n, wide.hoist) == (64, 64, False)
    wide = plan.select(plan.Problem(128, 1, 128, 8192, fp8_cache=True), H200, "triton")
    assert (wide.block_h, wide.block_n, wide.hoist) == (64, 64, False)
    assert plan.select(plan.Problem(128, 1, 16, 4096, fp8_cache=True), H200, "triton").block_h == 16
    assert plan.select(plan.Problem(128, 2, 128, 8192, page_size=16), H200, "triton").block_n == 32
    assert plan.select(plan.Problem(128, 2, 128, 8192), B200, "triton").block_h == 32, "64 rows do not compile there"
    assert plan.select(plan.Problem(1, 1, 16, 64), A100, "triton").num_splits == 1
    assert plan.select(plan.Problem(1, 1, 16, 64), A100, "torch") is None


def test_illegal_configurations():
    p = plan.Problem(1, 1, 64, 4096)
    big = plan.Config(64, 64, 8, 2, 1, False, True)
    assert plan.is_legal(big, p, H100) == ""
    assert "shared memory" in plan.is_legal(big, p, L40S)
    assert "padding" in plan.is_legal(big, plan.Problem(1, 1, 16, 4096), H100)
    assert "64 splits of 4096 tokens" in plan.is_legal(plan.Config(16, 32, 4, 3, 64, True, True), p, H100)
    assert "pages" in plan.is_legal(big, plan.Problem(1, 1, 64, 4096, page_size=16), H100)


def test_plan_numbers():
    p = plan.Problem(2, 1, 16, 4096)
    assert plan.flops(p) == 2 * 2 * 16 * 4096 * (576 + 512)
    assert plan.bytes(p) == 2 * (16 * (576 * 2 + 512 * 2 + 4) + 4096 * 1152 + 4)
    fp8 = plan.Problem(2, 1, 16, 4096, fp8_cache=True)
    assert plan.bytes(p) - plan.bytes(fp8) == 2 * 4096 * (1152 - 656)
