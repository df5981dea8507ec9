"""Test-wide settings: the Triton interpreter where there is no GPU, one thread a worker, what a GPU would add."""

import json
import os
from dataclasses import astuple
from pathlib import Path

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any kernel is imported

os.environ.setdefault("DEEPSEEK_KERNELS_TUNE_CACHE", "")  # what a user has measured is not what is tested

import pytest  # noqa: E402

torch.set_num_threads(1)

PASSED = os.environ.get("DEEPSEEK_KERNELS_TESTS_PASSED")
"""A file of test ids that are left out because they have passed; those that pass now are appended to `<file>.new`."""


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(hash(request.node.name) % 2**31 if os.environ.get("PYTHONHASHSEED") else 0)


def pytest_collection_modifyitems(config, items):
    if PASSED and os.path.exists(PASSED):
        with open(PASSED) as file:
            passed = set(file.read().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    """After an illegal access later tests of the process would all fail: the worker goes, another takes its place."""
    report = yield
    if HAS_GPU and report.failed and hasattr(item.config, "workerinput"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if PASSED:
                with open(f"{PASSED}.lost", "a") as file:
                    file.write(f"{item.nodeid}\n{report.longreprtext}\n")
            os._exit(1)
    return report


class PassedTests:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            with open(f"{PASSED}.new", "a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config):
    if PASSED and not hasattr(config, "workerinput"):  # a worker's reports all reach the process that started it
        config.pluginmanager.register(PassedTests())


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    gpu = [r for r in skipped if "gpu" in getattr(r, "keywords", ())]
    if gpu:
        terminalreporter.write_line(f"{len(gpu)} GPU tests were collected and skipped for want of a GPU")


def _regrets(op: str, size: tuple[str, ...], select) -> list[float]:
    """How much longer than the fastest tile the one takes that `select(*size)` chooses, for each measured problem."""
    file = Path(__file__).parents[1] / "benchmarks/results/nvidia-h200/fp8_tiles.jsonl"
    problems: dict[tuple, dict[tuple, float]] = {}
    for record in map(json.loads, file.read_text().splitlines()):
        if record["op"] == op and "tile" in record:
            problems.setdefault(tuple(record[s] for s in size), {})[tuple(record["tile"])] = record["us"]
    return [times[astuple(select(*p))[: len(next(iter(times)))]] / min(times.values()) for p, times in problems.items()]


@pytest.fixture
def regrets():
    return _regrets
