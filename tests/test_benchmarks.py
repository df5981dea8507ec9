"""The benchmarks run on a laptop, refuse to time wrong results, and their files hold what a number needs."""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from deepseek_kernels.ops._registry import OPERATORS
from deepseek_kernels.testing import timer
from deepseek_kernels.testing.timer import Flush, measure

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py"))
CPU = torch.device("cpu")

sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    common, report = (importlib.import_module(name) for name in ("common", "report"))
    MODULES = {family: importlib.import_module(f"bench_{family}") for family in FAMILIES}
finally:
    sys.path.remove(str(ROOT / "benchmarks"))
BENCHES = [pytest.param(b, id=b.label) for module in MODULES.values() for b in module.BENCHES]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_of_the_family_is_timed(family):
    timed = {bench.op for bench in MODULES[family].BENCHES}
    assert timed <= set(OPERATORS)
    assert timed & {op.name for op in OPERATORS.values() if op.family == family}
    assert any(case.quick for bench in MODULES[family].BENCHES for case in bench.cases), f"{family} has no quick case"


@pytest.mark.parametrize("bench", BENCHES)
def test_quick_cases_are_right(bench):
    for case in bench.cases:
        if not case.quick:
            continue
        g = torch.Generator().manual_seed(0)
        args = bench.inputs(CPU, g, **case.dims)
        bench.operator.check(*bench.of_op(args))
        expected = common.reference(bench, args)
        for provider in (*common.ours(bench, args), *common.peers(bench, CPU, False)):
            reason, error = common.try_once(bench, provider, args, expected)
            assert not reason, f"{case.name}, {provider.name}: {reason}"
            assert error < 0.1


@pytest.mark.parametrize("bench", BENCHES)
def test_real_sizes_exist_without_memory(bench):
    """The ahead-of-time compile takes its sizes from here."""
    for case in bench.cases:
        args = bench.inputs(torch.device("meta"), None, **case.dims)
        bench.operator.problem(*bench.of_op(args))


def test_host_overhead_leaves_ops_as_they_were():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        module = importlib.import_module("host_overhead")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    before = dict(OPERATORS["fp8_matmul"].backends)
    assert module.overhead("fp8_matmul", repeat=1) > 0
    assert OPERATORS["fp8_matmul"].backends == before


