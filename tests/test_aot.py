"""Every Triton kernel compiled for GPUs that are not here; see aot.py.

By default with the configurations the plan picks; DEEPSEEK_KERNELS_FULL_TEST=1 takes every legal candidate.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_kernels.ops._registry import OPERATORS

FULL = os.environ.get("DEEPSEEK_KERNELS_FULL_TEST") == "1"
FAMILIES = sorted({op.family for op in OPERATORS.values() if "triton" in op.backends})
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(script: str, *arguments: str):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout, f"{' '.join(command)} printed nothing:\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def kernels(family: str) -> list[dict]:
    return run("aot.py", "--op", family, "--json", *(("--all",) if FULL else ()))


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_clean(family, arch):
    here = [k for k in kernels(family) if k["arch"] == arch]
    assert here, f"no Triton kernel of {family} was compiled for sm_{arch}: the plan refuses every case there"
    failed = [
        f"{k['op']}/{k['name']} [{k['options']}; {k['config']}; {k['case']}]: {'; '.join(k['failures'])}"
        for k in here
        if k["failures"]
    ]
    assert not failed, "\n".join(failed)


def test_finds_faults():
    found = run("aot_faults.py")
    assert found.pop("sound") == found.pop("ieee") == found.pop("tma") == []
    patterns = {
        "spills": r"^\d+ spill instructions$",
        "shared": r"^shared memory \d+ past the limit of 101376 bytes$",
        "no_tma": r"^descriptors without TMA loads$",
        "unplanned": r"^shared memory 82\d\d, the plan counts on 4096 bytes$",
        "no_e4m3": r"^does not compile: .*fp8e4nv",
        "no_mma": r"^a dot without tensor-core instructions$",
    }
    for fault, failures in found.items():
        assert any(re.search(patterns[fault], f) for f in failures), f"{fault}: {failures}"
