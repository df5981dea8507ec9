"""What measured times say against the model: which backend first, and which of a kernel's configurations."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

ROWS = ("m", "num_rows", "num_tokens", "b")
"""The size of a problem that varies from call to call; of those that a Problem has, the first."""
NEAR = 2.0
"""How far apart in that size a problem may be from the one that was measured for it."""


@dataclass(frozen=True)
class Measured:
    """One backend and configuration on one problem. `config` is None where the backend has no choice."""

    backend: str
    config: Any
    microseconds: float


Table = Mapping[tuple[str, Any], Sequence[Measured]]
"""(op, problem) -> what was measured, the fastest first."""


def options(plan, problem, device, backend: str) -> list[Any]:
    """Every legal configuration of `backend`, that of the model first; [None] where it has no choice."""
    if not hasattr(plan, "select"):
        return [None]
    chosen = plan.select(problem, device, backend)
    takes_backend = "backend" in signature(plan.candidates).parameters
    candidates = list(plan.candidates(problem, device, *((backend,) if takes_backend else ())))
    if chosen not in candidates:  # this backend has no choice, or another kernel's candidates are not for it
        return [chosen]
    is_legal = getattr(plan, "is_legal", lambda *_: "")
    return [chosen, *(c for c in candidates if c != chosen and (c is None or not is_legal(c, problem, device)))]


def lookup(table: Table, op: str, problem) -> Sequence[Measured]:
    """What was measured for this problem or for the nearest one that differs in its rows alone; () if nothing was."""
    exact = table.get((op, problem))
    if exact:
        return exact
    names = {f.name for f in dataclasses.fields(problem)}
    field = next((f for f in ROWS if f in names), "")
    rows = getattr(problem, field, 0)
    if not rows:
        return ()
    near: list[tuple[float, Sequence[Measured]]] = []
    for (name, other), found in table.items():
        if name == op and (have := getattr(other, field, 0)) and dataclasses.replace(other, **{field: rows}) == problem:
            near.append((abs(math.log(have / rows)), found))
    distance, found = min(near, key=lambda pair: pair[0], default=(math.inf, ()))
    return found if distance <= math.log(NEAR) else ()


def order(measured: Sequence[Measured], default: Sequence[str]) -> tuple[str, ...]:
    """`default` with the measured backends before the others, the fastest first."""
    first = dict.fromkeys(m.backend for m in measured if m.backend in default)
    return *first, *(b for b in default if b not in first)


def config(measured: Sequence[Measured], backend: str, options: Sequence[Any]) -> Any:
    """The fastest measured configuration that is among the options, or the option most like it; else the first one."""
    for m in measured:
        if m.backend == backend and (found := [c for c in options if _alike(c, m.config) > 0.5]):
            return max(found, key=lambda c: _alike(c, m.config))
    return options[0]


_OF_SIZE = frozenset({"ctas", "group_m", "num_programs", "parts", "raster"})
"""Fields that follow from the problem's size: they do not tell one tile from another."""


def _alike(a, b) -> float:
    """The fraction of equal fields, but for those that follow from the size."""
    if type(a) is not type(b):
        return 0.0
    if a is None:
        return 1.0
    names = [f.name for f in dataclasses.fields(a) if f.name not in _OF_SIZE]
    return sum(getattr(a, n) == getattr(b, n) for n in names) / len(names)
