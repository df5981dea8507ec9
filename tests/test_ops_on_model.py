"""The "cuda" backend of every op that has one, from the public schema down to the kernel, in the software model.

What test_hopper_model.py passes to the bindings by hand, here comes from the op: strides, copies, plans, scratch.
"""

import sys
from pathlib import Path

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels.device import CPU
from deepseek_kernels.ops._registry import OPERATORS
from deepseek_kernels.plan import _bf16_hopper as bf16_hopper
from deepseek_kernels.plan import _fp8_hopper as fp8_hopper
from deepseek_kernels.plan import _fp8_wgrad as fp8_wgrad
from deepseek_kernels.plan import fp8_grouped_matmul as fp8_grouped_matmul_plan
from deepseek_kernels.plan import fp8_matmul as fp8_matmul_plan
from deepseek_kernels.plan.backend import Environment
from deepseek_kernels.testing import samples as sampling
from deepseek_kernels.testing.compare import MATMUL, assert_close, assert_same_bits
from deepseek_kernels.testing.guard import guarded_allocations
from deepseek_kernels.testing.samples.fp8_grouped_matmul import quantized, wgrad_operands
from deepseek_kernels.testing.samples.fp8_matmul import operands

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

SEEDS = harness.SEEDS[:3]


def _cases():
    for op in OPERATORS.values():
        env = Environment(extension_ops=frozenset({op.name.partition(".")[0], op.family}), on_model=True)
        for i, s in enumerate(sampling.samples(op)):
            problem = op.problem(*op.fill(s.args, s.kwargs))
            if "cuda" in op.backends and not op.plan.backends(problem, CPU, env)["cuda"]:
                yield pytest.param(op.name, i, id=f"{op.name}-{s.name}")


@pytest.fixture(scope="module", autouse=True)
def model():
    try:
        return harness.load()
    except harness.Unavailable as reason:
        pytest.skip(str(reason))


def run(op, s: sampling.Sample, backend: str) -> tuple[torch.Tensor, ...]:
    """Outputs and mutated arguments of one call on copies of the arguments."""
    values = {
        key: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).copy_(v) if isinstance(v, torch.Tensor) else v
        for key, v in zip(op.keywords, op.fill(s.args, s.kwargs), strict=True)
    }
    with torch.no_grad(), dk.use_backend(backend), guarded_allocations():
        out = op.overload(*values.values())
    out = () if out is None else out if isinstance(out, tuple) else (out,)
    out += tuple(values[key] for key in s.mutated)
    return s.defined(*out) if s.defined else out


@pytest.mark.parametrize(("name", "index"), list(_cases()))
def test_sample(name, index):
    op = OPERATORS[name]
    s = sampling.samples(op)[index]
    expected = run(op, s, "reference")
    tolerances = s.tolerance if isinstance(s.tolerance, tuple) else (s.tolerance,) * len(expected)
    first = None
    for seed in SEEDS:
        with harness.model_extension(seed=seed):
            actual = run(op, s, "cuda")
            for a, e, t in zip(actual, expected, tolerances, strict=True):
                assert_close(a, e, t, f"{name} on the model")
            for a, f in zip(actual, first or actual, strict=True):
                assert_same_bits(a, f, f"{name} under another schedule")
        first = first or actual


def test_fp8_matmul_copies_what_the_hopper_kernel_cannot_address():
    """Misaligned pointers, odd row strides, rows on top of each other, an output inside a frame: as if contiguous."""
    a, scale_a, b, scale_b = operands(torch.Generator().manual_seed(0), 5, 24, 144)
    with dk.use_backend("reference"):
        expected = dk.fp8_matmul(a, scale_a, b, scale_b)
        repeated = dk.fp8_matmul(a[:1].expand(5, -1), scale_a, b, scale_b)

    def shifted(q, by):
        wide = torch.zeros(len(q), q.shape[1] + by, dtype=torch.uint8).view(q.dtype)
        wide[:, by:] = q
        return wide[:, by:]

    frame = torch.zeros(5, 31, dtype=torch.bfloat16)
    with harness.model_extension(), dk.use_backend("cuda"):
        assert_close(dk.fp8_matmul(shifted(a, 3), scale_a, shifted(b, 16), scale_b), expected, MATMUL)
        assert_close(dk.fp8_matmul(a, scale_a, shifted(b, 8), scale_b), expected, MATMUL)
        assert_close(dk.fp8_matmul(a[:1].expand(5, -1), scale_a, b, scale_b), repeated, MATMUL)
        dk.fp8_matmul(a, scale_a, b, scale_b, out=frame[:, 5:29])
    assert_close(frame[:, 5:29], expected, MATMUL)
    assert not frame[:, :5].any() and not frame[:, 29:].any()


