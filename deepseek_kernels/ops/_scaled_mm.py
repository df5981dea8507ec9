"""torch's block-scaled `scaled_mm` behind the face of `fp8_matmul`: its layouts, its padding, and what it leaves out.

The rules are those of torch's `_scaled_mm_v2` and of cuBLASLt, for 1x128 and 128x128 scales: compute capability 9.0;
a row-major, b column-major, rows of whole 16 bytes; n and k multiples of 16; 1x128 scales MN-major without a gap, hence
m a multiple of 4; 128x128 scales K-major with the blocks of k padded to a multiple of 4; a bias of 16 bits, and only
where the result has the same dtype. `plan.fp8_matmul` refuses what cannot be arranged; the rest is arranged here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..shapes import align_up
from . import _allocate

_SCALE_ROWS = 4
"""cuBLASLt reads scales four at a time."""


class Operands(NamedTuple):
    """What `scaled_mm` takes: a [m4, k], b [k, n] column-major, both scales in the strides that it demands."""

    a: torch.Tensor
    scale_a: torch.Tensor
    b: torch.Tensor
    scale_b: torch.Tensor


def operands(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    vector_rows: Callable[[torch.Tensor], torch.Tensor],
) -> Operands:
    """Views of what fits already, copies of what does not.

    Args:
        vector_rows: a tensor of the same values whose rows are contiguous, aligned and whole 16 bytes.
    """
    per_row = scale_b.shape[0] == b.shape[0]
    m4 = align_up(a.shape[0], _SCALE_ROWS)
    return Operands(
        vector_rows(a) if m4 == a.shape[0] else _pad_rows(a, m4),
        _columns(scale_a, m4),
        vector_rows(b).t(),
        _columns(scale_b, b.shape[0]) if per_row else _columns(scale_b.t(), align_up(scale_b.shape[1], _SCALE_ROWS)),
    )


def _pad_rows(t: torch.Tensor, rows: int) -> torch.Tensor:
    padded = _allocate.empty((rows, t.shape[1]), t.dtype, t.device)
    padded[: t.shape[0]] = t
    padded.view(torch.uint8)[t.shape[0] :] = 0
    return padded


def _columns(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, columns] with strides (1, rows), zero past the rows that there are."""
    have, columns = scale.shape
    if have == rows and scale.stride() == (1, rows) and scale.data_ptr() % 16 == 0:
        return scale
    out = _allocate.empty((columns, rows), scale.dtype, scale.device)
    out[:, :have] = scale.t()
    out[:, have:] = 0
    return out.t()


def product(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    vector_rows: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """[m, n] of out_dtype; m, n and k are not 0. What the library does not add or write goes through fp32."""
    bf16 = torch.bfloat16
    inside = out_dtype in (bf16, torch.float32) if bias is None else out_dtype == bias.dtype == bf16
    recipe = F.ScalingType
    per_row = scale_b.shape[0] == b.shape[0]
    given = operands(a, scale_a, b, scale_b, vector_rows)
    d = F.scaled_mm(
        given.a, given.b, given.scale_a, recipe.BlockWise1x128,
        given.scale_b, recipe.BlockWise1x128 if per_row else recipe.BlockWise128x128,
        bias=bias.contiguous() if inside and bias is not None else None,
        output_dtype=out_dtype if inside else torch.float32,
    )[: a.shape[0]]  # fmt: skip
    if bias is not None and not inside:
        d.add_(bias)
    return d.to(out_dtype)
