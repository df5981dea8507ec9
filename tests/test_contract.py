"""What every op is held to from the day it is registered, driven by the registry and the samples of each op."""

import functools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import deepseek_kernels
from deepseek_kernels.ops import _registry
from deepseek_kernels.testing import samples as sampling
from deepseek_kernels.testing.compare import EXACT, GRADIENT, assert_close, assert_same_bits
from deepseek_kernels.testing.guard import guarded_allocations

OPERATORS = _registry.OPERATORS


@functools.cache
def sample(op: str, index: int) -> sampling.Sample:
    return sampling.samples(OPERATORS[op])[index]


def _runnable(op, s: sampling.Sample, backend: str) -> bool:
    with deepseek_kernels.use_backend(backend):
        return deepseek_kernels.explain(op.name, *s.args, **s.kwargs).backend is not None


def _skip_unless_runnable(op, s: sampling.Sample, backend: str) -> None:
    """For cases on a GPU: what a backend can run there is not known when the cases are listed."""
    if not _runnable(op, s, backend):
        pytest.skip(f"{backend} cannot run this case on this device")


def _cases():
    for op in OPERATORS.values():
        for i, s in enumerate(sampling.samples(op)):
            for backend in ("reference", *op.backends):
                if backend != "cuda" and _runnable(op, s, backend):
                    yield pytest.param(op.name, i, backend, "cpu", id=f"{op.name}-{s.name}-{backend}")
                if backend != "cpu":
                    mark = pytest.mark.gpu
                    yield pytest.param(op.name, i, backend, "cuda", id=f"{op.name}-{s.name}-{backend}-gpu", marks=mark)


def _bad_cases():
    for op in OPERATORS.values():
        for i, b in enumerate(sampling.bad(op)):
            yield pytest.param(op.name, i, id=f"{op.name}-{b.name}")


def _each(make=None):
    return pytest.mark.parametrize("name", [n for n in OPERATORS if make is None or make(OPERATORS[n])])


def outputs(result) -> tuple:
    return () if result is None else result if isinstance(result, tuple) else (result,)


def tolerances(s: sampling.Sample, count: int) -> tuple:
    return s.tolerance if isinstance(s.tolerance, tuple) else (s.tolerance,) * count


def clone(s: sampling.Sample) -> sampling.Sample:
    """A copy with the strides of the original."""

    def copy(v):
        if not isinstance(v, torch.Tensor):
            return v
        new = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
        new.copy_(v)
        return new

    return sampling.replace(s, args=tuple(map(copy, s.args)), kwargs={k: copy(v) for k, v in s.kwargs.items()})


def named(op, s: sampling.Sample) -> dict:
    return dict(zip(op.keywords, op.fill(s.args, s.kwargs), strict=True))


def with_arguments(op, s: sampling.Sample, **new) -> sampling.Sample:
    values = named(op, s) | new
    return sampling.replace(s, args=tuple(values[k] for k in op.keywords), kwargs={})


def call(op, s: sampling.Sample):
    """(outputs, values of the mutated arguments) with undefined parts masked."""
    return defined(op, s, outputs(op.overload(*op.fill(s.args, s.kwargs))))


def defined(op, s: sampling.Sample, out: tuple):
    everything = out + tuple(named(op, s)[m] for m in s.mutated)
    return s.defined(*everything) if s.defined else everything


