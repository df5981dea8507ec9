"""`mla_cache_write` and `mla_rope`: one token's row of the latent cache, and the same rotation for its queries."""

import torch

from ..plan import mla_cache_write as plan
from ..reference import mla_cache_write as reference
from . import _allocate, _extension, _latent_cache
from . import _checks as checks
from ._registry import register

_INTEGERS = (torch.int32, torch.int64)


def mla_cache_write(
    c_kv: torch.Tensor,
    k_rope: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> None:
    """Normalise the latent, rotate the shared key and write both as one row of the paged cache, in place.

    `kv_cache[slots[t] // page_size, slots[t] % page_size] = rmsnorm(c_kv[t]) * norm_weight ++ rope(k_rope[t])`

    Args:
        c_kv: [T, d_latent] bf16, fp16 or fp32; any strides. Normalised in fp32 and rounded once, to the cache's dtype.
        k_rope: [T, d_rope], likewise.
        norm_weight: [d_latent] bf16, fp16 or fp32; None writes the latent as it is.
        cos_sin: fp32 [max_positions, d_rope], contiguous: cosines in the first half of a row, sines in the second.
        positions: int32 or int64 [T], rows of cos_sin. Values out of range are clamped.
        kv_cache: [pages, page_size, d_latent + d_rope] bf16, fp16 or fp32; or uint8 [pages, page_size, 656] for
            d_latent 512 and d_rope 64: 512 e4m3 | 4 fp32 scales, max(amax, 1e-4) / 448 of each 128 | 64 bf16 rope.
            May be a strided view with contiguous rows (uint8: strides in multiples of 16). **Mutated**.
        slots: int32 or int64 [T]. -1 and everything else out of range is skipped. Where two tokens name one slot,
            one of them is written, in one piece on the CPU; which one is not specified.
        eps: added to the mean square.
        interleaved: the pairs that rotate are (2i, 2i + 1), as in DeepSeek-V3; else (i, i + d_rope / 2).
            Either way every element stays where it was: rotate queries with `mla_rope` the same way. (transformers
            moves interleaved pairs into halves; both give the same scores as long as queries and keys agree.)

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError where an input requires grad.
    """
    torch.ops.deepseek_kernels.mla_cache_write(
        c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots, eps, interleaved
    )


def mla_rope(
    x: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool = True,
    inverse: bool = False,
) -> torch.Tensor:
    """Rotate every head of every token by the angles of its position: the query side of `mla_cache_write`.

    Args:
        x: [T, h, d_rope] bf16, fp16, fp32 or fp64; any strides. Rotated in fp32.
        cos_sin, positions, interleaved: as in `mla_cache_write`.
        inverse: rotate back.

    Returns:
        [T, h, d_rope] in x's dtype, every element in its place.

    Raises:
        ValueError, TypeError: naming the argument.

    Differentiable in x; the gradient is the inverse rotation.
    """
    return torch.ops.deepseek_kernels.mla_rope(x, cos_sin, positions, interleaved, inverse)


def _check_rotation(op: str, num_tokens: int, d_rope: int, cos_sin, positions, device) -> None:
    checks.multiple(op, "d_rope", d_rope, 2)
    checks.tensor(op, "cos_sin", cos_sin, dtype=torch.float32, shape=(None, d_rope), device=device, contiguous=True)
    checks.at_least(op, "cos_sin: max_positions", cos_sin.shape[0], 1)
    checks.tensor(op, "positions", positions, dtype=_INTEGERS, shape=(num_tokens,), device=device)


def _check_write(c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots, eps, interleaved) -> None:
    op = "mla_cache_write"
    checks.tensor(op, "c_kv", c_kv, dtype=checks.FLOATS[:3], shape=(None, None))
    num_tokens, d_latent = c_kv.shape
    checks.at_least(op, "c_kv: d_latent", d_latent, 1)
    checks.tensor(op, "k_rope", k_rope, dtype=checks.FLOATS[:3], shape=(num_tokens, None), device=c_kv.device)
    d_rope = k_rope.shape[1]
    checks.at_least(op, "k_rope: d_rope", d_rope, 2)
    checks.tensor(op, "norm_weight", norm_weight, dtype=checks.FLOATS[:3], shape=(d_latent,), device=c_kv.device)
    _check_rotation(op, num_tokens, d_rope, cos_sin, positions, c_kv.device)
    _latent_cache.check(op, kv_cache, d_latent, d_rope, c_kv.device)
    checks.tensor(op, "slots", slots, dtype=_INTEGERS, shape=(num_tokens,), device=c_kv.device)
    checks.no_grad(op, c_kv=c_kv, k_rope=k_rope, norm_weight=norm_weight, kv_cache=kv_cache)


def _check_write_values(c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots, eps, interleaved) -> None:
    op = "mla_cache_write"
    checks.within(op, "slots", slots, -1, kv_cache.shape[0] * kv_cache.shape[1])
    checks.within(op, "positions", positions, 0, cos_sin.shape[0], where=slots >= 0)
    used, counts = slots[slots >= 0].unique(return_counts=True)
    if (counts > 1).any():
        raise checks.fail(op, "slots", "every slot at most once", f"{used[counts > 1][0].item()} more than once")


def _check_rope_values(x, cos_sin, positions, interleaved, inverse) -> None:
    checks.within("mla_rope", "positions", positions, 0, cos_sin.shape[0])


def _write_problem(c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots, eps, interleaved) -> plan.Problem:
    return plan.Problem(
        "write", c_kv.shape[0], c_kv.shape[1], k_rope.shape[1], c_kv.element_size(),
        kv_cache.shape[2] * kv_cache.element_size(), norm_weight is not None,
        str(c_kv.dtype).removeprefix("torch."),
    )  # fmt: skip


def _write_fake(*args) -> None:
    return None


def _write_triton(config, c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots, eps, interleaved) -> None:
    from ..triton_kernels import mla_cache_write as kernel

    if slots.shape[0] == 0 or kv_cache.shape[0] == 0:
        return
    norm_weight = norm_weight.contiguous() if norm_weight is not None else None
    kernel.write(
        config, checks.rows(c_kv), checks.rows(k_rope), norm_weight, cos_sin, positions.contiguous(), kv_cache,
        slots.contiguous(), eps, interleaved,
    )  # fmt: skip


def _rotation(cos_sin, positions, interleaved) -> dict:
    """Arguments the CPU kernels share. `positions` is contiguous."""
    return {
        "cos_sin": cos_sin.data_ptr(), "positions": positions.data_ptr(), "max_positions": cos_sin.shape[0],
        "d_rope": cos_sin.shape[1], "wide_positions": positions.dtype == torch.int64, "interleaved": interleaved,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _write_cpu(config, c_kv, k_rope, norm_weight, cos_sin, positions, kv_cache, slots, eps, interleaved) -> None:
    c_kv, k_rope, positions, slots = checks.rows(c_kv), checks.rows(k_rope), positions.contiguous(), slots.contiguous()
    norm_weight = norm_weight.contiguous() if norm_weight is not None else None
    fp8 = kv_cache.dtype == torch.uint8
    (num_pages, page_size, _), size, code = kv_cache.shape, kv_cache.element_size(), _extension.dtype_code
    _extension.cpu().mla_cache_write(
        **_rotation(cos_sin, positions, interleaved), c_kv=c_kv.data_ptr(), k_rope=k_rope.data_ptr(),
        norm_weight=_extension.address(norm_weight), kv_cache=kv_cache.data_ptr(), slots=slots.data_ptr(),
        num_tokens=c_kv.shape[0], d_latent=c_kv.shape[1], num_pages=num_pages, page_size=page_size,
        ld_c_kv=c_kv.stride(0), ld_k_rope=k_rope.stride(0), page_bytes=kv_cache.stride(0) * size,
        row_bytes=kv_cache.stride(1) * size, eps=eps, c_kv_dtype=code(c_kv.dtype), k_rope_dtype=code(k_rope.dtype),
        norm_dtype=code(norm_weight.dtype) if norm_weight is not None else 0,
        cache_dtype=0 if fp8 else code(kv_cache.dtype), wide_slots=slots.dtype == torch.int64, fp8=fp8,
    )  # fmt: skip


def _check_rope(x, cos_sin, positions, interleaved, inverse) -> None:
    checks.tensor("mla_rope", "x", x, dtype=checks.FLOATS, shape=(None, None, None))
    _check_rotation("mla_rope", x.shape[0], x.shape[2], cos_sin, positions, x.device)


def _rope_problem(x, cos_sin, positions, interleaved, inverse) -> plan.Problem:
    num_tokens, heads, d_rope = x.shape
    return plan.Problem(
        "rope", num_tokens * heads, 0, d_rope, x.element_size(), heads=heads, dtype=str(x.dtype).removeprefix("torch.")
    )


def _rope_fake(x, cos_sin, positions, interleaved, inverse):
    return x.new_empty(x.shape)


def _rope_triton(config, x, cos_sin, positions, interleaved, inverse):
    from ..triton_kernels import mla_cache_write as kernel

    out = _allocate.empty(x.shape, x.dtype, x.device)
    if out.numel():
        kernel.rope(config, checks.rows(x), cos_sin, positions.contiguous(), interleaved, inverse, out)
    return out


def _rope_cpu(config, x, cos_sin, positions, interleaved, inverse):
    out = _allocate.empty(x.shape, x.dtype, x.device)
    x, positions = checks.rows(x), positions.contiguous()
    _extension.cpu().mla_rope(
        **_rotation(cos_sin, positions, interleaved), x=x.data_ptr(), out=out.data_ptr(), num_tokens=x.shape[0],
        heads=x.shape[1], x_stride_t=x.stride(0), x_stride_h=x.stride(1), dtype=_extension.dtype_code(x.dtype),
        inverse=inverse,
    )  # fmt: skip
    return out


def _rope_context(ctx, inputs, output) -> None:
    _, cos_sin, positions, interleaved, inverse = (*inputs, *(True, False)[len(inputs) - 3 :])
    ctx.save_for_backward(cos_sin, positions)
    ctx.interleaved, ctx.inverse = interleaved, inverse


def _rope_backward(ctx, grad):
    grad_x = torch.ops.deepseek_kernels.mla_rope(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return grad_x, None, None, None, None


register(
    "mla_cache_write(Tensor c_kv, Tensor k_rope, Tensor? norm_weight, Tensor cos_sin, Tensor positions, "
    "Tensor(a!) kv_cache, Tensor slots, float eps=1e-6, bool interleaved=True) -> ()",
    check=_check_write,
    problem=_write_problem,
    plan=plan,
    fake=_write_fake,
    reference=reference.mla_cache_write,
    check_values=_check_write_values,
    backends={"triton": _write_triton, "cpu": _write_cpu},
)
register(
    "mla_rope(Tensor x, Tensor cos_sin, Tensor positions, bool interleaved=True, bool inverse=False) -> Tensor",
    check=_check_rope,
    problem=_rope_problem,
    plan=plan,
    fake=_rope_fake,
    reference=reference.mla_rope,
    check_values=_check_rope_values,
    backends={"triton": _rope_triton, "cpu": _rope_cpu},
    backward=_rope_backward,
    setup_context=_rope_context,
)
