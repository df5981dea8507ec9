"""The CPU kernels on every instruction set: values, memory, threads, forks, and processors that are not this one."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pybind11
import pytest
import torch

import deepseek_kernels
from deepseek_kernels.ops import _extension
from deepseek_kernels.testing.compare import ATTENTION, MATMUL, assert_close, assert_same_bits

ROOT = Path(__file__).parents[1]
SETS = ("base", "avx2", "avx512", "avx512_bf16")
VARIABLE = "DEEPSEEK_KERNELS_CPU_ISA"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"

sys.path.insert(0, str(ROOT))
try:
    from build_backend import extension, toolchain
finally:
    sys.path.pop(0)

if not _extension.environment().cpu_ops:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)


def run(command: list, *, isa: str | None = None, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    environ = {k: v for k, v in os.environ.items() if k != VARIABLE} | ({VARIABLE: isa} if isa else {})
    return subprocess.run(command, env=environ, capture_output=True, timeout=timeout, cwd=ROOT, **options)


def python(code: str, **options) -> str:
    """What `code` prints, in a fresh process."""
    result = run([sys.executable, "-c", code], text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@functools.cache
def refusal(isa: str) -> str:
    """Why this processor cannot run the set; empty where it can."""
    result = run([sys.executable, "-c", "import deepseek_kernels._C as c; print(c.cpu.isa())"], isa=isa, text=True)
    assert result.returncode in (0, 1), f"{isa} crashed"
    assert result.returncode or result.stdout.strip() == isa
    return result.stderr.strip().splitlines()[-1] if result.returncode else ""


EMULATED = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("deepseek_kernels._C", {path!r})
spec = importlib.util.spec_from_loader(loader.name, loader)
sys.modules[loader.name] = module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
assert module.cpu.isa() == {isa!r}
"""


def code_on(isa: str, code: str) -> str:
    """`code`, to be run with the set forced: by the installed module, or where the processor lacks the set by one
    whose AVX-512 is emulated."""
    if not refusal(isa):
        return code
    return EMULATED.format(path=str(build("emulated/_C.so")), isa=isa) + code


