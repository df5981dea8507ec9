"""Tensor descriptors of TMA: which operands they take."""

import torch

_BYTES = 16
"""Of which addresses, and all strides but the last, are multiples."""


def take(*operands: torch.Tensor) -> bool:
    """Whether they take every [groups, rows, columns]; where columns are not contiguous, a contiguous copy of it. As
    all plans it does not look at addresses: that of a storage is taken to be aligned."""
    for t in operands:
        group, row, column = t.stride()
        apart = row >= t.shape[2] and group >= t.shape[1] * row and group % max(row, 1) == 0
        aligned = row * t.element_size() % _BYTES == t.storage_offset() * t.element_size() % _BYTES == 0
        if column == 1 and not (apart and aligned):
            return False
    return True


def operand(config, t: torch.Tensor) -> torch.Tensor:
    """`t`, or where the Triton kernel of `config` needs it a copy whose storage is aligned."""
    return t.clone(memory_format=torch.contiguous_format) if config.tma and t.data_ptr() % _BYTES else t
