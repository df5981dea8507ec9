"""`mla_decode`: attention of a few absorbed queries per sequence over the paged latent cache."""

import torch

from ..plan import mla_decode as plan
from ..reference import mla_decode as reference
from . import _checks as checks
from . import _latent_cache
from ._registry import register

D_ROPE = 64


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seqlens_kv: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a paged latent cache, whose rows are keys as they are and values in their first d_latent columns.

    Args:
        q: [b, s_q, h_q, d_latent + 64] bf16, fp16 or fp32: absorbed queries, then their rotated part; any strides.
        kv_cache: [pages, page_size, d_latent + 64] in q's dtype, or uint8 [pages, page_size, 656] (d_latent 512) as
            `mla_cache_write` writes it. Any page size; may be a strided view with contiguous rows. Slots that no
            sequence uses may hold anything, NaN included.
        block_table: int32 [b, max_pages], contiguous. Entries past a sequence's length may hold anything; tokens
            in a page that does not exist count as absent.
        seqlens_kv: int32 [b], clamped to [0, max_pages * page_size]; never looked at from the host on a GPU.
        scale: of the scores, 1/sqrt(192) for V3 (times the square of YaRN's mscale).
        causal: query i of s_q sees keys j <= seqlens_kv - s_q + i (aligned to the end); else all.
        sink: fp32 [h_q], one more logit in the denominator: out *= exp(lse) / (exp(lse) + exp(sink)).

    Returns:
        out [b, s_q, h_q, d_latent] in q's dtype, lse fp32 [b, h_q, s_q]: natural log, without the sink. A query that
        sees nothing has out 0 and lse -inf. Results are deterministic; they depend on the batch size through the
        number of parts a sequence is split into.

    Raises:
        ValueError, TypeError: naming the argument.

    No backward. Semantics of FlashMLA's flash_mla_with_kvcache, except for the lse of a query that sees nothing.
    """
    return torch.ops.deepseek_kernels.mla_decode(q, kv_cache, block_table, seqlens_kv, scale, causal, sink)


def _check(q, kv_cache, block_table, seqlens_kv, scale, causal, sink) -> None:
    op = "mla_decode"
    checks.tensor(op, "q", q, dtype=checks.FLOATS[:3], shape=(None,) * 4)
    b, _, h_q, d_qk = q.shape
    checks.at_least(op, "q: d_latent + 64", d_qk, D_ROPE + 1)
    _latent_cache.check(op, kv_cache, d_qk - D_ROPE, D_ROPE, q.device)
    if kv_cache.dtype != torch.uint8:
        checks.tensor(op, "kv_cache", kv_cache, dtype=q.dtype)
    checks.tensor(op, "block_table", block_table, dtype=torch.int32, shape=(b, None), device=q.device, contiguous=True)
    checks.tensor(op, "seqlens_kv", seqlens_kv, dtype=torch.int32, shape=(b,), device=q.device, contiguous=True)
    checks.tensor(op, "sink", sink, dtype=torch.float32, shape=(h_q,), device=q.device)


def _problem(q, kv_cache, block_table, seqlens_kv, scale, causal, sink) -> plan.Problem:
    b, s_q, h_q, d_qk = q.shape
    page_size = kv_cache.shape[1]
    return plan.Problem(
        b, s_q, h_q, block_table.shape[1] * page_size, d_qk - D_ROPE, D_ROPE, page_size,
        str(q.dtype).removeprefix("torch."), kv_cache.dtype == torch.uint8, causal, sink is not None,
    )  # fmt: skip


def _fake(q, kv_cache, block_table, seqlens_kv, scale, causal, sink):
    b, s_q, h_q, d_qk = q.shape
    return q.new_empty(b, s_q, h_q, d_qk - D_ROPE), q.new_empty(b, h_q, s_q, dtype=torch.float32)


register(
    "mla_decode(Tensor q, Tensor kv_cache, Tensor block_table, Tensor seqlens_kv, float scale, bool causal=True, "
    "Tensor? sink=None) -> (Tensor, Tensor)",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.mla_decode,
    backends={},
)
