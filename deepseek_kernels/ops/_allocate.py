"""Every output and scratch tensor of a kernel is born here, so that tests can poison and guard them."""

from collections.abc import Sequence

import torch


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised and contiguous."""
    return torch.empty(shape, dtype=dtype, device=device)
