"""Valid and bad inputs of every op, one module per family.

A module has `SAMPLES: dict[str, Callable[[torch.Generator], list[Sample]]]` and `BAD: dict[str, ... list[Bad]]`,
keyed by op name as registered. They drive the contract test, the ahead-of-time compile and opcheck, so they are
small (a Triton interpreter run takes a second per few dozen programs).
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..compare import EXACT, Tolerance


@dataclass(frozen=True)
class Sample:
    """Arguments of one valid call of `torch.ops.deepseek_kernels.<op>`.

    Attributes:
        tolerance: one per output (or one for all), against the reference.
        mutated: names of the arguments that the schema says are written to.
        any_strides: names of tensor arguments that may also come with permuted strides.
        grad: names of the float arguments whose gradients are checked.
        defined: (outputs) -> outputs with everything the op leaves undefined masked out; None where all is defined.
    """

    name: str
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tolerance: Tolerance | tuple[Tolerance, ...] = EXACT
    mutated: tuple[str, ...] = ()
    any_strides: tuple[str, ...] = ()
    grad: tuple[str, ...] = ()
    defined: Callable | None = None

    def to(self, device) -> "Sample":
        def move(v):
            return v.to(device) if isinstance(v, torch.Tensor) else v

        return replace(
            self, args=tuple(move(a) for a in self.args), kwargs={k: move(v) for k, v in self.kwargs.items()}
        )


@dataclass(frozen=True)
class Bad:
    """Arguments that must be refused with `error`, whose message must match `match` (a regular expression)."""

    name: str
    args: tuple
    error: type[Exception]
    match: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def _module(operator):
    return importlib.import_module(f"{__name__}.{operator.family}")


def samples(operator, seed: int = 0) -> list[Sample]:
    return _module(operator).SAMPLES[operator.name](torch.Generator().manual_seed(seed))


def bad(operator, seed: int = 0) -> list[Bad]:
    return _module(operator).BAD[operator.name](torch.Generator().manual_seed(seed))
