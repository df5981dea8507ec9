"""Block-scaled FP8 matmul at the sizes of one DeepSeek-V3 layer: decoding, prefilling and the weight gradient."""

import torch
import torch.nn.functional as F
from common import Bench, Case, Peer

from deepseek_kernels import nn
from deepseek_kernels.reference.fp8_quantize import expand_scale
from deepseek_kernels.shapes import V3_MATMULS, ceil_div
from deepseek_kernels.testing.compare import MATMUL, Tolerance

BF16_OPERANDS = Tolerance(steps=4, of_norm=1e-2, distance=1e-4)
"""The peer rounds its operands to bf16."""
UNQUANTISED = Tolerance(distance=1e-3, of_norm=0.05)
"""FP8 training against the layer in bf16."""
SMALL = Case("small", dict(m=4, n=256, k=512), quick=True)
TOKENS = (1, 4, 16, 64, 128, 4096)
CASES = (
    SMALL,
    *(
        Case(f"m={m} {n}x{k}", dict(m=m, n=n, k=k), devices=("cpu", "cuda") if m <= 128 and n <= 7168 else ("cuda",))
        for n, k in V3_MATMULS
        for m in TOKENS
    ),
)
WGRAD_CASES = (
    Case("small", dict(m=64, n=128, k=256), quick=True),
    *(Case(f"{m}x{n} of 4096 tokens", dict(m=m, n=n, k=4096), devices=("cuda",)) for m, n in V3_MATMULS),
)
TRAINING_CASES = (
    Case("small", dict(m=64, n=128, k=256), quick=True),
    Case("m=1024 1024x1024", dict(m=1024, n=1024, k=1024), devices=("cpu",)),
    *(Case(f"m=4096 {n}x{k}", dict(m=4096, n=n, k=k), devices=("cuda",)) for n, k in V3_MATMULS),
)


def operands(device, g, m, n, k, rows_b):
    def codes(rows):
        return torch.randn(rows, k, device=device, generator=g).to(torch.float8_e4m3fn)

    def scales(rows):
        return 0.5 + torch.rand(rows, ceil_div(k, 128), device=device, generator=g)

    # scale_a is MN-major, as the Hopper kernels of every library read it
    return codes(m), scales(m).t().contiguous().t(), codes(n), scales(ceil_div(n, rows_b))


def inputs(device, g, m, n, k):
    return operands(device, g, m, n, k, 128)


def wgrad_inputs(device, g, m, n, k):
    out = torch.randn(m, n, device=device, generator=g)
    return *operands(device, g, m, n, k, 1), None, out, True


def in_bf16(a, scale_a, b, scale_b):
    """What a user without FP8 multiplies."""
    granularity_b = "1x128" if scale_b.shape[0] == b.shape[0] else "128x128"
    pairs = ((a, scale_a, "1x128"), (b, scale_b, granularity_b))
    return tuple((q.float() * expand_scale(s, *q.shape, granularity)).bfloat16() for q, s, granularity in pairs)


def dequantize_and_multiply(a, scale_a, b, scale_b):
    """What a user of FP8 weights without this package runs."""
    return F.linear(*in_bf16(a, scale_a, b, scale_b))


