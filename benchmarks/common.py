"""What a `bench_<op>.py` declares, and how it becomes numbers.

A bench file has `BENCHES`, a list of `Bench`: the cases, how to make inputs, and the peers. Our own backends, the
bytes, the flops and the check against the reference come from the registry.
"""

import functools
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace  # noqa: F401  (replace: for derived benches)
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import deepseek_kernels
from deepseek_kernels.ops import _device, _registry
from deepseek_kernels.testing.compare import EXACT, Tolerance, assert_close
from deepseek_kernels.testing.timer import Timing, measure

ROOT = Path(__file__).parents[1]
INPUT_SETS = 16
INPUT_BYTES = 2**30


@dataclass(frozen=True)
class Case:
    """One problem. `dims` are keyword arguments of the bench's `inputs`; `quick` cases take milliseconds on a CPU."""

    name: str
    dims: Mapping[str, Any]
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Peer:
    """What a user would otherwise run.

    Attributes:
        run: called with what `prepare` returned, or with the arguments of the op.
        prepare: (*args) -> tuple, outside the timing: layouts and casts that a user does once.
        needs: modules that must be importable; the peer is left out where they are not.
        available: (device) -> whether the peer exists in this torch on this device.
        tolerance: where the peer rounds elsewhere than we do; None takes the bench's.
        capturable: False where it synchronises with the host.
        outputs: (result, args) -> the op's outputs, before they are compared.
    """

    run: Callable
    prepare: Callable | None = None
    needs: tuple[str, ...] = ()
    available: Callable[[torch.device], bool] = lambda device: True
    tolerance: Tolerance | tuple[Tolerance, ...] | None = None
    capturable: bool = True
    outputs: Callable | None = None


@dataclass(frozen=True)
class Bench:
    """One op, or one way to call it.

    Attributes:
        op: name in the registry; gives our backends, `flops`, `bytes` and the reference.
        inputs: (device, generator, **dims) -> the op's arguments, in schema order.
        peers: name -> Peer or plain function of the op's arguments.
        tolerance: of the outputs against the reference, as in `testing.samples`.
        rate: operand dtype whose measured matmul rate is the compute ceiling.
        name: shown in tables; the op's name where empty.
        call: what our side runs, a function of the op's arguments; the op itself where None.
        arguments: (*inputs) -> the op's arguments, where `call` is a composition of other inputs. Each of its ops then
            chooses its own backend.
        expected: (*args) -> outputs, where the reference is too slow or too large.
        mutated: positions of arguments that the call writes to.
        cost: (problem, *args) -> (flops, bytes), where the op's own do not describe `call`.
        defined: (outputs, args) -> outputs with everything left undefined masked out.
    """

    op: str
    cases: tuple[Case, ...]
    inputs: Callable
    peers: Mapping[str, "Peer | Callable"] = field(default_factory=dict)
    tolerance: Tolerance | tuple[Tolerance, ...] = EXACT
    rate: str = "bf16"
    name: str = ""
    call: Callable | None = None
    arguments: Callable | None = None
    expected: Callable | None = None
    mutated: tuple[int, ...] = ()
    cost: Callable | None = None
    defined: Callable | None = None

    @property
    def label(self) -> str:
        return self.name or self.op

    @property
    def operator(self):
        return _registry.OPERATORS[self.op]

    def of_op(self, args: tuple) -> tuple:
        """All arguments of the op that describes a call with these inputs."""
        return self.operator.fill(self.arguments(*args) if self.arguments else args, {})


@dataclass(frozen=True)
class Provider:
    """Something that runs a case: `run(*args)`, one of ours if it has a backend."""

    name: str
    run: Callable
    backend: str = ""
    config: str = ""
    prepare: Callable | None = None
    tolerance: Tolerance | tuple[Tolerance, ...] | None = None
    capturable: bool = True
    outputs: Callable | None = None


def ours(bench: Bench, args: tuple) -> Iterator[Provider]:
    """Our backends that can run `args`; the reference only where nothing else can."""
    operator = bench.operator
    call = bench.call or operator.overload
    if bench.arguments:
        yield Provider("ours automatic", call, "automatic")
        return
    found = False
    for backend in (*operator.backends, "reference"):
        if backend == "reference" and found:
            continue
        with deepseek_kernels.use_backend(backend):
            explanation = deepseek_kernels.explain(bench.op, *args)
        if explanation.backend is None:
            continue
        found = True

        def run(*args, backend=backend):
            with deepseek_kernels.use_backend(backend):
                return call(*args)

        yield Provider(f"ours {backend}", run, backend, str(explanation.config or ""))


