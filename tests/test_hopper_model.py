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
    sources = [*harness.ROOT.glob("csrc/*/*.cu*"), harness.HERE / "hazards.cu"]
    planted = {part.split(")")[0] for p in sources for part in p.read_text().split("BUG(")[1:]}
    tested = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*_model.py"))
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
    thread = torch.arange(128)
    keys = ((thread * 37 + thread // 32) % 64 * 0x03FFFFFF).view(4, 32)
    leading = torch.tensor([32 - int(k).bit_length() for k in keys.flatten()]).view(4, 32)
    assert torch.equal(got["reduce"][:128].long().view(4, 32), (keys.amax(1, keepdim=True) >> 24) ^ leading)
    sums = (thread - 70).view(4, 32).sum(1, keepdim=True).expand(4, 32)
    assert torch.equal(got["reduce"][128:256].long().view(4, 32), sums % 256)
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
    corners = BATCH_CORNERS[:2]
    for name, add in (("tma_stored_3d", False), ("tma_reduced_3d", True)):
        padded, inside = batch(torch.float32, torch.zeros(3, 10, 32))
        for x, y, z in corners:
            target = box(padded, (x // 4, y, z))
            target.copy_(target + source if add else source)
        assert torch.equal(as_tensor(primitives_in_model[name]).view(torch.float32).view(3, 10, 32), inside), name
    rows = torch.zeros(30 + 16, 64)
    for x, y, _ in corners:
        rows[y : 16 + y, x // 4 : 32 + x // 4] += 2 * source.view(16, 32)  # by two CTAs
    got = as_tensor(primitives_in_model["tma_reduced_2d"]).view(torch.float32).view(30, 32)
    assert torch.equal(got, rows[:30, :32])


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


@pytest.mark.parametrize("n", [128, 256])
def test_mn_major_operands_in_the_model(primitives_in_model, n):
    values = torch.tensor([0, 1, -1, 2, -2, 0.5, 3, -4])
    i, j = torch.arange(64 * 64), torch.arange(64 * 256)
    a, b = values[(i * 5 + i // 64) % 8].view(64, 64), values[(j * 3 + j // 32 + j // 7) % 8].view(64, 256)
    got = as_tensor(primitives_in_model[f"wgmma_bf16_mn_major_{n}"]).view(torch.float32)[: 128 * n // 2]
    got = got.view(4, 8, 4, n // 8, 2, 2)  # warp, row, pair of columns, 8 columns, 8 rows, column of the pair
    assert torch.equal(got.permute(0, 4, 1, 3, 2, 5).reshape(64, n), (a.T @ b)[:, :n])


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
    folder, failed = tmp_path / "gpu", {}
    folder.mkdir()
    while (said := subprocess.run([primitives_for_gpu, folder, *failed], capture_output=True, text=True)).returncode:
        name, _, why = said.stderr.partition(": ")
        assert name not in failed, said.stderr
        failed[name] = why
    assert failed == {}
    on_gpu = {p.stem: p.read_bytes() for p in folder.iterdir()}
    assert on_gpu.keys() == primitives_in_model.keys()
    assert [name for name in on_gpu if on_gpu[name] != primitives_in_model[name]] == []


def test_layouts_are_those_of_cute(model):
    if not harness.cute_include():
        pytest.skip("needs the headers of nvidia-cutlass, and the toolkit's CCCL")
    said = subprocess.run([harness.build("cute")], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
    different, _, compared, _ = said.stdout.splitlines()[-1].split()
    assert int(different) == 0 and int(compared) > 100_000


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


FLOATS = torch.arange(2 * 32 * 32).view(2, 32, 32).float()


def run_hazard(model, name):
    guarded = harness.Guarded(model)
    before = FLOATS if name in ("loads", "copies") else torch.zeros(2, 32, 32)
    out = guarded.copy("out", before)
    tickets = guarded.copy("tickets", torch.zeros(1, dtype=torch.int32))
    model.hazard(name, out=out.data_ptr(), tickets=tickets.data_ptr())
    first = out.flatten()[:128]
    if name == "tiles":
        want = torch.zeros(2, 32, 32)
        for tile in range(12):
            want[tile % 2, tile % 8 : tile % 8 + 16] += tile + 1
        assert torch.equal(out[:, :24], want[:, :24])
    elif name == "loads":
        assert torch.equal(out[1, :2], torch.stack([FLOATS[0, :16].sum(0), FLOATS[0, 1:17].sum(0)]))
    elif name == "exchange":
        assert torch.equal(first, torch.arange(128.0).flip(0).view(64, 2).flip(1).flatten())
    elif name == "fragments":
        row, column = torch.arange(16.0).view(16, 1), torch.arange(64.0).view(1, 64)
        want = row * 4 + (column - 1) * (column % 2)
        assert torch.equal(out.flatten()[:512].view(torch.bfloat16).view(16, 64).float(), want)
    elif name == "product":
        assert (first == 512).all()
    elif name == "copies":
        assert torch.equal(first, FLOATS[1].flatten()[:128].roll(-1))
    elif name == "dependent":
        assert (first == 1).all()
    else:
        assert out.flatten()[:4].tolist() == [2, 1, 2, 0]


HAZARDS = {
    "tiles": {
        "added_by_hand": None,
        "fence_after_barrier": r"which thread \d+ wrote and has not fenced",
        "fence_by_issuer_only": r"which thread \d+ wrote and has not fenced",
        "matrix_of_next_tile": None,
        "row_before_the_first": "TMA reduction before the beginning of the tensor",
        "reduction_not_waited_for": "which a TMA store reads until it is waited for",
        "ticket_not_atomic": None,
        "ticket_not_waited_for": "race: ",
    },
    "loads": {
        "load_not_waited_for": "race: |which a TMA load in flight is writing",
        "loaded_over_readers": "more arrivals|race: TMA load|which a TMA load in flight is writing|deadlock",
        "map_of_other_rank": "TMA load of 2 dimensions through a tensor map of 3",
        "zeroed_before_load": r"TMA load meets box\[0\], which thread \d+ wrote and has not fenced",
    },
    "exchange": {
        "too_few_registers_asked_for": "setmaxnreg.inc to 160 of a kernel that starts with 248",
        "exchange_overwritten": "race: plain store",
        "past_the_end": "plain load touches shared memory .*, outside the 5120 bytes allocated",
        "shuffle_for_syncwarp": "race: plain load",
    },
    "fragments": {
        "rows_of_lanes_swapped": "race: stmatrix",
        "stmatrix_not_fenced": r"which thread \d+ wrote and has not fenced",
        "stmatrix_not_swizzled": None,
    },
    "product": {
        "operands_not_fenced": r"wgmma operand A meets .*, which thread \d+ wrote and has not fenced",
        "operands_not_waited_for": r"wgmma operand [AB] meets .*, which thread \d+ wrote and has not fenced|early over",
        "operand_overwritten": "early overwrite: plain store into .* while a wgmma of warpgroup 0 that reads it as A",
        "products_not_committed": "thread exits with wgmma not waited for",
    },
    "copies": {
        "copies_not_arrived_for": "thread exits with cp.async that it has not arrived for",
        "copies_not_waited_for": "race: |which a cp.async in flight is writing|exits while cp.async",
    },
    "dependent": {
        "dependency_not_waited_for": "exits without grid_dependency_wait",
        "read_before_dependency": "global access before grid_dependency_wait",
    },
}
"""Kernels of hazards.cu, their bugs, and what the model says; None: the numbers are wrong under some schedule."""


@pytest.mark.parametrize("name", [*HAZARDS, "waits_for_other_cta"])
def test_hazards_without_their_bugs(model, name):
    alive = 2 if name == "waits_for_other_cta" else 0
    harness.under_every_schedule(lambda seed: run_hazard(model, name), clusters_alive=alive)


@pytest.mark.parametrize(("name", "bug"), [(name, bug) for name, bugs in HAZARDS.items() for bug in bugs])
def test_hazards(model, name, bug):
    """What the model checks it reports under every schedule; what only the numbers show, under some of 30."""
    said = HAZARDS[name][bug]
    if said is None:
        return harness.assert_caught(lambda: run_hazard(model, name), bug, range(1, 31))
    for seed in harness.SEEDS:
        model.configure(seed=seed, bug=bug)
        with pytest.raises(RuntimeError, match=said):
            run_hazard(model, name)


def test_a_failure_names_its_schedule_and_the_command_that_replays_it(model, request):
    with pytest.raises(RuntimeError) as caught:
        harness.under_every_schedule(lambda seed: run_hazard(model, "loads"), bug="loaded_over_readers")
    seed = harness.SEEDS[0]
    assert f"(schedule {seed})" in str(caught.value)
    assert "thread 0 starts a TMA load into box[0] 2048" in str(caught.value)
    assert f"replay: DEEPSEEK_KERNELS_MODEL_SEED={seed} " in str(caught.value)
    assert request.node.nodeid in str(caught.value)


REPLAY = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C_model", sys.argv[1])
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
model.configure(seed=5, bug="loaded_over_readers")
try:
    model.hazard("loads", out=model.alloc(8192, "out"), tickets=model.alloc(4, "tickets"))
except RuntimeError:
    print(model.last_events())
"""


def test_a_schedule_is_the_same_in_another_process(model):
    model.configure(seed=5, bug="loaded_over_readers")
    with pytest.raises(RuntimeError):
        run_hazard(model, "loads")
    again = subprocess.run([sys.executable, "-c", REPLAY, model.__file__], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == model.last_events().strip() != ""


def test_the_ops_can_call_the_model(model):
    from deepseek_kernels.ops import _extension

    with harness.model_extension(seed=3):
        assert _extension.module() is model
    assert _extension._substitute is None