@pytest.mark.parametrize("isa", SETS)
def test_contract_on(isa):
    options = ["-q", "-n0", "-p", "no:cacheprovider", "tests/test_contract.py", "-k", "test_sample and cpu and not gpu"]
    code = code_on(isa, f"import pytest, sys\nsys.exit(pytest.main({options}))")
    result = run([sys.executable, "-c", code], isa=isa, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 100


@pytest.mark.parametrize("isa", SETS)
def test_nan_and_infinity_on(isa):
    """Where the registers of each set choose between a number and NaN differently, the reference decides."""
    code = """
import torch
import deepseek_kernels as dk
from deepseek_kernels.testing.compare import EXACT, LSE, SUM, assert_close

nan, inf, ops = float("nan"), float("inf"), torch.ops.deepseek_kernels
chosen = torch.tensor([[0, 3, 9], [2, 5, -1]])
odd = torch.tensor([nan, inf, -inf, 1.0, -100.0, 3e38, -3e38, 0.0])
pairs = torch.cartesian_prod(odd, odd).T.flatten()[None]
x = torch.randn(3, 256)
x[0, 5], x[1, 200], x[2, 7], x[2, 8] = nan, -inf, inf, nan
query, cache = torch.randn(2, 1, 3, 576), torch.randn(2, 32, 576)
query[0, 0, 1], query[1, 0, 2, 3] = nan, -nan
table, lengths = torch.tensor([[0, 1], [1, 5]]).int(), torch.tensor([40, 64]).int()
large, huge = torch.zeros(1, 1, 20, 576), torch.zeros(2, 32, 576)
large[..., 0], huge[1, 1, 0], huge[0, 3, 0], huge[1, 2, 1] = 3e38, 1e3, -1e3, 1.0  # scores inf, -inf and 0
out, lse = torch.randn(1, 1, 8, 19), odd.view(1, 8, 1)
cases = [
    lambda: dk.swiglu(pairs),
    lambda: dk.swiglu(pairs, clamp=7.0),
    lambda: dk.fp8_quantize(x),
    lambda: dk.fp8_quantize(x, "128x128", pow2_scale=True),
    lambda: dk.fp8_quantize(x, "128x1"),
    lambda: dk.moe_gate(odd.repeat(5, 4), top_k=6, num_groups=4, topk_groups=2),
    lambda: dk.moe_gate(odd.repeat(5, 4), odd.repeat(4), top_k=6, score="softmax"),
    lambda: ops.swiglu_backward(torch.ones(1, 64), pairs, torch.ones(1)),
    lambda: ops.swiglu_backward(torch.ones(1, 64), pairs, torch.ones(1), None, 7.0),
    lambda: ops.moe_gate_backward(torch.ones(2, 3), odd.repeat(2, 2), chosen, "sigmoid", True, 2.5),
    lambda: ops.moe_gate_backward(torch.ones(2, 3), odd.repeat(2, 2), chosen, "softmax", False, 2.5),
    lambda: ops.moe_gate_backward(torch.ones(2, 3), odd.repeat(2, 2), chosen, "sqrtsoftplus", True, 2.5),
    lambda: dk.mla_decode(query, cache, table, lengths, scale=0.05),
    lambda: dk.mla_decode(large, huge, table[:1], lengths[:1], scale=0.05),
    lambda: dk.mla_decode(large.bfloat16(), huge.bfloat16(), table[:1], lengths[:1], scale=0.05),
    lambda: dk.merge_states(out, lse, out.flip(3), lse.flip(1)),
]
torch.set_num_threads(3)  # sequences of mla_decode are cut
for i, case in enumerate(cases):
    with dk.use_backend("reference"):
        expected = case()
    with dk.use_backend("cpu"):
        actual = case()
    pairs_of_outputs = [(actual, expected)] if isinstance(actual, torch.Tensor) else list(zip(actual, expected))
    for a, e in pairs_of_outputs:
        tolerance = EXACT if e.dtype == torch.int64 else LSE if i >= 12 else SUM
        assert_close(a, e, tolerance, f"case {i}")
"""
    python(code_on(isa, code), isa=isa)


def test_an_unknown_set_is_refused():
    assert "wanted base, avx2, avx512 or avx512_bf16, got nonsense" in refusal("nonsense")


def test_stub_names_every_argument():
    from deepseek_kernels import _C

    stub = ast.parse((ROOT / "deepseek_kernels/_C.pyi").read_text())
    cpu = next(node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "cpu")
    written = {f.name: [a.arg for a in f.args.kwonlyargs] for f in cpu.body if isinstance(f, ast.FunctionDef)}
    compiled = {n: re.findall(r"(\w+): ", f.__doc__) for n, f in vars(_C.cpu).items() if callable(f) and f.__doc__}
    compiled = {n: a for n, a in compiled.items() if not n.startswith("__")}
    assert written == compiled


FLAVOURS = {  # compile and link flags, and whether AVX-512 is emulated
    "plain": ("-O1 -fPIC", "-static", False),  # static, to run under another emulator
    "emulated": ("-O1 -fPIC", "", True),
    "sanitized": (f"-g1 {SANITIZERS}", SANITIZERS, True),
}


@functools.cache
def build(target: str) -> Path:
    """tests/cpu_driver and, for `emulated/_C.so`, the module, from the real build's list of sources and flags."""
    ninja = pytest.importorskip("ninja")
    cxx = toolchain.host_compiler()
    if cxx is None or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler on x86-64 Linux")
    folder = ROOT / "build/cpu_driver"
    folder.mkdir(parents=True, exist_ok=True)
    with extension._lock(folder / "lock"):
        extension._write_if_changed(folder / "build.ninja", driver_ninja_file(cxx))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [Path(ninja.BIN_DIR, "ninja"), "-f", folder / "build.ninja", "-j", jobs, f"build/cpu_driver/{target}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    return folder / target


def driver_ninja_file(cxx: str) -> str:
    openmp = "-fopenmp" if extension._has_openmp(cxx) else ""
    lines = [
        "builddir = build/cpu_driver",
        f"cxx = {shlex.quote(cxx)}",
        "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx {openmp} $in $flags -o $out",
    ]
    real = extension.ninja_file(ROOT, Path("build"), Path("unused"), cxx, False, [], bool(openmp))
    sources = re.findall(r"cxx (csrc/\S*\.cpp) .*\n  flags = (.*)\n  note = ?(.*)", real)
    flags_of = {note: flags for _, flags, note in sources}
    for source in sorted((ROOT / "tests/cpu_driver").glob("*.cpp")):
        for note in extension.isa_flags(platform.machine()) if source.name == "convert.cpp" else ["driver"]:
            sources.append((source.relative_to(ROOT).as_posix(), flags_of.get(note, "-std=c++20 -Icsrc"), note))

    seen = set()
    for flavour, (compile_flags, link_flags, emulated) in FLAVOURS.items():
        objects: dict[str, list[str]] = {"driver": [], "_C.so": []}
        for source, flags, note in sources:
            is_binding, is_driver = source.count("/") == 1, source.startswith("tests/")
            if is_binding and flavour != "emulated":
                continue
            if not is_binding:
                flags = re.sub(r"-isystem \S*(?= |$)", "", flags)
            flags = flags.replace("-isystem build/links/pybind11", f"-isystem {pybind11.get_include()}")
            flags = f"{flags.replace('-O3', '')} {compile_flags} {openmp}"
            if emulated and note.startswith("avx512"):
                flags = re.sub("-mavx512[a-z0-9]*", "", flags) + " -Wno-psabi -include tests/cpu_driver/avx512.h"
            if emulated and source.endswith("/isa.cpp"):
                flags += " '-D__builtin_cpu_supports(feature)=1'"
            same = f"build/cpu_driver/{hashlib.sha256(flags.encode()).hexdigest()[:12]}"  # flavours share what they can
            made = f"{same}/{source.replace('/', '-')}-{note}.o"
            if not is_binding:
                objects["driver"].append(made)
            if not is_driver:
                objects["_C.so"].append(made)
            if made not in seen:
                lines.append(f"build {made}: cxx {source}\n  flags = {flags}")
                seen.add(made)
        program = f"build/cpu_driver/{flavour}"
        lines.append(f"build {program}/driver: link {' '.join(objects['driver'])}\n  flags = {link_flags}")
        if flavour == "emulated":
            lines.append(f"build {program}/_C.so: link {' '.join(objects['_C.so'])}\n  flags = -shared")
    return "\n".join([*lines, ""])


def convert(isa: str, function: str, values: torch.Tensor, dtype: torch.dtype, *scalar: str) -> torch.Tensor:
    program = build("emulated/driver" if refusal(isa) else "plain/driver")
    command = [program, "convert", function, *scalar]
    result = run(command, isa=isa, input=values.contiguous().view(torch.uint8).numpy().tobytes())
    assert result.returncode == 0, result.stdout
    return torch.frombuffer(bytearray(result.stdout), dtype=dtype)


@pytest.mark.parametrize("isa", SETS)
def test_kernels_stay_inside_their_memory(isa):
    """Exact-size buffers, ragged shapes, one and three threads, values against plain loops; AVX-512 emulated."""
    result = run([build("sanitized/driver")], isa=isa, text=True)
    assert (result.returncode, result.stdout) == (0, f"{isa}\n"), result.stdout + result.stderr[-3000:]


@pytest.mark.parametrize(("processor", "isa"), [("Nehalem", "base"), ("Haswell", "avx2")])
def test_kernels_on_older_processors(processor, isa):
    """No instruction that the processor lacks, and the right choice."""
    driver, emulator = build("plain/driver"), shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("needs qemu-x86_64-static (Debian: qemu-user-static)")
    result = run([emulator, "-cpu", processor, driver], text=True)
    assert (result.returncode, result.stdout) == (0, f"{isa}\n"), result.stdout + result.stderr
    result = run([emulator, "-cpu", processor, driver], isa="avx512", text=True)
    assert result.returncode == 1
    assert f"DEEPSEEK_KERNELS_CPU_ISA=avx512 on a processor that has {isa}" in result.stdout


def test_the_portable_path_on_arm(tmp_path, monkeypatch):
    """What the build compiles there, linked and run; the whole driver takes a minute in the emulator."""
    cxx = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if cxx is None or emulator is None:
        pytest.skip(
            "needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
        )
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    text = extension.ninja_file(ROOT, Path("build"), Path("unused"), cxx, False, [], True, bf16=False)
    sources = re.findall(r"cxx (csrc/\S+/\S*\.cpp) .*\n  flags = (.*)\n  note = ?(.*)", text)
    assert {note for _, _, note in sources} == {"", "base"}
    of_kernels = next(flags for _, flags, note in sources if note == "base")
    pairs = [(source, flags) for source, flags, _ in sources]
    for source in sorted((ROOT / "tests/cpu_driver").glob("*.cpp")):
        pairs.append((str(source), of_kernels if source.name == "convert.cpp" else "-std=c++20 -Icsrc -fopenmp"))

    objects = []
    for i, (source, flags) in enumerate(pairs):
        flags = re.sub(r"-isystem \S*(?= |$)", "", flags).replace("-O3", "-O1")
        objects.append(str(tmp_path / f"{i}.o"))
        command = [cxx, *shlex.split(flags), "-c", source, "-o", objects[-1]]
        assert subprocess.run(command, cwd=ROOT).returncode == 0, source
    program = tmp_path / "driver"
    assert subprocess.run([cxx, "-static", "-fopenmp", *objects, "-o", program]).returncode == 0
    result = run([emulator, program], text=True)
    assert (result.returncode, result.stdout) == (0, "base\n"), result.stdout + result.stderr


def test_kernels_on_this_processor():
    """Every set that it has, without emulation."""
    result = run([build("plain/driver")], text=True)
    expected = python("from deepseek_kernels import _C; print(_C.cpu.isa())")
    assert (result.returncode, result.stdout) == (0, f"{expected}\n")
    for isa in SETS:
        result = run([build("plain/driver")], isa=isa, text=True)
        assert (result.returncode, result.stdout) == (0, f"{isa}\n") or refusal(isa), result.stdout


def test_no_set_lends_code_to_another():
    """A function the linker may take from any object (a template, an inline one) would bring AVX-512 to everybody."""
    build("plain/driver")
    text = (ROOT / "build/cpu_driver/build.ninja").read_text()
    objects = re.search(r"build \S*/plain/driver: link (.*)", text)[1].split()
    kernels = [o for o in objects if re.search(r"-(base|avx2|avx512\w*)\.o$", o)]
    assert len(kernels) > 20
    names = subprocess.run(["nm", "-C", "--defined-only", *kernels], cwd=ROOT, capture_output=True, text=True)
    shared = [line for line in names.stdout.splitlines() if re.search(r" [VWu] (?!DW\.ref\.)", line)]
    assert names.returncode == 0 and not shared, shared


def sources_of(isa: str) -> list[str]:
    """What the build compiles for one set, and what stands outside the sets."""
    text = extension.ninja_file(ROOT, Path("build"), Path("unused"), "c++", False, [], False)
    found = re.findall(r"cxx (csrc/\S+/\S*\.cpp) .*\n  flags = .*\n  note = ?(.*)", text)
    return [source for source, note in found if note in ("", isa)]


@pytest.mark.parametrize("isa", SETS)
def test_clang(isa):
    """Also without OpenMP, as on macOS."""
    if shutil.which("clang++") is None or platform.machine() != "x86_64":
        pytest.skip("needs clang++ on x86-64")
    flags = {**extension.isa_flags("x86_64")}
    flags["avx512_bf16"] = [*flags["avx512"], *extension.BF16_FLAGS]
    sources = [s for s in sources_of(isa) if isa == "base" or "cpu" in Path(s).name and "common" not in s]
    command = [
        "clang++",
        "-fsyntax-only",
        "-std=c++17",
        "-Icsrc",
        "-Wall",
        "-Werror",
        "-Wno-unknown-warning-option",
        *flags[isa],
    ]
    result = run([*command, f"-DDSK_ISA={isa}", *sources], text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_compiler_without_bf16(tmp_path):
    """gcc before 10: the build goes on without that set, and the dispatch never names it."""
    real = toolchain.host_compiler()
    if real is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler on x86-64")
    old = tmp_path / "old-c++"
    old.write_text(f'#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1;; esac\nexec {shlex.quote(real)} "$@"\n')
    old.chmod(0o755)
    assert extension._takes(real, ["-mavx2"]) and not extension._takes(str(old), extension.BF16_FLAGS)
    text = extension.ninja_file(ROOT, Path("build"), Path("unused"), str(old), False, [], False, bf16=False)
    assert "cpu_bf16.cpp" not in text and text.count("-DDEEPSEEK_KERNELS_NO_AVX512_BF16=1") > 20
    program = tmp_path / "isa.cpp"
    program.write_text('#include "common/cpu/isa.cpp"\n#include "fp8_matmul/cpu.h"\n'
                       "void f(const deepseek_kernels::Fp8MatmulCpuParams& p) { fp8_matmul_cpu(p, 1); }\n")  # fmt: skip
    command = [old, "-std=c++17", "-Icsrc", "-DDEEPSEEK_KERNELS_NO_AVX512_BF16=1", "-S", program, "-o", "-"]
    result = run(command, text=True)
    assert result.returncode == 0, result.stderr
    assert "avx512" in result.stdout and "11avx512_bf16" not in result.stdout


def every_rounding() -> torch.Tensor:
    """fp32: every upper half, with lower halves at, around and between the middles of two bf16, fp16 and e4m3."""
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (torch.arange(2**16)[:, None] << 16) + low
    return bits.to(torch.int64).flatten().to(torch.uint32).view(torch.float32)


@pytest.mark.parametrize("scalar", [(), ("scalar",)], ids=["register", "scalar"])
@pytest.mark.parametrize("isa", SETS[:3])
def test_formats_are_those_of_torch(isa, scalar):
    for name, dtype, code in [
        ("e4m3", torch.float8_e4m3fn, torch.uint8),
        ("fp16", torch.float16, torch.int16),
        ("bf16", torch.bfloat16, torch.int16),
    ]:
        codes = torch.arange(2 ** (8 * dtype.itemsize)).to(code).view(dtype)
        decoded = convert(isa, f"from_{name}", codes.view(code), torch.float32, *scalar)
        assert_same_bits(decoded, codes.float(), f"every {name}")

        values = every_rounding()
        expected = (values.clamp(-448, 448) if name == "e4m3" else values).to(dtype)
        encoded = convert(isa, f"to_{name}", values, code, *scalar).view(dtype)
        assert_same_bits(encoded, expected, f"fp32 to {name}")


@pytest.mark.parametrize("isa", SETS[:3])
def test_exp(isa):
    x = torch.linspace(-87, 88, 2**20)
    expected = x.double().exp()
    step = torch.exp2(torch.floor(torch.log2(expected)) - 23)
    e = convert(isa, "exp", x, torch.float32)
    assert ((e.double() - expected).abs() / step).max() < 2
    special = torch.tensor([0.0, -0.0, -1e-40, -87.5, float("-inf"), 88.8, float("inf"), float("nan")] * 2)
    expected = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, float("inf"), float("inf"), float("nan")] * 2)
    assert_same_bits(convert(isa, "exp", special, torch.float32), expected)


def threaded_cases() -> dict:
    """Calls with work for two threads."""
    dk, g = deepseek_kernels, torch.Generator().manual_seed(0)
    x = torch.randn(512, 640, generator=g).bfloat16()
    experts = torch.randint(-1, 16, (4096, 4), generator=g)
    maps, weights = dk.moe_sort(experts[:512, :2], 16), torch.rand(512, 2, generator=g)
    b, scale_b = dk.fp8_quantize(x[:256], "128x128")
    a, scale_a = dk.fp8_quantize(x[:9])
    offsets = torch.tensor([0, 4, 9]).int()
    cache, angles = torch.randn(9, 16, 576, generator=g).bfloat16(), torch.randn(32, 64, generator=g)
    positions, slots = torch.arange(512) % 32, torch.randint(-1, 144, (512,), generator=g)  # slots named several times
    table, lengths = torch.randint(0, 9, (3, 40), generator=g).int(), torch.tensor([600, 1, 300]).int()
    query = torch.randn(3, 1, 16, 576, generator=g).bfloat16()

    def write():
        written = cache.clone()
        dk.mla_cache_write(x[:, :512], x[:, 512:576], weights[:, 0].contiguous(), angles, positions, written, slots)
        return written

    return {
        "moe_gate": lambda: dk.moe_gate(x, top_k=8),
        "moe_sort": lambda: dk.moe_sort(experts, 16),
        "moe_permute": lambda: dk.moe_permute(x, maps),
        "moe_unpermute": lambda: dk.moe_unpermute(x[: maps[1].shape[0]].repeat(2, 1), maps, weights),
        "swiglu": lambda: dk.swiglu(x),
        "swiglu, quantised": lambda: dk.swiglu(x, quantize=True),
        "fp8_quantize": lambda: dk.fp8_quantize(x),
        "fp8_dequantize": lambda: dk.fp8_dequantize(b, scale_b, "128x128"),
        "fp8_matmul": lambda: dk.fp8_matmul(a, scale_a, b, scale_b),
        "grouped_matmul": lambda: dk.grouped_matmul(x[:9], x[:512].view(2, 256, 640), offsets),
        "mla_cache_write": write,
        "mla_rope": lambda: dk.mla_rope(x.view(512, 10, 64), angles, positions),
        "merge_states": lambda: dk.merge_states(*(x.view(1, 512, 1, 640), weights[:, :1].T[None].contiguous()) * 2),
        "mla_decode": lambda: dk.mla_decode(query, cache, table, lengths, scale=0.05),
    }


@pytest.mark.parametrize("name", threaded_cases())
def test_threads_change_no_bits(name):
    """mla_decode merges one partial result a thread: there they change the last bits."""

    def outputs(threads):
        torch.set_num_threads(threads)
        try:
            with deepseek_kernels.use_backend("cpu"):
                result = threaded_cases()[name]()
        finally:
            torch.set_num_threads(1)
        return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]

    for one, many in zip(outputs(1), outputs(5), strict=True):
        if name == "mla_decode":
            assert_close(many, one, ATTENTION)
        else:
            assert_same_bits(many, one)