def peers(bench: Bench, device: torch.device, compiled: bool) -> Iterator[Provider]:
    for name, peer in bench.peers.items():
        peer = peer if isinstance(peer, Peer) else Peer(peer)
        if any(importlib.util.find_spec(module) is None for module in peer.needs) or not peer.available(device):
            continue
        options = dict(prepare=peer.prepare, tolerance=peer.tolerance, outputs=peer.outputs)
        yield Provider(name, peer.run, capturable=peer.capturable, **options)
        if compiled and name == "torch eager":
            yield Provider("torch.compile", torch.compile(peer.run, dynamic=False), **options)


def _tensors(values) -> Iterator[torch.Tensor]:
    for v in values:
        if isinstance(v, torch.Tensor):
            yield v
        elif isinstance(v, (tuple, list)):
            yield from _tensors(v)


def clone(args: tuple) -> tuple:
    """The same values and strides in fresh memory."""

    def copy(v):
        if isinstance(v, torch.Tensor):
            new = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
            return new.copy_(v.detach()).requires_grad_(v.requires_grad)
        return type(v)(map(copy, v)) if type(v) in (tuple, list) else v

    return tuple(map(copy, args))


def _outputs(bench: Bench, args: tuple, result) -> tuple[torch.Tensor, ...]:
    out = () if result is None else tuple(result) if isinstance(result, (tuple, list)) else (result,)
    out += tuple(args[i] for i in bench.mutated)
    return bench.defined(out, args) if bench.defined else out


def relative_error(actual: tuple, expected: tuple) -> float:
    """Largest |actual - expected| / |expected| in the norm, over the outputs."""
    worst = 0.0
    for a, e in zip(actual, expected):
        a, e = (t.detach().to(torch.float64).nan_to_num(0, 0, 0).flatten() for t in (a, e))
        if a.numel():
            worst = max(worst, ((a - e).norm() / e.norm().clamp(min=1e-30)).item())
    return worst


