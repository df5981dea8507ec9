"""The software model of a Hopper GPU (tests/hopper_model) itself: its primitives, what it reports, that it replays.

Each kernel's own tests in the model are in test_<op>_on_model.py. DEEPSEEK_KERNELS_FULL_TEST=1 takes more schedules.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


def test_every_planted_bug_is_tested():
    sources = [p.read_text() for p in harness.ROOT.glob("csrc/*/kernel*.cuh")]
    planted = {part.split(")")[0] for text in sources for part in text.split("BUG(")[1:]}
    tested = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*_on_model.py"))
    assert {bug for bug in planted if f'"{bug}"' not in tested} == set()


def run_primitives(program, folder):
    folder.mkdir()
    subprocess.run([program, folder], check=True)
    return {p.stem: p.read_bytes() for p in folder.iterdir()}


def as_tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.fixture(scope="module")
def primitives_in_model(model, tmp_path_factory):
    return run_primitives(harness.build("primitives"), tmp_path_factory.mktemp("primitives") / "model")


@pytest.fixture
def primitives_for_gpu(tmp_path):
    if harness.nvcc() is None:
        pytest.skip("needs nvcc")
    program, sources = tmp_path / "primitives", harness.ROOT / "csrc"
    command = [harness.nvcc(), "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-I", sources]
    command += ["--expt-relaxed-constexpr", "-o", program, harness.HERE / "primitives.cu"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return program


def test_primitives_in_the_model(primitives_in_model):
    got = {name: as_tensor(data) for name, data in primitives_in_model.items()}
    assert (got["elect"][:128] == 1).all()
    i = torch.arange(40 * 128)
    matrix = (i * 37 + i // 128).to(torch.uint8).view(40, 128)
    corners = got["tma_load_128"][: 6 * 32 * 128].view(3, 2, 32, 128)[:, 1]
    padded = torch.zeros(72, 160, dtype=torch.uint8)
    padded[16:56, 16:144] = matrix
    for corner, (x, y) in zip(corners, [(0, 0), (16, 24), (-16, -3)]):
        assert torch.equal(corner, padded[16 + y : 48 + y, 16 + x : 144 + x])


BATCH_CORNERS = [(0, 0, 0), (0, 3, 2), (64, -2, -1), (-32, 7, 1)]  # batch_corner of primitives.cu


def batch(dtype, values):
    """3 x 10 rows of 128 bytes, and a frame around them as wide as a box may reach."""
    padded = torch.zeros(3 + 4, 10 + 20, 3 * (128 // dtype.itemsize), dtype=dtype)
    inside = padded[2:5, 10:20, 128 // dtype.itemsize : 2 * (128 // dtype.itemsize)]
    inside.copy_(values)
    return padded, inside


def box(padded, corner):
    (x, y, z), width = corner, padded.shape[2] // 3
    return padded[2 + z : 4 + z, 10 + y : 18 + y, width + x : 2 * width + x]


def test_three_dimensional_loads_in_the_model(primitives_in_model):
    i = torch.arange(3 * 10 * 128 + 2 * 64)
    values = (i * 37 + i // 128).to(torch.uint8).as_strided((3, 10, 128), (10 * 128 + 64, 128, 1))
    padded, _ = batch(torch.uint8, values)
    got = as_tensor(primitives_in_model["tma_load_3d"])[: 4 * 2 * 8 * 128].view(4, 2, 8, 128)
    for got_box, corner in zip(got, BATCH_CORNERS, strict=True):
        assert torch.equal(got_box, box(padded, corner))
    got = as_tensor(primitives_in_model["tma_load_3d_multicast"])[: 2 * 2 * 2 * 8 * 128].view(2, 2, 2, 8, 128)
    assert torch.equal(got[0], got[1])
    assert sorted(got[0, 1].flatten().tolist()) == sorted(box(padded, (0, 1, 1)).flatten().tolist())


def test_three_dimensional_stores_and_reductions_in_the_model(primitives_in_model):
    source = torch.arange(2 * 8 * 32).view(2, 8, 32) * 0.25
    for name, corners, add in [("tma_stored_3d", BATCH_CORNERS[:2], False), ("tma_reduced_3d", BATCH_CORNERS, True)]:
        padded, inside = batch(torch.float32, torch.zeros(3, 10, 32))
        for x, y, z in corners:
            target = box(padded, (x // 4, y, z))
            target.copy_(target + source if add else source)
        assert torch.equal(as_tensor(primitives_in_model[name]).view(torch.float32).view(3, 10, 32), inside)
    rows = torch.zeros(16 + 30 + 16, 96)
    for x, y, _ in BATCH_CORNERS:
        rows[16 + y : 32 + y, 32 + x // 4 : 64 + x // 4] += 2 * source.view(16, 32)  # by two CTAs
    assert torch.equal(
        as_tensor(primitives_in_model["tma_reduced_2d"]).view(torch.float32).view(30, 32), rows[16:46, 32:64]
    )


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_in_the_model(primitives_in_model, count, transposed):
    got = as_tensor(primitives_in_model[f"stmatrix_x{count}" + transposed * "_trans"])[:1024].view(torch.int16)
    rows = got.view(32, 16).flip(0)[: 8 * count, :8]  # row j of matrix i went to slot 31 - (8 * i + j)
    want = torch.arange(64, dtype=torch.int16).view(1, 8, 8) + 256 * torch.arange(count, dtype=torch.int16).view(
        -1, 1, 1
    )
    assert torch.equal(rows.view(count, 8, 8), want.mT if transposed else want)
    assert not got.view(32, 16).flip(0)[8 * count :].any()


def test_dependent_launches_in_the_model(primitives_in_model):
    want = torch.full((64,), 0x01010101, dtype=torch.int64)
    for _ in range(20):
        want = (want * 3 + torch.arange(64)) % 2**32
    assert torch.equal(as_tensor(primitives_in_model["dependent_launches"]).view(torch.int32).long() % 2**32, want)


def test_primitives_compile_for_a_gpu(primitives_for_gpu):
    assert primitives_for_gpu.exists()


@pytest.mark.gpu
def test_primitives_do_on_a_gpu_what_they_do_in_the_model(primitives_in_model, primitives_for_gpu, tmp_path):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    on_gpu = run_primitives(primitives_for_gpu, tmp_path / "gpu")
    assert on_gpu.keys() == primitives_in_model.keys()
    assert [name for name in on_gpu if on_gpu[name] != primitives_in_model[name]] == []


def test_writes_past_the_end_are_reported(model):
    model.configure()
    guarded = harness.Guarded(model)
    x = guarded.copy("x", torch.ones(1, 128))
    small = guarded.empty("too_small", (1, 100), FP8)
    scale = guarded.empty("scale", (1, 1), torch.float32)
    arguments = dict(x=x.data_ptr(), scale=scale.data_ptr(), m=1, k=128, dtype=0, block_m=1, block_k=128, ldx=128)
    arguments |= dict(ldq=128, scale_stride_m=1, scale_stride_k=1, pow2_scale=False, stream=0)
    with pytest.raises(RuntimeError, match="past the end of 'too_small'"):
        model.fp8_quantize(q=small.data_ptr(), **arguments)


def test_the_ops_can_call_the_model(model):
    from deepseek_kernels.ops import _extension

    with harness.model_extension(seed=3):
        assert _extension.module() is model
    assert _extension._substitute is None
