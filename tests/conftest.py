"""Test-wide settings: the Triton interpreter where there is no GPU, one thread a worker, what a GPU would add."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any kernel is imported

import pytest  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(hash(request.node.name) % 2**31 if os.environ.get("PYTHONHASHSEED") else 0)


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    gpu = [r for r in skipped if "gpu" in r.keywords]
    if gpu:
        terminalreporter.write_line(f"{len(gpu)} GPU tests were collected and skipped for want of a GPU")
