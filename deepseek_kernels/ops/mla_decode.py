"""`mla_decode`: attention of a few absorbed queries per sequence over the paged latent cache."""

import torch

from ..plan import mla_decode as plan
from ..reference import mla_decode as reference
from ..shapes import ceil_div
from . import _allocate, _extension, _latent_cache
from . import _checks as checks
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
        sees nothing has out 0 and lse -inf. Results are deterministic; they depend on the batch through the parts
        that sequences are split into: on its size, and in CUDA on the lengths of all of them.

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


def _check_values(q, kv_cache, block_table, seqlens_kv, scale, causal, sink) -> None:
    (pages, page_size, _), max_pages = kv_cache.shape, block_table.shape[1]
    checks.within("mla_decode", "seqlens_kv", seqlens_kv, 0, max_pages * page_size + 1)
    first_token = page_size * torch.arange(max_pages, device=q.device)
    checks.within("mla_decode", "block_table", block_table, 0, pages, where=first_token < seqlens_kv[:, None])


def _problem(q, kv_cache, block_table, seqlens_kv, scale, causal, sink) -> plan.Problem:
    b, s_q, h_q, d_qk = q.shape
    pages, page_size, width = kv_cache.shape
    steps = sorted((s, n) for n, s in zip((pages, page_size), kv_cache.stride()) if n > 1)
    size = kv_cache.element_size()
    aligned = all(offset * size % plan.ALIGNMENT == 0 for offset in (kv_cache.storage_offset(), *(s for s, _ in steps)))
    for step, count in steps:  # rows that overlap are no tensor to TMA
        aligned &= step >= width
        width = step * count
    return plan.Problem(
        b, s_q, h_q, block_table.shape[1] * page_size, d_qk - D_ROPE, D_ROPE, page_size,
        str(q.dtype).removeprefix("torch."), kv_cache.dtype == torch.uint8, causal, sink is not None, aligned,
    )  # fmt: skip


def _fake(q, kv_cache, block_table, seqlens_kv, scale, causal, sink):
    b, s_q, h_q, d_qk = q.shape
    return q.new_empty(b, s_q, h_q, d_qk - D_ROPE), q.new_empty(b, h_q, s_q, dtype=torch.float32)


def _outputs(q):
    b, s_q, h_q, d_qk = q.shape
    out = _allocate.empty((b, s_q, h_q, d_qk - D_ROPE), q.dtype, q.device)
    return out, _allocate.empty((b, h_q, s_q), torch.float32, q.device)


def _cuda(config, q, kv_cache, block_table, seqlens_kv, scale, causal, sink):
    out, lse = _outputs(q)
    if out.numel() == 0:
        return out, lse
    q, row_stride = _queries_in_rows(q)
    b, s_q, h_q, d_latent = out.shape
    part_out = part_lse = heads = None
    if config.parts > 1:  # a part has at most two pieces of sequences that it shares with others
        part_out = _allocate.empty((2 * config.parts, s_q * h_q, d_latent), torch.float32, q.device)
        part_lse = _allocate.empty((2 * config.parts, s_q * h_q), torch.float32, q.device)
        heads = _allocate.empty((config.parts, 2), torch.int32, q.device)
    sink = sink.contiguous() if sink is not None else None
    address = _extension.address
    _extension.module().mla_decode(
        q=address(q), kv_cache=address(kv_cache), block_table=address(block_table), seqlens_kv=address(seqlens_kv),
        sink=address(sink), out=address(out), lse=address(lse), part_out=address(part_out),
        part_lse=address(part_lse), heads=address(heads), b=b, s_q=s_q, h_q=h_q, num_pages=kv_cache.shape[0],
        page_size=kv_cache.shape[1], max_pages=block_table.shape[1], q_stride_b=q.stride(0), q_stride_row=row_stride,
        page_stride=kv_cache.stride(0), row_stride=kv_cache.stride(1), scale=scale,
        dtype=_extension.dtype_code(q.dtype), causal=causal, parts=config.parts, cluster=config.cluster,
        stream=_extension.stream(q),
    )  # fmt: skip
    return out, lse


def _queries_in_rows(q: torch.Tensor) -> tuple[torch.Tensor, int]:
    """q, or a copy, whose rows of all queries and heads lie equally far apart where TMA can fetch them; how far."""
    (b, s_q, h_q, width), (of_b, of_s, of_h, last) = q.shape, q.stride()
    row = of_h if h_q > 1 else of_s if s_q > 1 else width
    equal = h_q == 1 or s_q == 1 or of_s == h_q * of_h
    apart = row >= width and (b == 1 or of_b >= s_q * h_q * row)
    places = (q.data_ptr(), row * q.element_size(), of_b * q.element_size() if b > 1 else 0)
    if last == 1 and equal and apart and all(place % plan.ALIGNMENT == 0 for place in places):
        return q, row
    return q.clone(memory_format=torch.contiguous_format), width