def is_hopper(device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def for_scaled_mm(a, scale_a, b, scale_b):
    """cuBLAS wants 1x128 scales MN-major and 128x128 scales K-major, padded to a multiple of 4."""
    padded = F.pad(scale_b, (0, -scale_b.shape[1] % 4))
    return a, scale_a.t().contiguous().t(), b.t(), padded.t()


def scaled_mm(a, scale_a, b, scale_b):
    recipe = F.ScalingType
    return F.scaled_mm(a, b, scale_a, recipe.BlockWise1x128, scale_b, recipe.BlockWise128x128)


def for_deep_gemm(a, scale_a, b, scale_b):
    import deep_gemm

    return (a, deep_gemm.get_mn_major_tma_aligned_tensor(scale_a)), (b, scale_b)


def run_deep_gemm(a, b):
    import deep_gemm

    d = torch.empty(a[0].shape[0], b[0].shape[0], dtype=torch.bfloat16, device=a[0].device)
    deep_gemm.fp8_gemm_nt(a, b, d)
    return d


def mn_major(scale):
    """The layout that DeepGEMM reads, TMA-aligned where there are a multiple of 4 rows."""
    return scale.mT.contiguous().mT


def wgrad_for_deep_gemm(a, scale_a, b, scale_b, bias, out, accumulate):
    return (a, mn_major(scale_a)), (b, mn_major(scale_b)), out


def wgrad_deep_gemm(a, b, out):
    import deep_gemm

    deep_gemm.fp8_gemm_nt(a, b, out, c=out, recipe=(1, 1, 128))


def layer_inputs(device, g, m, n, k):
    """x, weight and the gradient of the layer's result."""

    def normal(rows, columns):
        return torch.randn(rows, columns, device=device, generator=g).bfloat16()

    return normal(m, k).requires_grad_(), normal(n, k).requires_grad_(), normal(m, n)


def as_matmul(x, weight, grad):
    """The forward product, as the op's arguments."""
    pairs = ((x, (len(x), ceil_div(x.shape[1], 128))), (weight, [ceil_div(s, 128) for s in weight.shape]))
    return sum(
        ((t.detach().to(torch.float8_e4m3fn), t.new_empty(shape, dtype=torch.float32)) for t, shape in pairs), ()
    )


def trained(linear):
    """Value and gradients of x and weight."""

    def step(x, weight, grad):
        y = linear(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), grad)

    return step


def training_cost(problem, x, weight, grad):
    """Three products; x and weight read twice, dy once, y and both gradients written, all in bf16."""
    return 3 * 2 * problem.m * problem.n * problem.k, 3 * x.nbytes + 3 * weight.nbytes + 2 * grad.nbytes


PEERS = {
    "torch bf16": Peer(F.linear, prepare=in_bf16, tolerance=BF16_OPERANDS),
    "dequantize + linear": Peer(dequantize_and_multiply, tolerance=BF16_OPERANDS),
    "torch scaled_mm": Peer(
        scaled_mm, prepare=for_scaled_mm, available=lambda device: hasattr(F, "scaled_mm") and is_hopper(device)
    ),
    "deep_gemm": Peer(run_deep_gemm, prepare=for_deep_gemm, needs=("deep_gemm",), available=is_hopper),
}
WGRAD_PEERS = {
    "torch bf16": Peer(
        lambda a, b, out: out.add_(a @ b.t()),
        prepare=lambda a, scale_a, b, scale_b, bias, out, accumulate: (*in_bf16(a, scale_a, b, scale_b), out),
        tolerance=BF16_OPERANDS,
        outputs=lambda result, args: (),
    ),
    "deep_gemm": Peer(
        wgrad_deep_gemm, prepare=wgrad_for_deep_gemm, needs=("deep_gemm",), available=is_hopper,
        outputs=lambda result, args: (),
    ),
}  # fmt: skip
TRAINING_PEERS = {"torch bf16": Peer(trained(F.linear))}
BENCHES = [
    Bench("fp8_matmul", CASES, inputs, PEERS, tolerance=MATMUL, rate="fp8"),
    Bench(
        "fp8_matmul.out", WGRAD_CASES, wgrad_inputs, WGRAD_PEERS, tolerance=MATMUL, rate="fp8", mutated=(5,),
        name="fp8_matmul wgrad",
    ),
    Bench(
        "fp8_matmul", TRAINING_CASES, layer_inputs, TRAINING_PEERS, tolerance=UNQUANTISED, rate="fp8",
        name="fp8_linear forward+backward", call=trained(nn.fp8_linear), arguments=as_matmul, cost=training_cost,
        expected=trained(F.linear),
    ),
]  # fmt: skip
