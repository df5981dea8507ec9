"""The tolerance table, in one place. A tolerance is never loosened to make a test pass."""

from dataclasses import dataclass

import torch

STEP = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
    torch.float8_e4m3fn: 2.0**-3,
}
"""Relative distance of neighbouring values."""


@dataclass(frozen=True)
class Tolerance:
    """How far two results may be apart.

    `steps`: per element, in steps of the output format; `absolute`: per element, on top; `of_norm`: per element, as a
    fraction of the norm of its row, on top; `distance`: bound on 1 - 2<x,y>/(<x,x>+<y,y>) over the whole tensor.
    """

    steps: float = 0
    absolute: float = 0
    of_norm: float = 0
    distance: float = 0

    @property
    def exact(self) -> bool:
        return self == Tolerance()


EXACT = Tolerance()
SUM = Tolerance(steps=2, absolute=1e-6)
"""A short fp32 sum in another order, or with fused multiply-add."""
MATMUL = Tolerance(steps=2, of_norm=1e-3, distance=1e-5)
"""A matmul with fp32 accumulation against the exact product of the same operands."""
ATTENTION = Tolerance(steps=2.01, absolute=8e-4, distance=5e-6)
"""`mla_decode` output in bf16."""
FP8_STEP = Tolerance(steps=1, absolute=2.0**-9)
"""e4m3 codes of values that agree to fp32 rounding: at most neighbours."""
LSE = Tolerance(steps=8.01 * 2**7, absolute=1e-6)
"""fp32 log-sum-exp: 8.01 / 65536 relative."""
REQUANTIZED = Tolerance(steps=4, of_norm=2e-2, distance=1e-3)
"""A product of rows that were rounded to FP8 on the way: sums taken in another order move some of them by an FP8 step,
which is an eighth of the value, in a row of a few dozen values."""
GRADIENT = Tolerance(steps=4, of_norm=2e-3, distance=1e-5)
MOE_GRADIENT = Tolerance(steps=4, absolute=4e-3, of_norm=5e-3, distance=1e-5)
"""`fused_moe` in bf16, unit-scale inputs: gate_up, h and their gradients are each kept in bf16, so an element near 0
(where the slope of silu changes sign; a dot of rows) keeps the absolute error of its terms. As a whole, no looser."""


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2<x,y>/(<x,x>+<y,y>) in fp64: 0 for equal tensors, about half the squared relative error."""
    x, y = x.double().flatten(), y.double().flatten()
    norm = (x @ x + y @ y).item()
    return 0.0 if norm == 0 else 1 - 2 * (x @ y).item() / norm


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    if t.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=t.device)
    # a clone, because a dimension of size 1 may have any stride in a "contiguous" tensor
    return t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensor") -> None:
    _assert_same_kind(actual, expected, what)
    a, e = as_bytes(actual), as_bytes(expected)
    if actual.is_floating_point():  # one NaN is as good as another
        nan_a, nan_e = actual.detach().float().isnan(), expected.detach().float().isnan()
        if not torch.equal(nan_a, nan_e):
            raise AssertionError(f"{what}: NaN in different places ({int(nan_a.sum())} and {int(nan_e.sum())} of them)")
        size = actual.element_size()
        keep = ~nan_a.flatten().repeat_interleave(size)
        a, e = a[keep], e[keep]
    if not torch.equal(a, e):
        raise AssertionError(f"{what}: {int((a != e).sum())} of {a.numel()} bytes differ")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance, what: str = "tensor") -> None:
    """Shape, dtype and device equal; NaN and Inf in the same places; finite values within `tolerance`.

    `expected` may be of higher precision than `actual`; the steps are those of actual's dtype.
    """
    if tolerance.exact:
        return assert_same_bits(actual, expected, what)
    if actual.shape != expected.shape or actual.device != expected.device:
        raise AssertionError(f"{what}: {_kind(actual)} where {_kind(expected)} was expected")
    a, e = actual.detach().double(), expected.detach().double()
    odd = ~(a.isfinite() & e.isfinite())
    if not torch.equal(a[odd].nan_to_num(1.0), e[odd].nan_to_num(1.0)) or not torch.equal(a.isnan(), e.isnan()):
        raise AssertionError(f"{what}: NaN or Inf in different places ({int(odd.sum())} elements)")
    a, e = a.masked_fill(odd, 0), e.masked_fill(odd, 0)
    allowed = tolerance.steps * STEP[actual.dtype] * e.abs() + tolerance.absolute
    if tolerance.of_norm:
        allowed = allowed + tolerance.of_norm * (e.norm(dim=-1, keepdim=True) if e.dim() else e.abs())
    bad = (a - e).abs() > allowed
    if bad.any():
        worst = torch.where(bad, (a - e).abs() - allowed, -1).flatten().argmax()
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements off, worst {a.flatten()[worst]:.6g} "
            f"where {e.flatten()[worst]:.6g} was expected (allowed {allowed.expand_as(a).flatten()[worst]:.3g})"
        )
    if tolerance.distance and distance(a, e) > tolerance.distance:
        raise AssertionError(f"{what}: distance {distance(a, e):.3g}, allowed {tolerance.distance:.3g}")


def _kind(t: torch.Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} on {t.device}"


def _assert_same_kind(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype or actual.device != expected.device:
        raise AssertionError(f"{what}: {_kind(actual)} where {_kind(expected)} was expected")
