"""The measured table: what it changes, what it may not, and files that cannot be used. Times come from a fake timer."""

import dataclasses
import multiprocessing
import re
import warnings

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels import __main__ as cli
from deepseek_kernels import tune
from deepseek_kernels.device import A100, B200, CPU, GPUS, H100, H200
from deepseek_kernels.ops import _registry, _tuned
from deepseek_kernels.ops._registry import OPERATORS
from deepseek_kernels.plan import _fp8_hopper as fp8_hopper
from deepseek_kernels.plan import backend, fp8_matmul, fused_moe, tuned
from deepseek_kernels.plan.backend import BACKENDS, choose
from deepseek_kernels.plan.tuned import Measured
from deepseek_kernels.testing.timer import Timing

P = fp8_matmul.Problem(64, 4096, 7168)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_KERNELS_TUNE_CACHE", str(tmp_path))
    _tuned.forget()
    yield tmp_path
    monkeypatch.setenv("DEEPSEEK_KERNELS_TUNE_CACHE", "")
    _tuned.forget()


@pytest.mark.parametrize("device", GPUS.values(), ids=lambda d: d.name)
@pytest.mark.parametrize("op", [op for op in OPERATORS.values() if hasattr(op.plan, "select")], ids=lambda op: op.name)
def test_options_begin_with_the_models_choice(op, device):
    problem = cli.example(op)
    for name in op.backends:
        found = tuned.options(op.plan, problem, device, name)
        assert found[0] == op.plan.select(problem, device, name) and len(set(found)) == len(found)
        is_legal = getattr(op.plan, "is_legal", lambda *_: "")
        assert not any(is_legal(c, problem, device) for c in found if c is not None), name
        for c in found:  # a saved table names its kind
            assert c is None or getattr(op.plan, type(c).__name__, None) is type(c), f"{name}: {c}"


@pytest.mark.parametrize("device", [A100, H100, H200, B200], ids=lambda d: d.name)
def test_the_table_overrides_the_model(device):
    found = tuned.options(fp8_matmul, P, device, "triton")
    assert len(found) > 4
    for wanted in (found[1], found[-1]):
        assert tuned.config([Measured("triton", wanted, 1.0)], "triton", found) == wanted
    assert tuned.config([Measured("torch", None, 1.0)], "triton", found) == found[0]


def test_illegal_entries_are_ignored():
    found = tuned.options(fp8_matmul, P, A100, "triton")
    huge = fp8_matmul.Config(1024, 1024, 32, 9, True, 16, 77, False)
    of_another_kernel = fp8_matmul.CudaConfig(128, 128, 5, 1)
    legal = Measured("triton", found[3], 3.0)
    for bad in (huge, of_another_kernel, None):
        assert tuned.config([Measured("triton", bad, 1.0)], "triton", found) == found[0]
        assert tuned.config([Measured("triton", bad, 1.0), legal], "triton", found) == found[3]


def test_rows_in_between_take_the_nearest_entry():
    of_64, of_256 = ([Measured("triton", None, 1.0)] for _ in range(2))
    table = {("fp8_matmul", P): of_64, ("fp8_matmul", dataclasses.replace(P, m=256)): of_256}

    def found(**changes):
        return tuned.lookup(table, "fp8_matmul", dataclasses.replace(P, **changes))

    assert found() is of_64 and found(m=33) is of_64 and found(m=100) is of_64
    assert found(m=200) is of_256 and found(m=512) is of_256
    for nothing in (found(m=31), found(m=513), found(m=0), found(n=2112), found(out_dtype="float32")):
        assert nothing == ()
    assert tuned.lookup(table, "fp8_matmul.out", P) == ()


def test_a_neighbours_configuration_is_made_for_the_problem_at_hand():
    """Fields that follow from the rows are those of the problem, the tile is that of the measurement."""
    near = dataclasses.replace(P, m=96)
    tile = max(tuned.options(fp8_matmul, P, H100, "triton"), key=lambda c: (c.block_m, c.block_n, c.num_stages))
    measured = dataclasses.replace(tile, group_m=tile.group_m * 8)
    assert tuned.config(
        [Measured("triton", measured, 1.0)], "triton", [*tuned.options(fp8_matmul, near, H100, "triton")]
    ) in [
        c
        for c in tuned.options(fp8_matmul, near, H100, "triton")
        if (c.block_m, c.block_n) == (tile.block_m, tile.block_n)
    ]


