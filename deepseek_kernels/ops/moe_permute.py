"""`moe_permute` and `moe_unpermute`: token rows to expert order and back. Each is the other's gradient."""

import torch

from ..plan import moe_permute as plan
from ..reference import moe_permute as reference
from ..shapes import BLOCK, ceil_div
from . import _allocate, _extension
from . import _checks as checks
from ._maps import MoeMaps
from ._registry import register

_QUANTIZABLE = (torch.bfloat16, torch.float16, torch.float32)
_MOVABLE = (*checks.FLOATS, checks.FP8)


def moe_permute(
    x: torch.Tensor, maps: MoeMaps, scale: torch.Tensor | None = None, *, quantize: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Copy each token's row to every position its experts gave it.

    `out[maps.token_topk_to_pos[t, k]] = x[t]`; rows without an entry are zero.

    Args:
        x: [T, H], any float dtype or e4m3; any strides (a copy is made unless the last dimension is contiguous).
        maps: from `moe_sort`.
        scale: fp32 [T, S], moved along with the rows (FP8 payload with its 1x128 scales).
        quantize: x is bf16, fp16 or fp32 and comes out as e4m3 with 1x128 scales, in the same pass.

    Returns:
        out [R_max, H] with R_max = len(maps.pos_to_token_topk); with `scale` or `quantize` also the fp32 scales
        [R_max, S], zero where there is no entry.

    Raises:
        ValueError, TypeError: naming the argument. Positions out of range are ignored, never written.

    Differentiable in x unless quantised. Semantics of TileKernels' expand_to_fused.
    """
    out, out_scale = torch.ops.deepseek_kernels.moe_permute(
        x, maps.token_topk_to_pos, maps.pos_to_token_topk, scale, quantize
    )
    return out if scale is None and not quantize else (out, out_scale)


def moe_unpermute(y: torch.Tensor, maps: MoeMaps, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum each token's expert rows: `out[t] = sum_k weights[t, k] * y[maps.token_topk_to_pos[t, k]]`.

    Args:
        y: [R_max, H] bf16, fp16, fp32 or fp64. Rows without an entry are never read.
        maps: from `moe_sort`.
        weights: fp32 [T, K]; left out, the sum is plain (the weights were applied in `swiglu`).

    Returns:
        out [T, H] in y's dtype, accumulated in fp32 in the order of k. Entries of -1 add nothing.

    Raises:
        ValueError, TypeError: naming the argument.

    Differentiable in y and weights. Semantics of TileKernels' reduce_fused.
    """
    return torch.ops.deepseek_kernels.moe_unpermute(y, maps.token_topk_to_pos, maps.pos_to_token_topk, weights)


def _check_maps(op: str, device, token_topk_to_pos, num_tokens, pos_to_token_topk, num_rows) -> None:
    checks.tensor(
        op, "token_topk_to_pos", token_topk_to_pos,
        dtype=torch.int32, shape=(num_tokens, None), device=device, contiguous=True,
    )  # fmt: skip
    checks.tensor(
        op, "pos_to_token_topk", pos_to_token_topk,
        dtype=torch.int32, shape=(num_rows,), device=device, contiguous=True,
    )  # fmt: skip


def _check_permute(x, token_topk_to_pos, pos_to_token_topk, scale, quantize) -> None:
    op = "moe_permute"
    dtypes = _QUANTIZABLE if quantize else _MOVABLE
    checks.tensor(op, "x", x, dtype=dtypes, shape=(None, None))
    _check_maps(op, x.device, token_topk_to_pos, x.shape[0], pos_to_token_topk, None)
    checks.tensor(op, "scale", scale, dtype=torch.float32, shape=(x.shape[0], None), device=x.device)
    if quantize and scale is not None:
        raise checks.fail(op, "scale", "None when quantize is set", list(scale.shape))


def _check_values(op: str):
    def check(x, token_topk_to_pos, pos_to_token_topk, *rest) -> None:
        checks.within(op, "token_topk_to_pos", token_topk_to_pos, -1, pos_to_token_topk.numel())
        checks.within(op, "pos_to_token_topk", pos_to_token_topk, -1, token_topk_to_pos.numel())

    return check


def _scale_columns(x, scale, quantize) -> int:
    return ceil_div(x.shape[1], BLOCK) if quantize else scale.shape[1] if scale is not None else 0


def _permute_problem(x, token_topk_to_pos, pos_to_token_topk, scale, quantize) -> plan.Problem:
    return plan.Problem(
        "permute", x.shape[0], x.shape[1], token_topk_to_pos.shape[1], pos_to_token_topk.shape[0], x.element_size(),
        _scale_columns(x, scale, quantize), quantize, dtype=str(x.dtype).removeprefix("torch."),
    )  # fmt: skip


def _permute_fake(x, token_topk_to_pos, pos_to_token_topk, scale, quantize):
    rows = pos_to_token_topk.shape[0]
    out = x.new_empty(rows, x.shape[1], dtype=checks.FP8 if quantize else x.dtype)
    return out, x.new_empty(rows, _scale_columns(x, scale, quantize), dtype=torch.float32)


def _permute_outputs(x, pos_to_token_topk, scale, quantize):
    rows = pos_to_token_topk.shape[0]
    out = _allocate.empty((rows, x.shape[1]), checks.FP8 if quantize else x.dtype, x.device)
    return out, _allocate.empty((rows, _scale_columns(x, scale, quantize)), torch.float32, x.device)


def _permute_triton(config, x, token_topk_to_pos, pos_to_token_topk, scale, quantize):
    from ..triton_kernels import moe_permute as kernel

    out, out_scale = _permute_outputs(x, pos_to_token_topk, scale, quantize)
    if out.numel() == 0:
        return out, out_scale.zero_()
    x = checks.rows(x)
    if quantize:
        kernel.permute_quantize(config, x, token_topk_to_pos, pos_to_token_topk, out, out_scale)
        return out, out_scale
    kernel.permute(config, x, token_topk_to_pos, pos_to_token_topk, out)
    if out_scale.numel():
        kernel.permute(config, checks.rows(scale), token_topk_to_pos, pos_to_token_topk, out_scale)
    return out, out_scale


def _permute_cuda(config, x, token_topk_to_pos, pos_to_token_topk, scale, quantize):
    out, out_scale = _permute_outputs(x, pos_to_token_topk, scale, quantize)
    x = checks.rows(x)
    address, size = _extension.address, x.element_size()
    maps = dict(
        token_topk_to_pos=address(token_topk_to_pos), pos_to_token_topk=address(pos_to_token_topk),
        num_tokens=x.shape[0], top_k=token_topk_to_pos.shape[1], num_rows=out.shape[0],
    )  # fmt: skip
    common = dict(
        x=address(x), out=address(out), out_scale=address(out_scale), out_scale_stride_r=out_scale.shape[1],
        out_scale_stride_s=1, stream=_extension.stream(x),
    )  # fmt: skip
    if quantize:
        _extension.module().moe_permute_quantize(
            hidden=x.shape[1], dtype=_extension.dtype_code(x.dtype), ldx=x.stride(0), ld_out=out.shape[1],
            pow2_scale=False, **maps, **common,
        )  # fmt: skip
    else:
        _extension.module().moe_permute(
            scale=address(scale), row_bytes=x.shape[1] * size, ldx_bytes=x.stride(0) * size,
            ld_out_bytes=out.shape[1] * size, scale_columns=out_scale.shape[1],
            scale_stride_t=scale.stride(0) if scale is not None else 0,
            scale_stride_s=scale.stride(1) if scale is not None else 0, **maps, **common,
        )  # fmt: skip
    return out, out_scale


def _permute_cpu(config, x, token_topk_to_pos, pos_to_token_topk, scale, quantize):
    if quantize:  # a token once, not once a row
        x, scale = torch.ops.deepseek_kernels.fp8_quantize(x)
    out, out_scale = _permute_outputs(x, pos_to_token_topk, scale, False)
    x = checks.rows(x)
    row_bytes = x.shape[1] * x.element_size()
    _extension.cpu().moe_permute(
        x=x.data_ptr(), scale=_extension.address(scale), pos_to_token_topk=pos_to_token_topk.data_ptr(),
        out=out.data_ptr(), out_scale=out_scale.data_ptr(), num_tokens=x.shape[0], top_k=token_topk_to_pos.shape[1],
        num_rows=out.shape[0], row_bytes=row_bytes, ldx_bytes=x.stride(0) * x.element_size(), ld_out_bytes=row_bytes,
        scale_columns=out_scale.shape[1], scale_stride_t=scale.stride(0) if scale is not None else 0,
        scale_stride_s=scale.stride(1) if scale is not None else 0, out_scale_stride_r=out_scale.shape[1],
        out_scale_stride_s=1, threads=torch.get_num_threads(),
    )  # fmt: skip
    return out, out_scale


def _permute_backward(ctx, grad_out, grad_scale):
    if ctx.quantize:
        raise NotImplementedError("moe_permute: has no backward with quantize=True; quantise a detached tensor")
    token_topk_to_pos, pos_to_token_topk = ctx.saved_tensors
    grad_x = torch.ops.deepseek_kernels.moe_unpermute(grad_out, token_topk_to_pos, pos_to_token_topk)
    return grad_x, None, None, None, None


def _permute_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.quantize = len(inputs) > 4 and inputs[4]
    ctx.mark_non_differentiable(output[1])


def _check_unpermute(y, token_topk_to_pos, pos_to_token_topk, weights) -> None:
    op = "moe_unpermute"
    checks.tensor(op, "y", y, dtype=checks.FLOATS, shape=(None, None))
    _check_maps(op, y.device, token_topk_to_pos, None, pos_to_token_topk, y.shape[0])
    checks.tensor(
        op, "weights", weights,
        dtype=(torch.float32, torch.float64), shape=token_topk_to_pos.shape, device=y.device,
    )  # fmt: skip


def _unpermute_problem(y, token_topk_to_pos, pos_to_token_topk, weights) -> plan.Problem:
    num_tokens, top_k = token_topk_to_pos.shape
    return plan.Problem(
        "unpermute", num_tokens, y.shape[1], top_k, y.shape[0], y.element_size(),
        weighted=weights is not None, dtype=str(y.dtype).removeprefix("torch."),
    )  # fmt: skip


def _unpermute_fake(y, token_topk_to_pos, pos_to_token_topk, weights):
    return y.new_empty(token_topk_to_pos.shape[0], y.shape[1])


def _unpermute_triton(config, y, token_topk_to_pos, pos_to_token_topk, weights):
    from ..triton_kernels import moe_permute as kernel

    out = _allocate.empty((token_topk_to_pos.shape[0], y.shape[1]), y.dtype, y.device)
    if out.numel():
        weights = weights.contiguous().float() if weights is not None else None
        kernel.unpermute(config, checks.rows(y), token_topk_to_pos, weights, out)
    return out


def _unpermute_cuda(config, y, token_topk_to_pos, pos_to_token_topk, weights):
    out = _allocate.empty((token_topk_to_pos.shape[0], y.shape[1]), y.dtype, y.device)
    y = checks.rows(y)
    weights = weights.contiguous().float() if weights is not None else None
    address = _extension.address
    _extension.module().moe_unpermute(
        y=address(y), token_topk_to_pos=address(token_topk_to_pos), weights=address(weights), out=address(out),
        num_tokens=out.shape[0], top_k=token_topk_to_pos.shape[1], num_rows=y.shape[0], hidden=y.shape[1],
        dtype=_extension.dtype_code(y.dtype), ldy=y.stride(0), ld_out=out.shape[1], stream=_extension.stream(y),
    )  # fmt: skip
    return out


def _unpermute_cpu(config, y, token_topk_to_pos, pos_to_token_topk, weights):
    out = _allocate.empty((token_topk_to_pos.shape[0], y.shape[1]), y.dtype, y.device)
    y = checks.rows(y)
    weights = weights.contiguous().float() if weights is not None else None
    _extension.cpu().moe_unpermute(
        y=y.data_ptr(), token_topk_to_pos=token_topk_to_pos.data_ptr(), weights=_extension.address(weights),
        out=out.data_ptr(), num_tokens=out.shape[0], top_k=token_topk_to_pos.shape[1], num_rows=y.shape[0],
        hidden=y.shape[1], dtype=_extension.dtype_code(y.dtype), ldy=y.stride(0), ld_out=out.shape[1],
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return out


def _unpermute_backward(ctx, grad_out):
    y, token_topk_to_pos, pos_to_token_topk, weights = ctx.saved_tensors
    num_tokens, top_k = token_topk_to_pos.shape
    grad_y, _ = torch.ops.deepseek_kernels.moe_permute(grad_out, token_topk_to_pos, pos_to_token_topk)
    if weights is None or weights.numel() == 0:
        return grad_y, None, None, None if weights is None else torch.zeros_like(weights)
    grad_weights = None
    if ctx.needs_input_grad[3]:
        pos = token_topk_to_pos.flatten().long()
        has_entry = (pos >= 0) & (pos < y.shape[0])
        if y.shape[0] == 0:
            grad_weights = torch.zeros_like(weights)
        else:
            rows = y[torch.where(has_entry, pos, 0)].view(num_tokens, top_k, -1).to(weights.dtype)
            dots = (rows * grad_out.to(weights.dtype)[:, None]).sum(-1)
            grad_weights = torch.where(has_entry.view(num_tokens, top_k), dots, 0)
    entry = pos_to_token_topk.long()
    in_range = (entry >= 0) & (entry < weights.numel())
    row_weight = torch.where(in_range, weights.flatten()[torch.where(in_range, entry, 0)], 0)
    return (grad_y.to(weights.dtype) * row_weight[:, None]).to(y.dtype), None, None, grad_weights


def _unpermute_context(ctx, inputs, output) -> None:
    weights = inputs[3] if len(inputs) > 3 else None
    y = inputs[0]
    ctx.save_for_backward(y, inputs[1], inputs[2], weights)


register(
    "moe_permute(Tensor x, Tensor token_topk_to_pos, Tensor pos_to_token_topk, Tensor? scale=None, "
    "bool quantize=False) -> (Tensor, Tensor)",
    check=_check_permute,
    problem=_permute_problem,
    plan=plan,
    fake=_permute_fake,
    reference=reference.moe_permute,
    check_values=_check_values("moe_permute"),
    backends={"cuda": _permute_cuda, "triton": _permute_triton, "cpu": _permute_cpu},
    backward=_permute_backward,
    setup_context=_permute_context,
)
register(
    "moe_unpermute(Tensor y, Tensor token_topk_to_pos, Tensor pos_to_token_topk, Tensor? weights=None) -> Tensor",
    check=_check_unpermute,
    problem=_unpermute_problem,
    plan=plan,
    fake=_unpermute_fake,
    reference=reference.moe_unpermute,
    check_values=_check_values("moe_unpermute"),
    backends={"cuda": _unpermute_cuda, "triton": _unpermute_triton, "cpu": _unpermute_cpu},
    backward=_unpermute_backward,
    setup_context=_unpermute_context,
)
