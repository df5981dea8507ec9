"""One operator, one name, in every room."""

import inspect
from pathlib import Path

import pytest

from deepseek_kernels import __main__ as cli
from deepseek_kernels.device import H100
from deepseek_kernels.ops._registry import OPERATORS

ROOT = Path(__file__).parents[1]
FAMILIES = sorted({op.family for op in OPERATORS.values()})
CORNERS = (
    "deepseek_kernels/ops/{}.py",
    "deepseek_kernels/plan/{}.py",
    "deepseek_kernels/reference/{}.py",
    "deepseek_kernels/testing/samples/{}.py",
    "triton_kernels/{}.py",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
)
SHARED = {"__init__", "backend", "common", "tuned"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_corner_is_there(family):
    missing = [corner for c in CORNERS if not (ROOT / (corner := c.format(family))).exists()]
    assert not missing, f"{family} has no {', '.join(missing)}"


@pytest.mark.parametrize("corner", [c for c in CORNERS if not c.startswith("tests/")])
def test_nothing_stands_alone(corner):
    folder = (ROOT / corner).parent
    prefix = Path(corner).stem.removesuffix("{}")
    names = {p.stem.removeprefix(prefix) for p in folder.glob(f"{prefix}*.py")} - SHARED
    strangers = {n for n in names if not n.startswith("_")} - set(FAMILIES)
    assert not strangers, f"{folder.relative_to(ROOT)}: {', '.join(sorted(strangers))} belongs to no registered op"


def test_compiled_kernels_have_an_op():
    folders = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} - {"common"}
    assert folders <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_has_its_functions(family):
    plan = next(op.plan for op in OPERATORS.values() if op.family == family)
    assert plan.Problem.__dataclass_params__.frozen
    for name, parameters in {
        "flops": ["problem"],
        "bytes": ["problem"],
        "backends": ["problem", "device", "env"],
    }.items():
        assert len(inspect.signature(getattr(plan, name)).parameters) == len(parameters), f"{family}.{name}"
    if hasattr(plan, "select"):
        assert hasattr(plan, "candidates"), f"plan/{family}.py selects from candidates that nobody can list"


@pytest.mark.parametrize("name", OPERATORS)
def test_names_agree(name):
    op = OPERATORS[name]
    assert op.reference.__module__.startswith("deepseek_kernels.reference."), f"{name}: the reference lives elsewhere"
    assert op.problem.__module__ == f"deepseek_kernels.ops.{op.family}"
    sample_module = (ROOT / f"deepseek_kernels/testing/samples/{op.family}.py").read_text()
    assert f'"{name}"' in sample_module, f"samples/{op.family}.py has nothing for {name}"


@pytest.mark.parametrize("name", OPERATORS)
def test_plan_and_op_have_the_same_backends(name):
    op = OPERATORS[name]
    planned = op.plan.backends(cli.example(op), H100, cli.FULL_BUILD)
    promised = {b for b, why_not in planned.items() if not why_not}
    assert promised <= set(op.backends), f"{name}: the plan says that {promised - set(op.backends)} can run"
    assert set(op.backends) <= set(planned), f"{name}: the plan does not know {set(op.backends) - set(planned)}"
