"""The routing maps that `moe_sort` makes and every grouped op reads."""

from typing import NamedTuple

import torch


class MoeMaps(NamedTuple):
    """Where every (token, k) pair goes, all int32 and on the device.

    Worked example: T=3, K=2, E=3, indices [[0, 2], [2, 1], [0, -1]], alignment 1

        token_topk_to_pos  [[0, 3], [4, 2], [1, -1]]   position of (t, k), -1: dropped
        pos_to_token_topk  [0, 4, 3, 1, 2, -1]         t * K + k of each row, -1: no entry
        expert_offsets     [0, 2, 3, 5]                rows of expert e: [offsets[e], offsets[e + 1])

    With an alignment above 1, each expert's rows start at a multiple of it and the gap has no entry.
    """

    token_topk_to_pos: torch.Tensor  # [T, K]
    pos_to_token_topk: torch.Tensor  # [R_max]
    expert_offsets: torch.Tensor  # [E + 1]
