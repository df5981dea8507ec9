"""GPU kernels behind DeepSeek-style models, as torch ops.

Every public function is also `torch.ops.deepseek_kernels.<name>`, with a fake kernel, autograd where it is defined,
and no host synchronisation. Importing this package needs no GPU, no Triton and no compiled module.
"""

from . import ops  # noqa: F401  (registers the ops)
from .ops._maps import MoeMaps
from .ops._registry import BackendError, Explanation, explain, use_backend
from .ops.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_matmul_masked, fp8_grouped_matmul_wgrad
from .ops.fp8_matmul import fp8_matmul
from .ops.fp8_quantize import fp8_dequantize, fp8_quantize, fp8_quantize_both
from .ops.fused_moe import fused_moe
from .ops.grouped_matmul import grouped_matmul, grouped_matmul_wgrad
from .ops.merge_states import merge_states
from .ops.mla_cache_write import mla_cache_write, mla_rope
from .ops.mla_decode import mla_decode
from .ops.moe_gate import moe_gate
from .ops.moe_permute import moe_permute, moe_unpermute
from .ops.moe_sort import moe_sort
from .ops.swiglu import swiglu

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Explanation",
    "MoeMaps",
    "explain",
    "fp8_grouped_matmul",
    "fp8_grouped_matmul_masked",
    "fp8_grouped_matmul_wgrad",
    "grouped_matmul",
    "grouped_matmul_wgrad",
    "merge_states",
    "mla_cache_write",
    "mla_decode",
    "mla_rope",
    "moe_gate",
    "fp8_dequantize",
    "fp8_matmul",
    "fp8_quantize",
    "fp8_quantize_both",
    "fused_moe",
    "moe_permute",
    "moe_sort",
    "moe_unpermute",
    "swiglu",
    "use_backend",
]
