"""`fp8_quantize`, `fp8_quantize_both` and `fp8_dequantize`: what the contract cannot know."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import deepseek_kernels as dk
from deepseek_kernels.device import GPUS, H200
from deepseek_kernels.ops import _extension
from deepseek_kernels.plan import fp8_quantize as plan
from deepseek_kernels.shapes import GRANULARITIES, align_up, padded_columns
from deepseek_kernels.testing.compare import MATMUL, assert_close, assert_same_bits
from deepseek_kernels.triton_kernels.common import e4m3_decode, e4m3_encode

BACKENDS = ("reference", "triton")
FP8 = torch.float8_e4m3fn
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def quantize(backend, x, *args, **options):
    with dk.use_backend(backend):
        return dk.fp8_quantize(x, *args, **options)


def assert_same_quantisation(x, *args, **options):
    q, scale = quantize("reference", x, *args, **options)
    other, other_scale = quantize("triton", x, *args, **options)
    assert_same_bits(other_scale, scale, "scale")
    assert_same_bits(other, q, "q")
    return q, scale


@triton.jit
def _decode(codes, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, e4m3_decode(tl.load(codes + i)))


@triton.jit
def _encode(values, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, e4m3_encode(tl.load(values + i), NATIVE=False))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_integer_decode_knows_all_codes():
    out = torch.empty(256, device=DEVICE)
    _decode[(1,)](ALL_CODES.to(DEVICE), out, N=256)
    assert_same_bits(out.cpu(), ALL_CODES.view(FP8).float())


def test_integer_encode_rounds_to_nearest_even():
    """Every code, every midpoint of neighbours, and the fp32 values on both sides of each."""
    values = ALL_CODES[:0x7F].view(FP8).float()
    middle = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middle, torch.tensor([448.0, 464.0, 480.0, 1e30, 1e-30, 2.0**-10, torch.inf])])
    up = torch.nextafter(points, torch.tensor(torch.inf))
    down = torch.nextafter(points, torch.tensor(-torch.inf))
    points = torch.cat([points, up, down])
    points = torch.cat([points, -points, torch.tensor([torch.nan])])
    x = torch.zeros(triton.next_power_of_2(len(points)))
    x[: len(points)] = points
    out = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    _encode[(1,)](x.to(DEVICE), out, N=len(x))
    assert_same_bits(out.cpu().view(FP8), x.clamp(-448, 448).to(FP8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example(backend):
    """amax 896 gives scale 2; the row below holds nothing and gets the floor."""
    x = torch.tensor([[896.0, -3.0, 0.0, 2.0**-9], [0.0, 0.0, 0.0, 0.0]])
    q, scale = quantize(backend, x)
    assert scale.tolist() == [[2.0], [torch.tensor(1e-4).div(448).item()]]
    assert q.float().tolist() == [[448, -1.5, 0, 0], [0, 0, 0, 0]]  # 2^-10 is a tie, to even


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_hostile_values(granularity, pow2_scale):
    """Subnormals, ties, the edge of the range, zero blocks, NaN and Inf, huge and tiny blocks side by side."""
    x = torch.zeros(130, 264)
    ties = torch.tensor([448.0, 1.0625, 1.1875, -1.3125, 2.0**-10, 3 * 2.0**-10, 2.0**-6, 0.0146484375])
    x[0, :8] = ties
    x[0, 128:136] = torch.tensor([1e-4, 9.99e-5, 1e-38, -1e-45, 1e-44, 0.0, -0.0, 1e-4])
    x[1] = torch.randn(264) * 1e30
    x[2] = torch.randn(264) * 1e-30
    x[3, :256] = torch.arange(256) - 127.5
    x[4, 5] = torch.nan
    x[5, 200] = torch.inf
    x[129, 263] = -torch.inf
    x[129, 0] = 3.4e38
    q, scale = assert_same_quantisation(x, granularity, pow2_scale=pow2_scale)
    rows, columns = GRANULARITIES[granularity]
    assert scale[4 // rows, 5 // columns].isnan() and q[4, 5].isnan()
    if granularity == "1x128":
        assert q[4].float().isnan().tolist() == [True] * 128 + [False] * 136
        assert scale[5, 1].isinf() and q[5, 200].isnan() and not q[5, 128:200].float().any()
    if pow2_scale:
        finite = scale[scale.isfinite()]
        assert (torch.frexp(finite).mantissa == 0.5).all()
        plain = quantize("reference", x, granularity)[1][scale.isfinite()]
        assert (finite >= plain).all() and (finite < 2 * plain).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_and_ragged_shape(granularity, dtype):
    for m, k in ((1, 1), (129, 130), (3, 128)):
        assert_same_quantisation(torch.randn(m, k).to(dtype), granularity)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 9),
    k=st.integers(0, 270),
    exponent=st.floats(-120, 120),
    granularity=st.sampled_from(sorted(GRANULARITIES)),
    pow2_scale=st.booleans(),
    layout=st.sampled_from(["row", "mn_major"]),
    seed=st.integers(0, 2**31),
)
def test_same_bits_as_the_reference(m, k, exponent, granularity, pow2_scale, layout, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g) * 2**exponent
    q, scale = assert_same_quantisation(x, granularity, pow2_scale=pow2_scale, scale_layout=layout)
    if layout == "mn_major" and scale.shape[1] > 1:
        assert scale.stride() == ((1, -(-scale.shape[0] // 4) * 4) if scale.shape[0] else scale.stride())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantised_values_survive_a_round_trip(backend, granularity):
    """With power-of-two scales dequantising is exact, so quantising again changes nothing."""
    x = torch.randn(130, 200)
    q, scale = quantize(backend, x, granularity, pow2_scale=True)
    with dk.use_backend(backend):
        back = dk.fp8_dequantize(q, scale, granularity)
    again, again_scale = quantize(backend, back, granularity, pow2_scale=True)
    with dk.use_backend(backend):
        assert_same_bits(dk.fp8_dequantize(again, again_scale, granularity), back)
    step = back.abs() * 2**-4 + 2.0**-10 * scale.max()
    assert ((back - x).abs() <= step).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_value_of_a_block_is_448(backend):
    x = torch.randn(64, 384).exp() * torch.randn(64, 1).exp()
    q, _ = quantize(backend, x)
    assert (q.float().abs().view(64, 3, 128).amax(-1) == 448).all()


def test_leading_dimensions():
    x = torch.randn(2, 3, 200)
    q, scale = dk.fp8_quantize(x)
    flat, flat_scale = dk.fp8_quantize(x.view(6, 200))
    assert_same_bits(q, flat.view(2, 3, 200))
    assert_same_bits(scale, flat_scale.view(2, 3, 2))
    with pytest.raises(ValueError, match=r"fp8_quantize: x: wanted shape \[\*, \*\]"):
        dk.fp8_quantize(x, "128x128")


def test_mn_major_strides():
    _, scale = dk.fp8_quantize(torch.randn(6, 300), scale_layout="mn_major")
    assert scale.shape == (6, 3) and scale.stride() == (1, 8)


def quantize_both(backend, x, *args, **options):
    with dk.use_backend(backend):
        return dk.fp8_quantize_both(x, *args, **options)


BOTH_BACKENDS = ("reference", "triton", *(("cpu",) if "fp8_quantize_both" in _extension.environment().cpu_ops else ()))


@pytest.mark.parametrize("backend", BOTH_BACKENDS)
@pytest.mark.parametrize("layout", ["row", "mn_major"])
@pytest.mark.parametrize("m", [1, 128, 129])
def test_both_are_the_two_quantisations(backend, layout, m):
    x = torch.randn(m, 144).bfloat16()
    q, scale, q_t, scale_t = quantize_both(backend, x, scale_layout=layout)
    rows, columns = quantize("reference", x), quantize("reference", x, "128x1")
    assert_same_bits(q, rows[0])
    assert_same_bits(scale, rows[1])
    assert_same_bits(q_t[:, :m].contiguous(), columns[0].t().contiguous())
    assert_same_bits(scale_t, columns[1].t())
    assert q_t.shape == (144, align_up(m, 128)) and not q_t[:, m:].float().any()
    if layout == "mn_major":
        assert scale.stride(0) == scale_t.stride(0) == 1 and scale_t.shape[0] == 144


@pytest.mark.parametrize("backend", BOTH_BACKENDS)
def test_both_of_experts_is_both_of_each(backend):
    """Empty experts, one of most rows, one of one row; no block of an expert knows of another."""
    x = torch.randn(200, 48) * torch.logspace(-3, 3, 200)[:, None]
    offsets = [0, 0, 150, 151, 151, 190]
    q, scale, q_t, scale_t = quantize_both(backend, x, torch.tensor(offsets, dtype=torch.int32))
    assert q_t.shape == (48, padded_columns(200, 5)) and q_t.shape[1] % 128 == 0
    assert_same_bits(q, quantize("reference", x)[0])
    column = 0
    for begin, end in itertools.pairwise(offsets):
        _, _, expected, expected_scale = quantize_both("reference", x[begin:end])
        width = expected.shape[1]
        assert_same_bits(q_t[:, column : column + width].contiguous(), expected)
        assert_same_bits(scale_t[:, column // 128 : (column + width) // 128].contiguous(), expected_scale)
        column += width
    assert column < q_t.shape[1] and not q_t[:, column:].float().any()


@pytest.mark.parametrize("backend", BOTH_BACKENDS)
def test_weight_gradient_straight_from_both(backend):
    """For any number of tokens fp8_matmul takes the outputs as they are."""
    for m in (1, 77, 130):
        grad, x = torch.randn(m, 24), torch.randn(m, 40)
        _, _, grad_t, scale_grad_t = quantize_both(backend, grad)
        _, _, x_t, scale_x_t = quantize_both(backend, x, scale_layout="mn_major")
        got = dk.fp8_matmul(grad_t, scale_grad_t, x_t, scale_x_t, out_dtype=torch.float32)
        assert_close(got, dequantized_columns(grad, m).t() @ dequantized_columns(x, m), MATMUL)


def dequantized_columns(x, m):
    q, scale = quantize("reference", x, "128x1")
    return q.double() * scale.double().repeat_interleave(128, 0)[:m]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 150),
    k=st.integers(0, 20),
    offsets=st.lists(st.one_of(st.integers(0, 150), st.integers(-(2**31), 2**31 - 1)), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_any_offsets_give_the_bits_of_the_reference(m, k, offsets, seed):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).half()
    offsets = torch.tensor(offsets, dtype=torch.int32)
    expected = quantize_both("reference", x, offsets)
    for backend in BOTH_BACKENDS[1:]:
        for got, want in zip(quantize_both(backend, x, offsets), expected, strict=True):
            assert_same_bits(got, want)


def test_a_block_of_the_largest_number_of_columns():
    """As many blocks as there may be: each of E experts one row past a whole block; and the rows of no expert too."""
    m, experts = 3 * 129 + 2, 3
    p = plan.Problem("both", m, 16, "1x128", 2, experts)
    blocks = 3 * 2  # of the experts, with 130 tokens one of them
    assert p.width == 128 * blocks and p.row_tiles * 128 >= p.width
    assert plan.Problem("both", m, 16, "1x128", 2).width == align_up(m, 128)


def test_bytes_of_both():
    p = plan.Problem("both", 4096, 7168, "1x128", 2)
    assert plan.bytes(p) == 4096 * 7168 * 4 + 2 * 4 * 4096 * 56 and plan.flops(p) == 2 * 4096 * 7168


def test_bytes_of_the_published_case():
    p = plan.Problem("quantize", 4096, 7168, "1x128", 2)
    assert plan.bytes(p) == 4096 * 7168 * 3 + 4 * 4096 * 56


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS.keys())
def test_plan_for_devices_that_are_not_here(device):
    few = plan.select(plan.Problem("quantize", 1, 7168, "1x128", 2), device, "triton")
    many = plan.select(plan.Problem("quantize", 8192, 7168, "1x128", 2), device, "triton")
    assert few.rows < many.rows
    assert many.native_fp8 == (device.arch >= 89)


def test_every_candidate_gives_the_same_bits():
    from deepseek_kernels.triton_kernels import fp8_quantize as kernel

    x = torch.randn(7, 200)
    for granularity, block in GRANULARITIES.items():
        q, scale = quantize("reference", x, granularity)
        for config in plan.candidates(plan.Problem("quantize", 7, 200, granularity, 4), H200):
            config = plan.Config(config.rows, config.columns, config.num_warps, native_fp8=False)
            got, got_scale = torch.empty_like(q), torch.empty_like(scale)
            kernel.quantize(config, *block, False, x, got, got_scale)
            assert_same_bits(got, q)
            assert_same_bits(got_scale, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_device_conversion_gives_the_same_bits(backend, granularity):
    """Every bf16 bit pattern through the device's own conversion instruction."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    q, scale = quantize("reference", x, granularity)
    got, got_scale = quantize(backend, x.cuda(), granularity)
    assert_same_bits(got_scale.cpu(), scale)
    assert_same_bits(got.cpu(), q)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_both_on_a_device_gives_the_same_bits(backend):
    """Every bf16 bit pattern; experts that end inside a tile, and rows of none."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(512, 128)
    for offsets in (None, torch.tensor([3, 3, 140, 141, 500], dtype=torch.int32)):
        expected = quantize_both("reference", x, offsets)
        got = quantize_both(backend, x.cuda(), None if offsets is None else offsets.cuda())
        for a, e in zip(got, expected, strict=True):
            assert_same_bits(a.cpu(), e)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_device_rounds_to_nearest(backend):
    q = ALL_CODES.view(2, 128).view(FP8)
    scale = torch.rand(2, 1)
    with dk.use_backend("reference"):
        expected = dk.fp8_dequantize(q, scale, out_dtype=torch.bfloat16)
    with dk.use_backend(backend):
        assert_same_bits(dk.fp8_dequantize(q.cuda(), scale.cuda(), out_dtype=torch.bfloat16).cpu(), expected)


def test_division_by_the_reciprocal_is_exact():
    """What `triton_kernels.common.scaled` does on a GPU, where a fused multiplication and addition rounds once."""

    def fused(x, y, z):
        return (x.double() * y.double() + z.double()).float()

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    for exponent in torch.linspace(-14, 127, 60):
        amax = every.abs()[every.abs() <= 2.0**exponent].max() * (0.5 + torch.rand(1) / 2)
        x = every[every.abs() <= amax.clamp(min=1e-4)]
        scale = amax.clamp(min=1e-4) / 448
        inverse = 1 / scale
        first = x * inverse
        quotient = fused(fused(-first, scale, x), inverse, first)
        quotient = fused(fused(-quotient, scale, x), inverse, quotient)
        quotient = torch.where(first == 0, first, quotient)
        normal = (x / scale).abs() > 2.0**-76
        assert_same_bits(quotient[normal], (x / scale)[normal])
        assert_same_bits(quotient.to(torch.float8_e4m3fn), (x / scale).to(torch.float8_e4m3fn))
