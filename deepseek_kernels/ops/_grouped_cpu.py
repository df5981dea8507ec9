"""The compiled CPU kernel behind every grouped matmul, float and FP8, with or without a gather of its rows."""

import torch

from . import _allocate, _extension


def grouped(
    a: torch.Tensor,
    scale_a: torch.Tensor | None,
    b: torch.Tensor,
    scale_b: torch.Tensor | None,
    expert_offsets: torch.Tensor,
    out: torch.Tensor,
    pos_to_token_topk: torch.Tensor | None = None,
    top_k: int = 1,
) -> torch.Tensor:
    """out [R, n] of row r: a[r] @ b[e]^T, or of a[pos_to_token_topk[r] // top_k]; rows of no expert are zero."""
    if out.numel() == 0:
        return out
    b = b if b.stride(2) == 1 else b.contiguous()
    num_experts, n, k = b.shape
    num_tokens, num_rows = a.shape[0], out.shape[0]
    fp8 = scale_a is not None and scale_b is not None
    strides_a = scale_a.stride() if scale_a is not None else (0, 0)
    strides_b = scale_b.stride() if scale_b is not None else (0, 0, 0)
    extension, threads = _extension.cpu(), torch.get_num_threads()
    size = extension.grouped_matmul_workspace(
        num_tokens=num_tokens, num_rows=num_rows, k=k, num_experts=num_experts, threads=threads
    )
    workspace = _allocate.empty((size,), torch.float32, a.device)
    extension.grouped_matmul(
        a=a.data_ptr(), scale_a=_extension.address(scale_a), b=b.data_ptr(), scale_b=_extension.address(scale_b),
        expert_offsets=expert_offsets.data_ptr(), pos_to_token_topk=_extension.address(pos_to_token_topk),
        d=out.data_ptr(), workspace=workspace.data_ptr(), num_tokens=num_tokens, num_rows=num_rows, n=n, k=k,
        num_experts=num_experts, lda=a.stride(0), ldb=b.stride(1), ldd=out.stride(0), b_stride_e=b.stride(0),
        scale_a_stride_m=strides_a[0], scale_a_stride_k=strides_a[1], scale_b_stride_e=strides_b[0],
        scale_b_stride_n=strides_b[1], scale_b_stride_k=strides_b[2], top_k=top_k,
        dtype=0 if fp8 else _extension.dtype_code(a.dtype), out_dtype=_extension.dtype_code(out.dtype),
        threads=threads,
    )  # fmt: skip
    return out
