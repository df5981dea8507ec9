"""scripts/gpu.sh with a stand-in for Python: which stages run, what an interruption leaves, what the summary says."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Answers as python would on a machine with a GPU; every call of a stage appends its arguments to calls.txt.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-c import torch"|"-c import pybind11, ninja, setuptools") exit 0 ;;
  "-c import xdist"|"-c import pytest_timeout") exit 1 ;;
  -) cat | grep -q get_device_capability && echo "90a nvidia-h200"; exit 0 ;;
  "- "*) exit 0 ;;
esac
echo "$*" >> calls.txt
case "$*" in
  *"$SLOW"*) [ -z "$SLOW" ] || exec sleep 60 ;;
esac
case "$*" in
  *collect-only*) echo 'tests/test_contract.py::test_sample[fp8_matmul-0-cuda]' ;;
  *primitives*) echo "1 passed" ;;
  *"-m pytest"*) [ -z "$BROKEN" ] || { echo "FAILED tests/test_x.py::test_y"; echo "1 failed"; exit 1; }
                  echo "7 passed" ;;
  *benchmarks/run.py*) echo '{}' > benchmarks/results/nvidia-h200/benchmarks.jsonl
                       echo "3 s, 0 of our results wrong or missing, 0 cases left" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "gpu.sh", tmp_path / "scripts")
    for folder in ("deepseek_kernels", "triton_kernels", "csrc", "build_backend", "tests", "benchmarks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("1")
    for name, text in (("python", PYTHON), ("compute-sanitizer", '#!/bin/sh\nshift 6; exec "$@"\n')):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def run(checkout, **env):
    path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(checkout), "SLOW": "", "BROKEN": "", "BUDGET": "40", **env}
    (checkout / "calls.txt").write_text("")
    done = subprocess.run(["scripts/gpu.sh"], cwd=checkout, env=environment, capture_output=True, text=True)
    return done, (checkout / "calls.txt").read_text()


def test_what_was_built_elsewhere_is_not_built(checkout):
    (checkout / "_C.so").write_text("module")
    done, calls = run(checkout, PREBUILT=str(checkout / "_C.so"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pip install" not in calls and "-m pytest" in calls
    assert (checkout / "deepseek_kernels" / "_C.so").read_text() == "module"


def test_every_stage_runs_once_and_the_summary_comes_last(checkout):
    done, calls = run(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    order = ["pip install", "-k primitives", "-m gpu --durations", "benchmarks/run.py", "report.py"]
    assert sorted(map(calls.index, order)) == list(map(calls.index, order))
    summary = done.stdout[done.stdout.rindex("== nvidia-h200") :]
    for line in ("build: 0", "primitives: 0 (1 passed)", "tests: 0 (7 passed)", "benchmarks: 0 (3 s, 0 of our"):
        assert line in summary
    done, calls = run(checkout)
    assert done.returncode == 0 and "pip install" not in calls and "-m gpu" not in calls.replace("collect-only", "")
    (checkout / "csrc" / "a.cu").write_text("2")
    assert "pip install" in run(checkout)[1]


def test_a_failure_is_told_and_does_not_stop_what_follows(checkout):
    done, calls = run(checkout, BROKEN="1")
    assert done.returncode == 1 and "tests: 1 (1 failed)" in done.stdout
    assert "FAILED tests/test_x.py::test_y" in done.stdout and "benchmarks/run.py" in calls


def test_an_interrupted_stage_goes_on_in_the_next_call(checkout):
    done, _ = run(checkout, SLOW="--durations", BUDGET="18")
    assert "tests: unfinished" in done.stdout and "benchmarks: unfinished" in done.stdout and done.returncode == 1
    done, calls = run(checkout)
    assert "--durations" in calls and "pip install" not in calls and done.returncode == 0


def test_peers_are_built_when_named(checkout):
    _, calls = run(checkout, PEERS="/a/DeepGEMM:/b/FlashMLA")
    assert [line.split()[-1] for line in calls.splitlines() if "--target" in line] == ["/a/DeepGEMM", "/b/FlashMLA"]


def test_tests_that_passed_are_left_out_of_the_next_run(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(3))\ndef test_a(i):\n    assert i != 1\n"
    )
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    passed = tmp_path / "passed.txt"
    environment = {**os.environ, "DEEPSEEK_KERNELS_TESTS_PASSED": str(passed)}

    def outcome(*options):
        command = [sys.executable, "-m", "pytest", "-q", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    assert "1 failed, 2 passed" in outcome("-n", "2")
    (tmp_path / "passed.txt.new").rename(passed)
    assert "1 failed, 2 deselected" in outcome("-p", "no:xdist")