def run(*arguments, folder=ROOT):
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--device", "cpu", "--quick", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_command_line(tmp_path):
    out = tmp_path / "deep" / "out.jsonl"
    done = run("--op", "moe_permute", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "% roof" in done.stdout and "torch eager" in done.stdout
    records = [json.loads(line) for line in out.read_text().splitlines()]
    mine = [r for r in records if r["op"] == "moe_unpermute" and r["backend"]][0]
    assert mine["status"] == "ok" and mine["relative_error"] < 1e-2 and mine["ratio"]["torch eager"] > 0
    assert 0 < mine["time_us"]["p20"] <= mine["time_us"]["p50"] <= mine["time_us"]["p80"]
    assert mine["bytes"] > 0 and mine["gb_s"] > 0 and mine["percent_of_roof"] > 0
    assert {"copy", "matmul bf16"} == set(mine["ceilings"])
    assert mine["versions"]["torch"] == torch.__version__ and mine["device_name"]
    assert mine["command"].endswith(str(out)) and "commit" in mine and "clocks" in mine

    script = ROOT / "benchmarks/report.py"
    subprocess.run([sys.executable, str(script), str(out)], check=True, cwd=tmp_path)
    text = (out.parent / "report.md").read_text()
    assert "## moe_unpermute" in text and mine["device_name"] in text and mine["command"] in text
    assert (out.parent / "report.png").read_bytes().startswith(b"\x89PNG")


def test_resumes_within_its_budget(tmp_path):
    out = tmp_path / "out.jsonl"
    common_options = ("--op", "moe_permute", "--out", out, "--resume")
    assert run(*common_options, "--budget", "0").returncode == 75
    assert run(*common_options).returncode == 0
    first = out.read_text()
    again = run(*common_options, "--budget", "0")
    assert again.returncode == 0 and "0 cases left" in again.stdout
    assert out.read_text() == first


def test_unknown_family():
    done = run("--op", "moe_permut")
    assert done.returncode != 0 and "there are" in done.stderr and "moe_permute" in done.stderr


def wrong_bench(**options) -> "common.Bench":
    bench = MODULES["moe_permute"].BENCHES[2]
    assert bench.op == "moe_unpermute"
    return common.replace(bench, cases=bench.cases[:1], **options)


def test_a_wrong_result_has_no_speed(monkeypatch):
    bench = wrong_bench(expected=lambda y, *maps: torch.zeros(maps[0].shape[0], y.shape[1], dtype=y.dtype))
    records = common.run_case(bench, bench.cases[0], CPU, quick=True, warm=True)
    assert {r["op"] for r in records} == {f"{bench.label} warm"}
    assert {r["status"] for r in records} == {"wrong"}
    assert not any("time_us" in r or "gb_s" in r for r in records)
    assert all("elements off" in r["reason"] for r in records)


def test_a_failing_peer_hides_nobody():
    def broken(*args):
        raise RuntimeError("no such instruction")

    bench = wrong_bench(peers={"broken": broken, "absent": common.Peer(broken, needs=("no_such_module",))})
    records = {r["provider"]: r for r in common.run_case(bench, bench.cases[0], CPU, quick=True)}
    assert records["broken"]["status"] == "failed" and "no such instruction" in records["broken"]["reason"]
    assert "absent" not in records
    assert any(r["status"] == "ok" for r in records.values())


def test_timer_rotates():
    order = []
    functions = {name: [lambda name=name: order.append(name)] for name in "ab"}
    timings = measure(functions, CPU, seconds=0.0)
    assert list(timings) == ["a", "b"] and order[-4:] == ["a", "b", "a", "b"]
    assert all(t.p20 <= t.p50 <= t.p80 and t.host is None and t.method.endswith("clock") for t in timings.values())


def test_timer_flushes_unless_warm(monkeypatch):
    flushed = []
    monkeypatch.setattr(timer.Flush, "__call__", lambda self: flushed.append(1))
    measure({"f": [lambda: None]}, CPU, seconds=0.0, warm=True)
    assert not flushed
    measure({"f": [lambda: None]}, CPU, seconds=0.0)
    assert flushed


def test_timer_drops_samples_in_which_another_process_ran(monkeypatch):
    clock = types.SimpleNamespace(
        now=0.0, switches=0, calls=0, perf_counter=lambda: clock.now, thread_time=lambda: clock.now
    )
    monkeypatch.setattr(timer, "time", clock)
    monkeypatch.setattr(timer, "_taken_away", lambda: clock.switches)

    def call():
        clock.calls += 1
        disturbed = clock.calls % 3 == 0
        clock.switches += disturbed
        clock.now += 10.0 if disturbed else 1.0

    timing = measure({"f": [call]}, CPU, seconds=100.0)["f"]
    assert (timing.p20, timing.p80, timing.method) == (1e6, 1e6, "clock")
    timing = measure({"f": [lambda: [call() for _ in range(3)]]}, CPU, seconds=100.0)["f"]
    assert timing.method == "disturbed clock"


def test_flush_is_three_times_the_cache():
    from deepseek_kernels.device import CPU as spec

    flush = Flush(CPU)
    flush()
    assert flush._buffer.nbytes >= 3 * spec.l2


def test_report_takes_the_last_record_and_shows_failures(tmp_path):
    base = {"device_name": "GPU", "op": "x", "case": "c", "provider": "ours triton", "backend": "triton"}
    base |= {"versions": {}, "commit": None, "dirty": False, "clocks": None, "command": "run"}
    file = tmp_path / "a.jsonl"
    lines = [base | {"status": "wrong", "reason": "a | b"}, base | {"status": "failed", "reason": "later"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.markdown(report.load([file]))
    assert "**FAILED** later" in text and "WRONG" not in text


@pytest.mark.gpu
def test_timer_on_a_gpu():
    device = torch.device("cuda", 0)
    x = torch.ones(2**26, device=device)
    calls = {"add": [lambda: x.add(1)], "sync": [lambda: x[:1].item()]}
    timings = measure(calls, device, seconds=0.05, uncapturable=frozenset({"sync"}))
    assert timings["add"].method == "graph" and timings["sync"].method == "events"
    assert 2 * x.nbytes / timings["add"].p50 * 1e6 < 2e13 and timings["add"].host < 1000
