"""The extension's bindings and kernels over a software model of a Hopper GPU, on CPU memory.

model = harness.load()                       # the functions of deepseek_kernels._C, and configure, alloc, free
guarded = harness.Guarded(model)             # makes tensors between guard pages, filled with NaN
x = guarded.copy("x", torch.randn(3, 5))
model.configure(seed=7)
model.fp8_quantize(x=x.data_ptr(), ...)      # what goes wrong is a RuntimeError that says where

with harness.model_extension(seed=7):        # the ops of deepseek_kernels themselves run on the model
    deepseek_kernels.fp8_quantize(x)

A kernel's tests in the model are tests/test_<op>_on_model.py: a `model` fixture that yields harness.load_or_skip(), a
function that runs the kernel and checks the result, a test that calls harness.under_every_schedule(run) over shapes,
and one that calls harness.assert_caught(run, bug) for every BUG(name) of the kernel. test_hopper_model.py finds bugs
without a test. A failure ends with the last events and with the command that replays its schedule.

DEEPSEEK_KERNELS_MODEL_STRICT=1 is for the night: 200 schedules for 8, and threads are interrupted at plain accesses to
shared memory too. DEEPSEEK_KERNELS_FULL_TEST=1 does that and widens shapes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import weakref
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "hopper_model"
FULL = os.environ.get("DEEPSEEK_KERNELS_FULL_TEST") == "1"
STRICT = FULL or os.environ.get("DEEPSEEK_KERNELS_MODEL_STRICT") == "1"
SEEDS = range(1, 201 if STRICT else 9)
if REPLAY := os.environ.get("DEEPSEEK_KERNELS_MODEL_SEED"):
    SEEDS = range(int(REPLAY), int(REPLAY) + 1)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as the bindings number them

RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $flags $in -o $out
"""


class Unavailable(RuntimeError):
    """This machine cannot build the model."""


def nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def cuda_include() -> Path:
    """The folder of cuda_fp8.h, found beside nvcc."""
    compiler = nvcc()
    if compiler is None:
        raise Unavailable("the CUDA headers are needed, and there is no nvcc to find them by")
    listing = subprocess.run([compiler, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    for word in shlex.split(" ".join(line for line in listing.splitlines() if "INCLUDES=" in line).replace("#$", "")):
        folder = Path(word.removeprefix("INCLUDES=").removeprefix("-I"))
        if (folder / "cuda_fp8.h").exists():
            return folder
    raise Unavailable("nvcc's include folder has no cuda_fp8.h")


def cute_include() -> list[Path]:
    """The headers in nvidia-cutlass, against which layouts are checked, and the CCCL they need. Empty: not all here."""
    package = importlib.util.find_spec("cutlass_library")
    cute = [Path(p, "source", "include") for p in (package.submodule_search_locations or [])] if package else []
    cccl = [cuda_include(), cuda_include() / "cccl"]
    found = [
        [p for p in cute if (p / "cute/tensor.hpp").exists()],
        [p for p in cccl if (p / "cuda/std/utility").exists()],
    ]
    return [paths[0] for paths in found] if all(found) else []


def _ninja_file(cxx: str) -> str:
    import pybind11

    include = [f"-I{ROOT}/csrc", f"-I{HERE}"]
    for folder in (pybind11.get_include(), sysconfig.get_paths()["include"], cuda_include()):
        include += ["-isystem", str(folder)]
    common = ["-std=c++17", "-fPIC", "-march=x86-64-v3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
    # Kernels look at memory through several types, which nvcc lets them do.
    common += [
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",
        "-DDEEPSEEK_KERNELS_MODEL=1",
        "-DDEEPSEEK_KERNELS_CUDA=1",
    ]
    common += ["-DDEEPSEEK_KERNELS_SM90A=1", '-DDEEPSEEK_KERNELS_ARCHS="90a"', *include]
    lines = [f"cxx = {cxx}", RULES]

    def objects(sources, *flags: str) -> list[str]:
        made = []
        for source in sorted(sources):
            made.append(str(BUILD / f"{source.parent.name}.{source.stem}.o"))
            words = shlex.join([*flags, *common]).replace("$", "$$")
            lines.extend([f"build {made[-1]}: cxx {source}", f"  flags = {words}"])
        return made

    model = objects((p for p in HERE.glob("*.cpp") if p.stem not in ("module", "cute")), "-O3")
    module = objects([HERE / "module.cpp"], "-O1")
    # The sanitizer's calls tell the model of every plain access (shared_memory.cpp); its library is not linked.
    kernels = ["-x", "c++", "-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memmove", "-fno-builtin-memset"]
    module += objects([HERE / "hazards.cu", *ROOT.glob("csrc/*/launch*.cu")], "-O2", *kernels)
    primitives = objects([HERE / "primitives.cu"], "-O1", *kernels)
    link = "  flags = -Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset"
    lines += [f"build {BUILD}/_C_model.so: link {' '.join(model + module)}", f"{link} -shared"]
    lines += [f"build {BUILD}/primitives: link {' '.join(model + primitives)}", link]
    if folders := cute_include():
        program = objects([HERE / "cute.cpp"], "-O1", *(word for p in folders for word in ("-isystem", str(p))))
        lines += [f"build {BUILD}/cute: link {' '.join(model + program)}", link]
    lines += [""]
    return "\n".join(lines)


def build(target: str) -> Path:
    """The path of an up-to-date `_C_model.so` or `primitives`; workers of one test run wait for each other."""
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None or os.uname().machine != "x86_64":
        raise Unavailable("the model needs g++ on x86-64")
    try:
        import ninja

        tool = str(Path(ninja.BIN_DIR, "ninja"))
    except ImportError:
        tool = shutil.which("ninja")
    if tool is None:
        raise Unavailable("the model is built with ninja")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text, file = _ninja_file(cxx), BUILD / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        result = subprocess.run(
            [tool, "-f", str(file), "-j", jobs, str(BUILD / target)], cwd=BUILD, capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"the model does not compile:\n{result.stdout[-6000:]}")
    return BUILD / target


@functools.cache
def load():
    """The model's extension module, built on first use. Raises Unavailable where that cannot be."""
    spec = importlib.util.spec_from_file_location("_C_model", build("_C_model.so"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_or_skip():
    """load(), or a skipped test."""
    import pytest

    try:
        return load()
    except Unavailable as reason:
        pytest.skip(str(reason))


@contextlib.contextmanager
def explained(seed: int):
    """What fails within it says which schedule that was, what happened last, and how to see it again."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        settings = ["DEEPSEEK_KERNELS_FULL_TEST=1"] if FULL else ["DEEPSEEK_KERNELS_MODEL_STRICT=1"] if STRICT else []
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        command = [f"DEEPSEEK_KERNELS_MODEL_SEED={seed}", *settings, "python -m pytest -p no:xdist", shlex.quote(test)]
        raise type(error)(f"{error}\n\nlast events:\n{load().last_events()}\nreplay: {' '.join(command)}") from error


def under_every_schedule(run, seeds=SEEDS, **settings) -> None:
    """run(seed) under each of them."""
    for seed in seeds:
        load().configure(seed=seed, **settings)
        with explained(seed):
            run(seed)


def assert_caught(run, bug: str, seeds=SEEDS, **settings) -> None:
    """With the bug planted, `run()` raises under at least one schedule; without it, it does not."""
    model = load()
    for seed in seeds:
        model.configure(seed=seed, bug=bug, **settings)
        try:
            run()
        except (RuntimeError, AssertionError):
            break
    else:
        raise AssertionError(f"{bug} went unnoticed under {len(seeds)} schedules")
    under_every_schedule(lambda seed: run(), (1,), **settings)


class Guarded:
    """Makes tensors in the model's guarded memory: a byte past the end is reported, unwritten bytes are NaN.

    The memory stays as long as this object, and as long as its tensor.
    """

    def __init__(self, model):
        self._model = model
        self._memory = []

    def empty(self, name: str, shape, dtype: torch.dtype, *, stride=None, offset: int = 0) -> torch.Tensor:
        """A tensor that ends where its memory ends, `offset` elements after a multiple of 16 bytes."""
        shape = tuple(shape)
        stride = stride or torch.empty(shape, device="meta").stride()
        size = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride))
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        length = (offset + size) * dtype.itemsize
        address = self._model.alloc(length, name)
        memory = type(name, (ctypes.c_char * length,), {}).from_address(address)
        weakref.finalize(memory, self._model.free, address)  # the tensor's storage keeps `memory`
        self._memory.append(memory)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).as_strided(shape, stride, offset)

    def copy(self, name: str, source: torch.Tensor, *, stride=None, offset: int = 0) -> torch.Tensor:
        target = self.empty(name, source.shape, source.dtype, stride=stride, offset=offset)
        target.view(_bits(source.dtype)).copy_(source.view(_bits(source.dtype)))
        return target


def hostile(shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows of very different magnitude, with a negative zero, a NaN and an infinity."""
    x = torch.randn(shape, generator=generator) * 10 ** torch.randint(-5, 4, (shape[0], 1), generator=generator).float()
    x[:, :2] = -0.0
    x[x.shape[0] // 2, x.shape[1] // 2] = float("nan")
    x[-1, -1] = -float("inf")
    return x.to(dtype)


def mn_major(rows: int) -> tuple[int, int]:
    """The strides of MN-major scales."""
    return 1, -(-rows // 4) * 4


def _bits(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


@contextlib.contextmanager
def model_extension(seed: int = 1, **settings):
    """Within it `deepseek_kernels` calls the model in place of its compiled extension."""
    from deepseek_kernels.ops import _extension

    model = load()
    model.configure(seed=seed, **settings)
    _extension.substitute(model)
    try:
        with explained(seed):
            yield model
    finally:
        _extension.substitute(None)
        model.configure()
