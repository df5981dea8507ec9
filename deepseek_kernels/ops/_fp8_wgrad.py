"""The compiled weight gradient behind `fp8_matmul` and `fp8_grouped_matmul_wgrad`."""

import torch

from ..plan._fp8_wgrad import WgradConfig
from . import _extension


def launch(
    config: WgradConfig,
    grad_t: torch.Tensor,
    scale_grad: torch.Tensor,
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    expert_offsets: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """out fp32 [E, n, k] (+)= the sums over each expert's columns; without offsets E is 1.

    grad_t [n, C] and a_t [k, C]: rows that are contiguous and begin at multiples of 16 bytes, and so do those of out.
    """
    address = _extension.address
    _extension.module().fp8_grouped_matmul_wgrad(
        grad_t=address(grad_t), scale_grad=address(scale_grad), a_t=address(a_t), scale_a=address(scale_a),
        expert_offsets=address(expert_offsets), d=address(out), n=out.shape[1], k=out.shape[2],
        columns=grad_t.shape[1], num_experts=out.shape[0], ld_grad=grad_t.stride(0), ld_a=a_t.stride(0),
        ldd=out.stride(1), d_stride_e=out.stride(0), scale_grad_stride_n=scale_grad.stride(0),
        scale_grad_stride_c=scale_grad.stride(1), scale_a_stride_k=scale_a.stride(0),
        scale_a_stride_c=scale_a.stride(1), accumulate=accumulate, tile_m=config.tile_m, tile_n=config.tile_n,
        cluster_m=config.cluster_m, cluster_n=config.cluster_n, raster=config.raster, ctas=config.ctas,
        stream=_extension.stream(grad_t),
    )  # fmt: skip
