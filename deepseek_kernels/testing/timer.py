"""Times of several functions on the same footing: in rotation, warm-up outside, the last-level cache cold unless a CPU
is asked for warm ones.

On a GPU a function is captured into a CUDA graph with one call per input set and timed by events, so that what is
measured is the device. The cache is overwritten before every replay and each input set is read once in a replay: every
call finds its inputs cold. A function that cannot be captured is launched eagerly between two events instead.

On a CPU a sample during which another process took the processor away is dropped: two threads that wait for each other
then show the scheduler's time slice, whatever they run.
"""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..ops import _device

Calls = Sequence[Callable[[], object]]
"""One function on one or more input sets."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: quantiles on the device, and the host's median time to launch (None on a CPU)."""

    p20: float
    p50: float
    p80: float
    host: float | None
    method: str  # "graph", "events", "clock", or "disturbed clock" where too few samples were left alone


class Flush:
    """Overwrites a buffer of three times the last-level cache."""

    def __init__(self, device: torch.device):
        self._buffer = torch.empty(3 * _device.spec(device).l2 // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self._buffer.fill_(0)


def measure(
    functions: Mapping[str, Calls],
    device: torch.device,
    *,
    seconds: float = 0.5,
    uncapturable: frozenset[str] = frozenset(),
    warm: bool = False,
) -> dict[str, Timing]:
    """Time every function, one sample each in turn.

    Args:
        functions: name -> calls.
        seconds: about how long all samples of one function may take; at least 3 and at most 50 are taken.
        uncapturable: names of functions that synchronise with the host.
        warm: on a CPU, leave the caches as they are: what a function reads may have been written just before.
    """
    if device.type == "cuda":
        return _measure_cuda(functions, device, seconds, uncapturable)
    return _measure_cpu(functions, device, seconds, warm)


def _quantiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return (samples[0],) * 3
    cut = statistics.quantiles(samples, n=10, method="inclusive")
    return cut[1], cut[4], cut[7]


def _rounds(slowest: float, seconds: float) -> int:
    return int(min(50, max(3, seconds / max(slowest, 1e-6))))


def _measure_cpu(functions, device, seconds, warm) -> dict[str, Timing]:
    flush = Flush(device)

    def sample(calls: Calls) -> tuple[float, bool]:
        if not warm:
            flush()
        switches, start, worked = _taken_away(), time.perf_counter(), time.thread_time()
        for call in calls:
            call()
        worked, took = time.thread_time() - worked, time.perf_counter() - start
        return took / len(calls) * 1e6, _taken_away() == switches and worked > 0.9 * took - 2e-5

    first = {name: min(sample(calls)[0], sample(calls)[0]) * len(calls) for name, calls in functions.items()}
    rounds = {name: _rounds(took / 1e6, seconds) for name, took in first.items()}
    every: dict[str, list[float]] = {name: [] for name in functions}
    alone: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + _PATIENCE * seconds * len(functions)
    while wanting := [
        name
        for name in functions
        if len(every[name]) < rounds[name] or (len(alone[name]) < rounds[name] and time.perf_counter() < deadline)
    ]:
        for name in wanting:
            took, undisturbed = sample(functions[name])
            every[name].append(took)
            if undisturbed:
                alone[name].append(took)
    timings = {}
    for name in functions:
        enough = len(alone[name]) >= 3
        samples = alone[name] if enough else every[name]
        timings[name] = Timing(*_quantiles(samples), None, "clock" if enough else "disturbed clock")
    return timings


_PATIENCE = 4  # times as long as the samples should take


def _taken_away() -> int:
    """How often another process has taken the processor from one of our threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _capture(calls: Calls):
    """A graph that makes every call once, or None where the function cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _host_time(calls: Calls, launches: int = 30) -> float:
    samples = []
    torch.cuda.synchronize()
    for i in range(launches):
        start = time.perf_counter()
        calls[i % len(calls)]()
        samples.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(samples) * 1e6


def _measure_cuda(functions, device, seconds, uncapturable) -> dict[str, Timing]:
    with torch.cuda.device(device):
        flush = Flush(device)
        runs, host, methods = {}, {}, {}
        for name, calls in functions.items():
            for call in (*calls, *calls[:1]):  # every input set once, so that first-call work is behind us
                call()
            host[name] = _host_time(calls)
            graph = None if name in uncapturable else _capture(calls)
            methods[name] = "graph" if graph else "events"
            runs[name] = (graph.replay, len(calls)) if graph else (calls[0], 1)

        def sample(name) -> float:
            run, count = runs[name]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) * 1e3 / count

        slowest = max(sample(name) * runs[name][1] for name in functions)
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(_rounds(slowest / 1e6, seconds)):
            for name in functions:
                samples[name].append(sample(name))
        return {name: Timing(*_quantiles(s), host[name], methods[name]) for name, s in samples.items()}
