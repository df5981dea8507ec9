"""GPU kernels behind DeepSeek-style models, as torch ops.

Every public function is also `torch.ops.deepseek_kernels.<name>`, with a fake kernel, autograd where it is defined,
and no host synchronisation. Importing this package needs no GPU, no Triton and no compiled module.
"""

from . import ops  # noqa: F401  (registers the ops)
from .ops._maps import MoeMaps
from .ops._registry import BackendError, Explanation, explain, use_backend
from .ops.moe_permute import moe_permute, moe_unpermute

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Explanation",
    "MoeMaps",
    "explain",
    "moe_permute",
    "moe_unpermute",
    "use_backend",
]
