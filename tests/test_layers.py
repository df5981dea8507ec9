"""Who may import whom, read from the source without running it."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "deepseek_kernels"
STANDARD = set(sys.stdlib_module_names)

# room -> what its files may import besides the standard library: a package of that name, or a room of ours
ROOMS = {
    "shapes": set(),
    "device": set(),
    "plan": {"plan", "shapes", "device"},
    "reference": {"torch", "reference", "shapes"},
    "triton_kernels": {"torch", "triton", "triton_kernels"},
    "ops": {"torch", "ops", "plan", "shapes", "device", "reference", "triton_kernels"},
    "nn": {"torch", "package", "nn", "ops", "shapes"},
    "distributed": {"torch", "package", "distributed", "ops", "shapes", "deep_ep"},
    "integrations": {"torch", "package", "integrations", "nn", "ops", "shapes", "transformers"},
    "testing": {"torch", "testing", "ops", "plan", "shapes", "device", "reference"},
    "tune": {"torch", "ops", "plan", "shapes", "device", "testing", "tqdm"},
    "__main__": {"torch", "triton", "package", "ops", "plan", "shapes", "device", "tune"},
    "__init__": {"ops", "shapes", "nn", "distributed", "integrations"},
}


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """As it is imported once installed: triton_kernels/x.py is deepseek_kernels.triton_kernels.x."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *parts) if parts[0] == "triton_kernels" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(absolute name of what is imported, whether at module level, line)."""
    tree = ast.parse(path.read_text())
    inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    package = module_name(path).split(".")[:-1]
    for node in ast.walk(tree):
        top = node not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, top, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield ".".join([*base, alias.name]), top, node.lineno


def room(name: str) -> str:
    """The room of ours, the package, or the third-party package an absolute name belongs to."""
    first, *rest = name.split(".")
    if first != PACKAGE:
        return first
    return rest[0] if rest and (rest[0] in ROOMS or rest[0] == "_C") else "package"


def of_package(path: Path) -> str:
    parts = module_name(path).split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def ident(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(PACKAGE, "triton_kernels"), ids=ident)
def test_room_imports_only_what_it_may(path):
    here = of_package(path)
    allowed = ROOMS[here]
    for name, _, line in imports(path):
        target = room(name)
        if target == "_C":
            assert ident(path) == f"{PACKAGE}/ops/_extension.py", (
                f"{ident(path)}:{line}: _C only through ops/_extension"
            )
        elif target not in STANDARD:
            assert target in allowed, f"{ident(path)}:{line}: {here} may not import {name}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=ident)
def test_triton_is_imported_on_use(path):
    for name, top, line in imports(path):
        if room(name) in ("triton", "triton_kernels"):
            assert not top, f"{ident(path)}:{line}: {name} at module level; the package imports without triton"


@pytest.mark.parametrize("path", sources(f"{PACKAGE}/ops"), ids=ident)
def test_ops_do_not_import_each_other(path):
    for name, _, line in imports(path):
        parts = name.split(".")
        if parts[:2] == [PACKAGE, "ops"] and len(parts) > 2 and path.stem != "__init__":
            assert parts[2].startswith("_") or not (ROOT / PACKAGE / "ops" / f"{parts[2]}.py").exists(), (
                f"{ident(path)}:{line}: one op may not import another, {parts[2]}; call it through torch.ops"
            )


@pytest.mark.parametrize("path", sources(PACKAGE, "triton_kernels", "examples", "benchmarks", "tests"), ids=ident)
def test_nobody_imports_the_top_level_triton_kernels(path):
    for name, _, line in imports(path):
        assert name.split(".")[0] != "triton_kernels", f"{ident(path)}:{line}: that name belongs to another project"


def test_only_packages_have_init():
    for folder in ("tests", "benchmarks", "examples"):
        assert not list((ROOT / folder).rglob("__init__.py")), f"{folder} is not a package"


def cuda_sources() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp"))


@pytest.mark.parametrize("path", cuda_sources(), ids=ident)
def test_extension_layers(path):
    text = path.read_text()
    for line in re.findall(r'#include\s+[<"]([^>"]+)[>"]', text):
        assert not re.match(r"(torch|ATen|c10)/", line), f"{ident(path)}: the extension knows no torch: {line}"
        if line.startswith("pybind11/"):
            assert path.name.startswith("bindings"), f"{ident(path)}: pybind11 belongs in the bindings"
    folder = path.parent.name
    others = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} - {folder, "common"}
    if folder not in ("csrc", "common"):
        for line in re.findall(r'#include\s+"([^"]+)"', text):
            assert not others & set(Path(line).parts), f"{ident(path)}: one kernel may not include another's: {line}"
    if folder != "common":
        assert not re.search(r"\basm\b", text), f"{ident(path)}: instructions belong in csrc/common"


def test_names_are_read_as_python_does(tmp_path, monkeypatch):
    file = tmp_path / "triton_kernels" / "op.py"
    file.parent.mkdir()
    file.write_text("import torch\nfrom . import common\ndef f():\n    from ..reference.op import g\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert list(imports(file)) == [
        ("torch", True, 1),
        ("deepseek_kernels.triton_kernels.common", True, 2),
        ("deepseek_kernels.reference.op.g", False, 4),
    ]
    assert [room(name) for name, _, _ in imports(file)] == ["torch", "triton_kernels", "reference"]
