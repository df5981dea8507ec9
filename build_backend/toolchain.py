"""Which compilers build the extension, and for which GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import SetupError

# nvcc's parts are released on their own: all of them are pinned, or ptxas meets PTX newer than itself.
CUDA_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
MINIMUM_NVCC = (12, 4)
DEFAULT_ARCHS = "80;90a;100"
MODES = ("auto", "system", "wheel", "off")


class BuildError(SetupError):
    """Something is missing from the build environment; the message holds the remedy."""


def say(message: str) -> None:
    print(f"deepseek_kernels: {message}", flush=True)


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: tuple[int, int]
    include: Path | None  # None where the host compiler finds the CUDA headers by itself
    banner: str  # what `nvcc --version` prints


def mode(environ=os.environ, platform: str = sys.platform) -> str:
    """`DEEPSEEK_KERNELS_CUDA`; CUDA is built on Linux only."""
    value = environ.get("DEEPSEEK_KERNELS_CUDA", "auto")
    if value not in MODES:
        raise BuildError(f"DEEPSEEK_KERNELS_CUDA={value!r}: expected one of {', '.join(MODES)}")
    if platform == "linux":
        return value
    if value in ("system", "wheel"):
        raise BuildError(f"DEEPSEEK_KERNELS_CUDA={value}: CUDA is built on Linux only; unset it or set it to off")
    return "off"


def host_compiler(environ=os.environ, platform: str = sys.platform) -> str | None:
    """`CXX` (the name or path of one program), else the first of the usual names on PATH."""
    if named := environ.get("CXX"):
        if found := shutil.which(named, path=environ.get("PATH")):
            return found
        raise BuildError(f"CXX={named!r} is not a program that can be run; set CXX to the path of a C++17 compiler")
    if platform == "win32":
        return None
    names = ("g++", "c++", "clang++")
    return next((found for name in names if (found := shutil.which(name, path=environ.get("PATH")))), None)


def system_nvcc(environ=os.environ, default_root: Path = Path("/usr/local/cuda")) -> Path | None:
    """An installed nvcc: CUDA_HOME, CUDA_PATH, PATH, then the usual folder."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (root := environ.get(variable)) and (nvcc := Path(root, "bin", "nvcc")).is_file():
            return nvcc
    if found := shutil.which("nvcc", path=environ.get("PATH", "")):
        return Path(found)
    return nvcc if (nvcc := default_root / "bin" / "nvcc").is_file() else None


def wheel_nvcc(search_path: list[str] | None = None) -> Path | None:
    """nvcc from CUDA_WHEELS. pip may put them in another folder than the other build requirements."""
    folders = sys.path if search_path is None else search_path
    candidates = (Path(folder, "nvidia", "cu13", "bin", "nvcc") for folder in folders)
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def extra_requirements(environ=os.environ, platform: str = sys.platform) -> list[str]:
    """What a build needs beyond pyproject.toml: a CUDA compiler, if one is wanted, usable and not installed."""
    wanted = mode(environ, platform)
    if wanted == "wheel":
        return CUDA_WHEELS
    if wanted == "auto" and host_compiler(environ, platform) and not system_nvcc(environ):
        return CUDA_WHEELS
    return []


def find_nvcc(environ=os.environ, platform: str = sys.platform) -> Nvcc | None:
    """The CUDA compiler of this build; None builds without CUDA."""
    wanted = mode(environ, platform)
    if wanted == "off":
        return None
    path = None if wanted == "wheel" else system_nvcc(environ)
    if path is None and wanted != "system":
        path = wheel_nvcc()
    if path:
        return inspect_nvcc(path)
    if wanted == "system":
        raise BuildError(
            "DEEPSEEK_KERNELS_CUDA=system, but there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda; "
            "set CUDA_HOME, or DEEPSEEK_KERNELS_CUDA=wheel to fetch one"
        )
    remedy = "pip install " + " ".join(CUDA_WHEELS)
    if wanted == "wheel":
        raise BuildError(f"DEEPSEEK_KERNELS_CUDA=wheel without build isolation needs: {remedy}")
    say(f"no CUDA compiler found, building without CUDA (for CUDA: build with isolation, or {remedy})")
    return None


def inspect_nvcc(path: Path) -> Nvcc:
    banner = _output(path, "--version")
    match = re.search(r"release (\d+)\.(\d+)", banner)
    if not match:
        raise BuildError(f"{path} --version does not name a release; set CUDA_HOME to a working CUDA toolkit")
    version = (int(match[1]), int(match[2]))
    if version < MINIMUM_NVCC:
        raise BuildError(
            f"{path} is CUDA {version[0]}.{version[1]}, but {MINIMUM_NVCC[0]}.{MINIMUM_NVCC[1]} or newer is needed; "
            "set CUDA_HOME to a newer toolkit, DEEPSEEK_KERNELS_CUDA=wheel to fetch one, or DEEPSEEK_KERNELS_CUDA=off"
        )
    # `nvcc` may be a script anywhere; a dry run tells where the toolkit is, even for a file that does not exist.
    top = re.search(r"^#\$ TOP=(.+)$", _output(path, "--dryrun", "-c", "none.cu"), re.MULTILINE)
    root = Path(top[1].strip()) if top else path.parent.parent
    folders = [folder.resolve() for folder in (root / "include", *root.glob("targets/*/include"))]
    include = next((folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()), None)
    return Nvcc(path, version, None if include == Path("/usr/include") else include, banner)


def known_archs(nvcc: Path) -> set[int]:
    return {int(number) for number in re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))}


def wanted_archs(environ=os.environ) -> list[str]:
    """`DEEPSEEK_KERNELS_ARCHS`, such as "80;90a;100", in ascending order."""
    text = environ.get("DEEPSEEK_KERNELS_ARCHS") or DEFAULT_ARCHS
    archs = [word.strip() for word in re.split(r"[;,\s]+", text) if word.strip()]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise BuildError(f"DEEPSEEK_KERNELS_ARCHS={text!r}: {arch!r} is not like 80, 90a or 100")
    return sorted(set(archs), key=lambda arch: (_number(arch), arch))


def trim_archs(wanted: list[str], known: set[int], compiler: str) -> list[str]:
    """`wanted` without what the compiler cannot build, which it says in one line."""
    kept = [arch for arch in wanted if _number(arch) in known]
    dropped = [f"sm_{arch}" for arch in wanted if arch not in kept]
    if not kept:
        raise BuildError(
            f"{compiler} knows none of {', '.join(dropped)}; change DEEPSEEK_KERNELS_ARCHS or the compiler"
        )
    if dropped:
        say(f"{compiler} does not know {', '.join(dropped)}: built without")
    return kept


def gencode(archs: list[str], hopper_only: bool) -> list[str]:
    """nvcc's flags for one file. Hopper's own instructions exist in sm_90a alone; portable code also ships PTX."""
    if hopper_only:
        return ["-gencode=arch=compute_90a,code=sm_90a"] if "90a" in archs else []
    numbers = sorted({_number(arch) for arch in archs})
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def _output(path: Path, *arguments: str) -> str:
    try:
        result = subprocess.run([path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{path} cannot be run ({error}); set CUDA_HOME to a working CUDA toolkit") from error
    return result.stdout
