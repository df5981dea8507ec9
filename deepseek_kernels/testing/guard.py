"""Outputs and scratch filled with NaN beforehand and surrounded by guard bytes."""

from contextlib import contextmanager

import torch

from ..ops import _allocate

GUARD = 256  # bytes on either side; keeps 256-byte alignment
PATTERN = 0xA5


class GuardError(AssertionError):
    """A kernel wrote outside what it was given."""


@contextmanager
def guarded_allocations():
    """Inside: every tensor an op allocates is poisoned and guarded. On leaving: the guards are checked."""
    buffers: list[tuple[torch.Tensor, int]] = []
    plain = _allocate.empty

    def guarded(shape, dtype, device):
        size = dtype.itemsize
        for s in shape:
            size *= int(s)
        buffer = torch.full((size + 2 * GUARD,), PATTERN, dtype=torch.uint8, device=device)
        inner = buffer[GUARD : GUARD + size].fill_(0xFF)  # NaN in every float format, -1 in every integer
        buffers.append((buffer, size))
        return inner.view(dtype).view(tuple(shape)) if size else torch.empty(tuple(shape), dtype=dtype, device=device)

    _allocate.empty = guarded
    try:
        yield
    finally:
        _allocate.empty = plain
    for buffer, size in buffers:
        before, after = buffer[:GUARD], buffer[GUARD + size :]
        if (before != PATTERN).any() or (after != PATTERN).any():
            raise GuardError(f"wrote outside an allocation of {size} bytes")