def _triton(config, q, kv_cache, block_table, seqlens_kv, scale, causal, sink):
    from ..triton_kernels import mla_decode as kernel

    out, lse = _outputs(q)
    if out.numel() == 0:
        return out, lse
    b, s_q, h_q, d_latent = out.shape
    part_out = part_lse = None
    if config.num_splits > 1:
        part_out = _allocate.empty((b, config.num_splits, s_q * h_q, d_latent), torch.float32, q.device)
        part_lse = _allocate.empty((b, config.num_splits, s_q * h_q), torch.float32, q.device)
    sink = sink.contiguous() if sink is not None else None
    kernel.decode(
        config, checks.rows(q), kv_cache, block_table, seqlens_kv, scale, causal, sink, part_out, part_lse, out, lse
    )
    return out, lse


def _cpu(config, q, kv_cache, block_table, seqlens_kv, scale, causal, sink):
    out, lse = _outputs(q)
    if out.numel() == 0:
        return out, lse
    q = checks.rows(q)
    b, s_q, h_q, d_latent = out.shape
    extension, threads = _extension.cpu(), torch.get_num_threads()
    size = extension.mla_decode_workspace(rows=s_q * h_q, d_latent=d_latent, d_rope=D_ROPE, threads=threads)
    workspace = _allocate.empty((size,), torch.float32, q.device)
    sink = sink.contiguous() if sink is not None else None
    extension.mla_decode(
        q=q.data_ptr(), kv_cache=kv_cache.data_ptr(), block_table=block_table.data_ptr(),
        seqlens_kv=seqlens_kv.data_ptr(), sink=_extension.address(sink), out=out.data_ptr(), lse=lse.data_ptr(),
        workspace=workspace.data_ptr(), b=b, s_q=s_q, h_q=h_q, d_latent=d_latent, d_rope=D_ROPE,
        num_pages=kv_cache.shape[0], page_size=kv_cache.shape[1], max_pages=block_table.shape[1],
        q_stride_b=q.stride(0), q_stride_s=q.stride(1), q_stride_h=q.stride(2),
        page_bytes=kv_cache.stride(0) * kv_cache.element_size(), row_bytes=kv_cache.stride(1) * kv_cache.element_size(),
        scale=scale, dtype=_extension.dtype_code(q.dtype), causal=causal, fp8=kv_cache.dtype == torch.uint8,
        threads=threads,
    )  # fmt: skip
    return out, lse


def _torch(config, q, kv_cache, block_table, seqlens_kv, scale, causal, sink):
    """CPU tensors: gather each sequence's rows; its queries times heads are the rows of one attention over them."""
    out, lse = _outputs(q)
    b, s_q, h_q, d_latent = out.shape
    pages, page_size, _ = kv_cache.shape
    if out.numel() == 0:
        return out, lse
    q = checks.rows(q)
    for i, length in enumerate(seqlens_kv.clamp(0, block_table.shape[1] * page_size).tolist()):
        page = block_table[i, : ceil_div(length, page_size)].long()
        if ((page < 0) | (page >= pages)).any():
            return reference.mla_decode(q, kv_cache, block_table, seqlens_kv, scale, causal, sink)
        unseeing = max(s_q - length, 0) if causal else s_q * (length == 0)
        out[i, :unseeing] = 0
        lse[i, :, :unseeing] = float("-inf")
        if unseeing == s_q:
            continue
        rows = kv_cache[page].flatten(0, 1)[:length]
        queries = q[i, unseeing:].reshape(1, 1, -1, q.shape[3])
        if kv_cache.dtype == torch.uint8:
            rows, queries = reference.decode_rows(rows), queries.float()
        mask = None
        if causal and s_q > 1:
            last = torch.arange(length - s_q + unseeing, length)[:, None, None]
            visible = torch.arange(length) <= last.expand(-1, h_q, 1)
            mask = torch.where(visible, 0.0, float("-inf")).to(rows.dtype).view(1, 1, -1, length)
        # keys and values of one width take torch's fused kernel; the rope columns of the result are dropped
        attended, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, rows[None, None], rows[None, None], attn_mask=mask, scale=scale
        )
        out[i, unseeing:] = attended.view(-1, h_q, q.shape[3])[..., :d_latent]
        lse[i, :, unseeing:] = log_sum_exp.view(-1, h_q).t()
    if sink is not None:
        out *= torch.where(lse.isneginf(), 0, torch.sigmoid(lse - sink[:, None])).transpose(1, 2)[..., None]
    return out, lse


register(
    "mla_decode(Tensor q, Tensor kv_cache, Tensor block_table, Tensor seqlens_kv, float scale, bool causal=True, "
    "Tensor? sink=None) -> (Tensor, Tensor)",
    check=_check,
    problem=_problem,
    plan=plan,
    fake=_fake,
    reference=reference.mla_decode,
    check_values=_check_values,
    backends={"cuda": _cuda, "triton": _triton, "cpu": _cpu, "torch": _torch},
)
