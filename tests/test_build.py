"""The build: its decisions as pure functions, then real builds, the way users on different machines meet them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD_INPUTS = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "build_backend", "csrc"]
PACKAGES = ["deepseek_kernels", "triton_kernels"]
UNTRACKED = shutil.ignore_patterns("__pycache__", "*.so", "*.new", ".*")
HOST_TOOLS = "/usr/bin:/bin"

sys.path.insert(0, str(ROOT))
try:
    from build_backend import extension, toolchain
finally:
    sys.path.pop(0)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="builds are checked on Linux")


def fake_tool(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(root: Path, release: str = "13.0", archs=(80, 90, 100)) -> Path:
    listing = "\\n".join(f"compute_{arch}" for arch in archs)
    return fake_tool(
        root / "bin" / "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.88";; '
        f'--list-gpu-arch) printf "{listing}\\n";; esac',
    )


def test_system_nvcc_search_order(tmp_path):
    nvccs = [fake_nvcc(tmp_path / name) for name in ("home", "path_variable", "on_path", "default")]
    environ = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path_variable"),
        "PATH": str(tmp_path / "on_path" / "bin"),
    }
    for nvcc in nvccs:
        assert toolchain.system_nvcc(environ, tmp_path / "default") == nvcc
        nvcc.unlink()
    assert toolchain.system_nvcc(environ, tmp_path / "default") is None


@pytest.mark.parametrize(
    "wanted, compiler, system, platform, fetched",
    [
        ("auto", True, False, "linux", True),
        ("auto", True, True, "linux", False),
        ("auto", False, False, "linux", False),
        ("auto", True, False, "darwin", False),
        ("wheel", True, True, "linux", True),
        ("system", True, False, "linux", False),
        ("off", True, False, "linux", False),
    ],
)
def test_when_nvcc_is_fetched(monkeypatch, tmp_path, wanted, compiler, system, platform, fetched):
    monkeypatch.setattr(toolchain, "system_nvcc", lambda environ: fake_nvcc(tmp_path) if system else None)
    if compiler:
        fake_tool(tmp_path / "g++")
    environ = {"DEEPSEEK_KERNELS_CUDA": wanted, "PATH": str(tmp_path)}
    assert toolchain.extra_requirements(environ, platform) == (toolchain.CUDA_WHEELS if fetched else [])


def test_a_wrong_setting_is_refused():
    with pytest.raises(toolchain.BuildError, match="'on': expected one of auto, system, wheel, off"):
        toolchain.mode({"DEEPSEEK_KERNELS_CUDA": "on"}, "linux")
    with pytest.raises(toolchain.BuildError, match="Linux only"):
        toolchain.mode({"DEEPSEEK_KERNELS_CUDA": "wheel"}, "darwin")
    with pytest.raises(toolchain.BuildError, match="'sm90' is not like"):
        toolchain.wanted_archs({"DEEPSEEK_KERNELS_ARCHS": "80;sm90"})
    with pytest.raises(toolchain.BuildError, match="CXX='no-such-program'"):
        toolchain.host_compiler({"CXX": "no-such-program"})


def test_nvcc_from_wheels_is_found_in_any_folder(tmp_path):
    nvcc = fake_nvcc(tmp_path / "second" / "nvidia" / "cu13")
    assert toolchain.wheel_nvcc([str(tmp_path / "first"), str(tmp_path / "second")]) == nvcc
    assert toolchain.wheel_nvcc([str(tmp_path / "first")]) is None


def test_architectures_are_sorted_and_trimmed(tmp_path, capsys):
    assert toolchain.wanted_archs({}) == ["80", "90a", "100"]
    wanted = toolchain.wanted_archs({"DEEPSEEK_KERNELS_ARCHS": "100;90a, 80;80"})
    assert wanted == ["80", "90a", "100"]
    known = toolchain.known_archs(fake_nvcc(tmp_path, archs=(80, 90)))
    assert toolchain.trim_archs(wanted, known, "nvcc 12.4") == ["80", "90a"]
    assert capsys.readouterr().out == "deepseek_kernels: nvcc 12.4 does not know sm_100: built without\n"
    with pytest.raises(toolchain.BuildError, match="knows none of sm_999"):
        toolchain.trim_archs(["999"], known, "nvcc 12.4")


def test_gencode_of_portable_and_hopper_files():
    archs = ["80", "90a", "100"]
    assert toolchain.gencode(archs, hopper_only=True) == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert toolchain.gencode(["80", "90"], hopper_only=True) == []
    targets = [flag.rpartition("code=")[2] for flag in toolchain.gencode(archs, hopper_only=False)]
    assert targets == ["sm_80", "sm_90", "sm_100", "compute_100"]


@pytest.mark.parametrize("archs, hopper", [(["80", "90a"], True), (["80"], False)])
def test_ninja_file_compiles_each_source_for_its_architectures(tmp_path, archs, hopper):
    for name in ("plain/launch.cu", "fast/launch.cu", "fast/kernel_sm90.cuh"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    text = extension.ninja_file(tmp_path, Path("build"), Path("build/_C.so"), "/usr/bin/g++", True, archs, True)
    assert (
        ("csrc/fast/launch.cu" in text) == ("code=sm_90a" in text) == ("-DDEEPSEEK_KERNELS_SM90A=1" in text) == hopper
    )
    assert "csrc/plain/launch.cu" in text and "code=sm_80" in text
    assert "launch.cu" not in extension.ninja_file(
        tmp_path, Path("build"), Path("_C.so"), "/usr/bin/g++", False, [], True
    )


def copy_tree(target: Path) -> Path:
    target.mkdir()
    for name in [*BUILD_INPUTS, *PACKAGES]:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=UNTRACKED)
        elif source.exists():
            shutil.copy2(source, target / name)
    return target


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("build") / "tree")


def build_in_place(tree: Path, **environ: str) -> subprocess.CompletedProcess:
    """What `pip install -e . --no-build-isolation` does, without pip."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={"PATH": HOST_TOOLS, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def timed(call):
    """Its result and the processor time it and its children took: what else runs on the machine does not count."""
    begin = os.times()
    result = call()
    end = os.times()
    return result, sum(end[:4]) - sum(begin[:4])


