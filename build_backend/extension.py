"""`build_ext` for deepseek_kernels._C: writes one ninja file and runs it.

Everything that differs between two builds of the same sources (pip's temporary folders) is reached through links in
the build folder, so that the commands stay the same and a rebuild compiles only what changed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.command.build_ext import build_ext

from . import toolchain
from .toolchain import BuildError, Nvcc, say

ROOT = Path(__file__).resolve().parents[1]

RULES = r"""
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in $note
rule nvcc
  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 $
    || { grep -vE 'ptxas info|bytes stack frame' $out.log; exit 1; }; grep -i warning $out.log | sort -u || true
  depfile = $out.d
  deps = gcc
  description = nvcc $in $note
rule link
  command = $linker $flags $in -o $out
  description = link $out
"""


BF16_FLAGS = ["-mavx512bf16", "-mavx512vbmi"]


class BuildNative(build_ext):
    def run(self):
        compiler = toolchain.host_compiler()
        if compiler is None:
            if toolchain.mode() in ("system", "wheel"):
                raise BuildError("CUDA needs a host C++ compiler: install g++, or set CXX")
            say("no C++ compiler found: installing without compiled kernels (install g++ or clang++ to have them)")
            self.extensions = []
            return
        self.cxx = compiler
        super().run()

    def build_extension(self, ext):
        built = build(self.cxx, toolchain.find_nvcc())
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A running process may have the old file mapped: replace it, do not write into it.
        fresh = target.with_name(target.name + ".new")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)


def build(cxx: str, nvcc: Nvcc | None) -> Path:
    """The path of an up-to-date shared library."""
    import ninja

    kind = "cuda" if nvcc else "host"
    folder = Path("build", "native", f"{sys.implementation.cache_tag}-{kind}")
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    archs = []
    if nvcc:
        name = f"nvcc {nvcc.version[0]}.{nvcc.version[1]}"
        archs = toolchain.trim_archs(toolchain.wanted_archs(), toolchain.known_archs(nvcc.path), name)
    say(f"compiling with {cxx}, " + (f"{nvcc.path} for sm_{' sm_'.join(archs)}" if nvcc else "without CUDA"))
    with _lock(ROOT / folder / "lock"):
        _stable_names(ROOT / folder, cxx, nvcc)
        output = folder / "_C.so"
        text = ninja_file(ROOT, folder, output, cxx, nvcc is not None, archs, _has_openmp(cxx), _takes(cxx, BF16_FLAGS))
        _write_if_changed(ROOT / folder / "build.ninja", text)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [Path(ninja.BIN_DIR, "ninja"), "-f", folder / "build.ninja", "-j", jobs]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise BuildError("compiling deepseek_kernels._C failed; the compiler's message is above")
    return ROOT / output


def ninja_file(
    root: Path, folder: Path, output: Path, cxx: str, cuda: bool, archs: list[str], openmp: bool, bf16: bool = True
) -> str:
    """The text of build.ninja; all paths are relative to `root`, where ninja runs.

    `bf16`: whether the compiler knows AVX-512's bf16 instructions.
    """
    links, stamp = folder / "links", folder / "toolchain.txt"
    defines = ["-DDEEPSEEK_KERNELS_CUDA=1"] if cuda else []
    if cuda and "90a" in archs:
        defines.append("-DDEEPSEEK_KERNELS_SM90A=1")
    if not bf16:
        defines.append("-DDEEPSEEK_KERNELS_NO_AVX512_BF16=1")
    common = ["-O3", "-std=c++17", "-Icsrc", *defines]
    # Headers included with -isystem stay out of the dependency files: pip unpacks them anew for every build.
    cuda_include = ["-isystem", f"{links}/cuda-include"] if cuda else []
    # gcc makes registers of a loop with a choice between floating-point results only where none of them may trap.
    host = [*common, "-fno-trapping-math", "-fPIC", "-fvisibility=hidden", "-Wall", "-isystem", f"{links}/pybind11"]
    host += ["-isystem", sysconfig.get_paths()["include"], *cuda_include, *(["-fopenmp"] if openmp else [])]
    device = [*common, "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
    device += ["-ccbin", cxx, *cuda_include]

    lines = [f"builddir = {folder}", f"cxx = {_quote([cxx])}", f"nvcc = {links}/nvcc-bin/nvcc"]
    lines += ["linker = $nvcc" if cuda else "linker = $cxx", RULES]
    objects = []

    def compile(rule: str, source: Path, name: str, flags: list[str], note: str) -> None:
        objects.append(f"{folder}/{name}.o")
        lines.append(f"build {objects[-1]}: {rule} {source.relative_to(root).as_posix()} | {stamp}")
        lines.extend([f"  flags = {_quote(flags)}", f"  note = {note}"])

    csrc = root / "csrc"
    for source in sorted([*csrc.glob("*.cpp"), *csrc.glob("common/**/*.cpp")]):
        # Nothing here is run often, and pybind11's templates take gcc a fifth less time so.
        flags = [*host, "-O1"]
        if source.name == "bindings.cpp":
            flags += [f'-DDEEPSEEK_KERNELS_ARCHS="{",".join(archs)}"']
        compile("cxx", source, source.stem, flags, "")
    for source in sorted(csrc.glob("*/cpu.cpp")):
        for isa, flags in isa_flags(platform.machine()).items():
            compile("cxx", source, f"{source.parent.name}-{isa}", [*host, *flags, f"-DDSK_ISA={isa}"], isa)
    for source in sorted(csrc.glob("*/cpu_bf16.cpp")) if bf16 and "avx512" in isa_flags(platform.machine()) else []:
        flags = [*isa_flags(platform.machine())["avx512"], *BF16_FLAGS]
        compile("cxx", source, f"{source.parent.name}-avx512_bf16", [*host, *flags], "avx512_bf16")
    for source in sorted(csrc.glob("*/launch*.cu")) if cuda else []:
        flags = toolchain.gencode(archs, hopper_only=(source.parent / "kernel_sm90.cuh").exists())
        if not flags:
            say(f"sm_90a is not among the architectures: csrc/{source.parent.name} is left out")
            continue
        targets = " ".join(flag.rpartition("code=")[2] for flag in flags)
        compile("nvcc", source, f"{source.parent.name}-{source.stem}", [*device, *flags], targets)
    lines += [f"build {output}: link {' '.join(objects)}", f"  flags = {_quote(_link_flags(cxx, cuda, openmp, links))}"]
    return "\n".join([*lines, f"default {output}", ""])


def isa_flags(machine: str) -> dict[str, list[str]]:
    """The instruction sets every CPU kernel is compiled for; csrc/common/cpu/isa.cpp picks one at run time."""
    if machine.lower() not in ("x86_64", "amd64"):
        return {"base": []}
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    # gcc's own AVX-512 headers set off its warnings about uninitialised variables.
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    return {"base": [], "avx2": avx2, "avx512": [*avx2, *avx512]}


def _link_flags(cxx: str, cuda: bool, openmp: bool, links: Path) -> list[str]:
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    host = ["-fopenmp"] if openmp else []
    # The static CUDA runtime's symbols stay inside: torch brings a runtime of its own.
    linker = ["--exclude-libs,ALL", "--as-needed", "-O1"]
    if not cuda:
        return ["-shared", *host, *(f"-Wl,{flag}" for flag in linker)]
    flags = ["-shared", "-cudart", "static", "-ccbin", cxx, f"-L{links}/nvcc-bin/../lib"]
    flags += [part for flag in host for part in ("-Xcompiler", flag)]
    return [*flags, *(part for flag in linker for part in ("-Xlinker", flag))]


def _takes(cxx: str, flags: list[str]) -> bool:
    """Whether the compiler knows `flags`: gcc before 10 lacks -mavx512bf16."""
    command = [cxx, *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input="int f();", text=True, capture_output=True).returncode == 0


def _has_openmp(cxx: str) -> bool:
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n"
    command = [cxx, "-fopenmp", "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def _quote(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _stable_names(folder: Path, cxx: str, nvcc: Nvcc | None) -> None:
    import pybind11

    links = {"pybind11": Path(pybind11.get_include())}
    versions = [f"pybind11 {pybind11.__version__}", subprocess.getoutput(f"{shlex.quote(cxx)} --version")]
    if nvcc:
        links |= {"nvcc-bin": nvcc.path.parent.resolve(), "cuda-include": nvcc.include or folder / "links" / "none"}
        versions += [nvcc.banner]
    (folder / "links").mkdir(exist_ok=True)
    for name, target in links.items():
        link = folder / "links" / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    _write_if_changed(folder / "toolchain.txt", "\n".join(versions))


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@contextlib.contextmanager
def _lock(path: Path):
    """Two builds of one checkout wait for each other."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
