"""Host time of an eager call without a gradient, from `torch.ops` to the backend and back.

The backend is replaced by one that returns outputs made before, on CPU tensors, so that what is left is the dispatcher,
checks, plan and choice. A launch comes on top. Microseconds of processor time, the smallest mean of `--repeat` batches.
"""

import argparse
import time

import torch

from deepseek_kernels.ops import _registry
from deepseek_kernels.testing import samples

BATCH = 500


def overhead(name: str, repeat: int) -> float | None:
    """Of one op, on its first sample that has something to do; None where nothing but the reference runs it here."""
    op = _registry.OPERATORS[name]
    args = op.fill(
        next(s.args for s in samples.samples(op) if all(t.numel() for t in s.args if torch.is_tensor(t))), {}
    )
    with torch.no_grad():
        out = op.overload(*args)
        backend, _ = _registry._select(name, op.problem(*args), *selection(op, args))
        if backend == "reference":
            return None
        stubs, saved = dict(op.backends), op.backends
        stubs[backend] = lambda config, *args: out
        object.__setattr__(op, "backends", stubs)
        try:
            return min(batch(op.overload, args) for _ in range(repeat))
        finally:
            object.__setattr__(op, "backends", saved)


def selection(op, args):
    device = _registry._device.of(args)
    return _registry._device.spec(device), _registry._forced[-1], _registry._extension.generation()


def batch(call, args) -> float:
    start = time.process_time()
    for _ in range(BATCH):
        call(*args)
    return (time.process_time() - start) / BATCH * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", metavar="NAME", default=list(_registry.OPERATORS))
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    for name in options.op:
        took = overhead(name, options.repeat)
        print(f"{name:<28} " + ("no backend here" if took is None else f"{took:6.1f} us"), flush=True)


if __name__ == "__main__":
    main()