def test_too_old_nvcc_is_refused_with_a_remedy(tree, tmp_path):
    fake_nvcc(tmp_path, release="11.8")
    result = build_in_place(tree, CUDA_HOME=str(tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stdout
    assert "CUDA 11.8, but 12.4 or newer is needed" in result.stdout
    assert "DEEPSEEK_KERNELS_CUDA=wheel" in result.stdout


def test_without_a_compiler_the_package_is_pure_python(tree, tmp_path):
    result = build_in_place(tree, PATH=str(tmp_path), DEEPSEEK_KERNELS_CUDA="off")
    assert result.returncode == 0 and "no C++ compiler found: installing without compiled kernels" in result.stdout
    result = build_in_place(tree, PATH=str(tmp_path), DEEPSEEK_KERNELS_CUDA="wheel")
    assert result.returncode != 0 and "install g++, or set CXX" in result.stdout


def test_build_without_cuda_and_rebuild(tree):
    header = tree / "csrc" / "probe_of_rebuild.h"
    header.write_text("#pragma once\n")
    bindings = tree / "csrc" / "bindings.cpp"
    bindings.write_text('#include "probe_of_rebuild.h"\n' + bindings.read_text())

    def build():
        return build_in_place(tree, DEEPSEEK_KERNELS_CUDA="off", MAX_JOBS="1")

    result, seconds = timed(build)
    assert result.returncode == 0, result.stdout
    # The goal is 60 by the clock on two quiet cores. A busy one takes up to twice the processor time for the same work.
    assert seconds < 120
    result, seconds = timed(build)
    assert "no work to do" in result.stdout and seconds < 10
    header.write_text("#pragma once\n#define CHANGED\n")
    assert "csrc/bindings.cpp" in build().stdout

    library = tree / "deepseek_kernels" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    check_links(library)
    assert library.stat().st_size < 4e6
    subprocess.run([sys.executable, "-c", "import _C"], cwd=library.parent, check=True)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    source = copy_tree(folder / "tree")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", folder], cwd=source, check=True, capture_output=True
    )
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    return source, next((folder / "unpacked").iterdir())


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, isolated, in an empty environment, with nvcc from pinned wheels."""
    folder = tmp_path_factory.mktemp("wheel")
    earlier = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/deepseek_kernels"
    (sdist[1] / earlier).mkdir(parents=True)
    (sdist[1] / earlier / "removed_since.py").touch()
    keep = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PIP_", "MAX_JOBS")) or "proxy" in name.lower()
    }
    settings = {"PATH": HOST_TOOLS, "DEEPSEEK_KERNELS_CUDA": "wheel", "DEEPSEEK_KERNELS_ARCHS": "90a;999"}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, sdist[1]]
    result = subprocess.run(command, env=keep | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode and re.search(r"No matching distribution|NewConnectionError|ConnectTimeout", result.stdout):
        pytest.skip("no package index: the build requirements cannot be fetched")
    assert result.returncode == 0, result.stdout[-5000:]
    return next(folder.glob("*.whl")), result.stdout


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel in it; torch is borrowed from this one. Returns its python."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel[0]], check=True)
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    # Folders named in a .pth file come after the environment's own, and their .pth files are not read.
    Path(packages, "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def in_environment(python: Path, code: str) -> str:
    result = subprocess.run(
        [python, "-c", code], cwd=python.parent, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def check_links(library: Path) -> None:
    """No torch, no CUDA library, nothing beyond the runtimes of C, C++ and OpenMP."""
    dynamic = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    allowed = r"(libc|libm|libgomp|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux[-\w]*)\.so[.\d]*"
    assert not [name for name in needed if not re.fullmatch(allowed, name)]
    symbols = subprocess.run(
        ["readelf", "-W", "--dyn-syms", library], check=True, capture_output=True, text=True
    ).stdout
    foreign = re.compile(r"c10|torch|^at::|_ZN2at|^cu[A-Z]|^cuda[A-Z]|^__cuda")
    assert not [line for line in symbols.splitlines() if foreign.search(line.split("@")[0].split(" ")[-1])]


def test_sdist_holds_every_source(sdist):
    source, unpacked = sdist
    for name in BUILD_INPUTS + PACKAGES:
        paths = [source / name] if (source / name).is_file() else (source / name).rglob("*")
        for path in paths:
            if path.is_file() and path.suffix != ".pyc":
                assert (unpacked / path.relative_to(source)).is_file(), path


def test_wheel_has_compiled_hopper_code_and_no_torch(wheel, tmp_path):
    path, log = wheel
    assert not re.search(r"Successfully installed .*\btorch\b", log)
    with zipfile.ZipFile(path) as archive:
        library = Path(
            archive.extract(next(n for n in archive.namelist() if n.startswith("deepseek_kernels/_C.c")), tmp_path)
        )
    check_links(library)
    spec = importlib.util.find_spec("triton")
    cuobjdump = spec and Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", "cuobjdump")
    if not cuobjdump or not cuobjdump.exists():
        pytest.skip("reading the machine code needs the cuobjdump of Triton's wheel")
    listing = subprocess.run([cuobjdump, "-lelf", library], check=True, capture_output=True, text=True).stdout
    assert "sm_90a" in listing


def test_wheel_owns_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel[0]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deepseek_kernels"}
    assert "deepseek_kernels/triton_kernels/__init__.py" in names
    assert "deepseek_kernels/removed_since.py" not in names
    assert {"deepseek_kernels/py.typed", "deepseek_kernels/_C.pyi"} <= set(names)
    assert wheel[0].stat().st_size < 30e6


def test_unknown_architecture_is_dropped_with_one_line(wheel):
    assert len(re.findall("deepseek_kernels: nvcc 13.0 does not know sm_999: built without", wheel[1])) == 1


def test_wheel_works_without_a_gpu(installed):
    code = """
import deepseek_kernels, deepseek_kernels._C, deepseek_kernels.triton_kernels
print(*(module.__file__ for module in (deepseek_kernels, deepseek_kernels._C, deepseek_kernels.triton_kernels)))
"""
    for path in in_environment(installed, code).split():
        assert Path(path).is_relative_to(installed.parents[1])


def test_import_is_quick(installed):
    # Processor time, since other tests run beside this one; they slow it down too, as torch's own import shows, which
    # takes about 1.2 s where a processor is left alone.
    code = """
import time
begin = time.process_time()
import torch
middle = time.process_time()
import deepseek_kernels
print(middle - begin, time.process_time() - middle)
"""
    runs = [tuple(map(float, in_environment(installed, code).split())) for _ in range(3)]
    assert any(ours <= 0.3 * max(1, of_torch / 1.2) for of_torch, ours in runs), runs
