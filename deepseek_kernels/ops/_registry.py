"""The one torch.library.Library, and the path every call takes: check, plan, pick a backend, run it.

An op file calls `register` once per schema. Call cost matters here (`Library.define` + `impl` costs 2 us a call,
the `custom_op` decorator 16), so arguments that look the same are checked once and every choice is remembered.
`benchmarks/host_overhead.py` measures it.
"""

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..plan import tuned
from ..plan.backend import BACKENDS, Choice, choose
from . import _device, _extension, _tuned

NAMESPACE = "deepseek_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")  # module global: its finalizer would drop the ops

OPERATORS: dict[str, "Operator"] = {}
"""Every registered op by name, `name.overload` where it has one."""

_forced: list[str | None] = [None]
_debug = os.environ.get("DEEPSEEK_KERNELS_DEBUG") == "1"


class BackendError(RuntimeError):
    """The backend that was asked for cannot run the case."""


@dataclass(frozen=True)
class Operator:
    """One schema and everything that stands behind it. See `register`."""

    name: str
    schema: str
    check: Callable
    problem: Callable
    plan: ModuleType
    fake: Callable
    reference: Callable
    backends: Mapping[str, Callable]
    differentiable: bool
    check_values: Callable | None
    defaults: tuple = field(repr=False)
    keywords: tuple[str, ...] = field(repr=False)

    @property
    def packet(self):
        return getattr(getattr(torch.ops, NAMESPACE), self.name.partition(".")[0])

    @property
    def overload(self):
        return getattr(self.packet, self.name.partition(".")[2] or "default")

    @property
    def family(self) -> str:
        """The plan, reference and kernel file this op lives in."""
        return self.plan.__name__.rpartition(".")[2]

    def fill(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
        """All arguments in schema order; the dispatcher leaves trailing defaults out."""
        if len(args) == len(self.defaults):
            return args
        rest = self.defaults[len(args) :]
        if not kwargs:
            return args + rest
        return args + tuple(kwargs.get(k, d) for k, d in zip(self.keywords[len(args) :], rest, strict=True))

    def choice(self, problem, device, forced: str | None) -> Choice:
        env = _extension.environment()
        reasons = {"reference": "", **self.plan.backends(problem, device, env)}
        order = getattr(self.plan, "preference", lambda problem, device: BACKENDS)(problem, device)
        order = tuned.order(tuned.lookup(_tuned.table(device), self.name, problem), order)
        return choose(self.name.partition(".")[0], device, reasons, forced=forced, order=order)

    def config(self, problem, device, backend: str) -> Any:
        """The configuration for `backend`: as measured where there is a table, else as the plan has it."""
        if not hasattr(self.plan, "select"):
            return None
        measured = tuned.lookup(_tuned.table(device), self.name, problem)
        if not measured:
            return self.plan.select(problem, device, backend)
        return tuned.config(measured, backend, tuned.options(self.plan, problem, device, backend))

    def __call__(self, *args, **kwargs):
        args = self.fill(args, kwargs)
        key = (self.name, _forced[-1], _extension.generation(), torch.is_grad_enabled(), *map(_outline, args))
        backend, config, index = _decided.get(key) or self._decide(key, args)
        if _debug and self.check_values is not None and not (index is not None and _is_capturing()):
            self.check_values(*args)
        if backend == "reference":
            return self.reference(*args)
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self.backends[backend](config, *args)
        return self.backends[backend](config, *args)

    def _decide(self, key: tuple, args: tuple) -> tuple[str, Any, int | None]:
        """Check the arguments and choose, once for all calls of the same key: backend, configuration, GPU."""
        self.check(*args)
        problem, device = self.problem(*args), _device.of(args)
        chosen = _select(self.name, problem, _device.spec(device), _forced[-1], _extension.generation())
        if len(_decided) >= _MOST_DECISIONS:
            _decided.clear()
        decision = _decided[key] = (*chosen, device.index if device.type == "cuda" else None)
        return decision


_decided: dict[tuple, tuple[str, Any, int | None]] = {}
_MOST_DECISIONS = 8192


def _outline(a: Any) -> Any:
    """What checks and plans depend on: everything about a tensor but its values and its storage's address."""
    if isinstance(a, torch.Tensor):
        return a.dtype, a.shape, a.stride(), a.storage_offset(), a.device, a.requires_grad
    return tuple(a) if type(a) is list else a


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=8192)
def _select(name: str, problem, device, forced: str | None, generation: int) -> tuple[str, Any]:
    op = OPERATORS[name]
    choice = op.choice(problem, device, forced)
    if choice.backend is None:
        able = [b for b in BACKENDS if not choice.reasons[b]]
        raise BackendError(
            f"{name}: backend {forced!r} was asked for and cannot run this case on {device.name}: "
            f"{choice.reasons[str(forced)]}. Able to: {', '.join(able)}. "
            f"Choose one with deepseek_kernels.use_backend(...) or unset DEEPSEEK_KERNELS_BACKEND."
        )
    config = op.config(problem, device, choice.backend)
    if config is not None and os.environ.get("DEEPSEEK_KERNELS_PRINT_PLAN") == "1":
        print(f"{name}: {problem} on {device.name}: {choice.backend} {config}")
    return choice.backend, config


