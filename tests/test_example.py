"""The example on tiny widths: it agrees with transformers, and says so when it does not."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[1] / "examples" / "deepseek_v3_layer.py"
QUICK = ["--quick", "--device", "cpu", "--prompt-tokens", "70", "--steps", "3"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("deepseek_v3_layer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agrees_with_transformers_and_draws(example, tmp_path, capsys):
    chart = tmp_path / "chart.png"
    assert example.main([*QUICK, "--out", str(chart)]) == 0
    printed = capsys.readouterr().out
    assert "every step agrees with transformers" in printed
    for op in ("fused_moe", "moe_gate", "mla_decode", "mla_cache_write", "mla_rope", "swiglu", "fp8_matmul"):
        assert f"\n  {op} " in printed, op
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "part, weight", [("attention", "self_attn.kv_b_proj.weight"), ("experts", "mlp.experts.down_proj")]
)
def test_finds_a_wrong_weight(example, part, weight, tmp_path, capsys, monkeypatch):
    make = example.nn.DecoderLayer.from_transformers

    @torch.no_grad()
    def wrong(theirs):
        layer = make(theirs)
        path, _, name = weight.rpartition(".")
        parameter = getattr(layer.get_submodule(path), name)
        setattr(layer.get_submodule(path), name, torch.nn.Parameter(parameter * 1.1, requires_grad=False))
        return layer

    monkeypatch.setattr(example.nn.DecoderLayer, "from_transformers", wrong)
    assert example.main([*QUICK, "--no-fp8", "--out", str(tmp_path / "chart.png")]) == 1
    assert f"MISMATCH bf16: step 1: {part} off by" in capsys.readouterr().out


def test_finds_a_gate_that_chooses_otherwise(example, tmp_path, capsys, monkeypatch):
    make = example.nn.DecoderLayer.from_transformers

    @torch.no_grad()
    def wrong(theirs):
        layer = make(theirs)
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.flip(0)
        return layer

    monkeypatch.setattr(example.nn.DecoderLayer, "from_transformers", wrong)
    assert example.main([*QUICK, "--no-fp8", "--out", str(tmp_path / "chart.png")]) == 1
    assert "moe_gate chose other experts on the same logits" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--experts", "12"], ["--experts", "8"], ["--steps", "0"]])
def test_refuses_sizes_that_make_no_sense(example, wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(wrong)
    assert stop.value.code == 2 and "wanted" in capsys.readouterr().err
