"""One layer: latent attention, then experts or a dense MLP, each behind a norm and around a residual."""

from typing import Any

import torch

from .config import LayerConfig
from .latent_attention import LatentAttention
from .latent_cache import Append
from .moe import MoE, SwigluMLP
from .rotary import RotaryTable


class DecoderLayer(torch.nn.Module):
    """A decoder layer of DeepSeek-V2 or V3, with the parameter names of `transformers` and of published checkpoints.

    Args:
        config: see `LayerConfig`.
        dense: a plain MLP of `config.dense_intermediate` in place of the experts, as in the first layers of a model.
        rotary: table shared with the other layers.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        dense: bool = False,
        rotary: RotaryTable | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = config.shape.hidden
        self.input_layernorm = torch.nn.RMSNorm(hidden, config.eps, **made)
        self.self_attn = LatentAttention(config, rotary, **made)
        self.post_attention_layernorm = torch.nn.RMSNorm(hidden, config.eps, **made)
        self.mlp: MoE | SwigluMLP
        if dense:
            self.mlp = SwigluMLP(hidden, config.dense_intermediate, **made)
        else:
            self.mlp = MoE(config, **made)

    @classmethod
    def from_transformers(
        cls, layer: Any, config: LayerConfig | None = None, rotary: RotaryTable | None = None
    ) -> "DecoderLayer":
        """From a `transformers` DeepseekV2DecoderLayer or DeepseekV3DecoderLayer.

        Shares its memory, except for gate and up projections of the shared expert or dense MLP, which are joined, and
        a gate that was not fp32.
        """
        config = LayerConfig.from_transformers(layer.self_attn.config) if config is None else config
        if rotary is None:
            rotary = RotaryTable(config, layer.input_layernorm.weight.device)
        mine = cls(config, dense=not hasattr(layer.mlp, "experts"), rotary=rotary, device="meta")
        mine.load_state_dict(layer.state_dict(), assign=True)
        return mine.train(layer.training)

    def forward(self, x: torch.Tensor, step: Append | None = None, layer: int = 0) -> torch.Tensor:
        """x [b, s_q, hidden] -> [b, s_q, hidden]. See `LatentAttention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), step, layer)
        return x + self.mlp(self.post_attention_layernorm(x))

    def quantize_(self) -> "DecoderLayer":
        """Turn attention's projections and all experts into FP8, in place; returns self."""
        self.self_attn.quantize_()
        self.mlp.quantize_()
        return self
