"""What every op on the paged latent cache demands of it."""

import torch

from ..shapes import FP8_CACHE_ROW
from . import _checks as checks

ALIGNMENT = 16  # bytes; rows of the FP8 layout hold fp32 scales


def check(op: str, kv_cache: torch.Tensor, d_latent: int, d_rope: int, device: torch.device) -> None:
    """kv_cache is [pages, page_size, d_latent + d_rope] of floats, or uint8 [pages, page_size, 656] for 512 + 64."""
    fp8 = kv_cache.dtype == torch.uint8
    checks.tensor(
        op, "kv_cache", kv_cache,
        dtype=(*checks.FLOATS[:3], torch.uint8), shape=(None, None, FP8_CACHE_ROW if fp8 else d_latent + d_rope),
        device=device, last_contiguous=True,
    )  # fmt: skip
    checks.at_least(op, "kv_cache: page_size", kv_cache.shape[1], 1)
    if fp8:
        if (d_latent, d_rope) != (512, 64):
            raise checks.fail(op, "kv_cache", "d_latent 512 and d_rope 64 for uint8", f"{d_latent} and {d_rope}")
        for dim in (0, 1):
            if kv_cache.shape[dim] > 1:
                checks.multiple(op, f"kv_cache: stride({dim})", kv_cache.stride(dim), ALIGNMENT)
        checks.multiple(op, "kv_cache: storage_offset", kv_cache.storage_offset(), ALIGNMENT)