def check(actual: tuple, expected: tuple, tolerance) -> str:
    """Why the result is wrong; empty when it is right."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs where {len(expected)} were expected"
    tolerances = tolerance if isinstance(tolerance, tuple) else (tolerance,) * len(expected)
    for i, (a, e, t) in enumerate(zip(actual, expected, tolerances)):
        try:
            assert_close(a, e, t, f"output {i}")
        except AssertionError as error:
            return str(error)
    return ""


@functools.cache
def ceilings(device: torch.device, rate: str, quick: bool) -> dict[str, float]:
    """Measured copy bandwidth (read and written bytes per second) and matmul rate (operations per second)."""
    size = 2**30 if device.type == "cuda" else 2**26 if quick else 2**28
    a, b = (
        torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2)
    )  # untouched zero pages are free to read
    words, to = a.view(torch.int32), b.view(torch.int32)
    # on a GPU by a kernel: the copy that a graph holds reaches two thirds of it on an H200
    copy = (lambda: torch.add(words, 1, out=to)) if device.type == "cuda" else (lambda: b.copy_(a))
    copied = measure({"copy": [copy]}, device).get("copy")
    n = 8192 if device.type == "cuda" else 768 if quick else 2048
    multiplied = measure({"matmul": [_matmul(n, rate, device)]}, device).get("matmul")
    return {"copy": 2 * size / copied.p50 * 1e6, f"matmul {rate}": 2 * n**3 / multiplied.p50 * 1e6}


def _matmul(n: int, rate: str, device: torch.device) -> Callable:
    x, w = (torch.randn(n, n, device=device) for _ in range(2))
    if rate == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        x, w = (t.to(torch.float8_e4m3fn) for t in (x, w))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(rate, torch.bfloat16)
    x, w = x.to(dtype), w.to(dtype)
    return lambda: x @ w.t()


def reference(bench: Bench, args: tuple) -> tuple[torch.Tensor, ...]:
    """What every provider has to give."""
    fresh = clone(args)
    if bench.expected:
        return _outputs(bench, fresh, bench.expected(*fresh))
    with deepseek_kernels.use_backend("reference"):
        return _outputs(bench, fresh, (bench.call or bench.operator.overload)(*fresh))


def try_once(bench: Bench, provider: Provider, args: tuple, expected: tuple) -> tuple[str, float]:
    """(why its result is wrong, relative error)."""
    fresh = clone(args)
    result = provider.run(*(provider.prepare(*fresh) if provider.prepare else fresh))
    actual = _outputs(bench, fresh, provider.outputs(result, fresh) if provider.outputs else result)
    return check(actual, expected, provider.tolerance or bench.tolerance), relative_error(actual, expected)


def label(bench: Bench, warm: bool) -> str:
    """Under which results are kept."""
    return bench.label + " warm" if warm else bench.label


def _record(bench: Bench, case: Case, provider: str, backend: str, warm: bool) -> dict[str, Any]:
    dims = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in case.dims.items()}
    names = {"op": label(bench, warm), "case": case.name, "dims": dims, "provider": provider, "backend": backend}
    return names | {"status": "ok"}


def failure(bench: Bench, case: Case, reason: str, warm: bool) -> dict[str, Any]:
    """The record of a case that broke before any provider ran."""
    return _record(bench, case, "inputs and reference", "reference", warm) | {"status": "failed", "reason": reason}


def run_case(
    bench: Bench,
    case: Case,
    device: torch.device,
    *,
    quick: bool = False,
    compiled: bool = False,
    seconds: float | None = None,
    warm: bool = False,
) -> list[dict[str, Any]]:
    """One record per provider: checked first, and timed only where right."""
    operator = bench.operator
    args = bench.inputs(device, torch.Generator(device).manual_seed(0), **case.dims)
    problem = operator.problem(*bench.of_op(args))
    cost = bench.cost or (lambda problem, *args: (operator.plan.flops(problem), operator.plan.bytes(problem)))
    flops, num_bytes = cost(problem, *args)
    records, right = [], []
    with torch.set_grad_enabled(any(t.requires_grad for t in _tensors(args))):
        expected = reference(bench, args)
        for provider in (*ours(bench, args), *peers(bench, device, compiled)):
            record = _record(bench, case, provider.name, provider.backend, warm)
            record |= {"config": provider.config, "flops": flops, "bytes": num_bytes}
            records.append(record)
            try:
                reason, record["relative_error"] = try_once(bench, provider, args, expected)
            except Exception as error:  # a provider that cannot run must not hide the others
                record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            if reason:
                record |= {"status": "wrong", "reason": reason}
            else:
                right.append(provider)
        del expected
        timings = _time(bench, right, args, device, seconds or (0.05 if quick else 0.5), warm) if right else {}
    roof = ceilings(device, bench.rate, quick) if right else {}
    peer_times = {p.name: timings[p.name].p50 for p in right if not p.backend}
    for record in records:
        if record["status"] == "ok":
            record |= _figures(timings[record["provider"]], flops, num_bytes, roof, bench.rate)
            if record["backend"]:
                record["ratio"] = {n: t / record["time_us"]["p50"] for n, t in peer_times.items()}
    return records


def _time(
    bench: Bench, providers: list[Provider], args: tuple, device: torch.device, seconds: float, warm: bool
) -> dict[str, Timing]:
    size = sum(t.nbytes for t in _tensors(args))
    count = max(1, min(INPUT_SETS, INPUT_BYTES // max(size, 1))) if device.type == "cuda" else 1
    sets = [args, *(clone(args) for _ in range(count - 1))]
    functions = {
        p.name: [functools.partial(p.run, *(p.prepare(*s) if p.prepare else s)) for s in sets] for p in providers
    }
    uncapturable = frozenset(p.name for p in providers if not p.capturable)
    return measure(functions, device, seconds=seconds, uncapturable=uncapturable, warm=warm)


def _figures(t: Timing, flops: int, num_bytes: int, roof: dict[str, float], rate: str) -> dict[str, Any]:
    memory, compute = num_bytes / roof["copy"] * 1e6, flops / roof[f"matmul {rate}"] * 1e6
    return {
        "time_us": {"p20": t.p20, "p50": t.p50, "p80": t.p80},
        "gb_s": num_bytes / t.p50 / 1e3,
        "tflop_s": flops / t.p50 / 1e6,
        "roof_us": max(memory, compute),
        "bound": "memory" if memory >= compute else "compute",
        "percent_of_roof": 100 * max(memory, compute) / t.p50,
        "host_us": t.host,
        "method": t.method,
        "ceilings": roof,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of clocks, power and heat; None where there is no nvidia-smi."""
    fields = "name,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return dict(zip(fields.split(","), text.splitlines()[0].split(", "))) if text else None


def environment(device: torch.device) -> dict[str, Any]:
    """What a number needs beside it to be repeated."""
    packages = ("deepseek_kernels", "torch", "triton", "flash_mla", "deep_gemm", "flashinfer-python", "transformers")
    dirty = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "spec": asdict(_device.spec(device)),
        "threads": torch.get_num_threads(),
        "clocks": clocks() if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {p: v for p in packages if (v := _version(p))},
        "commit": os.environ.get("DEEPSEEK_KERNELS_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "dirty": None if dirty is None else bool(dirty),
        "command": shlex.join(["python", *sys.argv]),
    }


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
