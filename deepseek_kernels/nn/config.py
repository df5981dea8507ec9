"""What the modules are built from: published dimensions plus what a layer needs beyond them."""

import math
from dataclasses import dataclass, replace
from typing import Any

from .. import shapes
from ..shapes import ModelShape


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the last `d_rope` dimensions; YaRN (arXiv 2309.00071) where `factor` is given.

    Attributes:
        theta: base of the wavelengths.
        interleaved: pairs are neighbours (DeepSeek's own layout), else first half with second half.
        factor: ratio of the extended context to the one trained on; None for plain rotary embedding.
        original_positions: context trained on, in tokens.
        beta_fast, beta_slow: rotations over that context beyond which a dimension keeps its frequency, and below which
            it is stretched by `factor`.
        mscale, mscale_all_dim: growth of the attention temperature with log(factor).
        attention_factor: what cos and sin are multiplied by; None derives it from the two above.
    """

    theta: float = 10000.0
    interleaved: bool = True
    factor: float | None = None
    original_positions: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None

    def temperature(self, mscale: float = 1.0) -> float:
        if self.factor is None or self.factor <= 1:
            return 1.0
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return self.temperature()


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    Attributes:
        shape: widths, heads and experts.
        rope: rotary embedding.
        max_positions: rows of the rotary table; positions are below it.
        dense_intermediate: intermediate width of the layers without experts.
        eps: of the RMS norms around attention and experts; those inside attention have 1e-6.
        attention_bias: the projections into q_rank, d_latent + d_rope and hidden have a bias.
    """

    shape: ModelShape
    rope: Rope = Rope()
    max_positions: int = 4096
    dense_intermediate: int = 0
    eps: float = 1e-6
    attention_bias: bool = False

    @property
    def attention_scale(self) -> float:
        """Softmax scale: (d_nope + d_rope)^-0.5, times YaRN's temperature squared."""
        temperature = self.rope.temperature(self.rope.mscale_all_dim) if self.rope.mscale_all_dim else 1.0
        return (self.shape.d_nope + self.shape.d_rope) ** -0.5 * temperature**2

    @classmethod
    def from_transformers(cls, config: Any) -> "LayerConfig":
        """From a `transformers` DeepseekV2Config or DeepseekV3Config.

        Raises:
            ValueError: another model type, activation, or kind of rotary embedding.
        """
        if config.model_type not in ("deepseek_v2", "deepseek_v3"):
            raise ValueError(f"LayerConfig: model_type: wanted deepseek_v2 or deepseek_v3, got {config.model_type!r}")
        if config.hidden_act != "silu":
            raise ValueError(f"LayerConfig: hidden_act: wanted 'silu', got {config.hidden_act!r}")
        is_v3 = config.model_type == "deepseek_v3"
        grouped = is_v3 or config.topk_method == "group_limited_greedy"
        shape = ModelShape(
            name=config.model_type,
            hidden=config.hidden_size,
            h_q=config.num_attention_heads,
            q_rank=config.q_lora_rank,
            d_latent=config.kv_lora_rank,
            d_nope=config.qk_nope_head_dim,
            d_rope=config.qk_rope_head_dim,
            d_v=config.v_head_dim,
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            num_groups=config.n_group if grouped else 1,
            topk_groups=config.topk_group if grouped else 1,
            intermediate=config.moe_intermediate_size,
            num_shared_experts=config.n_shared_experts,
            score="sigmoid" if is_v3 else "softmax",
            normalize=bool(is_v3 and config.norm_topk_prob),  # transformers' V2 router never normalises
            routed_scale=config.routed_scaling_factor,
            vocab=config.vocab_size,
        )
        return cls(
            shape,
            _rope_from_transformers(config),
            config.max_position_embeddings,
            config.intermediate_size,
            config.rms_norm_eps,
            config.attention_bias,
        )


def _rope_from_transformers(config: Any) -> Rope:
    given = config.rope_parameters
    kind = given.get("rope_type", "default")
    rope = Rope(theta=given["rope_theta"], interleaved=bool(getattr(config, "rope_interleave", True)))
    if kind == "default":
        return rope
    if kind != "yarn" or given.get("truncate") is False:
        raise ValueError(f"LayerConfig: rope_parameters: wanted rope_type default or yarn (truncated), got {given}")
    original = given["original_max_position_embeddings"]
    return replace(
        rope,
        factor=given["factor"] or config.max_position_embeddings / original,
        original_positions=original,
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        mscale=given.get("mscale") or 0.0,
        mscale_all_dim=given.get("mscale_all_dim") or 0.0,
        attention_factor=given.get("attention_factor"),
    )


V2_LITE = LayerConfig(shapes.V2_LITE, Rope(factor=40.0, mscale=0.707, mscale_all_dim=0.707), 163840, 10944)
V3 = LayerConfig(shapes.V3, Rope(factor=40.0, mscale=1.0, mscale_all_dim=1.0), 163840, 18432)
