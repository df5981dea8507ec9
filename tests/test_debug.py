"""DEEPSEEK_KERNELS_DEBUG=1: values that only the device knows are looked at, and errors say which one is wrong."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

import deepseek_kernels
from deepseek_kernels.ops import _registry
from deepseek_kernels.ops._registry import OPERATORS
from deepseek_kernels.testing import samples

INT32 = torch.int32
BAD = {
    # op: [(argument, (its value in a sample) -> a wrong one, what the error says)]
    "fp8_grouped_matmul": [("expert_offsets", lambda t: t - 1, "wanted values from 0 to")],
    "fp8_grouped_matmul_masked": [("counts", lambda t: t + 10**6, "wanted values from 0 to")],
    "fp8_grouped_matmul_wgrad": [
        ("expert_offsets", lambda t: t.flip(0), "wanted values that do not decrease"),
        ("expert_offsets", lambda t: t + 10**6, "wanted values from 0 to"),
    ],
    "fp8_grouped_matmul_wgrad.out": [("expert_offsets", lambda t: t - 1, "wanted values from 0 to")],
    "fp8_quantize_both": [("expert_offsets", lambda t: t + 10**6, "wanted values from 0 to")],
    "fused_moe_backward": [
        ("token_topk_to_pos", lambda t: t - 2, "wanted values from -1 to"),
        ("expert_offsets", lambda t: t.flip(0), "wanted values that do not decrease"),
    ],
    "grouped_matmul": [("expert_offsets", lambda t: t.flip(0), "wanted values that do not decrease")],
    "grouped_matmul_wgrad": [("expert_offsets", lambda t: t + 10**6, "wanted values from 0 to")],
    "mla_cache_write": [
        ("slots", lambda t: torch.full_like(t, 10**6), "wanted values from -1 to"),
        ("slots", lambda t: torch.zeros_like(t), "wanted every slot at most once, got 0 more than once"),
        ("positions", lambda t: torch.full_like(t, 10**6), "wanted values from 0 to"),
    ],
    "mla_decode": [
        ("seqlens_kv", lambda t: torch.full_like(t, -1), "wanted values from 0 to"),
        ("block_table", lambda t: torch.full_like(t, -1), "wanted values from 0 to"),
    ],
    "mla_rope": [("positions", lambda t: torch.full_like(t, -1), "wanted values from 0 to")],
    "moe_permute": [
        ("token_topk_to_pos", lambda t: torch.full_like(t, -2), "wanted values from -1 to"),
        ("pos_to_token_topk", lambda t: torch.full_like(t, 10**6), "wanted values from -1 to"),
    ],
    "moe_unpermute": [("pos_to_token_topk", lambda t: torch.full_like(t, -2), "wanted values from -1 to")],
    "swiglu": [("pos_to_token_topk", lambda t: torch.full_like(t, -2), "wanted values from -1 to")],
    "swiglu_backward": [("pos_to_token_topk", lambda t: torch.full_like(t, 10**6), "wanted values from -1 to")],
}
CASES = [pytest.param(op, *case, id=f"{op}-{case[0]}-{i}") for op, cases in BAD.items() for i, case in enumerate(cases)]


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setattr(_registry, "_debug", True)


def accepted(operator) -> list[dict]:
    """The arguments of every sample whose values pass."""
    found = []
    for sample in samples.samples(operator):
        args = operator.fill(sample.args, sample.kwargs)
        try:
            operator.check_values(*args)
        except ValueError:
            continue  # samples hold hostile values too, which the ops ignore
        found.append(dict(zip(operator.keywords, args, strict=True)))
    return found


def test_every_op_with_device_values_is_here():
    assert set(BAD) == {name for name, op in OPERATORS.items() if op.check_values}
    words = {"expert_offsets", "counts", "slots", "positions", "block_table", "seqlens_kv", "pos_to_token_topk"}
    for name, op in OPERATORS.items():
        assert op.check_values or not words & set(op.keywords), f"{name} looks at none of its device values"


@pytest.mark.parametrize(("op", "argument", "spoil", "message"), CASES)
def test_wrong_values_are_named(debug, op, argument, spoil, message):
    operator = OPERATORS[op]
    tried = 0
    for args in accepted(operator):
        value = args[argument]
        if value is None or value.numel() < 2 or args.get("weights", ...) is None:
            continue
        spoilt = spoil(value.clone())
        if torch.equal(spoilt, value) or (argument == "block_table" and not args["seqlens_kv"].any()):
            continue
        if argument == "positions" and not (args.get("slots", value) >= 0).any():
            continue
        tried += 1
        with pytest.raises(ValueError, match=f"^{op.partition('.')[0]}: {argument}: {message}"):
            operator.overload(*(args | {argument: spoilt}).values())
    assert tried, f"no sample of {op} has {argument} to spoil"


@pytest.mark.parametrize("op", BAD)
def test_right_values_pass(debug, op):
    assert accepted(OPERATORS[op])
    for args in accepted(OPERATORS[op])[:2]:
        with torch.no_grad():
            OPERATORS[op].overload(*args.values())


def offsets(*values):
    return torch.tensor(values, dtype=INT32)


def test_what_an_error_says(debug):
    a, b = torch.randn(4, 16), torch.randn(2, 8, 16)
    with pytest.raises(ValueError, match=r"grouped_matmul: expert_offsets: wanted values from 0 to 4, got 5 at \[2\]"):
        deepseek_kernels.grouped_matmul(a, b, offsets(0, 2, 5))
    match = r"expert_offsets: wanted values that do not decrease, got 3, 2 at \[1, 2\]"
    with pytest.raises(ValueError, match=match):
        deepseek_kernels.grouped_matmul(a, b, offsets(0, 3, 2))


def test_experts_must_fit_in_the_columns(debug):
    q, scale = torch.zeros(8, 256).to(torch.float8_e4m3fn), torch.ones(8, 2)
    deepseek_kernels.fp8_grouped_matmul_wgrad(q, scale, q, scale, offsets(0, 1, 129))
    with pytest.raises(ValueError, match="expert_offsets: wanted rows that fill at most 256 columns.*, got 384"):
        deepseek_kernels.fp8_grouped_matmul_wgrad(q, scale, q, scale, offsets(0, 1, 130))


def test_unused_entries_may_hold_anything(debug):
    q, cache = torch.randn(1, 1, 2, 96), torch.randn(3, 4, 96)
    table = torch.tensor([[2, 10**6]], dtype=INT32)
    deepseek_kernels.mla_decode(q, cache, table, offsets(4), scale=1.0)
    with pytest.raises(ValueError, match=r"block_table: wanted values from 0 to 2, got 1000000 at \[0, 1\]"):
        deepseek_kernels.mla_decode(q, cache, table, offsets(5), scale=1.0)
    rows = torch.randn(2, 16)
    with pytest.raises(ValueError, match="positions"):
        deepseek_kernels.mla_rope(rows[:, None], torch.randn(3, 16), offsets(0, 3))
    deepseek_kernels.mla_cache_write(
        torch.randn(2, 32), rows, None, torch.randn(3, 16), offsets(0, 3), torch.zeros(3, 4, 48), offsets(1, -1)
    )


def test_tracing_looks_at_nothing(debug):
    a, b = torch.randn(4, 16), torch.randn(2, 8, 16)
    compiled = torch.compile(deepseek_kernels.grouped_matmul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, offsets(0, 2, 4)), deepseek_kernels.grouped_matmul(a, b, offsets(0, 2, 4)))
    with pytest.raises(ValueError, match="expert_offsets"):  # at run time it does
        compiled(a, b, offsets(0, 2, 5))


def test_a_graph_capture_looks_at_nothing(monkeypatch):
    """A decision says GPU 0 and a stand-in for torch.cuda that a graph is being captured there."""
    monkeypatch.setattr(_registry, "_debug", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    args = torch.randn(4, 16), torch.randn(2, 8, 16), offsets(0, 2, 5), None
    operator = OPERATORS["grouped_matmul"]
    monkeypatch.setattr(_registry, "_decided", {})
    monkeypatch.setattr(type(operator), "_decide", lambda *_: ("reference", None, 0))
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        if capturing:
            operator(*args)
        else:
            with pytest.raises(ValueError, match="expert_offsets"):
                operator(*args)


def test_without_it_values_are_clamped():
    a, b = torch.randn(4, 16), torch.randn(2, 8, 16)
    clamped = deepseek_kernels.grouped_matmul(a, b, offsets(0, 2, 4))
    assert torch.equal(deepseek_kernels.grouped_matmul(a, b, offsets(-3, 2, 10**6)), clamped)


def test_the_environment_variable():
    code = inspect.cleandoc("""
        import torch, deepseek_kernels
        a, b = torch.randn(4, 16), torch.randn(2, 8, 16)
        deepseek_kernels.grouped_matmul(a, b, torch.tensor([0, 2, 5], dtype=torch.int32))
    """)
    for value, fails in (("1", True), ("0", False)):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True,
            env=os.environ | {"DEEPSEEK_KERNELS_DEBUG": value},
        )  # fmt: skip
        assert ("wanted values from 0 to 4, got 5" in done.stderr) == fails == bool(done.returncode), done.stderr
