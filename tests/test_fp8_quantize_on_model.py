"""fp8_quantize's CUDA kernel in the model of tests/hopper_model, against the reference bit for bit."""

import sys
from pathlib import Path

import pytest
import torch

from deepseek_kernels.reference.fp8_quantize import fp8_quantize as reference_quantize
from deepseek_kernels.testing.compare import assert_same_bits

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

BLOCKS = {"1x128": (1, 128), "128x128": (128, 128), "128x1": (128, 1)}
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


def run_quantize(model, x, granularity, *, pow2_scale=False, mn_major=False, ld_pad=0, offset=0):
    (m, k), (block_m, block_k) = x.shape, BLOCKS[granularity]
    rows, columns = -(-m // block_m), -(-k // block_k)
    guarded = harness.Guarded(model)
    xs = guarded.copy("x", x, stride=(k + ld_pad, 1), offset=offset)
    q = guarded.empty("q", (m, k), FP8, stride=(k + ld_pad, 1), offset=offset)
    scale = guarded.empty("scale", (rows, columns), torch.float32, stride=harness.mn_major(rows) if mn_major else None)
    model.fp8_quantize(
        x=xs.data_ptr(), q=q.data_ptr(), scale=scale.data_ptr(), m=m, k=k, dtype=harness.DTYPES[x.dtype],
        block_m=block_m, block_k=block_k, ldx=xs.stride(0), ldq=q.stride(0), scale_stride_m=scale.stride(0),
        scale_stride_k=scale.stride(1), pow2_scale=pow2_scale, stream=0,
    )  # fmt: skip
    want_q, want_scale = reference_quantize(x, granularity, pow2_scale)
    assert_same_bits(scale, want_scale)
    assert_same_bits(q, want_q)


QUANTIZE_SHAPES = [(1, 128), (7, 1000), (63, 5), (130, 264), (200, 144)]


@pytest.mark.parametrize("granularity", BLOCKS)
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_fp8_quantize(model, dtype, granularity):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        layout = dict(ld_pad=(0, 16, 3)[seed % 3], offset=seed % 4 // 3, mn_major=seed % 3 == 0)
        for shape in QUANTIZE_SHAPES:
            x = harness.hostile(shape, dtype, generator)
            run_quantize(model, x, granularity, pow2_scale=seed % 2 == 0, **layout)

    harness.under_every_schedule(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_fp8_quantize_every_16_bit_pattern(model, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(512, 128)
    run_quantize(model, x, "1x128")
    largest = x.float().abs().nan_to_num(0, 0, 0).amax(1, keepdim=True)
    shuffled = (torch.rand(512, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1) * largest
    run_quantize(model, shuffled.to(dtype), "1x128")


def test_fp8_quantize_divides_exactly(model):
    """Quotients next to the midpoint of two FP8 values, where a multiplication by the reciprocal goes wrong."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(64, 1, generator=generator) * 3 + 1e-3
    middle = (torch.arange(8, 16) + 0.5).repeat(16)[:127] * 2.0 ** torch.randint(-3, 4, (64, 127), generator=generator)
    x = torch.cat([448 * scale, middle * scale], 1)
    for nudge in (-1, 0, 1):
        nudged = x.clone()
        nudged[:, 1:] = (x[:, 1:].view(torch.int32) + nudge).view(torch.float32)
        run_quantize(model, nudged, "1x128")


def test_fp8_quantize_of_nothing(model):
    for m, k in [(0, 128), (5, 0), (0, 0)]:
        run_quantize(model, torch.empty(m, k), "1x128")


@pytest.mark.parametrize(
    "bug, granularity",
    [
        ("column_tail_unmasked", "1x128"),
        ("row_tail_unmasked", "1x128"),
        ("lanes_not_reduced", "1x128"),
        ("syncthreads_missing", "128x128"),
        ("syncthreads_missing", "128x1"),
    ],
)
def test_bugs_of_fp8_quantize(model, bug, granularity):
    x = torch.randn(130, 265, generator=torch.Generator().manual_seed(0))
    harness.assert_caught(lambda: run_quantize(model, x, granularity), bug)
