"""Which backend runs a case, and what a user is told about it."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import deepseek_kernels
from deepseek_kernels.device import A100, B200, CPU, GPUS, H100, H200, L40S, gpu_spec
from deepseek_kernels.ops import _registry
from deepseek_kernels.plan import backend
from deepseek_kernels.plan.backend import BACKENDS, Environment, choose, cuda_reason, triton_reason

ALL = {b: "" for b in BACKENDS}
BUILT = Environment(triton=True, extension_ops=frozenset({"op"}), extension_archs=frozenset({80, 90}))


def arguments():
    maps = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    return torch.randn(2, 16), *maps


def test_unvalidated_kernels_run_only_by_name(monkeypatch):
    monkeypatch.setattr(backend, "VALIDATED", {})
    automatic = choose("op", H100, ALL)
    assert automatic.backend == "triton"
    assert "not yet validated" in automatic.reasons["cuda"] and "by name" in automatic.reasons["cuda"]
    assert choose("op", H100, ALL, forced="cuda").backend == "cuda"


def test_validated_kernels_are_preferred_where_they_passed(monkeypatch):
    monkeypatch.setattr(backend, "VALIDATED", {("op", "cuda"): frozenset({90})})
    assert choose("op", H100, ALL).backend == choose("op", H200, ALL).backend == "cuda"
    assert choose("op", H100, ALL).reasons["triton"] == "cuda is preferred"
    assert choose("op", A100, ALL).backend == choose("other", H100, ALL).backend == "triton"


def test_validated_names_real_kernels():
    from deepseek_kernels.ops._registry import OPERATORS

    for op, name in backend.VALIDATED:
        assert name in OPERATORS[op].backends


@pytest.mark.parametrize("device", [CPU, *GPUS.values()], ids=lambda d: d.name)
def test_the_automatic_choice_never_fails(device):
    assert choose("op", device, {"reference": ""}).backend == "reference"
    assert choose("op", device, {"reference": "", "triton": "no", "cuda": "no"}).backend == "reference"


def test_the_interpreter_is_never_automatic():
    choice = choose("op", CPU, {"reference": "", "triton": ""})
    assert choice.backend == "reference" and "interpreter" in choice.reasons["triton"]


def test_order_of_preference():
    assert choose("op", H100, ALL, order=("torch", "triton", "reference")).backend == "torch"
    assert choose("op", CPU, {"cpu": "", "torch": "", "reference": ""}).backend == "cpu"


def test_what_an_op_does_not_have_is_said():
    choice = choose("op", H100, {"reference": "", "triton": ""}, forced="cpu")
    assert choice.backend is None and choice.reasons["cpu"] == "op has no cpu implementation"


@pytest.mark.parametrize(
    ("device", "env", "match"),
    [
        (H100, Environment(), "pip install triton"),
        (CPU, Environment(triton=True), "TRITON_INTERPRET=1"),
        (gpu_spec("V100", 70, 80, 98_304, 6 * 2**20), Environment(triton=True), "8.0 or newer, the device has 7.0"),
        (H100, Environment(triton=True), "^$"),
        (CPU, Environment(triton=True, interpret=True), "^$"),
    ],
)
def test_triton_reason(device, env, match):
    assert re.search(match, triton_reason(device, env))


@pytest.mark.parametrize(
    ("device", "archs", "runs"),
    [
        (A100, (80, 90), True),
        (L40S, (80, 90), True),  # a binary for 8.0 runs on 8.9
        (H100, (90,), True),
        (H200, (90,), True),
        (L40S, (90,), False),
        (B200, (80, 90), False),
        (B200, (90,), False),  # sm_90a code runs on no other architecture
        (CPU, (80, 90), False),
    ],
)
def test_cuda_reason(device, archs, runs):
    reason = cuda_reason("op", device, BUILT, archs=archs)
    assert (reason == "") == runs
    if not runs and device.kind == "cuda":
        assert f"the device has {device.arch / 10:.1f}" in reason


def test_cuda_reason_names_the_remedy():
    env = Environment(extension_error="reinstall with DEEPSEEK_KERNELS_CUDA=system")
    assert "DEEPSEEK_KERNELS_CUDA=system" in cuda_reason("op", H100, env)
    assert "has no other" in cuda_reason("other", H100, BUILT)


def test_unknown_gpus_get_the_rates_of_the_nearest():
    assert gpu_spec("NVIDIA H200", 90, 132, 232_448, 60 * 2**20).bandwidth == H200.bandwidth
    assert gpu_spec("NVIDIA RTX 4090", 89, 128, 101_376, 72 * 2**20).rate("fp8") < L40S.rate("fp8")
    assert gpu_spec("NVIDIA B300", 103, 148, 232_448, 126 * 2**20).rate("bf16") == B200.rate("bf16")
    assert A100.rate("fp8") == A100.rate("bf16")


def test_forced_backend_that_cannot_run():
    with (
        deepseek_kernels.use_backend("cuda"),
        pytest.raises(deepseek_kernels.BackendError, match="moe_permute: backend 'cuda' was asked for") as error,
    ):
        torch.ops.deepseek_kernels.moe_permute(*arguments())
    assert "Able to: " in str(error.value) and "reference" in str(error.value)
    assert "use_backend" in str(error.value) and "DEEPSEEK_KERNELS_BACKEND" in str(error.value)


def test_use_backend_nests_and_ends_with_its_block():
    def chosen():
        return deepseek_kernels.explain("moe_permute", *arguments()).backend

    before = chosen()
    with deepseek_kernels.use_backend("reference"):
        assert chosen() == "reference"
        with deepseek_kernels.use_backend(None):
            assert chosen() == before
        assert chosen() == "reference"
    with pytest.raises(KeyError), deepseek_kernels.use_backend("reference"):
        raise KeyError
    assert chosen() == before
    with pytest.raises(ValueError, match="wanted one of cuda, triton, cpu, torch, reference, got 'gpu'"):
        deepseek_kernels.use_backend("gpu").__enter__()


def test_explain():
    explanation = deepseek_kernels.explain("moe_permute", *arguments())
    text = str(explanation)
    assert text.startswith(f"moe_permute on cpu: {explanation.backend}\n")
    assert "num_tokens=2" in text
    for name in set(BACKENDS) - {explanation.backend}:
        assert f"  not {name}: " in text
    with pytest.raises(ValueError, match="explain: op: wanted one of .*moe_permute.*, got 'permute'"):
        deepseek_kernels.explain("permute")
    with pytest.raises(TypeError, match="moe_permute has no argument alpha"):
        deepseek_kernels.explain("moe_permute", *arguments(), alpha=1)
    with pytest.raises(TypeError, match="explain: moe_gate: wanted bias, top_k too"):
        deepseek_kernels.explain("moe_gate", torch.randn(3, 4))
    with pytest.raises(TypeError, match="explain: moe_permute: wanted at most 5 arguments, got 6"):
        deepseek_kernels.explain("moe_permute", *arguments(), None, False, 1)
    with pytest.raises(ValueError, match="moe_permute: x: wanted shape"):
        deepseek_kernels.explain("moe_permute", torch.randn(3), *arguments()[1:])


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    keep = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DEEPSEEK_KERNELS_BACKEND")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=keep | environment)


CALL = """
    import torch, deepseek_kernels
    maps = torch.tensor([[0], [1]], dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    torch.ops.deepseek_kernels.moe_permute(torch.randn(2, 16), *maps)
"""


def test_environment_variable_that_cannot_be_served():
    done = python(CALL, DEEPSEEK_KERNELS_BACKEND="triton")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendError: moe_permute: backend 'triton' was asked for and cannot run this case on cpu" in last
    assert "TRITON_INTERPRET=1" in last and "unset DEEPSEEK_KERNELS_BACKEND" in last


def test_environment_variable_is_obeyed_and_checked():
    assert python(CALL, DEEPSEEK_KERNELS_BACKEND="reference").returncode == 0
    assert python(CALL, DEEPSEEK_KERNELS_BACKEND="").returncode == 0
    wrong = python(CALL, DEEPSEEK_KERNELS_BACKEND="fast")
    assert wrong.returncode == 1
    assert "DEEPSEEK_KERNELS_BACKEND: wanted one of cuda, triton, cpu, torch, reference, got 'fast'" in wrong.stderr


def test_import_needs_nothing_and_touches_no_gpu():
    done = python("""
        import json, sys

        sys.modules["triton"] = sys.modules["deepseek_kernels._C"] = None  # as if neither were installed
        import torch, deepseek_kernels

        maps = torch.tensor([[0], [1]], dtype=torch.int32), torch.arange(2, dtype=torch.int32)
        x = torch.randn(2, 16)
        out, _ = torch.ops.deepseek_kernels.moe_permute(x, *maps)
        assert torch.equal(out, x)
        reasons = deepseek_kernels.explain("moe_permute", x, *maps).reasons
        print(json.dumps({**reasons, "initialized": torch.cuda.is_initialized()}))
    """)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["initialized"] is False
    assert "pip install triton" in said["triton"]


def test_import_loads_no_kernels():
    done = python("""
        import sys, deepseek_kernels
        assert not [name for name in sys.modules if "triton_kernels" in name]
    """)
    assert done.returncode == 0, done.stderr


def test_arguments_that_look_the_same_are_checked_once():
    x, *maps = arguments()
    call = torch.ops.deepseek_kernels.moe_permute
    _registry.forget()
    call(x, *maps)
    known = len(_registry._decided)
    call(torch.randn(2, 16), *maps)
    assert len(_registry._decided) == known
    for _ in range(2):  # a refusal is not remembered
        with pytest.raises(TypeError, match="moe_permute: x: wanted dtype"):
            call(x.long(), *maps)
    assert len(_registry._decided) == known
    call(x.t().contiguous().t(), *maps)
    with deepseek_kernels.use_backend("reference"):
        call(x, *maps)
    assert len(_registry._decided) == known + 2


def test_what_may_be_written_depends_on_the_grad_mode():
    a, one = torch.ones(2, 16).to(torch.float8_e4m3fn), torch.ones(2, 1)
    out = torch.zeros(2, 8).requires_grad_()
    args = (a, one, a[:1].expand(8, 16).contiguous(), one[:1])
    for _ in range(2):
        with torch.no_grad():
            deepseek_kernels.fp8_matmul(*args, out=out)
        with pytest.raises(RuntimeError, match="out: requires grad"):
            deepseek_kernels.fp8_matmul(*args, out=out)


def test_print_plan():
    code = """
        import torch, deepseek_kernels
        maps = torch.tensor([[0], [1]], dtype=torch.int32), torch.arange(2, dtype=torch.int32)
        for _ in range(2):
            torch.ops.deepseek_kernels.moe_permute(torch.randn(2, 16), *maps)
    """
    settings = {"DEEPSEEK_KERNELS_PRINT_PLAN": "1", "TRITON_INTERPRET": "1", "DEEPSEEK_KERNELS_BACKEND": "triton"}
    done = python(code, **settings)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "moe_permute: Problem(" in done.stdout and "Config(" in done.stdout
