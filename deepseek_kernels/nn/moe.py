"""Mixture of experts: a gate, stacked routed experts, and an expert that every token visits."""

from typing import Any

import torch
from torch.nn.functional import linear

from ..ops.fp8_quantize import fp8_quantize
from ..ops.fused_moe import fused_moe
from ..ops.moe_gate import moe_gate
from ..ops.swiglu import swiglu
from ..shapes import BLOCK, ceil_div
from ._dtype import KeepsDtype, keep_dtype
from .config import LayerConfig
from .fp8_linear import FP8Linear, quantize_linears_


class SwigluMLP(torch.nn.Module):
    """`down_proj(silu(gate) * up)` with gate and up from one matmul.

    Loads state dicts with separate `gate_proj` and `up_proj`, as `transformers` and published checkpoints have them.
    """

    def __init__(self, hidden: int, intermediate: int, *, device=None, dtype=None):
        super().__init__()
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.gate_up_proj = torch.nn.Linear(hidden, 2 * intermediate, **made)
        self.down_proj = torch.nn.Linear(intermediate, hidden, **made)
        self.register_load_state_dict_pre_hook(_join_gate_up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> [..., hidden]."""
        gate_up = self.gate_up_proj(x.reshape(-1, x.shape[-1]))
        if isinstance(self.down_proj, FP8Linear) and self.down_proj.quantized:
            out = self.down_proj.forward_quantized(*swiglu(gate_up, quantize=True), x.dtype)
        else:
            out = self.down_proj(swiglu(gate_up))
        return out.view(x.shape)

    def quantize_(self) -> "SwigluMLP":
        """Turn both matmuls into FP8, in place; returns self."""
        quantize_linears_(self, "gate_up_proj", "down_proj")
        return self


class Gate(KeepsDtype):
    """Which experts each token goes to. Weight and bias are fp32, whatever the rest of the model is.

    Attributes:
        weight: fp32 [num_experts, hidden].
        e_score_correction_bias: fp32 [num_experts], a buffer added to the scores for selection only; None where the
            score is a softmax.
    """

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: LayerConfig, *, device=None):
        super().__init__()
        shape = config.shape
        self.shape = shape
        self.weight = torch.nn.Parameter(torch.empty(shape.num_experts, shape.hidden, device=device))
        bias = torch.zeros(shape.num_experts, device=device) if shape.score == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)
        torch.nn.init.normal_(self.weight, std=0.02)
        self.register_load_state_dict_pre_hook(_gate_in_fp32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] -> weights fp32 [T, top_k], indices int64 [T, top_k]."""
        shape = self.shape
        return moe_gate(
            linear(x.float(), self.weight), self.e_score_correction_bias,
            top_k=shape.top_k, num_groups=shape.num_groups, topk_groups=shape.topk_groups,
            score=shape.score, normalize=shape.normalize, scale=shape.routed_scale,
        )  # fmt: skip


class Experts(torch.nn.Module):
    """All routed experts, stacked.

    Parameters:
        gate_up_proj: [num_experts, 2 * intermediate, hidden], gate rows first.
        down_proj: [num_experts, hidden, intermediate].
        gate_up_proj_scale_inv, down_proj_scale_inv: after `quantize_`, fp32 128x128 scales
            [num_experts, rows / 128, columns / 128]; None before.
    """

    gate_up_proj: torch.nn.Parameter
    down_proj: torch.nn.Parameter
    gate_up_proj_scale_inv: torch.nn.Parameter | None
    down_proj_scale_inv: torch.nn.Parameter | None

    def __init__(self, config: LayerConfig, *, device=None, dtype=None):
        super().__init__()
        shape = config.shape
        sizes = {
            "gate_up_proj": (shape.num_experts, 2 * shape.intermediate, shape.hidden),
            "down_proj": (shape.num_experts, shape.hidden, shape.intermediate),
        }
        for name, size in sizes.items():
            weight = torch.nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            torch.nn.init.normal_(weight, std=0.02)
            self.register_parameter(name, weight)
            self.register_parameter(name + "_scale_inv", None)
        self.register_load_state_dict_pre_hook(_stack_experts)

    @property
    def quantized(self) -> bool:
        return self.gate_up_proj_scale_inv is not None

    def forward(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """x [T, hidden], weights fp32 [T, top_k], indices [T, top_k] -> [T, hidden]."""
        return fused_moe(
            x, self.gate_up_proj, self.down_proj, weights, indices,
            scale_gate_up=self.gate_up_proj_scale_inv, scale_down=self.down_proj_scale_inv,
        )  # fmt: skip

    @torch.no_grad()
    def quantize_(self) -> "Experts":
        """Turn the weights into e4m3 with 128x128 scales, one expert at a time, in place; returns self."""
        if self.quantized:
            return self
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(self, name)
            num_experts, n, k = weight.shape
            q = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
            scale = weight.new_empty(num_experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK), dtype=torch.float32)
            for expert in range(num_experts):
                q_one, scale_one = fp8_quantize(weight[expert], "128x128")
                q[expert].copy_(q_one)
                scale[expert].copy_(scale_one)
            setattr(self, name, torch.nn.Parameter(q, requires_grad=False))
            setattr(self, name + "_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
        return self

    def _apply(self, fn, recurse=True):
        return super()._apply(keep_dtype(fn) if self.quantized else fn, recurse)


class MoE(torch.nn.Module):
    """`experts(x, *gate(x)) + shared_experts(x)`, with the parameter names of `transformers`' DeepseekV3MoE.

    Args:
        config: experts, groups, score.
        experts: a module to call as `experts(x, weights, indices)` in place of `Experts`, for example one that
            spreads the experts over several devices.
    """

    def __init__(self, config: LayerConfig, experts: torch.nn.Module | None = None, *, device=None, dtype=None):
        super().__init__()
        shape = config.shape
        self.gate = Gate(config, device=device)
        self.experts: Any = Experts(config, device=device, dtype=dtype) if experts is None else experts
        shared = shape.num_shared_experts * shape.intermediate
        self.shared_experts = SwigluMLP(shape.hidden, shared, device=device, dtype=dtype) if shared else None

    @classmethod
    def from_transformers(cls, moe: Any, config: LayerConfig | None = None) -> "MoE":
        """From a `transformers` DeepseekV2Moe or DeepseekV3MoE, whose routed experts' memory it shares."""
        config = LayerConfig.from_transformers(moe.config) if config is None else config
        mine = cls(config, device="meta")
        mine.load_state_dict(moe.state_dict(), assign=True)
        return mine.train(moe.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> [..., hidden]."""
        tokens = x.reshape(-1, x.shape[-1])
        out = self.experts(tokens, *self.gate(tokens))
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.view(x.shape)

    def quantize_(self) -> "MoE":
        """Turn routed and shared experts into FP8, in place; returns self. The gate stays fp32."""
        self.experts.quantize_()
        if self.shared_experts is not None:
            self.shared_experts.quantize_()
        return self


def _join_gate_up(module, state_dict, prefix, *_) -> None:
    for suffix in ("weight", "weight_scale_inv"):
        gate, up = (f"{prefix}{name}.{suffix}" for name in ("gate_proj", "up_proj"))
        if gate in state_dict and up in state_dict:
            state_dict[f"{prefix}gate_up_proj.{suffix}"] = torch.cat([state_dict.pop(gate), state_dict.pop(up)])


def _gate_in_fp32(module, state_dict, prefix, *_) -> None:
    for name in ("weight", "e_score_correction_bias"):
        if prefix + name in state_dict:
            state_dict[prefix + name] = state_dict[prefix + name].float()


def _stack_experts(module, state_dict, prefix, *_) -> None:
    """Published checkpoints have `<expert>.gate_proj.weight` and so on, one tensor each."""
    if f"{prefix}0.gate_proj.weight" not in state_dict:
        return
    num_experts = module.gate_up_proj.shape[0]
    for suffix, stacked in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
        if f"{prefix}0.gate_proj.{suffix}" not in state_dict:
            continue
        take = {
            name: [state_dict.pop(f"{prefix}{e}.{name}_proj.{suffix}") for e in range(num_experts)]
            for name in ("gate", "up", "down")
        }
        gate_up = [torch.cat(pair) for pair in zip(take["gate"], take["up"], strict=True)]
        state_dict[f"{prefix}gate_up_proj{stacked}"] = torch.stack(gate_up)
        state_dict[f"{prefix}down_proj{stacked}"] = torch.stack(take["down"])
