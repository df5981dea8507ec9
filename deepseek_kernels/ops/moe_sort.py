"""`moe_sort`: the routing maps of a batch, from the expert ids of its tokens."""

import torch

from ..plan import moe_sort as plan
from ..reference import moe_sort as reference
from ..shapes import align_up
from . import _allocate, _extension
from . import _checks as checks
from ._maps import MoeMaps
from ._registry import register

_MAX_ROWS = 2**31 - 1


def moe_sort(
    indices: torch.Tensor, num_experts: int, *, expert_range: tuple[int, int] | None = None, alignment: int = 1
) -> MoeMaps:
    """Give every (token, k) pair a row, expert by expert, in the order of t * K + k inside each expert.

    Args:
        indices: int32 or int64 [T, K], expert ids; any strides. Ids below 0, at or above `num_experts`, or outside
            `expert_range` are dropped.
        num_experts: E, of the whole model.
        expert_range: (begin, end), the experts of this rank. The maps then speak of `end - begin` local experts,
            the first of which is `begin`. Left out: all of them.
        alignment: the rows of each expert start at a multiple of it; the gaps have no entry.

    Returns:
        `MoeMaps`, all int32 on the device of `indices`: token_topk_to_pos [T, K] (-1: dropped),
        pos_to_token_topk [R_max] (-1: no entry), expert_offsets [local experts + 1]. R_max bounds the rows of any
        routing, T * K where alignment is 1, so that nobody waits for the counts.

    Raises:
        ValueError, TypeError: naming the argument.

    The same input gives the same maps, always. Semantics of TileKernels' get_fused_mapping.
    """
    begin, end = expert_range if expert_range is not None else (0, num_experts)
    if end < 0:  # to the op that means all of them
        raise checks.fail("moe_sort", "expert_range", f"0 <= begin <= end <= {num_experts}", (begin, end))
    return MoeMaps(*torch.ops.deepseek_kernels.moe_sort(indices, num_experts, begin, end, alignment))


def _sizes(indices, num_experts, expert_begin, expert_end, alignment) -> tuple[int, int]:
    """(local experts, R_max)."""
    num_local = (num_experts if expert_end < 0 else expert_end) - expert_begin
    return num_local, reference.max_rows(indices.shape[0] * indices.shape[1], num_local, alignment)


def _check(indices, num_experts, expert_begin, expert_end, alignment) -> None:
    op = "moe_sort"
    checks.tensor(op, "indices", indices, dtype=(torch.int32, torch.int64), shape=(None, None))
    checks.at_least(op, "num_experts", num_experts, 1)
    checks.at_least(op, "alignment", alignment, 1)
    if not 0 <= expert_begin <= (num_experts if expert_end < 0 else expert_end) <= num_experts:
        raise checks.fail(op, "expert_range", f"0 <= begin <= end <= {num_experts}", (expert_begin, expert_end))
    _, num_rows = _sizes(indices, num_experts, expert_begin, expert_end, alignment)
    if num_rows > _MAX_ROWS:
        raise checks.fail(op, "indices", f"at most {_MAX_ROWS} rows with their padding", num_rows)


def _problem(*args) -> plan.Problem:
    indices, alignment = args[0], args[-1]
    return plan.Problem(*indices.shape, *_sizes(*args), alignment, indices.element_size())


def _outputs(empty, *args):
    num_local, num_rows = _sizes(*args)
    shapes = (args[0].shape, (num_rows,), (num_local + 1,))
    return tuple(empty(shape, torch.int32, args[0].device) for shape in shapes)


def _fake(*args):
    return _outputs(lambda shape, dtype, device: args[0].new_empty(shape, dtype=dtype), *args)


def _triton(config, indices, *args):
    from ..triton_kernels import moe_sort as kernel

    maps = _outputs(_allocate.empty, indices, *args)
    if indices.numel() == 0:
        maps[-1].zero_()
        return maps
    _, expert_begin, _, alignment = args
    counts = None
    if config.programs > 1:
        counts = _allocate.empty((config.programs, maps[-1].shape[0] - 1), torch.int32, indices.device)
    kernel.sort(config, indices.contiguous(), expert_begin, alignment, counts, *maps)
    return maps


def _cuda(config, indices, *args):
    maps = _outputs(_allocate.empty, indices, *args)
    if indices.numel() == 0:
        maps[-1].zero_()
        return maps
    _, expert_begin, _, alignment = args
    num_local, counts = maps[-1].shape[0] - 1, None
    if config.ctas > 1:
        counts = _allocate.empty((config.ctas, align_up(num_local, 4)), torch.int32, indices.device)
    indices = indices.contiguous()
    _extension.module().moe_sort(
        indices=indices.data_ptr(), token_topk_to_pos=maps[0].data_ptr(), pos_to_token_topk=maps[1].data_ptr(),
        expert_offsets=maps[2].data_ptr(), counts=_extension.address(counts), num_entries=indices.numel(),
        num_rows=maps[1].shape[0], expert_begin=expert_begin, num_local=num_local, alignment=alignment,
        wide=indices.dtype == torch.int64, warps=config.warps, rounds=config.rounds, ctas=config.ctas,
        dependent=config.dependent, stream=_extension.stream(indices),
    )  # fmt: skip
    return maps


def _cpu(config, indices, *args):
    maps = _outputs(_allocate.empty, indices, *args)
    _, expert_begin, _, alignment = args
    indices, threads = indices.contiguous(), torch.get_num_threads()
    num_local = maps[-1].shape[0] - 1
    workspace = _allocate.empty((threads, num_local), torch.int32, indices.device)
    _extension.cpu().moe_sort(
        indices=indices.data_ptr(), token_topk_to_pos=maps[0].data_ptr(), pos_to_token_topk=maps[1].data_ptr(),
        expert_offsets=maps[2].data_ptr(), workspace=workspace.data_ptr(), num_entries=indices.numel(),
        num_rows=maps[1].shape[0], expert_begin=expert_begin, expert_end=expert_begin + num_local,
        alignment=alignment, wide=indices.dtype == torch.int64, threads=threads,
    )  # fmt: skip
    return maps


register(
    "moe_sort(Tensor indices, int num_experts, int expert_begin=0, int expert_end=-1, int alignment=1) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.moe_sort,
    backends={"cuda": _cuda, "triton": _triton, "cpu": _cpu},
)
