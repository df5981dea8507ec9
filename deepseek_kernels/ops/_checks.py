"""Checks that read as a table. Every message names op, argument, what was wanted and what came."""

from collections.abc import Collection, Sequence

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = torch.float8_e4m3fn


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def fail(op: str, argument: str, wanted: str, got: object) -> ValueError:
    """The error to raise: `raise fail(...)`."""
    return ValueError(f"{op}: {argument}: wanted {wanted}, got {got}")


def tensor(
    op: str,
    argument: str,
    t: torch.Tensor | None,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
    last_contiguous: bool = False,
    contiguous: bool = False,
) -> None:
    """Check one tensor; None (an optional argument that was left out) passes.

    Args:
        shape: one entry per dimension, None where any size will do.
        last_contiguous: the last dimension must have stride 1 (where it has more than one element).
    """
    if t is None:
        return
    if dtype is not None and t.dtype is not dtype and (isinstance(dtype, torch.dtype) or t.dtype not in dtype):
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        raise TypeError(f"{op}: {argument}: wanted dtype {_names(dtypes)}, got {_names([t.dtype])}")
    if shape is not None and not _fits(t.shape, shape):
        wanted = ", ".join("*" if w is None else str(w) for w in shape)
        raise fail(op, argument, f"shape [{wanted}]", list(t.shape))
    if device is not None and t.device != device:
        raise fail(op, argument, f"device {device}", t.device)
    if last_contiguous and t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise fail(op, argument, "stride 1 in the last dimension", f"strides {list(t.stride())}")
    if contiguous and not t.is_contiguous():
        raise fail(op, argument, "a contiguous tensor", f"strides {list(t.stride())}")


def _fits(shape: torch.Size, wanted: Sequence[int | None]) -> bool:
    if len(shape) != len(wanted):
        return False
    for got, want in zip(shape, wanted):  # noqa: B905, SIM110 (equal lengths; runs on every call)
        if want is not None and got != want:
            return False
    return True


def one_of(op: str, argument: str, value: object, choices: Collection) -> None:
    if value not in choices:
        raise fail(op, argument, "one of " + ", ".join(map(repr, choices)), repr(value))


def at_least(op: str, argument: str, value: int, least: int) -> None:
    if value < least:
        raise fail(op, argument, f"at least {least}", value)


def multiple(op: str, argument: str, value: int | torch.SymInt, of: int) -> None:
    if value % of:
        raise fail(op, argument, f"a multiple of {of}", value)


def no_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """For ops that write into an argument: refuse inputs that autograd would have to follow."""
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(f"{op}: {name}: requires grad, and {op} has no backward; use torch.no_grad()")


def within(
    op: str, argument: str, t: torch.Tensor | None, least: int, below: int, where: torch.Tensor | None = None
) -> None:
    """Of values, for debug mode: looks at them, which waits for the device. `where`: only at these."""
    if t is None:
        return
    bad = (t < least) | (t >= below)
    if where is not None:
        bad &= where
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise fail(op, argument, f"values from {least} to {below - 1}", f"{t[index].item()} at {list(index)}")


def offsets(op: str, argument: str, t: torch.Tensor | None, num_rows: int) -> None:
    """Of values, for debug mode: the bounds of consecutive groups of rows."""
    if t is None:
        return
    within(op, argument, t, 0, num_rows + 1)
    bad = t[1:] < t[:-1]
    if bad.any():
        i = int(bad.nonzero()[0].item())
        raise fail(op, argument, "values that do not decrease", f"{t[i].item()}, {t[i + 1].item()} at [{i}, {i + 1}]")


def rows(t: torch.Tensor) -> torch.Tensor:
    """`t` itself if its last dimension is contiguous, else a contiguous copy."""
    return t if t.dim() == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()
