"""docs/numerics.md: its figures are those its script makes, and its statements about special values hold."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import deepseek_kernels as dk

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    numerics = importlib.import_module("numerics")
finally:
    sys.path.remove(str(ROOT / "benchmarks"))
PAGE = numerics.PAGE.read_text()


def rows(name: str) -> list[list[str]]:
    text = PAGE.partition(f"<!-- {name} -->\n")[2].partition("\n<!-- end -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_page_holds_the_scripts_figures(monkeypatch):
    """Those of the smallest size again; the last digit may differ between processors, and what fp32 rounds away with
    the order of the sum, of which every instruction set has its own."""
    monkeypatch.setattr(numerics, "KS", (128,))
    header, _, *stored = rows("matmul")
    assert len(stored) == 6 and len(header) == 8
    torch.manual_seed(0)
    again = next(iter(numerics.matmul_rows()))
    assert again[:2] == tuple(stored[0][:2])
    assert 0.5 < float(again[2]) / float(stored[0][2]) < 2
    for a, s in zip(again[3:], stored[0][3:], strict=True):
        assert float(a) == pytest.approx(float(s), rel=0.2)
    for row in stored:
        assert float(row[2]) < 1e-6 and float(row[3]) < 2**-8 and float(row[-1]) < 1e-3
    for row in rows("training")[2:]:
        assert max(map(float, row[1:])) < 1e-3


def test_the_model_of_a_short_sum():
    a, b = torch.rand(4, 1024, dtype=torch.float64), torch.rand(8, 1024, dtype=torch.float64)
    exact = a @ b.t()
    errors = [numerics.relative(numerics.accumulated(a, b, bits, 1024), exact) for bits in (53, 24, 14, 10)]
    assert errors[0] < 1e-13 and errors == sorted(errors)
    assert numerics.relative(numerics.accumulated(a, b, 14, 128), exact) < errors[2]
    assert numerics.rounded(torch.tensor([1 + 2.0**-13, -3.0]).double(), 13).tolist() == [1.0, -3.0]


def test_filling_the_page_twice_changes_nothing():
    made = {"training": "| a |\n| --- |"}
    once = numerics.filled(PAGE, made)
    assert once != PAGE and numerics.filled(once, made) == once
    assert once.replace(made["training"], "") == PAGE.replace("\n".join(
        PAGE.partition("<!-- training -->\n")[2].partition("\n<!-- end -->")[0].splitlines()), "")  # fmt: skip


def round_trip(*values: float) -> torch.Tensor:
    x = torch.zeros(1, 128)
    x[0, : len(values)] = torch.tensor(values)
    return dk.fp8_dequantize(*dk.fp8_quantize(x))[0, : len(values)]


def test_small_values_of_a_block():
    scale = 2.0
    values = torch.tensor([448.0, 2.0**-6, 2.0**-9, 2.0**-10, 1.01 * 2.0**-10, 1.9 * 2.0**-9]) * scale
    expected = torch.tensor([448.0, 2.0**-6, 2.0**-9, 0.0, 2.0**-9, 2.0**-8]) * scale
    assert torch.equal(round_trip(*values.tolist()), expected)
    q, scale = dk.fp8_quantize(torch.zeros(1, 128))
    assert not q.float().any() and scale.item() == pytest.approx(1e-4 / 448)
    assert round_trip(1e-5).item() == pytest.approx(1e-5, rel=2**-4)


def test_nan_and_infinity_stay_in_their_block():
    x = torch.ones(2, 256)
    for special in (torch.nan, torch.inf, -torch.inf):
        x[0, 3] = special
        back = dk.fp8_dequantize(*dk.fp8_quantize(x))
        assert back[0, :128].isnan().all() and torch.equal(back[0, 128:], back[1, 128:]) and back[1].isfinite().all()
    q, scale = dk.fp8_quantize(torch.tensor([[torch.inf, 1.0]]))
    assert scale.isinf().all() and q.float()[0, 1] == 0 and q.float()[0, 0].isnan()
