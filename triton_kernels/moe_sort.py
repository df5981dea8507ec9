"""Row of entry i = start[e_i] + #{j < i : e_j = e_i}, with start the running sum of the experts' counts, each rounded
up to the alignment. A counting sort without a sort: no atomics, no barriers, every address written once.

Tiling:  the entries (and the rows) are dealt to PROGRAMS programs in order, each taking its share CHUNK at a time.
         _count: program p counts its share, counts[p, :].
         _place: sums the counts of all programs and of those before it, both kept in registers (one counter per
         expert), places its entries, and clears those of its rows that no expert owns. A single program counts for
         itself, in one launch.
Ranks:   inside a chunk from the CHUNK x CHUNK comparison of its ids; before it from the running counters, read through
         the CHUNK x EXPERTS comparison of ids with expert numbers.
Bytes:   T*K*b read twice, 4*(T*K + R + E) written. T=8192 K=8 int64: 1.6 MB; bound by latency, not by bytes.
"""

import triton
import triton.language as tl


@triton.jit
def _local(indices, entry, end, expert_begin, num_local):
    """Local expert of each entry, `num_local` for those that are dropped. Compared in int64: ids may be garbage."""
    expert = tl.load(indices + entry, mask=entry < end, other=-1).to(tl.int64)
    ours = (expert >= expert_begin) & (expert < expert_begin + num_local)
    return tl.where(ours, expert - expert_begin, num_local).to(tl.int32)


@triton.jit
def _count_share(indices, begin, end, expert_begin, num_local, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    experts = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), tl.int32)
    for first in range(begin, end, CHUNK):
        expert = _local(indices, first + tl.arange(0, CHUNK), end, expert_begin, num_local)
        count += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    return tl.where(experts < num_local, count, 0)


@triton.jit
def _count(
    indices, counts, num_entries, share, expert_begin, num_local, CHUNK: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    begin = program * share
    end = tl.minimum(begin + share, num_entries)
    count = _count_share(indices, begin, end, expert_begin, num_local, CHUNK, EXPERTS)
    experts = tl.arange(0, EXPERTS)
    tl.store(counts + program * num_local + experts, count, mask=experts < num_local)


@triton.jit
def _place(
    indices, counts, token_topk_to_pos, pos_to_token_topk, expert_offsets, num_entries, share, num_rows, row_share,
    expert_begin, num_local,
    ALIGNMENT: tl.constexpr, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    begin = program * share
    end = tl.minimum(begin + share, num_entries)
    experts = tl.arange(0, EXPERTS)
    chunk = tl.arange(0, CHUNK)

    before = tl.zeros((EXPERTS,), tl.int32)
    if PROGRAMS == 1:
        total = _count_share(indices, begin, end, expert_begin, num_local, CHUNK, EXPERTS)
    else:
        total = tl.zeros((EXPERTS,), tl.int32)
        for first in range(0, PROGRAMS, CHUNK):
            other = first + chunk
            mask = (other[:, None] < PROGRAMS) & (experts[None, :] < num_local)
            count = tl.load(counts + other[:, None] * num_local + experts[None, :], mask=mask, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where(other[:, None] < program, count, 0), 0)

    padded = (total + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    past = tl.cumsum(padded, 0)
    start = past - padded
    num_placed = tl.max(past, 0)
    if program == 0:
        tl.store(expert_offsets + experts, start, mask=experts < num_local)
        tl.store(expert_offsets + num_local, num_placed)

    running = start + before
    for first in range(begin, end, CHUNK):
        entry = first + chunk
        expert = _local(indices, entry, end, expert_begin, num_local)
        owns = (expert[:, None] == experts[None, :]) & (experts[None, :] < num_local)
        earlier = (expert[:, None] == expert[None, :]) & (chunk[None, :] < chunk[:, None])
        pos = tl.sum(tl.where(owns, running[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        has_row = expert < num_local
        tl.store(token_topk_to_pos + entry, tl.where(has_row, pos, -1), mask=entry < end)
        tl.store(pos_to_token_topk + pos, entry.to(tl.int32), mask=has_row)
        running += tl.sum(owns.to(tl.int32), 0)

    first_row = program * row_share
    last_row = tl.minimum(first_row + row_share, num_rows)
    if ALIGNMENT == 1:
        first_row = tl.maximum(first_row, num_placed)  # the only rows without an entry are the last ones
    none = tl.full((CHUNK,), -1, tl.int32)
    for first in range(first_row, last_row, CHUNK):
        row = first + chunk
        vacant = row < last_row
        if ALIGNMENT > 1:
            taken = (row[:, None] >= start[None, :]) & (row[:, None] < (start + total)[None, :])
            vacant = vacant & (tl.max(taken.to(tl.int32), 1) == 0)
        tl.store(pos_to_token_topk + row, none, mask=vacant)


def sort(
    config, indices, expert_begin, alignment, counts, token_topk_to_pos, pos_to_token_topk, expert_offsets
) -> None:
    """The maps of indices [T, K], contiguous; `counts` int32 [programs, local experts] only for several programs."""
    num_entries, num_rows = indices.numel(), pos_to_token_topk.shape[0]
    num_local = expert_offsets.shape[0] - 1
    share = triton.cdiv(triton.cdiv(num_entries, config.chunk), config.programs) * config.chunk
    row_share = triton.cdiv(num_rows, config.programs)
    tile = {"CHUNK": config.chunk, "EXPERTS": config.experts, "num_warps": config.num_warps}
    if counts is not None:
        _count[(config.programs,)](indices, counts, num_entries, share, expert_begin, num_local, **tile)
    _place[(config.programs,)](
        indices, counts if counts is not None else expert_offsets, token_topk_to_pos, pos_to_token_topk, expert_offsets,
        num_entries, share, num_rows, row_share, expert_begin, num_local,
        ALIGNMENT=alignment, PROGRAMS=config.programs, **tile,
    )  # fmt: skip
