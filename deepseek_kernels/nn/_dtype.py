"""Modules whose tensors keep their dtype: FP8 weights and their scales, rotary tables, the gate."""

from collections.abc import Callable

import torch


def keep_dtype(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` of `nn.Module._apply` without its change of dtype: `module.to("cuda", torch.bfloat16)` only moves."""

    def move(t: torch.Tensor) -> torch.Tensor:
        moved = fn(t)
        return moved if moved.dtype is t.dtype else t.to(moved.device)

    return move


class KeepsDtype(torch.nn.Module):
    """A module that `.to(dtype)`, `.half()` and `.bfloat16()` move and never cast."""

    def _apply(self, fn, recurse=True):
        return super()._apply(keep_dtype(fn), recurse)
