"""Matmul of each expert's FP8 rows with its own FP8 weight, and the gradient of those weights, at DeepSeek-V3's expert
sizes."""

from dataclasses import replace

import torch
from bench_fp8_matmul import is_hopper, mn_major
from bench_grouped_matmul import DOWN, GATE_UP, SIZES, SMALL, WGRAD_CASES, case, uneven_offsets
from common import Bench, Case, Peer

from deepseek_kernels.plan import fp8_grouped_matmul as fp8_grouped_matmul_plan
from deepseek_kernels.reference.fp8_quantize import expand_scale
from deepseek_kernels.shapes import align_up, ceil_div, padded_columns
from deepseek_kernels.testing.compare import MATMUL, Tolerance

CPU = Case("cpu 16x8", dict(num_experts=16, num_rows=128, n=512, k=512), devices=("cpu",))
BF16_OPERANDS = Tolerance(steps=4, of_norm=1e-2, distance=1e-4)
"""The peer rounds its operands to bf16."""
CASES = (SMALL, CPU, *(case(*size) for size in SIZES))


def codes(device, g, *shape):
    return torch.randn(*shape, device=device, generator=g).to(torch.float8_e4m3fn)


def scales(device, g, *shape):
    return 0.5 + torch.rand(*shape, device=device, generator=g)


def rows(device, g, m, k):
    return codes(device, g, m, k), scales(device, g, m, ceil_div(k, 128))


def inputs(device, g, num_experts, num_rows, n, k):
    return (
        *rows(device, g, num_rows, k), codes(device, g, num_experts, n, k),
        scales(device, g, num_experts, ceil_div(n, 128), ceil_div(k, 128)),
        uneven_offsets(device, g, num_experts, num_rows),
    )  # fmt: skip


def masked_case(num_experts: int, rows: int, n: int, k: int) -> Case:
    dims = dict(num_experts=num_experts, m_max=4096, rows=rows, n=n, k=k)
    return Case(f"{num_experts}x{rows} of 4096 n={n} k={k}", dims, devices=("cuda",))


MASKED_CASES = (
    Case("small", dict(num_experts=8, m_max=32, rows=8, n=256, k=256), quick=True),
    *(masked_case(e, m, *nk) for e, m in ((1, 1024), (2, 512), (4, 256), (32, 20)) for nk in (GATE_UP, DOWN)),
)


def masked_inputs(device, g, num_experts, m_max, rows, n, k):
    """`rows` of the m_max of an expert are filled on average."""
    a, scale_a, b, scale_b, ends = inputs(device, g, num_experts, num_experts * m_max, n, k)
    a, scale_a = (t.view(num_experts, m_max, -1) for t in (a, scale_a))
    counts = uneven_offsets(device, g, num_experts, num_experts * rows).diff().clamp(max=m_max).int()
    return a, scale_a, b, scale_b, counts, None, rows


def filled(outputs, args):
    """The rows that the masked op leaves unwritten masked out."""
    (d,), counts = outputs, args[4]
    return (d.masked_fill((torch.arange(d.shape[1], device=d.device) >= counts[:, None])[..., None], 0),)


def dequantized(a, scale_a, b, scale_b, expert_offsets):
    """The operands in bf16, as a user without a grouped FP8 matmul keeps them."""
    x = (a.float() * expand_scale(scale_a, *a.shape, "1x128")).bfloat16()
    weights = [(q.float() * expand_scale(s, *q.shape, "128x128")).bfloat16() for q, s in zip(b, scale_b, strict=True)]
    return x, weights, expert_offsets


def masked_bmm(x, weights, counts):
    """What a user writes under a CUDA graph: every place is multiplied."""
    return torch.bmm(x, weights.transpose(1, 2))


def dequantized_masked(a, scale_a, b, scale_b, counts, out_dtype, expected_m):
    x, weights, _ = dequantized(a.flatten(0, 1), scale_a.flatten(0, 1), b, scale_b, None)
    return x.view(a.shape), torch.stack(weights), counts


def loop(x, weights, expert_offsets):
    counts = expert_offsets.diff().tolist()
    return torch.cat([rows @ weight.t() for rows, weight in zip(x.split(counts), weights, strict=True)])


def padded_rows(expert_offsets, num_rows):
    """Expert of each row, where it goes if each expert begins at a multiple of 128 rows, and how many those are."""
    counts = expert_offsets.diff().long()
    padded = align_up(counts, 128)
    expert = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    first = padded.cumsum(0) - padded - expert_offsets[:-1]
    return expert, torch.arange(num_rows, device=counts.device) + first[expert], int(padded.sum())


def for_deep_gemm(a, scale_a, b, scale_b, expert_offsets):
    expert, row, total = padded_rows(expert_offsets, len(a))
    x = torch.zeros(total, a.shape[1], dtype=torch.uint8, device=a.device)
    x[row] = a.view(torch.uint8)
    scale = torch.ones(scale_a.shape[1], total, device=a.device)
    scale[:, row] = scale_a.t()
    expert_of_row = torch.full((total,), -1, dtype=torch.int32, device=a.device)
    expert_of_row[row] = expert.int()
    return (x.view(a.dtype), scale.t()), (b, scale_b), expert_of_row