def test_one_pool_of_threads_with_torch():
    code = """
import os, re, torch
import deepseek_kernels as dk

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x, w = torch.randn(1024, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
alone = threads()
dk.swiglu(x)
assert threads() == alone, "torch.set_num_threads(1) was not honoured"
torch.set_num_threads(2)
torch.nn.functional.linear(x, w), torch.relu(x)
torchs = threads()
for _ in range(5):
    dk.swiglu(x), torch.nn.functional.linear(x, w), torch.relu(x), dk.fp8_quantize(x)
assert threads() == torchs, f"{threads()} threads where torch had {torchs}"
print(len(set(re.findall(r"\\S*/lib\\w*omp\\S*\\.so\\S*", open("/proc/self/maps").read()))))
"""
    assert python(code) == "1"


def test_a_forked_process_works_alone():
    """libgomp's threads do not come along: a parallel region in the child would wait for them for ever."""
    code = """
import os, torch
import deepseek_kernels as dk

torch.set_num_threads(2)
x = torch.randn(512, 1024)

def quantized():
    return dk.fp8_quantize(x)[0].view(torch.uint8).numpy().tobytes()

before = quantized()
child = os.fork()
if child == 0:
    os._exit(0 if quantized() == before else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), quantized() == before)
"""
    assert python(code, timeout=60) == "0 True"


