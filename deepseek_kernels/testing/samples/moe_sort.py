"""Inputs of `moe_sort`."""

import torch

from . import Bad, Sample
from .moe_permute import routing

_GARBAGE = torch.tensor([-1, -(2**63), 2**63 - 1, 2**32, 2**32 + 1, 5, -7, 2**31])


def sort(g: torch.Generator) -> list[Sample]:
    def ids(t, k, e, dropped=0.0, dtype=torch.int64):
        return routing(g, t, k, e, dropped).to(dtype)

    wild = torch.where(torch.rand(8, 3, generator=g) < 0.5, _GARBAGE[:, None], ids(8, 3, 5))
    return [
        Sample("int64", (ids(9, 3, 5), 5), any_strides=("indices",)),
        Sample("int32", (ids(9, 3, 5, dtype=torch.int32), 5), any_strides=("indices",)),
        Sample("aligned", (ids(9, 3, 5, 0.3), 5), {"alignment": 4}),
        Sample("aligned_128", (ids(5, 2, 3), 3), {"alignment": 128}),
        Sample("garbage", (wild, 5)),
        Sample("range", (ids(9, 3, 7), 7), {"expert_begin": 2, "expert_end": 5}),
        Sample("range_aligned", (ids(9, 3, 7, dtype=torch.int32), 7, 5, 7, 8)),
        Sample("empty_range", (ids(4, 2, 5), 5), {"expert_begin": 3, "expert_end": 3}),
        Sample("one_expert", (torch.zeros(40, 1, dtype=torch.int64), 1)),
        Sample("several_programs", (ids(700, 2, 5, 0.1), 5), {"alignment": 16}),
        Sample("many_experts", (ids(11, 6, 1000), 1000)),
        Sample("all_dropped", (torch.full((3, 2), -1), 4), {"alignment": 2}),
        Sample("no_tokens", (ids(0, 2, 4), 4)),
        Sample("no_choices", (torch.empty(3, 0, dtype=torch.int64), 4)),
    ]


def bad(g: torch.Generator) -> list[Bad]:
    ids = routing(g, 5, 2, 4)
    return [
        Bad("dtype", (ids.short(), 4), TypeError, r"moe_sort: indices: wanted dtype int32 or int64, got int16"),
        Bad("dims", (ids[0], 4), ValueError, r"moe_sort: indices: wanted shape \[\*, \*\], got \[2\]"),
        Bad("no_experts", (ids, 0), ValueError, r"moe_sort: num_experts: wanted at least 1, got 0"),
        Bad("alignment", (ids, 4, 0, -1, 0), ValueError, r"moe_sort: alignment: wanted at least 1, got 0"),
        Bad("range_order", (ids, 4, 3, 2), ValueError, r"moe_sort: expert_range: wanted 0 <= begin <= end <= 4"),
        Bad("range_end", (ids, 4, 0, 5), ValueError, r"moe_sort: expert_range: wanted 0 <= begin <= end <= 4"),
        Bad("range_begin", (ids, 4, -1, 2), ValueError, r"moe_sort: expert_range"),
        Bad("too_many_rows", (ids, 4, 0, -1, 2**30), ValueError, r"moe_sort: indices: wanted at most 2147483647 rows"),
    ]


SAMPLES = {"moe_sort": sort}
BAD = {"moe_sort": bad}