def test_a_neighbour_does_not_choose_a_tile_that_was_not_measured():
    """Sizes twice as far apart have other numbers of blocks, and other tiles of the same."""
    of_tile = [f.name for f in dataclasses.fields(fp8_hopper.Tile)]
    for n, k in ((576, 7168), (1536, 7168), (2112, 7168), (4096, 7168), (7168, 2048), (32768, 512)):
        for m in (1, 16, 48, 100):
            there = fp8_matmul.Problem(m, n, k)
            for measured in tuned.options(fp8_matmul, there, H200, "cuda"):
                for near in (m + 1, 2 * m):
                    here = tuned.options(fp8_matmul, dataclasses.replace(there, m=near), H200, "cuda")
                    chosen = tuned.config([Measured("cuda", measured, 1.0)], "cuda", here)
                    assert all(getattr(chosen, f) == getattr(measured, f) for f in of_tile), (measured, chosen)


def test_no_configuration_can_be_the_measured_one():
    p = fused_moe.Problem("inference", 1, 7168, 2048, 256, 8, 2, 2)
    found = tuned.options(fused_moe, p, H100, "triton")
    assert None in found and found[0] is not None
    assert tuned.config([Measured("triton", None, 1.0)], "triton", found) is None


def test_backends_go_by_time_but_an_unvalidated_kernel_still_asks_for_its_name(monkeypatch):
    monkeypatch.setattr(backend, "VALIDATED", {})
    times = [Measured("cuda", None, 1.0), Measured("torch", None, 2.0), Measured("triton", None, 3.0)]
    order = tuned.order(times, BACKENDS)
    assert order == ("cuda", "torch", "triton", "cpu", "reference")
    assert choose("op", H100, {b: "" for b in BACKENDS}, order=order).backend == "torch"
    assert choose("op", H100, {b: "" for b in BACKENDS} | {"torch": "no"}, order=order).backend == "triton"
    assert tuned.order([], BACKENDS) == BACKENDS


def entry(m: int = 64):
    problem = dataclasses.replace(P, m=m)
    return {
        ("fp8_matmul", problem): [Measured("torch", None, 2.5), Measured("triton", fp8_matmul.Config(64, 64, 4, 4), 3)]
    }


