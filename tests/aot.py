"""Compile our Triton kernels for GPUs that are not here, and read the machine code.

    python tests/aot.py [--op FAMILY ...] [--arch 90 ...] [--all] [--json]

Nothing about a kernel is written down here. The op's own Triton function runs on meta tensors, with the plan's own
configurations, while the launch is replaced by a note of what Triton would compile: signature, divisibility by 16,
constants, options. The inputs are the cases of the benchmarks (real sizes) and the samples of the tests.

A kernel fails if it does not compile, asks for more shared memory than the device has (the compiler does not look) or
than the plan counts on, spills registers, has a `tl.dot` and no tensor-core instruction, or tensor descriptors and no
TMA load; and where the plan says TMA, if it takes no descriptors.
"""

import argparse
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from deepseek_kernels.device import A100, B200, H100, L40S, DeviceSpec
from deepseek_kernels.ops import _device
from deepseek_kernels.ops._registry import OPERATORS, Operator
from deepseek_kernels.plan.backend import Environment
from deepseek_kernels.testing import samples as sampling

DEVICES = {d.arch: d for d in (A100, L40S, H100, B200)}
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NVIDIA_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TMA = re.compile(r"\bUTMALDG\b")
MMA = re.compile(r"\b(?:[HIQD]G?MMA|UTC\w*MMA)\b[.\w]*")
ENVIRONMENT = Environment(triton=True)


@dataclass
class Kernel:
    """One compilation: what Triton was asked for, and after `read` what came of it."""

    op: str
    arch: int
    name: str
    case: str
    config: str
    options: str
    shared: int = 0
    registers: int = 0
    spills: int = 0
    mma: tuple[str, ...] = ()
    planned: int = 0
    tma: bool = False
    failures: list[str] = field(default_factory=list)


class _Driver:
    """Stands in for Triton's driver: a device per architecture, numbered by it."""

    arch = 90

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def _meta(value):
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(_meta, value)) if type(value) in (tuple, list) else value


def _benches(family: str) -> list:
    if not (BENCHMARKS / f"bench_{family}.py").exists():
        return []
    sys.path.append(str(BENCHMARKS))
    try:
        return importlib.import_module(f"bench_{family}").BENCHES
    finally:
        sys.path.remove(str(BENCHMARKS))


@functools.cache
def inputs(name: str) -> list[tuple[str, bool, tuple]]:
    """(case, whether of real size, arguments on the meta device), real sizes first."""
    op, found = OPERATORS[name], []
    for bench in _benches(op.family):
        if bench.op == op.name:
            for case in bench.cases:
                args = bench.of_op(bench.inputs(torch.device("meta"), None, **case.dims))
                found.append((f"{bench.label} {case.name}", True, args))
    for sample in sampling.samples(op):
        found.append((f"sample {sample.name}", False, _meta(op.fill(sample.args, sample.kwargs))))
    return [(case, real, op.fill(args, {})) for case, real, args in found]


def configs(op: Operator, problem, device: DeviceSpec, every: bool) -> list:
    """The configuration the plan picks for Triton; with `every`, all its legal candidates."""
    if not hasattr(op.plan, "select"):
        return [None]
    selected = op.plan.select(problem, device, "triton")
    if not every or not hasattr(op.plan, "candidates"):
        return [selected]
    takes_backend = "backend" in inspect.signature(op.plan.candidates).parameters
    candidates = op.plan.candidates(problem, device, *(("triton",) if takes_backend else ()))
    is_legal = getattr(op.plan, "is_legal", lambda *_: "")
    legal = [c for c in candidates if type(c) is type(selected) and not is_legal(c, problem, device)]
    return [selected, *(c for c in legal if c != selected)]


def _descriptors(launched: tuple) -> bool:
    return any(t.startswith("tensordesc") for t in launched[1].values())


def _planned(op: Operator, config, problem) -> int:
    """Bytes of shared memory that the plan counts on; 0 where it does not count."""
    count = getattr(op.plan, "shared_memory", None)
    return count(config, problem) if count and len(inspect.signature(count).parameters) == 2 else 0