@pytest.mark.parametrize(
    ("op", "plan", "reserved"),
    [
        ("fp8_matmul", fp8_matmul_plan, 0),
        ("fp8_grouped_matmul", fp8_grouped_matmul_plan, fp8_grouped_matmul_plan.CUDA_RESERVED),
    ],
)
def test_the_plan_knows_the_compiled_instances(model, op, plan, reserved):
    names, compiled = {model.BF16: "bfloat16", model.FP32: "float32"}, {}
    for dtype, *instance, stages in getattr(model, f"{op}_instances"):
        compiled.setdefault(names[dtype], []).append(tuple(instance))
        out_bytes = fp8_matmul_plan.ELEMENT_BYTES[names[dtype]]
        assert stages == fp8_hopper.stages(fp8_hopper.Tile(*instance), out_bytes, reserved), instance
    assert {d: sorted(i) for d, i in compiled.items()} == {d: sorted(i) for d, i in plan.INSTANCES.items()}


def test_fp8_grouped_matmul_copies_what_the_hopper_kernel_cannot_address():
    """Rows at odd addresses, experts that overlap or lie a fraction of a row apart, and slices of weights in place."""
    g = torch.Generator().manual_seed(0)
    a, scale_a, b, scale_b = quantized(g, 21, 24, 144, 3)
    ends = torch.tensor([0, 5, 5, 21], dtype=torch.int32)

    def framed(q, rows, columns):
        wide = torch.zeros(*q.shape[:-2], q.shape[-2] + rows, q.shape[-1] + columns, dtype=torch.uint8).view(q.dtype)
        wide[..., rows:, columns:] = q
        return wide[..., rows:, columns:]

    with dk.use_backend("reference"):
        expected = dk.fp8_grouped_matmul(a, scale_a, b, scale_b, ends)
        same = dk.fp8_grouped_matmul(a, scale_a, b[:1].expand(3, -1, -1), scale_b[:1].expand(3, -1, -1), ends)
    with harness.model_extension(), dk.use_backend("cuda"):
        for rows, columns in ((0, 3), (8, 0), (1, 16)):
            got = dk.fp8_grouped_matmul(framed(a, rows, columns), scale_a, framed(b, rows, columns), scale_b, ends)
            assert_close(got, expected, MATMUL)
        got = dk.fp8_grouped_matmul(a, scale_a, b[:1].expand(3, -1, -1), scale_b[:1].expand(3, -1, -1), ends)
        assert_close(got, same, MATMUL)


def test_the_weight_gradients_plan_knows_the_compiled_instances(model):
    compiled = {tuple(instance): stages for *instance, stages in model.fp8_grouped_matmul_wgrad_instances}
    assert sorted(compiled) == sorted(fp8_wgrad.INSTANCES)
    for instance, stages in compiled.items():
        assert stages == fp8_wgrad.stages(fp8_hopper.Tile(*instance)), instance


