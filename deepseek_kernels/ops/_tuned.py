"""The measured table of this machine: a JSON file for each device, written by `python -m deepseek_kernels tune`.

    {"format": 1,
     "device": {...},        what it was measured on, and
     "versions": {...},      with; a file that says anything else than this process would is not read
     "measured": {op: [{"problem": {field: value}, "times": [{"backend", "config": null | {field: value}, "us"}]}]}}

Files are replaced in one step, so that a reader sees an old one or a new one. Writers take turns behind a lock.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..device import DeviceSpec
from ..plan.backend import BACKENDS
from ..plan.tuned import Measured, Table

FORMAT = 1


def folder() -> Path | None:
    """DEEPSEEK_KERNELS_TUNE_CACHE, or the user's cache; None where the variable is empty."""
    given = os.environ.get("DEEPSEEK_KERNELS_TUNE_CACHE")
    if given is not None:
        return Path(given) if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek_kernels"


def identity(device: DeviceSpec) -> dict[str, Any]:
    """What a measurement is bound to, apart from versions."""
    about: dict[str, Any] = {"name": device.name, "arch": device.arch, "num_sms": device.num_sms}
    if device.kind == "cpu":
        about |= {"processor": _processor(), "threads": torch.get_num_threads()}
    return about


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


@functools.cache
def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": torch.__version__}
    for package in ("deepseek_kernels", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def path(device: DeviceSpec) -> Path | None:
    """Of the table of `device`; None where there is to be none."""
    where = folder()
    name = " ".join(str(v) for v in identity(device).values())
    return where / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json") if where else None


@functools.cache
def table(device: DeviceSpec) -> Table:
    """Read once; empty where there is no file, or one that cannot be used, which is then said in a warning."""
    file = path(device)
    if file is None or not file.exists():
        return {}
    try:
        return _parse(json.loads(file.read_text()), device)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"deepseek_kernels: {file} is not used: {type(error).__name__}: {error}. Delete it, or measure again with "
            f"python -m deepseek_kernels tune",
            stacklevel=2,
        )
        return {}


def _parse(content: Any, device: DeviceSpec) -> Table:
    wanted = {"format": FORMAT, "device": identity(device), "versions": versions()}
    for key, value in wanted.items():
        if content[key] != value:
            raise ValueError(f"{key}: wanted {value}, got {content[key]}")
    found: dict[tuple[str, Any], list[Measured]] = {}
    for op, entries in content["measured"].items():
        plan = _plan(op)
        for entry in entries:
            problem = _made(plan.Problem, entry["problem"])
            times = [_measured(plan, **time) for time in entry["times"]]
            found[op, problem] = sorted(times, key=lambda m: m.microseconds)
    return found


def _plan(op: str):
    from ._registry import OPERATORS

    if op not in OPERATORS:
        raise ValueError(f"no op is called {op!r}")
    return OPERATORS[op].plan


def _made(kind: type, fields: dict[str, Any]) -> Any:
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})


def _measured(plan, backend: str, config: dict[str, Any] | None, us: float) -> Measured:
    if backend not in BACKENDS:
        raise ValueError(f"no backend is called {backend!r}")
    if not (isinstance(us, (int, float)) and math.isfinite(us) and us > 0):
        raise ValueError(f"us: wanted a time, got {us!r}")
    if config is None:
        return Measured(backend, None, us)
    fields = dict(config)
    kind = getattr(plan, fields.pop("kind"))
    return Measured(backend, _made(kind, fields), us)


def save(device: DeviceSpec, new: Table) -> Path:
    """Add `new` to the table of `device`, in place of what it says of the same problems."""
    file = path(device)
    if file is None:
        raise ValueError("DEEPSEEK_KERNELS_TUNE_CACHE: wanted a folder to write to, got an empty name")
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        forget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what cannot be read is replaced
            merged = {**table(device), **new}
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(_content(device, merged), out, indent=1)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    forget()
    return file


def _content(device: DeviceSpec, table: Table) -> dict[str, Any]:
    measured: dict[str, list] = {}
    for (op, problem), times in table.items():
        entry = {"problem": dataclasses.asdict(problem), "times": [_time(m) for m in times]}
        measured.setdefault(op, []).append(entry)
    return {"format": FORMAT, "device": identity(device), "versions": versions(), "measured": measured}


def _time(m: Measured) -> dict[str, Any]:
    config = m.config and {"kind": type(m.config).__name__, **dataclasses.asdict(m.config)}
    return {"backend": m.backend, "config": config, "us": m.microseconds}


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where nothing is tuned

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget() -> None:
    """Read the table again at its next use, and choose again."""
    from . import _registry

    table.cache_clear()
    _registry.forget()
