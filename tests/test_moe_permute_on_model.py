"""moe_permute's CUDA kernels in the model of tests/hopper_model, against maps followed by hand."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from deepseek_kernels.reference.fp8_quantize import fp8_quantize as reference_quantize
from deepseek_kernels.testing.compare import assert_same_bits

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


def random_maps(num_tokens, top_k, num_rows, generator):
    """Every entry has a row of its own, some have none, some point outside; (token_topk_to_pos, pos_to_token_topk)."""
    entries = torch.randperm(num_tokens * top_k, generator=generator)[: num_rows * 3 // 4].int()
    rows = torch.randperm(num_rows, generator=generator)[: len(entries)].int()
    to_pos = torch.full((num_tokens * top_k,), -1, dtype=torch.int32)
    to_pos[entries.long()] = rows[: len(entries)]
    outside = (to_pos < 0).nonzero().flatten()[::3]
    wild = torch.tensor([num_rows, 2**31 - 1, -(2**31), -2], dtype=torch.int32)
    to_pos[outside] = wild[torch.arange(len(outside)) % 4]
    to_entry = torch.full((num_rows,), -1, dtype=torch.int32)
    to_entry[rows.long()] = entries
    return to_pos.view(num_tokens, top_k), to_entry


def expected_rows(x, to_pos, num_rows):
    out = torch.zeros(num_rows, x.shape[1], dtype=x.dtype)
    for token, k in itertools.product(range(to_pos.shape[0]), range(to_pos.shape[1])):
        if 0 <= to_pos[token, k] < num_rows:
            out[to_pos[token, k]] = x[token]
    return out


def maps_arguments(guarded, to_pos, to_entry):
    return dict(
        token_topk_to_pos=guarded.copy("token_topk_to_pos", to_pos).data_ptr(),
        pos_to_token_topk=guarded.copy("pos_to_token_topk", to_entry).data_ptr(),
        num_tokens=to_pos.shape[0], top_k=to_pos.shape[1], num_rows=to_entry.shape[0],
    )  # fmt: skip


def run_permute(model, x, scale, to_pos, to_entry, *, ld_pad=0, offset=0):
    (_, hidden), num_rows = x.shape, to_entry.shape[0]
    columns = 0 if scale is None else scale.shape[1]
    guarded = harness.Guarded(model)
    xs = guarded.copy("x", x, stride=(hidden + ld_pad, 1), offset=offset)
    out = guarded.empty("out", (num_rows, hidden), x.dtype, stride=(hidden + ld_pad, 1), offset=offset)
    scales = guarded.copy("scale", scale, stride=(1, x.shape[0])) if columns else None
    out_scale = guarded.empty("out_scale", (num_rows, columns), torch.float32) if columns else None
    model.moe_permute(
        **maps_arguments(guarded, to_pos, to_entry), x=xs.data_ptr(), out=out.data_ptr(),
        scale=scales.data_ptr() if columns else 0, out_scale=out_scale.data_ptr() if columns else 0,
        row_bytes=hidden * x.element_size(), ldx_bytes=xs.stride(0) * x.element_size(),
        ld_out_bytes=out.stride(0) * x.element_size(), scale_columns=columns,
        scale_stride_t=1, scale_stride_s=x.shape[0], out_scale_stride_r=columns, out_scale_stride_s=1, stream=0,
    )  # fmt: skip
    assert_same_bits(out, expected_rows(x, to_pos, num_rows))
    if columns:
        assert_same_bits(out_scale, expected_rows(scale, to_pos, num_rows))


def run_permute_quantize(model, x, to_pos, to_entry, *, pow2_scale=False, offset=0):
    (_, hidden), num_rows = x.shape, to_entry.shape[0]
    guarded = harness.Guarded(model)
    xs = guarded.copy("x", x, offset=offset)
    out = guarded.empty("out", (num_rows, hidden), FP8, offset=offset)
    out_scale = guarded.empty("out_scale", (num_rows, -(-hidden // 128)), torch.float32)
    model.moe_permute_quantize(
        **maps_arguments(guarded, to_pos, to_entry), x=xs.data_ptr(), out=out.data_ptr(),
        out_scale=out_scale.data_ptr(), hidden=hidden, dtype=harness.DTYPES[x.dtype], ldx=hidden, ld_out=hidden,
        out_scale_stride_r=out_scale.stride(0), out_scale_stride_s=1, pow2_scale=pow2_scale, stream=0,
    )  # fmt: skip
    q, scale = reference_quantize(x, "1x128", pow2_scale)
    assert_same_bits(out, expected_rows(q.view(torch.uint8), to_pos, num_rows).view(FP8))
    assert_same_bits(out_scale, expected_rows(scale, to_pos, num_rows))


def run_unpermute(model, y, weights, to_pos, *, ld_pad=0, offset=0):
    (num_rows, hidden), num_tokens = y.shape, to_pos.shape[0]
    guarded = harness.Guarded(model)
    ys = guarded.copy("y", y, stride=(hidden + ld_pad, 1), offset=offset)
    out = guarded.empty("out", (num_tokens, hidden), y.dtype, stride=(hidden + ld_pad, 1), offset=offset)
    arguments = maps_arguments(guarded, to_pos, torch.empty(num_rows, dtype=torch.int32))
    del arguments["pos_to_token_topk"]
    model.moe_unpermute(
        **arguments, y=ys.data_ptr(), weights=0 if weights is None else guarded.copy("weights", weights).data_ptr(),
        out=out.data_ptr(), hidden=hidden, dtype=harness.DTYPES[y.dtype], ldy=ys.stride(0), ld_out=out.stride(0),
        stream=0,
    )  # fmt: skip
    want = torch.zeros(num_tokens, hidden)
    for token, k in itertools.product(range(num_tokens), range(to_pos.shape[1])):
        if 0 <= to_pos[token, k] < num_rows:
            weight = 1.0 if weights is None else weights[token, k].double()
            want[token] = (want[token].double() + weight * y[to_pos[token, k]].double()).float()
    assert_same_bits(out, want.to(y.dtype))


MOE_SHAPES = [(1, 1, 8), (7, 3, 40), (5, 8, 136), (3, 6, 2100)]  # tokens, top_k, hidden


@pytest.mark.parametrize("dtype", [*harness.DTYPES, FP8], ids=lambda d: str(d).removeprefix("torch."))
def test_moe_permute(model, dtype):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for tokens, top_k, hidden in MOE_SHAPES:
            x = torch.randn(tokens, hidden + seed % 2, generator=generator).to(dtype)
            scale = torch.rand(tokens, 3, generator=generator) if seed % 3 else None
            maps = random_maps(tokens, top_k, tokens * top_k + 35, generator)
            run_permute(model, x, scale, *maps, ld_pad=seed % 4 // 2 * 16, offset=seed % 5 // 4)

    harness.under_every_schedule(run)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_moe_permute_quantize(model, dtype):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for tokens, top_k, hidden in MOE_SHAPES:
            x = harness.hostile((tokens, hidden + seed % 2 * 8), dtype, generator)
            maps = random_maps(tokens, top_k, tokens * top_k + 35, generator)
            run_permute_quantize(model, x, *maps, pow2_scale=seed % 3 == 0, offset=seed % 5 // 4)

    harness.under_every_schedule(run)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_moe_unpermute(model, dtype):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for tokens, top_k, hidden in MOE_SHAPES:
            y = torch.randn(tokens * top_k + 3, hidden + seed % 2, generator=generator).to(dtype)
            # Products and sums of small integers are exact, so the order of rounding cannot matter in the comparison.
            y, weights = (y * 8).round(), torch.randint(-8, 9, (tokens, top_k), generator=generator) / 4
            to_pos, _ = random_maps(tokens, top_k, len(y), generator)
            run_unpermute(
                model, y, weights if seed % 2 else None, to_pos, ld_pad=seed % 4 // 2 * 16, offset=seed % 5 // 4
            )

    harness.under_every_schedule(run)


def test_moe_permute_of_nothing(model):
    nothing, no_tokens = torch.empty(0, 16), torch.empty(0, 2, dtype=torch.int32)
    for num_rows in (0, 5):
        run_permute(model, nothing, None, no_tokens, torch.full((num_rows,), -1, dtype=torch.int32))
    run_unpermute(model, nothing, None, torch.full((3, 2), -1, dtype=torch.int32))


@pytest.mark.parametrize("bug", ["position_not_checked", "last_expert_forgotten", "empty_rows_kept", "weight_of_first"])
def test_bugs_of_moe_permute(model, bug):
    generator = torch.Generator().manual_seed(0)
    to_pos, to_entry = random_maps(7, 4, 31, generator)
    if bug == "weight_of_first":
        y, weights = torch.randint(-8, 9, (31, 40), generator=generator).float(), torch.arange(28.0).view(7, 4)
        harness.assert_caught(lambda: run_unpermute(model, y, weights, to_pos), bug)
    else:
        x = torch.randn(7, 40, generator=generator)
        harness.assert_caught(lambda: run_permute(model, x, None, to_pos, to_entry), bug)


def test_bugs_of_moe_permute_quantize(model):
    generator = torch.Generator().manual_seed(0)
    x, maps = torch.randn(7, 264, generator=generator), random_maps(7, 4, 63, generator)
    harness.assert_caught(lambda: run_permute_quantize(model, x, *maps), "lanes_not_reduced")