def test_the_weight_gradient_copies_what_the_hopper_kernel_cannot_address():
    """Operands and outputs that begin anywhere, rows on top of each other: as if contiguous."""
    rows, expert_offsets = 300, torch.tensor([0, 130, 130, 300], dtype=torch.int32)
    grad_t, scale_grad, a_t, scale_a = wgrad_operands(torch.Generator().manual_seed(0), rows, 24, 40, expert_offsets)

    def shifted(t, by):
        flat = torch.zeros(t.numel() + by, dtype=torch.uint8).view(t.dtype)
        flat[by:] = t.flatten()
        return flat[by:].view(t.shape)

    flat = torch.ones(3 * 24 * 40 + 1)
    out = flat[1:].view(3, 24, 40)
    with dk.use_backend("reference"):
        expected = 1 + dk.fp8_grouped_matmul_wgrad(grad_t, scale_grad, a_t, scale_a, expert_offsets)
    with harness.model_extension(), dk.use_backend("cuda"):
        operands = shifted(grad_t, 3), scale_grad, shifted(a_t, 8), scale_a
        dk.fp8_grouped_matmul_wgrad(*operands, expert_offsets, out=out, accumulate=True)
    assert_close(out, expected, MATMUL)
    assert flat[0] == 1


def test_the_plan_of_grouped_matmul_knows_the_compiled_instances(model):
    forward = {(tile, cluster, t): stages for tile, _, cluster, t, stages in model.grouped_matmul_instances}
    assert forward.keys() == {(*i, t) for i in bf16_hopper.INSTANCES["forward"] for t in (False, True)}
    for (columns, *_), stages in forward.items():
        assert stages == bf16_hopper.stages(columns, "forward"), columns
    names, compiled = {model.BF16: "bfloat16", model.FP32: "float32"}, {}
    for dtype, _, columns, cluster, stages in model.grouped_matmul_wgrad_instances:
        compiled.setdefault(names[dtype], set()).add((columns, cluster))
        assert stages == bf16_hopper.stages(columns, "wgrad", names[dtype]), (dtype, columns)
    assert compiled == {dtype: set(bf16_hopper.INSTANCES["wgrad"]) for dtype in bf16_hopper.OUT_DTYPES["wgrad"]}


def test_grouped_matmul_copies_what_the_hopper_kernel_cannot_address():
    """Rows at odd addresses, experts that overlap or lie a fraction of a row apart, weights of neither order; slices of
    weights in place, in both orders."""
    g = torch.Generator().manual_seed(0)
    a, b, grad = (torch.randn(*shape, generator=g).bfloat16() for shape in ((21, 72), (3, 24, 72), (21, 24)))
    ends = torch.tensor([0, 5, 5, 21], dtype=torch.int32)

    def framed(t, rows, columns):
        wide = torch.full((*t.shape[:-2], t.shape[-2] + rows, t.shape[-1] + columns), float("nan"), dtype=t.dtype)
        wide[..., rows:, columns:] = t
        return wide[..., rows:, columns:]

    with dk.use_backend("reference"):
        expected, same = dk.grouped_matmul(a, b, ends), dk.grouped_matmul(a, b[:1].expand(3, -1, -1), ends)
        gradient = dk.grouped_matmul_wgrad(grad, a, ends)
    scattered = torch.stack([b, b], -1)[..., 0]
    with harness.model_extension(), dk.use_backend("cuda"):
        for rows, columns in ((0, 3), (8, 0), (1, 16), (0, 8)):
            x, y = framed(a, rows, columns), framed(grad, rows, columns)
            n_major = framed(b.mT.contiguous(), rows, columns).mT
            for weights in (framed(b, rows, columns), n_major):
                assert_close(dk.grouped_matmul(x, weights, ends), expected, MATMUL)
            assert_close(dk.grouped_matmul_wgrad(y, x, ends), gradient, MATMUL)
        assert_close(dk.grouped_matmul(a, scattered, ends), expected, MATMUL)
        assert_close(dk.grouped_matmul(a, b[:1].expand(3, -1, -1), ends), same, MATMUL)


def test_the_gradients_of_grouped_matmul_run_on_its_hopper_kernels():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=g).bfloat16() for shape in ((40, 16), (2, 24, 16)))
    ends, grads = torch.tensor([2, 30, 37], dtype=torch.int32), {}
    for backend in ("reference", "cuda"):
        x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
        with harness.model_extension(), dk.use_backend(backend):
            dk.grouped_matmul(x, w, ends).square().sum().backward()
        grads[backend] = x.grad, w.grad
    for got, want in zip(grads["cuda"], grads["reference"], strict=True):
        assert_close(got, want, MATMUL)
