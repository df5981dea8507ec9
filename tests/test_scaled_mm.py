"""What `fp8_matmul` hands to torch's block-scaled `scaled_mm`. No GPU: `stand_in` takes the library's place, checks
every rule that torch's ScaledBlas.cpp states, and multiplies in fp32; torch's own shape function is asked as well."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_kernels import fp8_quantize
from deepseek_kernels.device import A100, B200, CPU, H100, H200, L40S
from deepseek_kernels.ops import _scaled_mm
from deepseek_kernels.ops.fp8_matmul import _vector_rows
from deepseek_kernels.plan import fp8_matmul as plan
from deepseek_kernels.plan.backend import BACKENDS, Environment
from deepseek_kernels.reference.fp8_matmul import fp8_matmul as reference
from deepseek_kernels.shapes import V3_MATMULS, align_up, ceil_div
from deepseek_kernels.testing.compare import MATMUL, assert_close
from deepseek_kernels.testing.samples.fp8_matmul import operands

NEW = Environment(triton=True, torch_functions=frozenset({"scaled_mm"}), cuda=(13, 0))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def aligned(t: torch.Tensor) -> bool:
    return t.data_ptr() % 16 == 0


def stand_in(
    mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None, bias=None,
    output_dtype=BF16, contraction_dim=(), use_fast_accum=False,
):  # fmt: skip
    """Not the library: its published rules, and the product in fp32."""
    recipe = F.ScalingType
    (m, k), (k_b, n) = mat_a.shape, mat_b.shape
    blocks, l4 = ceil_div(k, 128), align_up(ceil_div(k, 128), 4)
    assert mat_a.dtype == mat_b.dtype == torch.float8_e4m3fn and k == k_b and min(m, n, k) > 0
    assert k % 16 == 0 and n % 16 == 0 and m % 4 == 0
    assert mat_a.stride(1) == 1 and mat_a.stride(0) >= k and mat_a.stride(0) % 16 == 0 and aligned(mat_a)
    assert mat_b.stride(0) == 1 and mat_b.stride(1) >= k and mat_b.stride(1) % 16 == 0 and aligned(mat_b)
    assert scale_recipe_a == recipe.BlockWise1x128 and not use_fast_accum
    assert scale_a.shape == (m, blocks) and scale_a.stride() == (1, m) and aligned(scale_a)
    if scale_recipe_b == recipe.BlockWise1x128:
        assert scale_b.shape == (n, blocks) and scale_b.stride() == (1, n)
    else:
        assert scale_recipe_b == recipe.BlockWise128x128
        assert scale_b.shape == (l4, ceil_div(n, 128)) and scale_b.stride() == (1, l4)
        assert not scale_b[blocks:].any()
        scale_b = scale_b[:blocks].t()
    assert scale_a.dtype == scale_b.dtype == FP32 and aligned(scale_b)
    assert output_dtype in (BF16, FP32)
    if bias is not None:
        assert output_dtype == bias.dtype == BF16 and bias.shape == (n,) and bias.is_contiguous()
    return reference(mat_a, scale_a, mat_b.t(), scale_b, bias, output_dtype)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", stand_in)


@pytest.mark.parametrize("rows_b", [128, 1])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (4, 144, 128), (7, 2112, 144), (64, 256, 640), (129, 128, 272)])
@pytest.mark.parametrize(("out_dtype", "bias"), [(BF16, None), (FP32, None), (BF16, BF16), (BF16, FP32), (FP16, FP16)])
def test_every_rule_is_kept(library, m, n, k, rows_b, out_dtype, bias):
    g = torch.Generator().manual_seed(m)
    args = (*operands(g, m, n, k, rows_b), None if bias is None else torch.randn(n, generator=g).to(bias))
    d = _scaled_mm.product(*args, out_dtype, _vector_rows)
    assert d.shape == (m, n) and d.dtype == out_dtype and d.is_contiguous()
    assert_close(d, reference(*args, torch.float64), MATMUL)


def test_awkward_strides_are_copied(library):
    g = torch.Generator().manual_seed(0)
    a, scale_a, b, scale_b = operands(g, 12, 32, 48)
    frame_a, frame_b = (torch.zeros(len(q), 56, dtype=torch.uint8).view(q.dtype) for q in (a, b))
    frame_a.view(torch.uint8)[:, 4:52] = a.view(torch.uint8)
    frame_b.view(torch.uint8)[:, 4:52] = b.view(torch.uint8)
    odd = (frame_a[:, 4:52], scale_a.expand(12, 1), frame_b[:, 4:52], scale_b.expand(1, 1))
    expected = reference(a, scale_a, b, scale_b, None, torch.float64)
    assert_close(_scaled_mm.product(*odd, None, FP32, _vector_rows), expected, MATMUL)
    transposed = a.t().contiguous().t()
    assert_close(_scaled_mm.product(transposed, *odd[1:], None, FP32, _vector_rows), expected, MATMUL)


def test_what_the_quantiser_writes_is_not_copied():
    x, w = torch.randn(64, 512), torch.randn(256, 512)
    a, scale_a = fp8_quantize(x, scale_layout="mn_major")
    b, scale_b = fp8_quantize(w, "128x128")
    given = _scaled_mm.operands(a, scale_a, b, scale_b, _vector_rows)
    assert [t.data_ptr() for t in given] == [t.data_ptr() for t in (a, scale_a, b, scale_b)]
    both = fp8_quantize(w, scale_layout="mn_major")
    assert _scaled_mm.operands(a, scale_a, *both, _vector_rows).scale_b.data_ptr() == both[1].data_ptr()


def test_padding_is_exact():
    g = torch.Generator().manual_seed(0)
    given = _scaled_mm.operands(*operands(g, 5, 272, 656), _vector_rows)
    assert [tuple(t.shape) for t in given] == [(8, 656), (8, 6), (656, 272), (8, 3)]
    assert [t.stride() for t in given] == [(656, 1), (1, 8), (1, 656), (1, 8)]
    assert not given.a[5:].float().any() and not given.scale_a[5:].any() and not given.scale_b[6:].any()


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="torch.nn.functional.scaled_mm came with torch 2.10")
@pytest.mark.parametrize("rows_b", [128, 1])
def test_torch_accepts_the_shapes(rows_b):
    """The shape function that torch itself runs under tracing, on tensors that say they are on a GPU."""
    m, n, k = 130, 384, 896
    g = torch.Generator().manual_seed(0)
    given = _scaled_mm.operands(*operands(g, m, n, k, rows_b), _vector_rows)
    recipe = F.ScalingType

    def call(*shapes):
        with FakeTensorMode():
            a, scale_a, b, scale_b = (
                torch.empty_strided(shape, t.stride(), dtype=t.dtype, device="cuda")
                for t, shape in zip(given, shapes, strict=True)
            )
            recipe_b = recipe.BlockWise1x128 if rows_b == 1 else recipe.BlockWise128x128
            return F.scaled_mm(a, b, scale_a, recipe.BlockWise1x128, scale_b, recipe_b)

    *shapes, scale_b = (tuple(t.shape) for t in given)
    assert call(*shapes, scale_b).shape == (132, n)
    with pytest.raises(RuntimeError):
        call(*shapes, (scale_b[0] - 1, scale_b[1]))


@pytest.mark.parametrize(
    ("device", "env", "options", "why"),
    [
        (H100, NEW, {}, "^$"),
        (H200, NEW, {"granularity_b": "1x128", "accumulate": True, "out_dtype": "float32"}, "^$"),
        (CPU, Environment(), {}, "^$"),
        (A100, NEW, {}, r"compute capability 9\.0 only, the device has 8\.0"),
        (L40S, NEW, {}, r"has 8\.9"),
        (B200, NEW, {}, r"has 10\.0"),
        (H100, Environment(cuda=(13, 0)), {}, r"torch 2\.10 or newer"),
        (H100, Environment(torch_functions=NEW.torch_functions, cuda=(12, 8)), {}, r"from CUDA 12\.9 on.* has 12\.8"),
        (H100, NEW, {"n": 24}, "n of a multiple of 16, got 24"),
        (H100, NEW, {"k": 0}, "k of at least 16"),
    ],
)
def test_the_plan_names_the_rule(device, env, options, why):
    p = plan.Problem(**({"m": 128, "n": 4096, "k": 7168} | options))
    assert re.search(why, plan.backends(p, device, env)["torch"])


def test_many_rows_on_hopper_go_to_the_library():
    def first(device, m=4096, n=4096, k=7168, **options):
        order = plan.preference(plan.Problem(m, n, k, **options), device)
        assert sorted(order) == sorted(BACKENDS)
        return next(b for b in order if b in ("triton", "torch"))

    for n, k in V3_MATMULS:
        assert first(H200, n=n, k=k) == ("torch" if n % 128 == 0 else "triton")
    for device in (A100, L40S, B200, CPU):
        assert first(device) == "triton"
    assert first(H100, m=128) == first(H100, m=4097) == first(H100, k=7184) == "triton"
    assert first(H100, out_dtype="float32", accumulate=True) == first(H100, out_dtype="float16") == "triton"
    assert first(H100, bias_dtype="float32") == "triton" and first(H100, bias_dtype="bfloat16") == "torch"
    assert plan.preference(plan.Problem(4096, 4096, 7168), H100)[0] == "cuda"