def record(op: Operator, arch: int, every: bool = False) -> Iterator[tuple[Kernel, tuple]]:
    """(kernel, what `triton.compile` needs) for each distinct compilation; a launcher that raises is a failed kernel.

    Without `every`, sizes that differ in divisibility alone count as one, and of the samples only those are taken that
    reach a kernel or operand types not seen yet.
    """
    device, launches, seen = DEVICES[arch], [], set()

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        launches.append((self, signature, constexprs, attrs, options))

    patched = JITFunction._do_compile, _device.spec
    JITFunction._do_compile, _device.spec = note, lambda _: device
    _Driver.arch = arch
    triton.runtime.driver.set_active(_Driver())
    try:
        for case, real, args in inputs(op.name):
            problem = op.problem(*args)
            if op.plan.backends(problem, device, ENVIRONMENT).get("triton"):
                continue
            for config in configs(op, problem, device, every):
                launches.clear()
                error = None
                try:
                    with torch.no_grad():
                        op.backends["triton"](config, *args)
                except Exception as e:
                    error = f"the launcher raised {type(e).__name__}: {e}".splitlines()[0]
                    yield Kernel(op.name, arch, "?", case, str(config), "", failures=[error]), ()
                if launches and getattr(config, "tma", False) and not any(map(_descriptors, launches)) and not error:
                    error = "no kernel takes the descriptors that the plan says"
                    yield Kernel(op.name, arch, "?", case, str(config), "", failures=[error]), ()
                for launched in launches:
                    fn, signature, constexprs, attrs, options = launched
                    name = fn.__name__.rpartition(".")[2]
                    operands = (name, *(t for t in signature.values() if t.startswith(("*", "tensordesc"))))
                    chosen = (operands, str(constexprs), str(options))
                    exact = (chosen, str(signature), str(attrs))
                    if (exact if every else chosen if real else operands) in seen:
                        continue
                    seen |= {operands, chosen, exact}
                    launch = f"{options.num_warps} warps, {options.num_stages} stages"
                    kernel = Kernel(op.name, arch, name, case, str(config), launch, tma=_descriptors(launched))
                    kernel.planned = _planned(op, config, problem)
                    yield kernel, (fn, signature, constexprs, attrs, options.__dict__)
    finally:
        JITFunction._do_compile, _device.spec = patched


def _tool(name: str, *arguments) -> str:
    return subprocess.run([NVIDIA_BIN / name, *arguments], capture_output=True, text=True, check=True).stdout


def wants_tensor_cores(ttir: str) -> bool:
    """Whether a dot has operands that the tensor cores take; IEEE fp32 runs on the ordinary units."""
    dots = [line for line in ttir.splitlines() if re.search(r"\btt\.dot(_scaled)?\b", line)]
    return any("xf32> *" not in d or "inputPrecision" in d for d in dots)


def read(kernel: Kernel, source: tuple) -> Kernel:
    """Compile, and fill in what the machine code says."""
    fn, signature, constexprs, attrs, options = source
    try:
        compiled = triton.compile(
            ASTSource(fn, signature, constexprs, attrs), target=GPUTarget("cuda", kernel.arch, 32), options=options
        )
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        kernel.failures.append(f"does not compile: {type(error).__name__}: {lines[-1].strip()}")
        return kernel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = _tool("cuobjdump", "-res-usage", cubin.name), _tool("nvdisasm", "-c", cubin.name)
    kernel.shared = compiled.metadata.shared
    kernel.registers = int(re.search(r"REG:(\d+)", usage)[1])
    kernel.spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))  # the report's LOCAL stays 0 when registers spill
    kernel.mma = tuple(sorted(set(MMA.findall(sass))))
    limit = DEVICES[kernel.arch].shared_memory
    if kernel.shared > limit:
        kernel.failures.append(f"shared memory {kernel.shared} past the limit of {limit} bytes")
    if kernel.shared > kernel.planned > 0:
        kernel.failures.append(f"shared memory {kernel.shared}, the plan counts on {kernel.planned} bytes")
    if kernel.tma and not TMA.search(sass):
        kernel.failures.append("descriptors without TMA loads")
    if kernel.spills:
        kernel.failures.append(f"{kernel.spills} spill instructions")
    if not kernel.mma and wants_tensor_cores(compiled.asm["ttir"]):
        kernel.failures.append("a dot without tensor-core instructions")
    return kernel


_pending: list[tuple[Kernel, tuple]] = []


def _read_pending(index: int) -> Kernel:
    return read(*_pending[index])


def compile_all(families: list[str], archs: list[int], every: bool, jobs: int) -> list[Kernel]:
    torch.set_num_threads(1)
    for op in OPERATORS.values():
        if op.family in families and "triton" in op.backends:
            for arch in archs:
                _pending.extend(record(op, arch, every))
    failed = [k for k, source in _pending if not source]
    todo = [i for i, (_, source) in enumerate(_pending) if source]
    with ProcessPoolExecutor(max(1, min(jobs, len(todo))), mp_context=get_context("fork")) as pool:
        return failed + list(pool.map(_read_pending, todo))


def show(kernels: list[Kernel]) -> None:
    for k in kernels:
        instructions = " ".join(k.mma[:2]) or "-"
        print(
            f"sm_{k.arch} {k.op}/{k.name}  shared {k.shared}  registers {k.registers}  spills {k.spills}  "
            f"{instructions}  [{k.options}; {k.config}; {k.case}]" + "".join(f"\n    FAILED {f}" for f in k.failures)
        )


def main() -> int:
    families = sorted({op.family for op in OPERATORS.values() if "triton" in op.backends})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=families, default=families, metavar="FAMILY")
    parser.add_argument("--arch", nargs="+", type=int, choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--all", action="store_true", help="every legal candidate, not only what the plan picks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kernels: list[Any] = compile_all(options.op, options.arch, options.all, options.jobs)
    if options.json:
        print(json.dumps([asdict(k) for k in kernels]))
    else:
        show(kernels)
        failed = sum(bool(k.failures) for k in kernels)
        print(f"triton {triton.__version__}: {len(kernels)} compilations, {failed} failed")
    return any(k.failures for k in kernels)


if __name__ == "__main__":
    sys.exit(main())
