"""The table of cosines and sines that `mla_rope` and `mla_cache_write` read."""

import math

import torch

from ._dtype import KeepsDtype
from .config import LayerConfig, Rope


def inverse_frequencies(rope: Rope, d_rope: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Radians per position of each pair: fp32 [d_rope / 2], plain or YaRN."""
    wavelengths = rope.theta ** (torch.arange(0, d_rope, 2, dtype=torch.float32, device=device) / d_rope)
    if rope.factor is None:
        return 1.0 / wavelengths

    def pair_with(rotations: float) -> float:
        """Index of the pair that makes so many rotations over the context trained on."""
        radians = rope.original_positions / (rotations * 2 * math.pi)
        return d_rope * math.log(radians) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_with(rope.beta_fast)), 0)
    last = min(math.ceil(pair_with(rope.beta_slow)), d_rope - 1)
    pair = torch.arange(d_rope // 2, dtype=torch.float32, device=device)
    kept = 1 - ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return (1.0 / (rope.factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept


class RotaryTable(KeepsDtype):
    """`cos_sin` fp32 [max_positions, d_rope]: cosines in the first half, sines in the second.

    All layers of a model can hold the same instance: 42 MB at V3's 163 840 positions.
    """

    cos_sin: torch.Tensor

    def __init__(self, config: LayerConfig, device: torch.device | str | None = None):
        super().__init__()
        positions = torch.arange(config.max_positions, dtype=torch.float32, device=device)
        angles = positions[:, None] * inverse_frequencies(config.rope, config.shape.d_rope, device)
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1) * config.rope.amplitude
        self.register_buffer("cos_sin", cos_sin, persistent=False)
