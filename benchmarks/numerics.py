"""The figures of docs/numerics.md, against float64 on the CPU backends: python benchmarks/numerics.py

--write   put them into the page
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import deepseek_kernels as dk
from deepseek_kernels import nn
from deepseek_kernels.testing.compare import distance

PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"
M, N = 64, 256
KS = (128, 1024, 7168)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def uneven(*shape: int) -> torch.Tensor:
    """Rows a thousand times as large and a thousand times as small as the others."""
    return normal(*shape) * 10.0 ** torch.linspace(-3, 3, shape[0])[:, None]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the rows, on average."""
    return ((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).mean().item()


def per_tensor(t: torch.Tensor) -> torch.Tensor:
    """e4m3 with one scale for all, and back."""
    scale = t.abs().max() / 448
    return (t / scale).float().to(torch.float8_e4m3fn).double() * scale


def matmul_rows() -> Iterator[tuple[str, ...]]:
    for name, make in (("even", normal), ("uneven", uneven)):
        for k in KS:
            x, w = make(M, k), normal(N, k)
            exact = x @ w.t()
            a, scale_a = dk.fp8_quantize(x.float())
            b, scale_b = dk.fp8_quantize(w.float(), "128x128")
            stored = dk.fp8_dequantize(a, scale_a).double() @ dk.fp8_dequantize(b, scale_b, "128x128").double().t()
            d = {t: dk.fp8_matmul(a, scale_a, b, scale_b, out_dtype=t) for t in (torch.float32, torch.bfloat16)}
            pow2 = dk.fp8_matmul(
                *dk.fp8_quantize(x.float(), pow2_scale=True), *dk.fp8_quantize(w.float(), "128x128", pow2_scale=True),
                out_dtype=torch.float32,
            )  # fmt: skip
            whole = per_tensor(x) @ per_tensor(w).t()
            errors = (
                *(relative(t, stored) for t in d.values()),
                *(relative(t, exact) for t in (d[torch.float32], pow2, whole)),
            )
            yield name, str(k), *(f"{e:.1e}" for e in errors), f"{distance(d[torch.bfloat16], exact):.1e}"


def rounded(t: torch.Tensor, bits: int) -> torch.Tensor:
    """Truncated to so many bits, as an accumulator that keeps no more."""
    mantissa, exponent = torch.frexp(t)
    return torch.ldexp((mantissa * 2**bits).trunc() / 2**bits, exponent)


def accumulated(a: torch.Tensor, b: torch.Tensor, bits: int, promote: int) -> torch.Tensor:
    """A model of the tensor core, not one: 32 products at a time are added exactly to a sum of `bits` bits, which goes
    into a full-precision sum after every `promote` of k."""
    total, part = torch.zeros(len(a), len(b), dtype=torch.float64), torch.zeros(len(a), len(b), dtype=torch.float64)
    for k in range(0, a.shape[1], 32):
        part = rounded(part + a[:, k : k + 32] @ b[:, k : k + 32].t(), bits)
        if (k + 32) % promote == 0:
            total, part = total + part, torch.zeros_like(part)
    return total + part


def accumulation_rows() -> Iterator[tuple[str, ...]]:
    for k in (1024, 4096, 16384):
        a, b = (normal(M, k).abs().float().to(torch.float8_e4m3fn).double() for _ in range(2))
        exact = a @ b.t()
        yield str(k), *(f"{relative(accumulated(a, b, 14, p), exact):.1e}" for p in (k, 512, 128))


def training_rows() -> Iterator[tuple[str, ...]]:
    for m in (128, 1024):
        x, w, grad = normal(m, 1024).bfloat16(), normal(N, 1024).bfloat16(), normal(m, N).bfloat16()
        x.requires_grad_()
        w.requires_grad_()
        y = nn.fp8_linear(x, w)
        y.backward(grad)
        exact = x.double() @ w.double().t(), grad.double() @ w.double(), grad.double().t() @ x.double()
        yield str(m), *(f"{distance(a.detach(), e.detach()):.1e}" for a, e in zip((y, x.grad, w.grad), exact))


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in (header, ("---",) * len(header), *rows))


def tables() -> dict[str, str]:
    """Name in the page -> markdown."""
    torch.manual_seed(0)
    return {
        "matmul": table(
            ("rows of x", "k", "fp32", "bf16", "x and w", "powers of two", "one scale", "distance"),
            matmul_rows(),
        ),
        "accumulation": table(("k", "never", "every 512", "every 128"), accumulation_rows()),
        "training": table(("tokens", "y", "dx", "dw"), training_rows()),
    }


def filled(page: str, tables: dict[str, str]) -> str:
    for name, text in tables.items():
        begin = f"<!-- {name} -->\n"
        head, _, tail = page.partition(begin)
        page = f"{head}{begin}{text}\n<!-- end -->{tail.partition('<!-- end -->')[2]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    made = tables()
    print("\n\n".join(made.values()))
    if options.write:
        PAGE.write_text(filled(PAGE.read_text(), made))


if __name__ == "__main__":
    main()
