"""The vocabulary and the published model dimensions.

| word | meaning |
| --- | --- |
| `b`, `s_q`, `s_kv`, `h_q` | sequences, query tokens per sequence, cached tokens, query heads |
| `d_latent`, `d_rope`, `d_nope`, `d_v` | widths of latent attention; `d_qk` = latent + rope (absorbed) or nope + rope |
| `page_size`, `block_table`, `seqlens_kv` | paged cache; int32 |
| `num_tokens` T, `hidden` H, `num_experts` E, `top_k` K, `intermediate` I, `num_rows` R = T*K | mixture of experts |
| `token_topk_to_pos` [T, K], `pos_to_token_topk` [R_max], `expert_offsets` [E+1] | routing maps, int32; -1 = no entry |
| `m`, `n`, `k`, `num_groups` | matmul: `d[m, n] = a[m, k] @ b[n, k]^T`, both K-major |
| `scale_a` [m, ceil(k/128)], `scale_b` [ceil(n/128), ceil(k/128)] | FP8 scales, multiply to dequantise |
| 1x128, 128x128, 128x1 | scale granularity: activation, weight, activation for the weight gradient |
"""

from dataclasses import dataclass

BLOCK = 128
"""Elements that share one FP8 scale along each blocked dimension."""

GRANULARITIES = {"1x128": (1, BLOCK), "128x128": (BLOCK, BLOCK), "128x1": (BLOCK, 1)}
"""Scale granularity -> (rows, columns) that share one FP8 scale."""

FP8_MAX = 448.0
"""Largest finite e4m3fn value."""

FP8_AMAX_FLOOR = 1e-4
"""Smallest amax a scale is computed from, so that an all-zero block has a finite, non-zero scale."""

FP8_CACHE_ROW = 656
"""Bytes of one latent cache row in FP8: 512 e4m3 | 4 fp32 scales, one per 128 | 64 bf16 rope (FlashMLA's layout)."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def align_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def padded_columns(num_rows: int, num_experts: int) -> int:
    """Most columns that `num_rows` rows of `num_experts` experts take when each expert starts a new 1x128 block.

    Expert e has the columns from `128 * sum(ceil(rows_i / 128) for i < e)`. Most are needed when every expert has one
    row more than whole blocks.
    """
    busy = min(num_experts, num_rows)
    return BLOCK * (busy + (num_rows - busy) // BLOCK) if busy else 0


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of one published model, as in its config.json."""

    name: str
    hidden: int
    h_q: int
    q_rank: int | None
    d_latent: int
    d_nope: int
    d_rope: int
    d_v: int
    num_experts: int
    top_k: int
    num_groups: int
    topk_groups: int
    intermediate: int
    num_shared_experts: int
    score: str
    normalize: bool
    routed_scale: float
    vocab: int

    @property
    def d_qk(self) -> int:
        """Width of a cached row and of an absorbed query."""
        return self.d_latent + self.d_rope


V2_LITE = ModelShape(
    name="DeepSeek-V2-Lite", hidden=2048, h_q=16, q_rank=None, d_latent=512, d_nope=128, d_rope=64, d_v=128,
    num_experts=64, top_k=6, num_groups=1, topk_groups=1, intermediate=1408, num_shared_experts=2,
    score="softmax", normalize=False, routed_scale=1.0, vocab=102400,
)  # fmt: skip
V3 = ModelShape(
    name="DeepSeek-V3", hidden=7168, h_q=128, q_rank=1536, d_latent=512, d_nope=128, d_rope=64, d_v=128,
    num_experts=256, top_k=8, num_groups=8, topk_groups=4, intermediate=2048, num_shared_experts=1,
    score="sigmoid", normalize=True, routed_scale=2.5, vocab=129280,
)  # fmt: skip
MODELS = {"v2-lite": V2_LITE, "v3": V3}

V3_MATMULS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""(n, k) of the dense matmuls of one DeepSeek-V3 layer."""
