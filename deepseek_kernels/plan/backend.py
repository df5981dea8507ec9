"""Which backend runs a case: one pure function of what each backend says about it."""

from collections.abc import Mapping
from dataclasses import dataclass

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")
"""Every backend, in the default order of preference."""

_ON_HOPPER = (
    "fp8_grouped_matmul", "fp8_grouped_matmul_masked", "fp8_grouped_matmul_wgrad", "fp8_matmul", "fp8_quantize",
    "fp8_quantize_both", "fp8_dequantize", "moe_gate", "moe_permute", "moe_sort", "moe_unpermute",
)  # fmt: skip
VALIDATED: Mapping[tuple[str, str], frozenset[int]] = {(op, "cuda"): frozenset({90}) for op in _ON_HOPPER}
"""(op, backend) -> architectures on which the tests of that compiled kernel have passed; benchmarks/results/nvidia-h200
has the list.

A compiled kernel outside this table runs only when it is asked for by name.
"""

TRITON_MIN_ARCH = 80

LIBRARY_MATMULS = ("grouped_mm", "scaled_mm")
"""Functions that a "torch" backend may hand over to; newer than the oldest torch we support."""


@dataclass(frozen=True)
class Environment:
    """What this process has, as plain values."""

    triton: bool = False
    interpret: bool = False  # TRITON_INTERPRET=1: Triton kernels run on CPU tensors
    extension_ops: frozenset[str] = frozenset()
    extension_archs: frozenset[int] = frozenset()
    on_model: bool = False  # the compiled kernels are a software model that takes CPU tensors
    extension_error: str = ""
    torch_functions: frozenset[str] = frozenset()  # what torch.nn.functional has of LIBRARY_MATMULS
    cuda: tuple[int, ...] = (0, 0)  # that torch was built with
    cpu_ops: frozenset[str] = frozenset()  # what the extension has for CPU tensors


@dataclass(frozen=True)
class Choice:
    """The outcome: `backend`, or none and why. `reasons` maps every other backend to why it was not taken."""

    backend: str | None
    reasons: Mapping[str, str]


def triton_reason(device, env: Environment, *, min_arch: int = TRITON_MIN_ARCH) -> str:
    """Why Triton cannot run on `device`; empty when it can."""
    if not env.triton:
        return "needs the triton package (pip install triton), which is not installed"
    if device.kind == "cpu":
        return "" if env.interpret else "needs a GPU (or TRITON_INTERPRET=1 to run the kernels in Triton's interpreter)"
    if device.arch < min_arch:
        return f"needs compute capability {min_arch / 10:.1f} or newer, the device has {device.arch / 10:.1f}"
    return ""


def cuda_reason(op: str, device, env: Environment, *, archs: tuple[int, ...] = (80, 90, 100)) -> str:
    """Why the compiled kernel of `op`, written for `archs`, cannot run on `device`; empty when it can."""
    if op not in env.extension_ops:
        return env.extension_error or f"this build of deepseek_kernels._C has no {op}"
    if device.kind == "cpu":
        return "" if env.on_model else "needs a GPU"
    if archs == (90,):
        runs = device.arch == 90 and 90 in env.extension_archs
    else:  # portable code: a binary for the same major version runs
        runs = any(a // 10 == device.arch // 10 and a <= device.arch for a in env.extension_archs)
    if runs:
        return ""
    have = ", ".join(f"{a / 10:.1f}" for a in sorted(env.extension_archs)) or "none"
    return f"compiled for compute capability {have}, the device has {device.arch / 10:.1f}"


def cpu_reason(op: str, device, env: Environment) -> str:
    """Why the compiled CPU kernel of `op` cannot run on `device`; empty when it can."""
    if device.kind != "cpu":
        return "runs on CPU tensors only"
    if op not in env.cpu_ops:
        return f"this installation of deepseek_kernels._C has no CPU kernel for {op}"
    return ""


def cpu_reference_reason(device) -> str:
    """Why a path for CPU tensors only cannot run; empty when it can."""
    return "" if device.kind == "cpu" else "runs on CPU tensors only"


def choose(
    op: str, device, reasons: Mapping[str, str], *, forced: str | None = None, order: tuple[str, ...] = BACKENDS
) -> Choice:
    """Pick the backend of `op` on `device`.

    Args:
        reasons: backend -> why it cannot run the case, empty where it can. A backend that is absent does not exist
            for this op.
        forced: the backend asked for, which is then the only one considered.
        order: preference among those that can run.
    """
    missing = {b: f"{op} has no {b} implementation" for b in BACKENDS if b not in reasons}
    reasons = {**reasons, **missing}
    if forced is not None:
        return Choice(forced if not reasons[forced] else None, reasons)
    why = dict(reasons)
    chosen = None
    for backend in order:
        if why[backend]:
            continue
        if backend == "cuda" and device.arch not in VALIDATED.get((op, backend), frozenset()):
            why[backend] = "not yet validated on this architecture; ask for it by name to use it"
        elif backend == "triton" and device.kind == "cpu":
            why[backend] = "the interpreter is for checking; ask for it by name to use it"
        elif chosen is None:
            chosen = backend
        else:
            why[backend] = f"{chosen} is preferred"
    return Choice(chosen, why)