def deep_gemm_contiguous(a, b, expert_of_row):
    import deep_gemm

    d = torch.empty(len(a[0]), b[0].shape[1], dtype=torch.bfloat16, device=a[0].device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, expert_of_row)
    return d


def masked_for_deep_gemm(a, scale_a, b, scale_b, counts, out_dtype, expected_m):
    return (a, mn_major(scale_a)), (b, scale_b), counts, expected_m


def deep_gemm_masked(a, b, counts, expected_m):
    import deep_gemm

    d = torch.empty(*a[0].shape[:2], b[0].shape[1], dtype=torch.bfloat16, device=a[0].device)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, counts, expected_m)
    return d


def wgrad_inputs(device, g, num_experts, num_rows, n, k):
    """Every column holds a value, also those that would be zero to fill a block."""
    columns = padded_columns(num_rows, num_experts)
    offsets = uneven_offsets(device, g, num_experts, num_rows)
    return *rows(device, g, n, columns), *rows(device, g, k, columns), offsets


def wgrad_cost(problem, *args):
    """Of the rows there are, without what fills their blocks."""
    p = replace(problem, num_rows=int(args[4][-1]))
    return fp8_grouped_matmul_plan.flops(p), fp8_grouped_matmul_plan.bytes(p)


def dequantized_columns(grad_t, scale_grad, a_t, scale_a, expert_offsets):
    g, x = (
        (q.float() * expand_scale(s, *q.shape, "1x128")).bfloat16() for q, s in ((grad_t, scale_grad), (a_t, scale_a))
    )
    return g, x, expert_offsets


def padded_widths(expert_offsets):
    """Columns of each expert, which begins at a multiple of 128 columns."""
    return [align_up(count, 128) for count in expert_offsets.diff().tolist()]


def wgrad_loop(g, x, expert_offsets):
    widths = padded_widths(expert_offsets)
    widths.append(g.shape[1] - sum(widths))
    pairs = list(zip(g.split(widths, 1), x.split(widths, 1), strict=True))[:-1]
    return torch.stack([(g @ x.t()).float() for g, x in pairs])


def wgrad_for_deep_gemm(grad_t, scale_grad, a_t, scale_a, expert_offsets):
    widths = padded_widths(expert_offsets)

    def flat(q, scale):
        parts = q[:, : sum(widths)].view(torch.uint8).split(widths, 1)
        return torch.cat([part.flatten() for part in parts]).view(q.dtype), mn_major(scale[:, : sum(widths) // 128])

    out = torch.zeros(len(widths), len(grad_t), len(a_t), device=grad_t.device)
    on_device = torch.tensor(widths, dtype=torch.int32, device=grad_t.device)
    return flat(grad_t, scale_grad), flat(a_t, scale_a), out, widths, on_device


def deep_gemm_wgrad(grad_t, a_t, out, widths, on_device):
    """It can only add to what is there, which was zero in the call that is checked."""
    import deep_gemm

    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(grad_t, a_t, out, widths, on_device, c=out)
    return out


def deep_gemm(run, prepare, **options) -> Peer:
    return Peer(run, prepare=prepare, needs=("deep_gemm",), available=is_hopper, **options)


BENCHES = [
    Bench(
        "fp8_grouped_matmul", CASES, inputs,
        {
            "torch loop bf16": Peer(loop, prepare=dequantized, tolerance=BF16_OPERANDS, capturable=False),
            "deep_gemm, rows padded before": deep_gemm(
                deep_gemm_contiguous, for_deep_gemm,
                outputs=lambda d, args: (d[padded_rows(args[4], len(args[0]))[1]],),
            ),
        },
        tolerance=MATMUL, rate="fp8",
    ),
    Bench(
        "fp8_grouped_matmul_masked", MASKED_CASES, masked_inputs,
        {
            "torch bmm bf16": Peer(masked_bmm, prepare=dequantized_masked, tolerance=BF16_OPERANDS),
            "deep_gemm": deep_gemm(deep_gemm_masked, masked_for_deep_gemm),
        },
        tolerance=MATMUL, rate="fp8", defined=filled,
    ),
    Bench(
        "fp8_grouped_matmul_wgrad", WGRAD_CASES, wgrad_inputs,
        {
            "torch loop bf16": Peer(
                wgrad_loop, prepare=dequantized_columns, tolerance=BF16_OPERANDS, capturable=False
            ),
            "deep_gemm, adding": deep_gemm(deep_gemm_wgrad, wgrad_for_deep_gemm),
        },
        tolerance=MATMUL, rate="fp8", cost=wgrad_cost,
    ),
]  # fmt: skip