def forget() -> None:
    """Choose backends and configurations anew."""
    _decided.clear()
    _select.cache_clear()


def register(
    schema: str,
    *,
    check: Callable,
    problem: Callable,
    plan: ModuleType,
    fake: Callable,
    reference: Callable,
    backends: Mapping[str, Callable],
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    check_values: Callable | None = None,
    tags: tuple = (),
) -> Operator:
    """Define one op. Every callable takes all arguments of the schema, positionally, in its order.

    Args:
        schema: as torch.library wants it, without namespace.
        check: raises ValueError or TypeError; looks at shapes, dtypes, devices and strides only.
        problem: -> `plan.Problem`.
        fake: -> outputs of the right shape, stride and dtype.
        reference: -> outputs, plain torch, any device.
        backends: backend -> function(config, *args) -> outputs.
        backward, setup_context: as torch.library.register_autograd wants them. Without `backward` an input that
            requires grad is accepted and the backward pass raises NotImplementedError.
        check_values: raises ValueError; looks at offsets, ids and counts, hence waits for the device. Called with
            DEEPSEEK_KERNELS_DEBUG=1 only, and neither while tracing nor while a CUDA graph is captured.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=tags)
    packet, _, overload = name.partition(".")
    parsed = getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")._schema
    arguments = parsed.arguments
    op = Operator(
        name, schema, check, problem, plan, fake, reference, backends, backward is not None, check_values,
        tuple(a.default_value for a in arguments), tuple(a.name for a in arguments),
    )  # fmt: skip
    OPERATORS[name] = op
    for key in ("CPU", "CUDA"):
        _library.impl(name, op.__call__, key)

    def checked_fake(*args, **kwargs):
        args = op.fill(args, kwargs)
        check(*args)
        return fake(*args)

    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, checked_fake, lib=_library)
    if not parsed.is_mutable:

        def refuse(ctx, *grads):
            raise NotImplementedError(f"{name}: has no backward; call it under torch.no_grad() or detach its inputs")

        torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context, lib=_library)
        autograd = torch._library.autograd
        private = (
            (torch._C, "_any_requires_grad"),
            (torch._C, "_after_autograd_keyset"),
            (autograd, "make_autograd_impl"),
        )
        if all(hasattr(*name) for name in private):  # not in every torch
            formula = autograd.Info(backward or refuse, setup_context)
            _skip_autograd(op, autograd.make_autograd_impl(op.overload, formula))
    if op.packet not in flop_registry:  # a new overload makes a new packet
        register_flop_formula(op.packet, get_raw=True)(functools.partial(_flops, packet))
    return op


def _skip_autograd(op: Operator, with_gradient: Callable) -> None:
    """Where no gradient is asked for, go from the dispatcher straight to the op.

    torch's own kernel for the key, `with_gradient`, would dispatch once more, which costs as much as everything else
    before the launch. Anything but plain tensors (fake ones, functorch's, a dispatch mode) goes through that kernel.
    """
    keys, below, any_requires_grad = torch._C.DispatchKey, torch._C._after_autograd_keyset, torch._C._any_requires_grad
    for key, autograd in ((keys.CPU, "AutogradCPU"), (keys.CUDA, "AutogradCUDA")):
        plain = torch._C.DispatchKeySet(key).raw_repr()

        def kernel(keyset, *args, plain=plain, **kwargs):
            if (keyset & below).raw_repr() == plain and not (torch.is_grad_enabled() and any_requires_grad(*args)):
                return op(*args, **kwargs)
            return with_gradient(keyset, *args, **kwargs)

        _library.impl(op.name, kernel, autograd, with_keyset=True)


def _flops(packet: str, *args, out_val=None, **kwargs) -> int:
    """Of one call; the counter knows the packet only, so overloads are told apart by whether they return something."""
    overloads = [op for op in OPERATORS.values() if op.name.partition(".")[0] == packet]
    op = next((op for op in overloads if op.overload._schema.is_mutable == (out_val is None)), overloads[0])
    return op.plan.flops(op.problem(*op.fill(args, kwargs)))


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or DEEPSEEK_KERNELS_BACKEND, if any."""
    return _forced[-1]


@contextmanager
def use_backend(name: str | None):
    """Run every op of this package on one backend inside the `with` block, or raise where it cannot.

    Args:
        name: "cuda", "triton", "cpu", "torch", "reference", or None for the automatic choice.

    Holds for the whole process, so that a backward pass in another thread sees it too.
    """
    _forced.append(_valid(name, "use_backend"))
    try:
        yield
    finally:
        _forced.pop()


def _valid(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{where}: wanted one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced[0] = _valid(os.environ.get("DEEPSEEK_KERNELS_BACKEND") or None, "DEEPSEEK_KERNELS_BACKEND")


@dataclass(frozen=True)
class Explanation:
    """What would run, and why nothing else would. `str()` gives a short table."""

    op: str
    device: str
    problem: Any
    backend: str | None
    config: Any
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.backend or 'no backend'}", f"  problem {self.problem}"]
        if self.config is not None:
            lines.append(f"  config  {self.config}")
        lines += [f"  not {b}: {why}" for b, why in self.reasons.items() if why and b != self.backend]
        return "\n".join(lines)


def explain(op: str, *args, **kwargs) -> Explanation:
    """Which backend and configuration a call would use, and why not the others. Runs nothing.

    Args:
        op: name of the op, for example "mla_decode".
        *args, **kwargs: what `torch.ops.deepseek_kernels.<op>` would be called with.
    """
    if op not in OPERATORS:
        raise ValueError(f"explain: op: wanted one of {', '.join(sorted(OPERATORS))}, got {op!r}")
    operator = OPERATORS[op]
    unknown = set(kwargs) - set(operator.keywords)
    if unknown:
        raise TypeError(f"explain: {op} has no argument {', '.join(sorted(unknown))}")
    arguments = operator.overload._schema.arguments
    if len(args) > len(arguments):
        raise TypeError(f"explain: {op}: wanted at most {len(arguments)} arguments, got {len(args)}")
    given = {*operator.keywords[: len(args)], *kwargs}
    missing = [a.name for a in arguments if a.name not in given and not a.has_default_value()]
    if missing:
        raise TypeError(f"explain: {op}: wanted {', '.join(missing)} too")
    args = operator.fill(args, kwargs)
    operator.check(*args)
    problem = operator.problem(*args)
    device = _device.spec(_device.of(args))
    choice = operator.choice(problem, device, _forced[-1])
    config = operator.config(problem, device, choice.backend) if choice.backend is not None else None
    return Explanation(op, device.name, problem, choice.backend, config, choice.reasons)