def test_what_is_saved_is_read(cache):
    file = _tuned.save(H100, entry(64))
    _tuned.save(H100, entry(128))
    assert file.parent == cache and "h100" in file.name
    assert _tuned.table(H100) == entry(64) | entry(128)
    assert _tuned.table(A100) == {} and not list(cache.glob("*.tmp"))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda text: text[: len(text) // 2], "JSONDecodeError"),
        (lambda text: "", "JSONDecodeError"),
        (lambda text: "[]", "TypeError"),
        (lambda text: "{}", "KeyError: 'format'"),
        (lambda text: text.replace('"format": 1', '"format": 0'), "format: wanted 1, got 0"),
        (lambda text: text.replace(H100.name, "H100-PCIe"), "device: wanted .*H100-SXM5.* got .*H100-PCIe"),
        (lambda text: text.replace(torch.__version__, "2.1.0"), "versions: wanted .* got .*2.1.0"),
        (lambda text: text.replace('"fp8_matmul"', '"fp4_matmul"'), "no op is called 'fp4_matmul'"),
        (lambda text: text.replace('"block_m"', '"block_z"'), "block_z"),
        (lambda text: text.replace('"torch",\n', '"gpu",\n', 1), "no backend is called|versions"),
        (lambda text: text.replace("2.5", "NaN"), "us: wanted a time, got nan"),
        (lambda text: text.replace('"Config"', '"Missing"'), "Missing"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named_once(cache, spoil, why):
    file = _tuned.save(H100, entry())
    file.write_text(spoil(file.read_text()))
    _tuned.forget()
    with pytest.warns(UserWarning, match=f"(?s){file.name} is not used: .*({why})"):
        assert _tuned.table(H100) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tuned.table(H100) == {}
        _tuned.save(H100, entry())  # measuring again mends it
        assert _tuned.table(H100) == entry()


def write(folder, m):
    _tuned.save(H100, entry(m))


def test_writers_at_the_same_time_lose_nothing(cache):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(cache, m)) for m in (64, 128, 256, 512)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    _tuned.forget()
    assert {p.m for _, p in _tuned.table(H100)} == {64, 128, 256, 512}


def test_where_the_table_is(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_KERNELS_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(_tuned.path(H200)).startswith("/somewhere/deepseek_kernels/h200")
    monkeypatch.setenv("DEEPSEEK_KERNELS_TUNE_CACHE", "")
    assert _tuned.path(H200) is None and _tuned.table(H200) == {}
    with pytest.raises(ValueError, match="TUNE_CACHE: wanted a folder"):
        _tuned.save(H200, {})


def fake_timer(fast: str):
    def timer(calls, device, seconds):
        for (call,) in calls.values():
            call()
        times = {key: 1.0 if key[0] == fast else 10.0 + i for i, key in enumerate(calls)}
        return {key: Timing(t, t, t, None, "clock") for key, t in times.items()}

    return timer


@pytest.mark.parametrize("fast", ["cpu", "torch"])
def test_from_measuring_to_choosing(cache, monkeypatch, capsys, fast):
    monkeypatch.setattr(tune.measure_problem, "__defaults__", (fake_timer(fast), print))
    cpu = torch.device("cpu")
    table = tune.tune(["grouped_matmul"], ["num_rows=8,n=32,k=16,num_experts=2"], cpu, 0.01)
    assert len(table) == 1 and f"1.0 us by {fast}" in capsys.readouterr().out
    args = tune.FAMILIES["grouped_matmul"].inputs(cpu, num_rows=9, n=32, k=16, num_experts=2)
    explanation = dk.explain("grouped_matmul", *args)
    if not explanation.reasons["cpu"] or fast == "torch":
        assert explanation.backend == fast
    assert _registry._select("grouped_matmul", explanation.problem, CPU, None, 0)[0] == explanation.backend
    with dk.use_backend("reference"):
        assert dk.explain("grouped_matmul", *args).backend == "reference"


def test_wrong_results_and_failures_are_left_out_and_said():
    real = OPERATORS["fp8_matmul"]
    said = []

    def fails(config, *args):
        raise RuntimeError("no such instance\nand a trace")

    def wrong(config, *args):
        return 1.1 * real.reference(*args)

    def nan(config, *args):
        return torch.nan * real.reference(*args)

    def right(config, *args):
        return real.reference(*args)

    args = tune.FAMILIES["fp8_matmul"].inputs(torch.device("cpu"), m=4, n=16, k=32)
    for run, word in (
        (fails, "RuntimeError: no such instance"),
        (wrong, "off by 0.1"),
        (nan, "off by nan"),
        (right, ""),
    ):
        op = dataclasses.replace(real, backends={"torch": run})
        found = tune.measure_problem(op, args, 0.01, fake_timer("torch"), said.append)
        assert [m.backend for m in found] == ([] if word else ["torch"])
        assert not word or word in said.pop()
    assert not said


@pytest.mark.parametrize("op", tune.FAMILIES)
def test_every_family_makes_arguments_that_its_op_takes(op):
    small = {"m": 4, "n": 32, "k": 128, "num_rows": 8, "num_experts": 4, "m_max": 8, "expected_m": 2, "num_tokens": 3,
             "hidden": 128, "intermediate": 128, "top_k": 2, "b": 2, "h_q": 2, "s_kv": 9, "page_size": 4}  # fmt: skip
    family, operator = tune.FAMILIES[op], OPERATORS[op]
    if op == "moe_gate":
        small["num_experts"] = 256
    sizes = {name: small[name] for name in family.sizes[0]}
    found = tune.measure_problem(
        operator, family.inputs(torch.device("cpu"), **sizes), 0.01, fake_timer("cpu"), pytest.fail
    )
    args = operator.fill(family.inputs(torch.device("cpu"), **sizes), {})
    assert {m.backend for m in found} == {b for b, _ in tune.candidates(operator, operator.problem(*args), CPU)}
    assert len({len(s) for s in family.sizes}) == 1 and len({str(s) for s in family.sizes}) == len(family.sizes)


def test_the_command(cache, capsys, monkeypatch):
    monkeypatch.setattr(tune.measure_problem, "__defaults__", (fake_timer("torch"), print))
    command = ["tune", "--device", "cpu", "--op", "fp8_matmul.out", "--shapes", "m=4,n=16,k=32", "m=8,n=16,k=32"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "2 problems in" in out and "the only choice here" in out
    for wrong, message in (
        (["--op", "fp4_matmul"], "op: wanted one of .* got fp4_matmul"),
        (["--op", "fp8_matmul", "--shapes", "m=4"], r"wanted m=..,n=..,k=.. for fp8_matmul, got 'm=4'"),
        (["--op", "fp8_matmul", "--shapes", "4x16x32"], "got '4x16x32'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["tune", "--device", "cpu", *wrong])
        assert re.search(message, capsys.readouterr().err)