@pytest.mark.parametrize(("name", "index", "backend", "device"), list(_cases()))
def test_sample(name, index, backend, device):
    """Right values, nothing outside its memory, inputs untouched, the same bits twice, any strides, fake as real."""
    op = OPERATORS[name]
    original = sample(name, index).to(device)
    _skip_unless_runnable(op, original, backend)
    with torch.no_grad(), deepseek_kernels.use_backend("reference"):
        expected = call(op, clone(original))
    with torch.no_grad(), deepseek_kernels.use_backend(backend):
        s = clone(original)
        with guarded_allocations():
            first = call(op, s)
        for key, before in named(op, original).items():
            if isinstance(before, torch.Tensor) and key not in s.mutated:
                assert_same_bits(named(op, s)[key], before, f"input {key} after the call")
        for i, (a, e, t) in enumerate(zip(first, expected, tolerances(s, len(expected)), strict=True)):
            assert a.dtype == e.dtype, f"output {i}: dtype {a.dtype}, reference {e.dtype}"
            assert_close(a, e, EXACT if backend == "reference" else t, f"output {i}")

        for i, (a, b) in enumerate(zip(first, call(op, clone(original)), strict=True)):
            assert_same_bits(b, a, f"output {i} of a second call")

        for key in s.any_strides:
            t = named(op, original)[key]
            permuted = t.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
            spread = torch.stack([t, t], -1)[..., 0] if t.dtype.itemsize > 1 else permuted
            for other in (permuted, spread):
                again = call(op, with_arguments(op, clone(original), **{key: other}))
                for i, (a, b) in enumerate(zip(first, again, strict=True)):
                    assert_same_bits(b, a, f"output {i} with {key} of strides {other.stride()}")

        real = outputs(op.overload(*clone(original).args, **clone(original).kwargs))
    with FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in original.args]
        fake_kwargs = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in original.kwargs.items()}
        fake = outputs(op.overload(*fake_args, **fake_kwargs))
    for i, (r, f) in enumerate(zip(real, fake, strict=True)):
        kind = (r.shape, r.stride(), r.dtype, r.device.type)
        assert (f.shape, f.stride(), f.dtype, f.device.type) == kind, f"output {i}: fake differs from real {kind}"


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "index", "backend"), [c.values[:3] for c in _cases() if c.values[3] == "cuda"])
def test_captures_into_a_cuda_graph(name, index, backend):
    """What waits for the device cannot be captured. A replay computes the same bits from the same memory."""
    op = OPERATORS[name]
    original = sample(name, index).to("cuda")
    _skip_unless_runnable(op, original, backend)
    with torch.no_grad(), deepseek_kernels.use_backend(backend):
        expected = call(op, clone(original))  # also compiles and loads
        s = clone(original)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = outputs(op.overload(*op.fill(s.args, s.kwargs)))
        graph.replay()
        for i, (a, e) in enumerate(zip(defined(op, s, out), expected, strict=True)):
            assert_same_bits(a, e, f"output {i} of a replay")


def _grad_cases():
    for case in _cases():
        name, index, backend, device = case.values
        if sample(name, index).grad:
            yield case


@pytest.mark.parametrize(("name", "index", "backend", "device"), list(_grad_cases()))
def test_gradient(name, index, backend, device):
    """Every gradient, by name, against the reference path in float64 (itself checked by test_gradcheck)."""
    op = OPERATORS[name]
    s = sample(name, index).to(device)
    _skip_unless_runnable(op, s, backend)

    def gradients(s, backend, cotangents=None):
        values = named(op, s)
        leaves = {k: values[k].detach().clone().requires_grad_() for k in s.grad}
        with deepseek_kernels.use_backend(backend):
            out = outputs(op.overload(*with_arguments(op, s, **leaves).args))
            out = [o for o in out if o.requires_grad]
            g = torch.Generator().manual_seed(1)
            cotangents = cotangents or [torch.randn(o.shape, generator=g).to(o.device, o.dtype) for o in out]
            given.extend(cotangents)
            try:
                gradients = torch.autograd.grad(out, list(leaves.values()), cotangents, retain_graph=True)
            except deepseek_kernels.BackendError:  # a forward alone
                with deepseek_kernels.use_backend(None):
                    gradients = torch.autograd.grad(out, list(leaves.values()), cotangents)
            return dict(zip(leaves, gradients, strict=True))

    given: list[torch.Tensor] = []
    actual = gradients(s, backend)
    double = with_arguments(op, s, **{k: named(op, s)[k].double() for k in s.grad})
    expected = gradients(double, "reference", [c.double() for c in given])
    for key in s.grad:
        assert actual[key].dtype == named(op, s)[key].dtype
        assert_close(actual[key], expected[key], GRADIENT, f"gradient of {key}")


@_each(lambda op: op.differentiable)
def test_gradient_under_activation_checkpointing(name):
    op = OPERATORS[name]
    s = next(s for s in sampling.samples(op) if s.grad)
    leaves = {k: named(op, s)[k].detach().clone().requires_grad_() for k in s.grad}

    def function(*tensors):
        out = outputs(op.overload(*with_arguments(op, s, **dict(zip(s.grad, tensors, strict=True))).args))
        return tuple(o for o in out if o.requires_grad)

    def gradients(out):
        return torch.autograd.grad(out, list(leaves.values()), [torch.ones_like(o) for o in out])

    checkpointed = checkpoint(function, *leaves.values(), use_reentrant=False)
    for key, a, e in zip(leaves, gradients(checkpointed), gradients(function(*leaves.values())), strict=True):
        assert_same_bits(a, e, f"gradient of {key}")


