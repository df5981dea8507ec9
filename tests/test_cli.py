"""The command line, and the tables it makes for README.md and docs/ops.md.

python tests/test_cli.py --update    # writes both tables
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_kernels import __main__ as cli
from deepseek_kernels.ops._registry import OPERATORS
from deepseek_kernels.plan.backend import BACKENDS

ROOT = Path(__file__).parents[1]
TABLES = {"README.md": ("support matrix", cli.support_matrix), "docs/ops.md": ("ops", cli.ops_table)}


def block(marker: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {marker} -->\n).*?(?=<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize("file", TABLES)
def test_table_is_the_generated_one(file):
    marker, generate = TABLES[file]
    found = block(marker).search((ROOT / file).read_text())
    assert found, f"{file} has no <!-- {marker} --> ... <!-- end -->"
    assert found[0] == generate() + "\n", f"{file} is out of date: python tests/test_cli.py --update"


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("deepseek_kernels 0.") and "\ncpu: cpu\n" in text
    for name in OPERATORS:
        assert re.search(rf"^  {re.escape(name)} +\w+", text, re.MULTILINE)


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["ops"].keys() == OPERATORS.keys()
    for name, devices in about["ops"].items():
        for device, where in devices.items():
            assert where["backend"] in BACKENDS, f"{name} on {device}"
            assert where["backend"] not in where["not"] and all(where["not"].values())


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "deepseek_kernels", "info"]
    environment = os.environ | {"DEEPSEEK_KERNELS_BACKEND": "reference"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "every op is asked to run on reference" in done.stdout
    failed = subprocess.run(command[:-1], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2 and "required: command" in failed.stderr


def test_examples_cover_every_field():
    for op in OPERATORS.values():
        problem = cli.example(op)
        assert op.plan.bytes(problem) >= 0 and op.plan.flops(problem) >= 0
        assert isinstance(hash(problem), int)


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    for file, (marker, generate) in TABLES.items():
        path = ROOT / file
        path.write_text(block(marker).sub(lambda _, g=generate: g() + "\n", path.read_text()))
