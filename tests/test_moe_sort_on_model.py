"""moe_sort's CUDA kernels in the model of tests/hopper_model, against the reference."""

import sys
from pathlib import Path

import pytest
import torch

from deepseek_kernels.reference.moe_sort import max_rows
from deepseek_kernels.reference.moe_sort import moe_sort as reference

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402


@pytest.fixture(scope="module")
def model():
    yield harness.load_or_skip()
    harness.load().configure()


def random_ids(entries, num_experts, dtype, generator):
    """Most of them experts, some far away, some with an expert's low 32 bits."""
    ids = torch.randint(0, max(num_experts, 1), (entries,), generator=generator)
    wild = torch.tensor([-1, num_experts, -(2**31), 2**31 - 1, 2**32 + 1, -(2**63), 2**63 - 1])
    wild = wild[torch.randint(0, 4 if dtype == torch.int32 else 7, (entries,), generator=generator)]
    return torch.where(torch.rand(entries, generator=generator) < 0.2, wild, ids).to(dtype)


def run_sort(model, ids, num_experts, *, begin=0, end=None, alignment=1, warps=4, rounds=1, ctas=1):
    end = num_experts if end is None else end
    guarded, num_local = harness.Guarded(model), end - begin
    maps = [
        guarded.empty(name, (size,), torch.int32).fill_(77)
        for name, size in (
            ("token_topk_to_pos", len(ids)),
            ("pos_to_token_topk", max_rows(len(ids), num_local, alignment)),
            ("expert_offsets", num_local + 1),
        )
    ]
    counts = guarded.empty("counts", (ctas, -(-num_local // 4) * 4), torch.int32) if ctas > 1 else None
    model.moe_sort(
        indices=guarded.copy("indices", ids).data_ptr(), token_topk_to_pos=maps[0].data_ptr(),
        pos_to_token_topk=maps[1].data_ptr(), expert_offsets=maps[2].data_ptr(),
        counts=0 if counts is None else counts.data_ptr(), num_entries=len(ids), num_rows=len(maps[1]),
        expert_begin=begin, num_local=num_local, alignment=alignment, wide=ids.dtype == torch.int64,
        warps=warps, rounds=rounds, ctas=ctas, dependent=True, stream=0,
    )  # fmt: skip
    for actual, expected in zip(maps, reference(ids[:, None], num_experts, begin, end, alignment), strict=True):
        assert torch.equal(actual, expected.flatten())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rounds", [1, 2, 4, 8])
def test_one_cta(model, rounds, dtype):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        warps = (4, 8, 12)[seed % 3]
        for num_experts in (1, 5, 33, 257):
            entries = int(torch.randint(1, warps * 32 * rounds + 1, (), generator=generator))
            ids = random_ids(entries, num_experts, dtype, generator)
            run_sort(model, ids, num_experts, alignment=(1, 5, 16)[seed % 3], warps=warps, rounds=rounds)

    harness.under_every_schedule(run)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rounds", [1, 2, 4, 8])
def test_several_ctas(model, rounds, dtype):
    """One to three tiles each, the last CTAs with less or without any; fewer and more experts than threads."""

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        tile = 4 * 32 * rounds
        for ctas, tiles in ((2, 2), (3, 7), (5, 6)):
            num_experts = (1, 7, 70, 600)[int(torch.randint(0, 4, (), generator=generator))]
            entries = tiles * tile - int(torch.randint(0, tile, (), generator=generator))
            ids = random_ids(entries, num_experts, dtype, generator)
            run_sort(model, ids, num_experts, alignment=(1, 8)[seed % 2], rounds=rounds, ctas=ctas)

    harness.under_every_schedule(run, harness.SEEDS[:4] if not harness.STRICT else harness.SEEDS)


@pytest.mark.parametrize("ctas", [1, 3])
def test_ranges_and_extremes(model, ctas):
    generator = torch.Generator().manual_seed(0)

    def run(seed):
        ids = random_ids(120, 9, torch.int64, generator)
        for begin, end in ((0, 4), (4, 4), (4, 9)):
            run_sort(model, ids, 9, begin=begin, end=end, alignment=3, ctas=ctas)
        run_sort(model, torch.full((100,), 6), 9, alignment=128, ctas=ctas)
        run_sort(model, torch.full((100,), -1), 9, alignment=128, ctas=ctas)

    harness.under_every_schedule(run)


@pytest.mark.parametrize(
    ("bug", "ctas"),
    [("id_truncated", 1), ("gaps_kept", 1), ("warps_before_forgotten", 1), ("histogram_not_ordered", 1),
     ("gaps_kept", 2), ("warps_before_forgotten", 2), ("own_counted_before", 2)],
)  # fmt: skip
def test_bugs_of_moe_sort(model, bug, ctas):
    ids = random_ids(120, 5, torch.int64, torch.Generator().manual_seed(0))
    ids[50] = 2**32 + 1
    harness.assert_caught(lambda: run_sort(model, ids, 5, alignment=4, ctas=ctas), bug)


def test_what_no_instance_takes_is_refused(model):
    ids = torch.zeros(4 * 32 + 1, dtype=torch.int32)
    for wrong in (dict(), dict(rounds=3), dict(warps=6), dict(warps=36)):
        with pytest.raises(RuntimeError, match=r"launch\.cu"):
            run_sort(model, ids, 1, **wrong)
