"""Modules built from the ops: latent attention over a paged cache, experts, and the layer around them."""

from .config import V2_LITE, V3, LayerConfig, Rope
from .decoder_layer import DecoderLayer
from .fp8_linear import FP8Linear
from .functional import WgradQueue, fp8_linear
from .latent_attention import LatentAttention
from .latent_cache import Append, CacheFull, LatentCache
from .moe import Experts, Gate, MoE, SwigluMLP
from .rotary import RotaryTable, inverse_frequencies

__all__ = [
    "V2_LITE",
    "V3",
    "Append",
    "CacheFull",
    "DecoderLayer",
    "Experts",
    "FP8Linear",
    "Gate",
    "LatentAttention",
    "LatentCache",
    "LayerConfig",
    "MoE",
    "Rope",
    "RotaryTable",
    "SwigluMLP",
    "WgradQueue",
    "fp8_linear",
    "inverse_frequencies",
]
