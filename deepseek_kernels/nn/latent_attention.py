"""Multi-head latent attention: prefill over expanded heads, decode over the latent rows themselves."""

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from ..ops.fp8_quantize import fp8_dequantize
from ..ops.mla_cache_write import mla_cache_write, mla_rope
from ..ops.mla_decode import mla_decode
from .config import LayerConfig
from .fp8_linear import quantize_linears_
from .latent_cache import Append
from .rotary import RotaryTable

INNER_EPS = 1e-6  # of both norms inside attention, whatever the model's own


class LatentAttention(torch.nn.Module):
    """Latent attention of DeepSeek-V2 and V3, with the parameter names of `transformers`' DeepseekV3Attention.

    A first chunk of a sequence expands every latent row into keys and values of each head (d_nope + d_rope wide
    queries and keys, d_v wide values). Later tokens stay in the latent space: `kv_b_proj` is absorbed, its key half
    into the query and its value half into the output, and all heads read the same cached row.

    Args:
        config: widths, rotary embedding, softmax scale.
        rotary: shared table; built when left out.
    """

    def __init__(
        self,
        config: LayerConfig,
        rotary: RotaryTable | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        shape, bias = config.shape, config.attention_bias
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = shape.h_q * (shape.d_nope + shape.d_rope)
        if shape.q_rank is None:
            self.q_proj = torch.nn.Linear(shape.hidden, width, bias=False, **made)
        else:
            self.q_a_proj = torch.nn.Linear(shape.hidden, shape.q_rank, bias=bias, **made)
            self.q_a_layernorm = torch.nn.RMSNorm(shape.q_rank, INNER_EPS, **made)
            self.q_b_proj = torch.nn.Linear(shape.q_rank, width, bias=False, **made)
        self.kv_a_proj_with_mqa = torch.nn.Linear(shape.hidden, shape.d_qk, bias=bias, **made)
        self.kv_a_layernorm = torch.nn.RMSNorm(shape.d_latent, INNER_EPS, **made)
        self.kv_b_proj = torch.nn.Linear(shape.d_latent, shape.h_q * (shape.d_nope + shape.d_v), bias=False, **made)
        self.o_proj = torch.nn.Linear(shape.h_q * shape.d_v, shape.hidden, bias=bias, **made)
        self.rotary = RotaryTable(config, device) if rotary is None else rotary
        self.register_load_state_dict_pre_hook(_dequantize_kv_b)

    def forward(self, x: torch.Tensor, step: Append | None = None, layer: int = 0) -> torch.Tensor:
        """Causal attention of each token to itself and those before it.

        Args:
            x: [b, s_q, hidden].
            step: from `LatentCache.append(s_q)`; the new rows are written to `step.pages[layer]`. Left out, the
                tokens start at position 0 and nothing is cached, which is the differentiable path.
            layer: which layer's pages.

        Returns:
            [b, s_q, hidden]. Rows of padding (see `Append.counts`) are finite and meaningless.

        Raises:
            ValueError: x does not have the tokens of `step`, or the rotary table is too short for them.
        """
        shape, rope = self.config.shape, self.config.rope
        b, s_q, _ = x.shape
        self._check(x, step)
        if step is None:
            positions = torch.arange(s_q, dtype=torch.int32, device=x.device).repeat(b)
        else:
            positions = step.positions
        cos_sin = self.rotary.cos_sin

        q_nope, q_rope = self._queries(x).split([shape.d_nope, shape.d_rope], dim=-1)
        q_rope = mla_rope(q_rope, cos_sin, positions, interleaved=rope.interleaved)
        latent, k_rope = self.kv_a_proj_with_mqa(x).flatten(0, 1).split([shape.d_latent, shape.d_rope], dim=-1)
        if step is not None:
            mla_cache_write(
                latent, k_rope, self.kv_a_layernorm.weight, cos_sin, positions, step.pages[layer], step.slots,
                eps=INNER_EPS, interleaved=rope.interleaved,
            )  # fmt: skip
        if step is None or step.starts_empty:
            k_rope = mla_rope(k_rope[:, None], cos_sin, positions, interleaved=rope.interleaved)
            heads = self._attend_expanded(b, s_q, q_nope, q_rope, self.kv_a_layernorm(latent), k_rope)
        else:
            heads = self._attend_latent(q_nope, q_rope, step, layer)
        return self.o_proj(heads.reshape(b, s_q, shape.h_q * shape.d_v))

    def quantize_(self) -> "LatentAttention":
        """Turn the projections into FP8, all but `kv_b_proj`, which decoding absorbs. In place; returns self."""
        queries = ("q_proj",) if self.config.shape.q_rank is None else ("q_a_proj", "q_b_proj")
        quantize_linears_(self, *queries, "kv_a_proj_with_mqa", "o_proj")
        return self

    def _check(self, x: torch.Tensor, step: Append | None) -> None:
        b, s_q, _ = x.shape
        if step is not None and (b, s_q) != (step.block_table.shape[0], step.s_q):
            wanted = f"[{step.block_table.shape[0]}, {step.s_q}, *]"
            raise ValueError(f"LatentAttention: x: wanted shape {wanted} as appended, got {list(x.shape)}")
        needed, rows = s_q if step is None else step.max_tokens, self.rotary.cos_sin.shape[0]
        if needed > rows:
            raise ValueError(f"LatentAttention: max_positions: wanted at least {needed} for these tokens, got {rows}")

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        """[T, h_q, d_nope + d_rope], before the rotary embedding."""
        shape = self.config.shape
        if shape.q_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return q.view(x.shape[0] * x.shape[1], shape.h_q, shape.d_nope + shape.d_rope)

    def _attend_expanded(self, b, s_q, q_nope, q_rope, latent, k_rope) -> torch.Tensor:
        """Keys and values of every head, from normalised latents [T, d_latent]. Returns [b, s_q, h_q, d_v]."""
        shape = self.config.shape
        expanded = self.kv_b_proj(latent).view(-1, shape.h_q, shape.d_nope + shape.d_v)
        k_nope, v = expanded.split([shape.d_nope, shape.d_v], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, shape.h_q, -1)], dim=-1)
        v = pad(v, (0, q.shape[-1] - shape.d_v))  # torch's fused kernels want one width
        q, k, v = (t.unflatten(0, (b, s_q)).transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.config.attention_scale)
        return out[..., : shape.d_v].transpose(1, 2).contiguous()

    def _attend_latent(self, q_nope, q_rope, step, layer) -> torch.Tensor:
        """The absorbed form, over everything cached. Returns [b, s_q, h_q, d_v]."""
        shape = self.config.shape
        weight = self.kv_b_proj.weight.view(shape.h_q, shape.d_nope + shape.d_v, shape.d_latent)
        w_uk, w_uv = weight.split([shape.d_nope, shape.d_v], dim=1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        b, s_q = step.block_table.shape[0], step.s_q
        q = torch.cat([q_latent, q_rope], dim=-1).unflatten(0, (b, s_q))
        if step.counts is not None:
            q = _shift(q, s_q - step.counts)
        out, _ = mla_decode(q, step.pages[layer], step.block_table, step.seqlens_kv, scale=self.config.attention_scale)
        if step.counts is not None:
            out = _shift(out, step.counts - s_q)
        out = torch.bmm(out.flatten(0, 1).transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
        return out.reshape(b, s_q, shape.h_q, shape.d_v)


def _shift(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Roll each sequence of x [b, s_q, ...] by so many tokens: `mla_decode` wants the newest token last."""
    s_q = x.shape[1]
    source = (torch.arange(s_q, device=x.device) - by[:, None]) % s_q
    return x[torch.arange(x.shape[0], device=x.device)[:, None], source]


def _dequantize_kv_b(module, state_dict, prefix, *_) -> None:
    """Published FP8 checkpoints quantise `kv_b_proj` too."""
    scale = state_dict.pop(prefix + "kv_b_proj.weight_scale_inv", None)
    if scale is not None:
        key = prefix + "kv_b_proj.weight"
        state_dict[key] = fp8_dequantize(state_dict[key], scale, "128x128").to(module.kv_b_proj.weight.dtype)
