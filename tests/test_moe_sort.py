"""`moe_sort`: what the contract cannot know."""

import pytest
import torch

import deepseek_kernels as dk
from deepseek_kernels.device import GPUS, H200
from deepseek_kernels.ops import moe_sort as op
from deepseek_kernels.ops._device import spec
from deepseek_kernels.plan import moe_sort as plan
from deepseek_kernels.reference.moe_sort import moe_sort as reference
from deepseek_kernels.testing.guard import guarded_allocations

BACKENDS = ("reference", "triton", "cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton means its interpreter


@pytest.fixture(params=BACKENDS)
def backend(request):
    with dk.use_backend(request.param):
        if dk.explain("moe_sort", torch.zeros(1, 1, dtype=torch.int64), 1).backend is None:
            pytest.skip(f"no {request.param} backend here")
        yield request.param


def sort_in_python(indices, num_local, begin=0, alignment=1):
    """(token_topk_to_pos, rows with an entry, expert_offsets), by going through the entries one by one."""
    flat = indices.flatten().tolist()
    pos, rows, offsets = [-1] * len(flat), {}, [0]
    for expert in range(begin, begin + num_local):
        row = offsets[-1]
        for entry, e in enumerate(flat):
            if e == expert:
                pos[entry], rows[row] = row, entry
                row += 1
        offsets.append(-(-row // alignment) * alignment)
    return pos, rows, offsets


def check(maps, indices, num_local, begin=0, alignment=1):
    pos, rows, offsets = sort_in_python(indices, num_local, begin, alignment)
    assert maps.token_topk_to_pos.shape == indices.shape
    assert maps.token_topk_to_pos.flatten().tolist() == pos
    assert maps.expert_offsets.tolist() == offsets
    assert maps.pos_to_token_topk.tolist() == [rows.get(r, -1) for r in range(len(maps.pos_to_token_topk))]
    assert len(maps.pos_to_token_topk) >= offsets[-1]


@pytest.mark.parametrize("alignment", [1, 4, 128])
@pytest.mark.parametrize("num_experts", [1, 5, 16, 72])
def test_random(backend, num_experts, alignment):
    indices = torch.randint(-1, num_experts, (13, 3))
    check(dk.moe_sort(indices, num_experts, alignment=alignment), indices, num_experts, alignment=alignment)


def test_is_stable(backend):
    """Rows of one expert keep the order of the entries, across chunks too."""
    indices = torch.randint(0, 3, (150, 2))
    maps = dk.moe_sort(indices, 3)
    for first, last in zip(maps.expert_offsets, maps.expert_offsets[1:]):
        assert (maps.pos_to_token_topk[first:last].diff() > 0).all()


@pytest.mark.parametrize("alignment", [1, 128])
def test_all_to_one_expert(backend, alignment):
    indices = torch.full((70, 2), 4)
    check(dk.moe_sort(indices, 7, alignment=alignment), indices, 7, alignment=alignment)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_garbage_is_dropped(backend, dtype):
    """Extremes, and int64 ids whose low 32 bits are those of an expert."""
    info = torch.iinfo(dtype)
    ids = [0, -1, info.max, info.min, 3, 5, 4, -5, info.min + 2, 1]
    if dtype == torch.int64:
        ids += [2**32, 2**32 + 1, -(2**32) + 3, 2**63 - 2**31]
    indices = torch.tensor(ids, dtype=dtype)[:, None]
    check(dk.moe_sort(indices, 5), indices, 5)
    check(dk.moe_sort(indices, 5, expert_range=(1, 4), alignment=4), indices, 3, 1, 4)


def test_ranges_partition_the_entries(backend):
    """Every rank of an expert-parallel layer takes its own entries, and together all of them."""
    indices = torch.randint(0, 10, (11, 3))
    taken = torch.zeros_like(indices)
    for begin, end in ((0, 4), (4, 4), (4, 9), (9, 10)):
        maps = dk.moe_sort(indices, 10, expert_range=(begin, end))
        check(maps, indices, end - begin, begin)
        taken += maps.token_topk_to_pos >= 0
    assert (taken == 1).all()


@pytest.mark.parametrize("programs", [2, 3, 7])
@pytest.mark.parametrize(("num_experts", "chunk", "alignment"), [(5, 16, 1), (5, 32, 8), (16, 16, 4), (40, 16, 1)])
def test_several_programs(num_experts, chunk, alignment, programs):
    """What a GPU runs for more entries than one program takes, some of the programs without any."""
    indices = torch.randint(-1, num_experts, (29, 3))
    experts = max(16, 1 << (num_experts - 1).bit_length())
    config = plan.Config(experts, chunk, programs, 4)
    with guarded_allocations():
        maps = op._triton(config, indices.to(DEVICE), num_experts, 0, -1, alignment)
    for actual, expected in zip(maps, reference(indices, num_experts, alignment=alignment)):
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("num_experts", [5, 256, 4096])
@pytest.mark.parametrize("num_tokens", [1, 1000, 8192, 131072])
def test_real_sizes_on_a_gpu(num_tokens, num_experts, alignment):
    """Every configuration of the CUDA kernel, over and over: two launches overlap, and many CTAs write."""
    indices = torch.randint(-1, num_experts, (num_tokens, 8), device="cuda")
    p = op._problem(indices, num_experts, 0, num_experts, alignment)
    expected = reference(indices, num_experts, alignment=alignment)
    with dk.use_backend("cuda"):
        if dk.explain("moe_sort", indices, num_experts).backend is None:
            pytest.skip("no cuda backend here")
    for config in plan.candidates(p, spec(indices.device), "cuda"):
        for _ in range(5):
            maps = op._cuda(config, indices, num_experts, 0, num_experts, alignment)
            assert all(map(torch.equal, maps, expected)), config


def test_bound_is_reached():
    """The worst routing for the padding fills every row of the bound but its rounding."""
    indices = torch.arange(6)[:, None]
    maps = dk.moe_sort(indices, 8, alignment=4)
    assert maps.expert_offsets[-1] == len(maps.pos_to_token_topk) == 24


def test_face():
    maps = dk.moe_sort(torch.tensor([[0, 2], [2, 1], [0, -1]]), 3)
    assert isinstance(maps, dk.MoeMaps) and maps.expert_offsets.tolist() == [0, 2, 3, 5]
    with pytest.raises(TypeError):
        dk.moe_sort(torch.zeros(1, 1, dtype=torch.int64), 3, (0, 2))
    with pytest.raises(ValueError, match=r"moe_sort: expert_range: wanted 0 <= begin <= end <= 3, got \(1, -1\)"):
        dk.moe_sort(torch.zeros(1, 1, dtype=torch.int64), 3, expert_range=(1, -1))


def problem(num_tokens, num_experts=256, top_k=8, alignment=1):
    return plan.Problem(num_tokens, top_k, num_experts, num_tokens * top_k, alignment, 8)


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("num_experts", [0, 1, 8, 256, 257, 1000, 4096])
@pytest.mark.parametrize("num_tokens", [1, 100, 8192, 131072])
def test_plan_of_the_cuda_kernel(num_tokens, num_experts, device):
    """One launch for one tile, and several CTAs that each get something; all in shared memory."""
    p = problem(num_tokens, num_experts)
    for config in [plan.select(p, device, "cuda"), *plan.candidates(p, device, "cuda")]:
        assert plan.shared_bytes(config, p) <= device.shared_memory
        tiles = -(-num_tokens * 8 // config.tile)
        assert tiles == 1 if config.ctas == 1 else config.ctas <= min(tiles, device.num_sms)
        assert config.dependent == (config.ctas > 1 and device.arch >= 90)


def test_plan_of_the_cuda_kernel_decodes_in_one_launch():
    assert plan.select(problem(128), H200, "cuda").ctas == 1
    assert plan.select(problem(8192), H200, "cuda").ctas >= 16


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("num_experts", [1, 8, 256, 257, 1000, 4096])
@pytest.mark.parametrize("num_tokens", [1, 100, 8192, 131072])
def test_plan_holds_every_expert(num_tokens, num_experts, device):
    config = plan.select(problem(num_tokens, num_experts), device, "triton")
    assert config.experts >= num_experts and config.experts & (config.experts - 1) == 0
    assert config.chunk & (config.chunk - 1) == 0
    assert 1 <= config.programs <= device.num_sms


def test_plan_decodes_in_one_launch():
    assert plan.select(problem(1), H200, "triton").programs == 1
    assert plan.select(problem(4096), H200, "triton").programs > 32
