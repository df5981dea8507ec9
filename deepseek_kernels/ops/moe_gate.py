"""`moe_gate`: which experts each token goes to, and with what weight."""

import torch

from ..plan import moe_gate as plan
from ..reference import moe_gate as reference
from . import _allocate, _extension
from . import _checks as checks
from ._registry import register


def moe_gate(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `top_k` experts per token on biased scores, and weigh them by unbiased ones.

    Args:
        logits: [T, E] bf16, fp16, fp32 or fp64, any strides. The maths is in fp32 (fp64 stays fp64).
        bias: fp32 [E], added to the scores for the selection only. It gets no gradient: it has its own update rule.
        num_groups: experts come in this many groups of E / num_groups neighbours.
        topk_groups: groups a token may use: those of the highest group score, which is the sum of a group's two best
            selection scores, or without `bias` the best one.
        score: "sigmoid", "softmax" (over all E) or "sqrtsoftplus".
        normalize: divide the weights of a token by (their sum + 1e-20), before `scale`. With top_k 1 that leaves
            `scale`.
        mask: bool [T]; False marks a padded token, whose ids are -1 and weights 0.

    Returns:
        weights [T, K] fp32 (fp64 for fp64 logits) and indices int64 [T, K], both by descending selection score; ties
        between experts, and between groups, go to the lower index.

    Raises:
        ValueError, TypeError: naming the argument.

    Whatever the logits hold, the ids of a token that is not masked are distinct, in range and in its groups. A NaN
    logit counts as -inf and +inf as the largest finite number; an expert at -inf scores 0 and is chosen only when its
    groups have nothing better, lowest index first. The same goes for `bias` plus score, except that the weight stays
    the score. A group with one expert above -inf has that one's selection score, one without any comes last.

    Differentiable in `logits`, through the weights. Definition: `Gate` of DeepSeek-V3's inference/model.py, in fp32.
    """
    return torch.ops.deepseek_kernels.moe_gate(
        logits, bias, top_k, num_groups, topk_groups, score, normalize, scale, mask
    )


def _weight_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check(logits, bias, top_k, num_groups, topk_groups, score, normalize, scale, mask) -> None:
    op = "moe_gate"
    checks.tensor(op, "logits", logits, dtype=checks.FLOATS, shape=(None, None))
    num_tokens, num_experts = logits.shape
    checks.tensor(
        op, "bias", bias,
        dtype=(torch.float32, torch.float64), shape=(num_experts,), device=logits.device, last_contiguous=True,
    )  # fmt: skip
    checks.tensor(op, "mask", mask, dtype=torch.bool, shape=(num_tokens,), device=logits.device)
    checks.one_of(op, "score", score, reference.SCORES)
    if num_groups < 1 or num_experts % num_groups:
        raise checks.fail(op, "num_groups", f"a divisor of the {num_experts} experts", num_groups)
    if not 1 <= topk_groups <= num_groups:
        raise checks.fail(op, "topk_groups", f"1 to {num_groups}", topk_groups)
    allowed = num_experts // num_groups * topk_groups
    if not 1 <= top_k <= allowed:
        raise checks.fail(op, "top_k", f"1 to {allowed}, the experts of {topk_groups} of {num_groups} groups", top_k)


def _problem(logits, bias, top_k, num_groups, topk_groups, *_) -> plan.Problem:
    dtype = str(logits.dtype).removeprefix("torch.")
    num_groups = 1 if topk_groups == num_groups else num_groups
    return plan.Problem("forward", *logits.shape, top_k, num_groups, logits.element_size(), dtype)


def _fake(logits, bias, top_k, *_):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=_weight_dtype(logits)), logits.new_empty(shape, dtype=torch.int64)


def _triton(config, logits, bias, top_k, num_groups, topk_groups, score, normalize, scale, mask):
    from ..triton_kernels import moe_gate as kernel

    shape = (logits.shape[0], top_k)
    weights = _allocate.empty(shape, torch.float32, logits.device)
    indices = _allocate.empty(shape, torch.int64, logits.device)
    if indices.numel():
        bias = bias.float() if bias is not None else None
        mask = mask.contiguous().view(torch.uint8) if mask is not None else None
        kernel.gate(
            config, checks.rows(logits), bias, mask, weights, indices,
            num_groups, topk_groups, score, normalize, scale,
        )  # fmt: skip
    return weights, indices


def _cuda(config, logits, bias, top_k, num_groups, topk_groups, score, normalize, scale, mask):
    num_tokens, num_experts = logits.shape
    weights = _allocate.empty((num_tokens, top_k), torch.float32, logits.device)
    indices = _allocate.empty((num_tokens, top_k), torch.int64, logits.device)
    logits = checks.rows(logits)
    bias = bias.float() if bias is not None else None
    mask = mask.contiguous() if mask is not None else None
    if topk_groups == num_groups:
        num_groups = topk_groups = 1
    _extension.module().moe_gate(
        logits=logits.data_ptr(), bias=_extension.address(bias), mask=_extension.address(mask),
        weights=weights.data_ptr(), indices=indices.data_ptr(), num_tokens=num_tokens, ld_logits=logits.stride(0),
        num_experts=num_experts, top_k=top_k, num_groups=num_groups, topk_groups=topk_groups,
        score=list(reference.SCORES).index(score), dtype=_extension.dtype_code(logits.dtype), normalize=normalize,
        scale=scale, group_lanes=config.group_lanes, per_lane=config.per_lane, warps=config.warps, ctas=config.ctas,
        stream=_extension.stream(logits),
    )  # fmt: skip
    return weights, indices


def _cpu(config, logits, bias, top_k, num_groups, topk_groups, score, normalize, scale, mask):
    num_tokens, num_experts = logits.shape
    weights = _allocate.empty((num_tokens, top_k), torch.float32, logits.device)
    indices = _allocate.empty((num_tokens, top_k), torch.int64, logits.device)
    extension, threads = _extension.cpu(), torch.get_num_threads()
    size = extension.moe_gate_workspace(num_experts=num_experts, num_groups=num_groups, top_k=top_k, threads=threads)
    workspace = _allocate.empty((size,), torch.float32, logits.device)
    logits = checks.rows(logits)
    bias = bias.float() if bias is not None else None
    mask = mask.contiguous() if mask is not None else None
    extension.moe_gate(
        logits=logits.data_ptr(), bias=_extension.address(bias), mask=_extension.address(mask),
        weights=weights.data_ptr(), indices=indices.data_ptr(), workspace=workspace.data_ptr(),
        num_tokens=num_tokens, num_experts=num_experts, ld_logits=logits.stride(0), top_k=top_k,
        num_groups=num_groups, topk_groups=topk_groups, score=list(reference.SCORES).index(score),
        dtype=_extension.dtype_code(logits.dtype), normalize=normalize, scale=scale, threads=threads,
    )  # fmt: skip
    return weights, indices


def _backward(ctx, grad_weights, grad_indices):
    logits, indices = ctx.saved_tensors
    grad_logits = torch.ops.deepseek_kernels.moe_gate_backward(grad_weights, logits, indices, *ctx.options)
    return grad_logits, *(None,) * 8


_DEFAULTS = (None, None, None, 1, 1, "sigmoid", True, 1.0, None)  # of the schema, which may be left out of `inputs`


def _context(ctx, inputs, output) -> None:
    ctx.options = (*inputs, *_DEFAULTS[len(inputs) :])[5:8]
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _check_backward(grad_weights, logits, indices, score, normalize, scale) -> None:
    op = "moe_gate_backward"
    checks.tensor(op, "logits", logits, dtype=checks.FLOATS, shape=(None, None))
    shape = (logits.shape[0], None)
    checks.tensor(op, "indices", indices, dtype=(torch.int32, torch.int64), shape=shape, device=logits.device)
    checks.tensor(
        op, "grad_weights", grad_weights, dtype=_weight_dtype(logits), shape=indices.shape, device=logits.device
    )
    checks.one_of(op, "score", score, reference.SCORES)


def _backward_problem(grad_weights, logits, indices, *_) -> plan.Problem:
    dtype = str(logits.dtype).removeprefix("torch.")
    return plan.Problem("backward", *logits.shape, indices.shape[1], 1, logits.element_size(), dtype)


def _backward_fake(grad_weights, logits, *_):
    return logits.new_empty(logits.shape)


def _backward_triton(config, grad_weights, logits, indices, score, normalize, scale):
    from ..triton_kernels import moe_gate as kernel

    grad_logits = _allocate.empty(logits.shape, logits.dtype, logits.device)
    if indices.numel() == 0:
        return grad_logits.zero_()
    if grad_logits.numel():
        kernel.gate_backward(
            config, grad_weights.contiguous(), checks.rows(logits), indices.contiguous(), grad_logits,
            score, normalize, scale,
        )  # fmt: skip
    return grad_logits


def _backward_cpu(config, grad_weights, logits, indices, score, normalize, scale):
    (num_tokens, num_experts), top_k = logits.shape, indices.shape[1]
    grad_logits = _allocate.empty(logits.shape, logits.dtype, logits.device)
    extension, threads = _extension.cpu(), torch.get_num_threads()
    size = extension.moe_gate_backward_workspace(num_experts=num_experts, top_k=top_k, threads=threads)
    workspace = _allocate.empty((size,), torch.float32, logits.device)
    grad_weights, logits, indices = grad_weights.contiguous(), checks.rows(logits), indices.contiguous()
    extension.moe_gate_backward(
        grad_weights=grad_weights.data_ptr(), logits=logits.data_ptr(), indices=indices.data_ptr(),
        grad_logits=grad_logits.data_ptr(), workspace=workspace.data_ptr(), num_tokens=num_tokens,
        num_experts=num_experts, ld_logits=logits.stride(0), top_k=top_k, score=list(reference.SCORES).index(score),
        dtype=_extension.dtype_code(logits.dtype), wide=indices.dtype == torch.int64, normalize=normalize,
        scale=scale, threads=threads,
    )  # fmt: skip
    return grad_logits


register(
    "moe_gate(Tensor logits, Tensor? bias, int top_k, int num_groups=1, int topk_groups=1, str score='sigmoid', "
    "bool normalize=True, float scale=1.0, Tensor? mask=None) -> (Tensor, Tensor)",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.moe_gate,
    backends={"cuda": _cuda, "triton": _triton, "cpu": _cpu},
    backward=_backward,
    setup_context=_context,
)
register(
    "moe_gate_backward(Tensor grad_weights, Tensor logits, Tensor indices, str score, bool normalize, float scale) "
    "-> Tensor",
    check=_check_backward,
    problem=_backward_problem,
    plan=plan,
    fake=_backward_fake,
    reference=reference.moe_gate_backward,
    backends={"triton": _backward_triton, "cpu": _backward_cpu},
)