@_each(lambda op: op.differentiable)
def test_gradcheck(name):
    op = OPERATORS[name]
    checked = 0
    for s in sampling.samples(op):
        if not s.grad:
            continue
        values = {k: named(op, s)[k].double().requires_grad_() for k in s.grad}
        keys = list(values)

        def function(*leaves, s=s, keys=keys):
            out = outputs(op.overload(*with_arguments(op, s, **dict(zip(keys, leaves, strict=True))).args))
            return tuple(o for o in out if o.requires_grad)

        with deepseek_kernels.use_backend("reference"):
            assert torch.autograd.gradcheck(function, tuple(values.values()), fast_mode=True, nondet_tol=0.0)
        checked += 1
    assert checked, f"{name} is differentiable and no sample names its gradients"


@_each(lambda op: not op.differentiable and not op.overload._schema.is_mutable)
def test_refuses_backward(name):
    op = OPERATORS[name]
    for s in sampling.samples(op):
        values = named(op, s)
        key = next((k for k, v in values.items() if isinstance(v, torch.Tensor) and v.dtype in STANDARD), None)
        if key is None:
            continue
        leaf = values[key].detach().clone().requires_grad_()
        out = outputs(op.overload(*with_arguments(op, s, **{key: leaf}).args))
        for o in out:
            if o.is_floating_point():
                assert o.requires_grad, f"{name}: {key} requires grad, and the result keeps silent about it"
                with pytest.raises(NotImplementedError, match=name.partition(".")[0]):
                    o.float().sum().backward()
        return


STANDARD = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize(("name", "index"), list(_bad_cases()))
def test_bad_input(name, index):
    op = OPERATORS[name]
    b = sampling.bad(op)[index]
    with pytest.raises(b.error, match=b.match) as raised:
        op.overload(*b.args, **b.kwargs)
    assert re.match(rf"{name.partition('.')[0]}: .+: (wanted .+, got .+|requires grad)", str(raised.value))


@_each()
def test_opcheck(name):
    op = OPERATORS[name]
    for s in sampling.samples(op):
        s = clone(s)
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if s is not None and any(getattr(v, "dtype", None) == torch.float8_e4m3fn for v in named(op, s).values()):
            tests.remove("test_schema")  # its comparison does not know float8; test_sample checks the inputs' bytes
        torch.library.opcheck(op.overload, s.args, s.kwargs, test_utils=tests)
    first = clone(sampling.samples(op)[0])
    torch.library.opcheck(op.overload, first.args, first.kwargs, test_utils="test_aot_dispatch_dynamic")


@_each()
def test_compiles_to_one_graph(name):
    op = OPERATORS[name]
    s = sampling.samples(op)[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args, **kwargs: op.overload(*args, **kwargs), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        a, b = clone(s), clone(s)
        for got, want in zip(
            outputs(compiled(*a.args, **a.kwargs)), outputs(op.overload(*b.args, **b.kwargs)), strict=True
        ):
            assert_same_bits(got, want)


@_each()
def test_has_triton_case_and_bad_input(name):
    op = OPERATORS[name]
    assert sampling.bad(op), f"{name} has no bad samples"
    assert "triton" in op.backends, f"{name} has no Triton kernel"
    assert any(_runnable(op, s, "triton") for s in sampling.samples(op)), f"{name}: no sample runs on Triton"


@_each()
def test_reference_never_looks_at_values(name):
    """What would synchronise with a GPU cannot run on tensors without values."""
    op = OPERATORS[name]
    for s in sampling.samples(op):
        with FakeTensorMode() as mode, torch.no_grad():
            args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in op.fill(s.args, s.kwargs)]
            op.reference(*args)


@_each()
def test_plan_counts(name):
    op = OPERATORS[name]
    for s in sampling.samples(op):
        problem = op.problem(*op.fill(s.args, s.kwargs))
        assert op.plan.flops(problem) >= 0 and op.plan.bytes(problem) >= 0
        hash(problem)


@_each()
def test_flop_formula(name):
    from torch.utils.flop_counter import FlopCounterMode

    op = OPERATORS[name]
    s = clone(sampling.samples(op)[0])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        op.overload(*s.args, **s.kwargs)
    if not name.partition(".")[2]:
        assert counter.get_total_flops() == op.plan.flops(op.problem(*op.fill(s.args, s.kwargs)))


@pytest.mark.parametrize("grad", [False, True])
def test_modes_see_calls_that_need_no_gradient(grad):
    """Such a call skips torch's autograd kernel, but no dispatch mode and no fake tensor."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    swiglu = torch.ops.deepseek_kernels.swiglu
    with torch.set_grad_enabled(grad):
        with Watch():
            swiglu(torch.ones(2, 4))
        with FakeTensorMode():
            assert isinstance(swiglu(torch.ones(2, 4))[0], FakeTensor)
        assert torch.vmap(lambda x: swiglu(x)[0])(torch.ones(3, 2, 4)).shape == (3, 2, 2)
    assert swiglu.default in seen
