"""fp8_quantize's CUDA kernel in the model of tests/hopper_model, against the reference bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_kernels.plan.fp8_quantize import Problem
from deepseek_kernels.reference import fp8_quantize as reference
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
    want_q, want_scale = reference.fp8_quantize(x, granularity, pow2_scale)
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


def run_both(model, x, offsets=None, *, pow2_scale=False, mn_major=False, ld_pad=0, offset=0):
    m, k = x.shape
    problem = Problem("both", m, k, "1x128", x.element_size(), None if offsets is None else len(offsets) - 1)
    width, scale_columns = problem.width, -(-k // 128)
    guarded = harness.Guarded(model)
    xs = guarded.copy("x", x, stride=(k + ld_pad, 1), offset=offset)
    q = guarded.empty("q", (m, k), FP8, stride=(k + ld_pad, 1), offset=offset)
    q_t = guarded.empty("q_t", (k, width), FP8)
    strides = [harness.mn_major(rows) if mn_major else None for rows in (m, k)]
    scale = guarded.empty("scale", (m, scale_columns), torch.float32, stride=strides[0])
    scale_t = guarded.empty("scale_t", (k, width // 128), torch.float32, stride=strides[1])
    offsets = None if offsets is None else guarded.copy("expert_offsets", torch.tensor(offsets, dtype=torch.int32))
    model.fp8_quantize_both(
        x=xs.data_ptr(), expert_offsets=0 if offsets is None else offsets.data_ptr(), q=q.data_ptr(),
        scale=scale.data_ptr(), q_t=q_t.data_ptr(), scale_t=scale_t.data_ptr(), m=m, k=k, width=width,
        row_tiles=problem.row_tiles, num_experts=problem.num_experts or 0, dtype=harness.DTYPES[x.dtype],
        ldx=xs.stride(0), ldq=q.stride(0), ldq_t=q_t.stride(0), scale_stride_m=scale.stride(0),
        scale_stride_k=scale.stride(1), scale_t_stride_k=scale_t.stride(0), scale_t_stride_w=scale_t.stride(1),
        pow2_scale=pow2_scale, stream=0,
    )  # fmt: skip
    for got, want in zip((q, scale, q_t, scale_t), reference.fp8_quantize_both(x, offsets, pow2_scale), strict=True):
        assert_same_bits(got, want)


BOTH_CASES = [
    (1, 128, None),
    (129, 40, None),
    (63, 5, [0, 1, 1, 40, 63]),
    (200, 144, [0, 0, 130, 131, 200]),
    (40, 16, [7, 3, 2**31 - 1, -(2**31), 20]),
    (150, 24, [20, 20]),
    (9, 16, [0]),
    (70, 16, list(range(71))),  # more experts than lanes, each of one row
]


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_fp8_quantize_both(model, dtype):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        layout = dict(ld_pad=(0, 16, 3)[seed % 3], offset=seed % 3 // 2, mn_major=seed % 3 == 0)
        for m, k, offsets in BOTH_CASES:
            x = harness.hostile((m, k), dtype, generator)
            run_both(model, x, offsets, pow2_scale=seed % 2 == 0, **layout)

    harness.under_every_schedule(run, harness.SEEDS if harness.FULL else (1, 2, 3))


@pytest.mark.parametrize(
    "bug",
    [
        "column_tail_unmasked",
        "row_tail_unmasked",
        "lanes_not_reduced",
        "rows_read_early",
        "amax_read_early",
        "scale_read_early",
        "codes_read_early",
        "chunks_in_order",
        "expert_end_ignored",
        "strangers_have_columns",
    ],
)
def test_bugs_of_fp8_quantize_both(model, bug):
    x = torch.randn(150, 265, generator=torch.Generator().manual_seed(0))
    harness.assert_caught(lambda: run_both(model, x, [0, 5, 100]), bug)


def run_dequantize(model, granularity, m, k, out_dtype, *, mn_major=False, ld_pad=0, offset=0):
    block_m, block_k = BLOCKS[granularity]
    rows, columns = -(-m // block_m), -(-k // block_k)
    generator = torch.Generator().manual_seed(m * k)
    guarded = harness.Guarded(model)
    codes = torch.randint(0, 256, (m, k), generator=generator, dtype=torch.uint8).view(FP8)
    q = guarded.copy("q", codes, stride=(k + ld_pad, 1), offset=offset)
    scale = guarded.copy(
        "scale", torch.randn(rows, columns, generator=generator), stride=harness.mn_major(rows) if mn_major else None
    )
    out = guarded.empty("out", (m, k), out_dtype, stride=(k + ld_pad, 1), offset=offset)
    model.fp8_dequantize(
        q=q.data_ptr(), scale=scale.data_ptr(), out=out.data_ptr(), m=m, k=k, ldq=q.stride(0), ld_out=out.stride(0),
        scale_stride_m=scale.stride(0), scale_stride_k=scale.stride(1), block_m=block_m, block_k=block_k,
        dtype=harness.DTYPES[out_dtype], stream=0,
    )  # fmt: skip
    assert_same_bits(out, reference.fp8_dequantize(codes, scale, granularity, out_dtype))


@pytest.mark.parametrize("granularity", BLOCKS)
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_fp8_dequantize(model, dtype, granularity):
    def run(seed):
        layout = dict(mn_major=seed == 1, ld_pad=(0, 16, 3)[seed - 1], offset=seed // 3)
        for m, k in QUANTIZE_SHAPES:
            run_dequantize(model, granularity, m, k, dtype, **layout)

    harness.under_every_schedule(run, (1, 2, 3))


@pytest.mark.parametrize("bug", ["column_tail_unmasked", "row_tail_unmasked"])
def test_bugs_of_fp8_dequantize(model, bug):
    harness.assert_caught(lambda: run_dequantize(model, "1x128", 130, 265, torch.bfloat16), bug)


DIVISOR = """
#define DEEPSEEK_KERNELS_MODEL 1
#include <cstdio>
#include "common/numeric.cuh"
using namespace deepseek_kernels;
int main() {
  long wrong = 0;
  for (uint32_t s = 0x3f800000; s < 0x40000000; s += STEP) {
    const float scale = __uint_as_float(s);
    const Fp8Divisor divisor(scale);
    for (uint16_t x = 0x3c00; x < 0x4000; ++x) {
      const __half half = reinterpret_cast<const __half&>(x);
      wrong += divisor.divide(half) != to_float(half) / scale;
    }
  }
  std::printf("%ld", wrong);
}
"""


def test_one_newton_step_divides_16_bit_numbers_exactly(model, tmp_path):
    """Every fp16 mantissa by every 509th fp32 mantissa; by every one in the full test."""
    source, program = tmp_path / "divisor.cpp", tmp_path / "divisor"
    source.write_text(DIVISOR)
    step = 1 if harness.FULL else 509
    command = ["g++", "-std=c++17", "-O2", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", f"-DSTEP={step}"]
    command += [f"-I{harness.ROOT}/csrc", f"-I{harness.HERE}", "-isystem", str(harness.cuda_include())]
    subprocess.run([*command, "-o", str(program), str(source)], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "0"
