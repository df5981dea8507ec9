"""Kernels with one fault each, compiled by `aot.read`; prints what it found wrong with them as JSON."""

import json

import aot
import triton
import triton.language as tl
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + rows[:, None] * K + depth[None, :])
    y = tl.load(b + depth[:, None] * N + columns[None, :])
    tl.store(out + rows[:, None] * N + columns[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def copy(x, out, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    tl.store(out + rows[:, None] * N + columns[None, :], x.load([0, 0]))


def failures_of_copy(arch: int, planned: int = 0) -> list[str]:
    kernel = aot.Kernel("faults", arch, "copy", "", "", "", planned=planned, tma=True)
    signature = {"x": "tensordesc<bf16[64, 64]>", "out": "*bf16", "M": "constexpr", "N": "constexpr"}
    attributes = {(1,): [["tt.divisibility", 16]]}
    return aot.read(kernel, (copy, signature, {(2,): 64, (3,): 64}, attributes, {"num_warps": 4})).failures


def failures(arch: int, dtype: str, m: int, n: int, k: int, warps: int, precision: str = "tf32") -> list[str]:
    kernel = aot.Kernel("faults", arch, "product", "", "", "")
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32"}
    sizes = {"K": k, "M": m, "N": n, "PRECISION": precision}
    signature |= dict.fromkeys(sizes, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(product, signature, {(3 + i,): v for i, v in enumerate(sizes.values())}, attributes)
    return aot.read(
        kernel, (source.fn, source.signature, source.constants, source.attrs, {"num_warps": warps})
    ).failures


if __name__ == "__main__":
    found = {
        "sound": failures(90, "bf16", 64, 64, 64, 4),
        "ieee": failures(90, "fp32", 16, 16, 16, 4, "ieee"),
        "spills": failures(90, "bf16", 64, 256, 64, 1),
        "shared": failures(89, "bf16", 64, 256, 256, 8),
        "tma": failures_of_copy(90),
        "no_tma": failures_of_copy(89),
        "unplanned": failures_of_copy(90, planned=4096),
        "no_e4m3": failures(80, "fp8e4nv", 64, 64, 64, 4),
    }
    aot.MMA = aot.re.compile("no such instruction")
    found["no_mma"] = failures(90, "bf16", 64, 64, 64, 4)
    print(json.dumps(found))