def test_other_python_threads_run_meanwhile():
    page = torch.randn(1, 64, 576)
    table, length = torch.zeros(1, 16000).int(), torch.tensor([1_024_000]).int()
    query = torch.randn(1, 1, 16, 576)
    deepseek_kernels.mla_decode(query, page, table[:, :1], length, scale=0.05)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    with deepseek_kernels.use_backend("cpu"):
        deepseek_kernels.mla_decode(query, page, table, length, scale=0.05)
    end = time.perf_counter()
    stop.set()
    thread.join()
    # With the lock held there would be one tick, at the end of the call.
    assert any(begin + 0.1 * (end - begin) < t < end - 0.1 * (end - begin) for t in ticks)


@pytest.mark.parametrize("m", [257, 700])
def test_more_rows_than_one_slice(m):
    """The matmuls take 256 rows of a at a time; what a thread needs of scratch does not grow beyond that."""
    dk, backend = deepseek_kernels, deepseek_kernels.use_backend
    a, scale_a = dk.fp8_quantize(torch.randn(m, 384))
    b, scale_b = dk.fp8_quantize(torch.randn(264, 384), "128x128")
    with backend("reference"):
        expected = dk.fp8_matmul(a, scale_a, b, scale_b, out_dtype=torch.float32)
    with backend("cpu"):
        assert_close(dk.fp8_matmul(a, scale_a, b, scale_b), expected, MATMUL)
        offsets = torch.tensor([0, m - 3, m], dtype=torch.int32)
        two = dk.fp8_grouped_matmul(a, scale_a, b.expand(2, *b.shape), scale_b.expand(2, *scale_b.shape), offsets)
        assert_close(two, expected, MATMUL)
    more = [_extension.cpu().fp8_matmul_workspace(m=m, k=128, threads=t) for t in (1, 65)]
    assert (more[1] - more[0]) / 64 < 80_000
