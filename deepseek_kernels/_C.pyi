"""The compiled extension: raw addresses, sizes, strides in elements and a stream; no torch, no logic.

Every pointer is a device address as `int` (0 where "may be 0"). Matrices are row-major with a unit last stride and a
leading stride `ld*` unless two strides are given. The caller sets the current device, keeps the memory alive until the
stream has passed, and has validated shapes and dtypes: what is checked here raises RuntimeError, everything else is
undefined. No function synchronises or allocates; all may be captured in a CUDA graph. All release the GIL.
"""

from typing import Final

FP32: Final[int]
FP16: Final[int]
BF16: Final[int]
"""Codes of the `*dtype` arguments."""

architectures: tuple[str, ...]
"""What the kernels were compiled for, as in ("80", "90a", "100"); empty without CUDA."""
cuda_version: int
"""CUDART_VERSION of the build, as in 13000; 0 without CUDA."""
ops: tuple[str, ...]
"""The functions below that were compiled in. Some need "90a" among the architectures, as is said there."""

fp8_matmul_instances: tuple[tuple[int, int, int, int, int, bool, int, int], ...]
"""What `fp8_matmul` was compiled for: (out_dtype, tile_m, tile_n, cluster_m, cluster_n, swap, cluster_k), and the
stages of each. Only there if it is in `ops`."""

def fp8_quantize(
    *,
    x: int,
    q: int,
    scale: int,
    m: int,
    k: int,
    dtype: int,
    block_m: int,
    block_k: int,
    ldx: int,
    ldq: int,
    scale_stride_m: int,
    scale_stride_k: int,
    pow2_scale: bool,
    stream: int,
) -> None:
    """q = saturate_e4m3(x / scale), scale = max(amax, 1e-4) / 448 over each block of x [m, k].

    (block_m, block_k) is (1, 128), (128, 128) or (128, 1); scale [ceil(m/block_m), ceil(k/block_k)] has any two
    strides, so MN-major scales are written directly. `pow2_scale` rounds each scale up to a power of two. A NaN makes
    its block's scale and q NaN (q as 0x7F); an Inf makes the scale Inf, q 0 for finite elements and NaN for infinite.
    Any m, k >= 0 and any alignment; 16-byte aligned rows of x and q are the fast path.
    """

def fp8_quantize_both(
    *,
    x: int,
    expert_offsets: int,
    q: int,
    scale: int,
    q_t: int,
    scale_t: int,
    m: int,
    k: int,
    width: int,
    row_tiles: int,
    num_experts: int,
    dtype: int,
    ldx: int,
    ldq: int,
    ldq_t: int,
    scale_stride_m: int,
    scale_stride_k: int,
    scale_t_stride_k: int,
    scale_t_stride_w: int,
    pow2_scale: bool,
    stream: int,
) -> None:
    """q, scale as `fp8_quantize` in 1x128; q_t [k, width], scale_t [k, width/128] as in 128x1, transposed.

    Column t of q_t is row t of x where expert_offsets is 0. Otherwise it is int32 [num_experts + 1], clamped to [0, m]
    and raised where it decreases, and the rows of expert e are the columns from 128 * sum(ceil(rows_i/128) for i < e).
    Columns of no row are quantised zeros. `width` is a multiple of 128 with room for them, rows of q_t are multiples of
    16 bytes apart, `row_tiles` is how many blocks of at most 128 rows there can be, those of no expert included.
    """

def fp8_dequantize(
    *,
    q: int,
    scale: int,
    out: int,
    m: int,
    k: int,
    ldq: int,
    ld_out: int,
    scale_stride_m: int,
    scale_stride_k: int,
    block_m: int,
    block_k: int,
    dtype: int,
    stream: int,
) -> None:
    """out [m, k] of `dtype` = q * scale of its block, in fp32, rounded once; blocks and scale as for `fp8_quantize`."""

def moe_gate(
    *,
    logits: int,
    bias: int,
    mask: int,
    weights: int,
    indices: int,
    num_tokens: int,
    ld_logits: int,
    num_experts: int,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    score: int,
    dtype: int,
    normalize: bool,
    scale: float,
    group_lanes: int,
    per_lane: int,
    warps: int,
    ctas: int,
    stream: int,
) -> None:
    """weights, indices = the top_k (1 to 32) of score(logits) + bias in the best topk_groups groups.

    weights fp32 and indices int64 [num_tokens, top_k]; logits [num_tokens, num_experts] of `dtype`; bias fp32, may be
    0; mask bool, may be 0. score: 0 sigmoid, 1 softmax, 2 sqrt(softplus). Tokens that are masked out get weights 0 and
    indices -1. num_groups is 1 where every group may be used. A warp has a token: `group_lanes` lanes (a power of two,
    at most 32 in all groups) hold the experts of a group, `per_lane` (2, 4, 8 or 16) each; `ctas` CTAs of `warps` (1
    to 8) share the tokens. Any alignment; rows that begin at multiples of 16 bytes are the fast path.
    """

def moe_permute(
    *,
    x: int,
    scale: int,
    token_topk_to_pos: int,
    pos_to_token_topk: int,
    out: int,
    out_scale: int,
    num_tokens: int,
    top_k: int,
    num_rows: int,
    row_bytes: int,
    ldx_bytes: int,
    ld_out_bytes: int,
    scale_columns: int,
    scale_stride_t: int,
    scale_stride_s: int,
    out_scale_stride_r: int,
    out_scale_stride_s: int,
    stream: int,
) -> None:
    """out[token_topk_to_pos[t, k]] = x[t]; rows r of out with pos_to_token_topk[r] == -1 become zero.

    x [num_tokens, row_bytes] and out [num_rows, row_bytes] in bytes; both maps int32 and contiguous. Positions outside
    [0, num_rows) are ignored. scale fp32 [num_tokens, scale_columns] moves along into out_scale [num_rows,
    scale_columns]; both may be 0 with scale_columns 0. Any alignment; 16-byte aligned rows are the fast path.
    """

def moe_permute_quantize(
    *,
    x: int,
    token_topk_to_pos: int,
    pos_to_token_topk: int,
    out: int,
    out_scale: int,
    num_tokens: int,
    top_k: int,
    num_rows: int,
    hidden: int,
    dtype: int,
    ldx: int,
    ld_out: int,
    out_scale_stride_r: int,
    out_scale_stride_s: int,
    pow2_scale: bool,
    stream: int,
) -> None:
    """moe_permute of fp8_quantize(x, 1x128) in one pass, bit for bit.

    x [num_tokens, hidden] of `dtype`, out e4m3 [num_rows, hidden], out_scale fp32 [num_rows, ceil(hidden/128)].
    """

def moe_sort(
    *,
    indices: int,
    token_topk_to_pos: int,
    pos_to_token_topk: int,
    expert_offsets: int,
    counts: int,
    num_entries: int,
    num_rows: int,
    expert_begin: int,
    num_local: int,
    alignment: int,
    wide: bool,
    warps: int,
    rounds: int,
    ctas: int,
    dependent: bool,
    stream: int,
) -> None:
    """Stable counting sort of indices [num_entries], int64 if `wide`, else int32, by expert.

    Those outside [expert_begin, expert_begin + num_local) get position -1, and every expert's rows are padded to a
    multiple of `alignment`; pos_to_token_topk [num_rows] is -1 where there is no entry. The three maps are int32.
    `ctas` CTAs of `warps` warps (4 to 32, in fours) look at tiles of warps * 32 * rounds entries (rounds 1, 2, 4 or 8).
    One CTA takes one tile, in one launch. More take two launches, the second of which may overlap the first if
    `dependent` (sm_90 and newer), and counts, int32 [ctas, num_local rounded up to 4], 16-byte aligned.
    """

def moe_unpermute(
    *,
    y: int,
    token_topk_to_pos: int,
    weights: int,
    out: int,
    num_tokens: int,
    top_k: int,
    num_rows: int,
    hidden: int,
    dtype: int,
    ldy: int,
    ld_out: int,
    stream: int,
) -> None:
    """out[t] = sum over k in order of weights[t, k] * y[token_topk_to_pos[t, k]], fused multiply-adds in fp32.

    y [num_rows, hidden] and out [num_tokens, hidden] of `dtype`; weights fp32 [num_tokens, top_k] contiguous, may be 0
    (then a plain sum). Positions outside [0, num_rows) add nothing.
    """

def fp8_matmul(
    *,
    a: int,
    scale_a: int,
    b: int,
    scale_b: int,
    bias: int,
    d: int,
    m: int,
    n: int,
    k: int,
    lda: int,
    ldb: int,
    ldd: int,
    scale_a_stride_m: int,
    scale_a_stride_k: int,
    scale_b_stride_n: int,
    scale_b_stride_k: int,
    out_dtype: int,
    bias_dtype: int,
    accumulate: bool,
    tile_m: int,
    tile_n: int,
    cluster_m: int,
    cluster_n: int,
    cluster_k: int,
    swap: bool,
    raster: int,
    ctas: int,
    stream: int,
) -> None:
    """d[m, n] = sum over 128-wide blocks kb of scale_a[m, kb] * scale_b[n/128, kb] * (a[m, k] @ b[n, k]^T) + bias[n].

    a, b e4m3; scale_a [m, ceil(k/128)] and scale_b [ceil(n/128), ceil(k/128)] fp32 with any two strides; d of
    `out_dtype` BF16 or FP32; bias of `bias_dtype` BF16 or FP32, may be 0. sm_90a only.
    Needs a, b, d 16-byte aligned, lda % 16 == 0, ldb % 16 == 0, ldd * itemsize % 16 == 0, k % 16 == 0, n % 8 == 0.
    `accumulate` adds that to d. Anything not among `fp8_matmul_instances` raises. `ctas` CTAs run, a multiple of the
    cluster: cluster_m tiles along m fetch their rows of b for each other, cluster_n along n their rows of a, cluster_k
    CTAs share out the k of a tile; two of the three are 1. `swap`: b is the operand that wgmma takes 64 rows of.
    `raster` >= 1: that many rows of clusters are walked before the next column of tiles, so that their operands stay in
    L2.
    """

fp8_grouped_matmul_instances: tuple[tuple[int, int, int, int, int, bool, int], ...]
"""As `fp8_matmul_instances`, without cluster_k."""

def fp8_grouped_matmul(
    *,
    a: int,
    scale_a: int,
    b: int,
    scale_b: int,
    groups: int,
    d: int,
    num_rows: int,
    n: int,
    k: int,
    num_groups: int,
    masked: bool,
    lda: int,
    ldb: int,
    a_group_rows: int,
    b_group_rows: int,
    scale_a_stride_g: int,
    scale_a_stride_m: int,
    scale_a_stride_k: int,
    scale_b_stride_g: int,
    scale_b_stride_n: int,
    scale_b_stride_k: int,
    out_dtype: int,
    tile_m: int,
    tile_n: int,
    cluster_m: int,
    cluster_n: int,
    swap: bool,
    raster: int,
    ctas: int,
    stream: int,
) -> None:
    """As `fp8_matmul`, of the rows of each group with its own b [num_groups, n, k]. At most 1024 groups; sm_90a only.

    Group g has the rows groups[g] <= r < groups[g + 1] of a [num_rows, k] (clamped to num_rows, and never decreasing),
    and rows of no group become zero. Masked: the first groups[g] rows of a[g] of [num_groups, num_rows, k], and the
    other rows of d are left alone. groups is int32, d contiguous. Matrix g of b (and of a, if masked) begins
    g * b_group_rows (g * a_group_rows) rows after the first.
    """

fp8_grouped_matmul_wgrad_instances: tuple[tuple[int, int, int, int, int], ...]
"""What `fp8_grouped_matmul_wgrad` was compiled for: (tile_m, tile_n, cluster_m, cluster_n), and the stages of each."""

def fp8_grouped_matmul_wgrad(
    *,
    grad_t: int,
    scale_grad: int,
    a_t: int,
    scale_a: int,
    expert_offsets: int,
    d: int,
    n: int,
    k: int,
    columns: int,
    num_experts: int,
    ld_grad: int,
    ld_a: int,
    ldd: int,
    d_stride_e: int,
    scale_grad_stride_n: int,
    scale_grad_stride_c: int,
    scale_a_stride_k: int,
    scale_a_stride_c: int,
    accumulate: bool,
    tile_m: int,
    tile_n: int,
    cluster_m: int,
    cluster_n: int,
    raster: int,
    ctas: int,
    stream: int,
) -> None:
    """d[e] = grad_t [n, columns of e] @ a_t [k, columns of e]^T of dequantised operands; sm_90a only.

    grad_t, a_t e4m3; scale_grad [n, ceil(columns/128)] and scale_a [k, ceil(columns/128)] fp32 with any two strides; d
    fp32 [num_experts, n, k], `accumulate` adds to it. expert_offsets int32 [num_experts + 1] of rows, of any values:
    expert e has the blocks of 128 columns that its rows fill, after those of the experts before it. 0: there is one
    expert with all columns, the last block of which may be partial.
    Needs grad_t, a_t 16-byte and d 8-byte aligned, ld_grad % 16 == 0, ld_a % 16 == 0, ldd, d_stride_e and k even,
    columns % 128 == 0 (16 where there is one expert). tile_m is of n, tile_n of k; `cluster_m`, `cluster_n`, `raster`
    and `ctas` as for `fp8_matmul`. Anything not among `fp8_grouped_matmul_wgrad_instances` raises.
    """

grouped_matmul_instances: tuple[tuple[int, int, int, bool, int], ...]
"""What `grouped_matmul` was compiled for: (tile_m, tile_n, cluster_n, transposed), and the stages of each."""

def grouped_matmul(
    *,
    a: int,
    b: int,
    groups: int,
    d: int,
    num_rows: int,
    n: int,
    k: int,
    num_groups: int,
    lda: int,
    ldb: int,
    b_stride_g: int,
    transposed: bool,
    tile_m: int,
    cluster_n: int,
    raster: int,
    ctas: int,
    stream: int,
) -> None:
    """d[r] = a[r] @ b[g]^T in bf16 for the rows groups[g] <= r < groups[g + 1]; sm_90a only.

    a [num_rows, k]; b [num_groups, n, k], or [num_groups, k, n] if `transposed`; d [num_rows, n] contiguous. groups
    int32 of any values, clamped to num_rows and never decreasing; rows of no group become zero. At most 1024 groups.
    Needs a, b, d 16-byte aligned, lda, ldb, b_stride_g and n multiples of 8. `ctas` CTAs run, a multiple of cluster_n:
    so many tiles along n fetch their rows of a for each other. `raster` >= 1: that many rows of tiles are walked before
    the next column. Anything not among `grouped_matmul_instances` raises.
    """

grouped_matmul_wgrad_instances: tuple[tuple[int, int, int, int, int], ...]
"""What `grouped_matmul_wgrad` was compiled for: (out_dtype, tile_m, tile_n, cluster_m), and the stages of each."""

def grouped_matmul_wgrad(
    *,
    grad: int,
    a: int,
    groups: int,
    d: int,
    num_rows: int,
    n: int,
    k: int,
    num_groups: int,
    ld_grad: int,
    lda: int,
    out_dtype: int,
    tile_n: int,
    cluster_m: int,
    raster: int,
    ctas: int,
    stream: int,
) -> None:
    """d[g] = grad[rows of g]^T @ a[rows of g] of bf16; sm_90a only.

    grad [num_rows, n]; a [num_rows, k]; d [num_groups, n, k] contiguous of `out_dtype` BF16 or FP32; groups as for
    `grouped_matmul`, one without rows gives zeros. Needs grad, a, d 16-byte aligned, ld_grad, lda and k multiples of 8,
    num_rows of at least 1. tile_m is of n, tile_n of k; cluster_m tiles along n fetch their rows of a for each other.
    `raster` and `ctas` as for `grouped_matmul`. Anything not among `grouped_matmul_wgrad_instances` raises.
    """

def mla_decode(
    *,
    q: int,
    kv_cache: int,
    block_table: int,
    seqlens_kv: int,
    sink: int,
    out: int,
    lse: int,
    part_out: int,
    part_lse: int,
    heads: int,
    b: int,
    s_q: int,
    h_q: int,
    num_pages: int,
    page_size: int,
    max_pages: int,
    q_stride_b: int,
    q_stride_row: int,
    page_stride: int,
    row_stride: int,
    scale: float,
    causal: bool,
    dtype: int,
    parts: int,
    cluster: int,
    stream: int,
) -> None:
    """Attention of q [b, s_q, h_q, 576] over kv_cache [num_pages, page_size, 576], which `deepseek_kernels.mla_decode`
    describes; d_latent is 512 and `dtype` that of q, kv_cache and out, BF16 or FP16. Only there if "90a" is among the
    architectures.

    The s_q * h_q rows of a sequence's q lie `q_stride_row` apart; all rows of q and kv_cache begin at multiples of 16
    bytes. page_size is a multiple of 8. `sink` may be 0. block_table int32 [b, max_pages], seqlens_kv int32 [b],
    out [b, s_q, h_q, 512] and lse fp32 [b, h_q, s_q] are contiguous.

    `parts` that the tokens of all sequences are cut into take a CTA for every 64 query rows each; `cluster` of these, 1
    or 2, fetch the cache together, 2 only if there is an even number for a part. Scratch, which may be 0 with one
    part: part_out fp32 [2 * parts, s_q * h_q, 512], part_lse fp32 [2 * parts, s_q * h_q], heads int32 [parts, 2].
    """

class cpu:
    """A submodule of kernels for CPU memory.

    `threads` takes the place of a stream: pass torch.get_num_threads(). A call returns when it is done.
    """

    ops: Final[tuple[str, ...]]
    """What was compiled in."""

    @staticmethod
    def isa() -> str:
        """The instruction set in use: base, avx2, avx512 or avx512_bf16. DEEPSEEK_KERNELS_CPU_ISA forces one.

        Raises RuntimeError if that names none, or one that the processor lacks.
        """

    @staticmethod
    def fp8_dequantize(
        *,
        q: int,
        scale: int,
        out: int,
        m: int,
        k: int,
        ldq: int,
        ld_out: int,
        scale_stride_m: int,
        scale_stride_k: int,
        block_m: int,
        block_k: int,
        dtype: int,
        threads: int,
    ) -> None:
        """out[m, k] = q * scale of its block of block_m x block_k, rounded once to `dtype`."""

    @staticmethod
    def fp8_matmul_workspace(*, m: int, k: int, threads: int) -> int:
        """fp32 elements of workspace."""

    @staticmethod
    def fp8_matmul(
        *,
        a: int,
        scale_a: int,
        b: int,
        scale_b: int,
        bias: int,
        d: int,
        workspace: int,
        m: int,
        n: int,
        k: int,
        lda: int,
        ldb: int,
        ldd: int,
        scale_a_stride_m: int,
        scale_a_stride_k: int,
        scale_b_stride_n: int,
        scale_b_stride_k: int,
        out_dtype: int,
        accumulate: bool,
        threads: int,
    ) -> None:
        """d[m, n] = (scale_a * a) @ (scale_b * b)^T + bias[n]; `accumulate` adds to what d holds.

        a, b e4m3; scale_a [m, ceil(k/128)], scale_b [ceil(n/128), ceil(k/128)] with any two strides; bias fp32, may be
        0; d of `out_dtype`, any of the three. Made for few rows m.
        """

    @staticmethod
    def fp8_quantize(
        *,
        x: int,
        q: int,
        scale: int,
        m: int,
        k: int,
        dtype: int,
        block_m: int,
        block_k: int,
        ldx: int,
        ldq: int,
        scale_stride_m: int,
        scale_stride_k: int,
        pow2_scale: bool,
        threads: int,
    ) -> None:
        """As `fp8_quantize` above, bit for bit."""

    @staticmethod
    def fp8_quantize_both(
        *,
        x: int,
        expert_offsets: int,
        q: int,
        scale: int,
        q_t: int,
        scale_t: int,
        m: int,
        k: int,
        width: int,
        row_tiles: int,
        num_experts: int,
        dtype: int,
        ldx: int,
        ldq: int,
        ldq_t: int,
        scale_stride_m: int,
        scale_stride_k: int,
        scale_t_stride_k: int,
        scale_t_stride_w: int,
        pow2_scale: bool,
        threads: int,
    ) -> None:
        """As `fp8_quantize_both` above, bit for bit."""

    @staticmethod
    def grouped_matmul_workspace(*, num_tokens: int, num_rows: int, k: int, num_experts: int, threads: int) -> int:
        """fp32 elements of workspace."""

    @staticmethod
    def grouped_matmul(
        *,
        a: int,
        scale_a: int,
        b: int,
        scale_b: int,
        expert_offsets: int,
        pos_to_token_topk: int,
        d: int,
        workspace: int,
        num_tokens: int,
        num_rows: int,
        n: int,
        k: int,
        num_experts: int,
        lda: int,
        ldb: int,
        ldd: int,
        b_stride_e: int,
        scale_a_stride_m: int,
        scale_a_stride_k: int,
        scale_b_stride_e: int,
        scale_b_stride_n: int,
        scale_b_stride_k: int,
        top_k: int,
        dtype: int,
        out_dtype: int,
        threads: int,
    ) -> None:
        """d[r] = a[r] @ b[e]^T for expert_offsets[e] <= r < expert_offsets[e + 1]; rows of no expert become zero.

        a [num_tokens, k], b [num_experts, n, k]: e4m3 with both scales, or of `dtype` with both 0. With
        pos_to_token_topk [num_rows] row r of a is row entry // top_k, and rows whose entry does not exist are zero;
        without it num_tokens == num_rows. Offsets are clamped to [0, num_rows], and raised where they decrease.
        """

    @staticmethod
    def merge_states(
        *,
        out_a: int,
        lse_a: int,
        out_b: int,
        lse_b: int,
        out: int,
        lse: int,
        b: int,
        s_q: int,
        h_q: int,
        d_v: int,
        dtype: int,
        threads: int,
    ) -> None:
        """out, lse of the softmax over the keys of both sides.

        out_* [b, s_q, h_q, d_v] of `dtype` and lse_* fp32 [b, h_q, s_q], contiguous. A side whose lse is -inf is
        ignored, whatever it holds.
        """

    @staticmethod
    def mla_cache_write(
        *,
        c_kv: int,
        k_rope: int,
        norm_weight: int,
        cos_sin: int,
        positions: int,
        kv_cache: int,
        slots: int,
        num_tokens: int,
        d_latent: int,
        d_rope: int,
        max_positions: int,
        num_pages: int,
        page_size: int,
        ld_c_kv: int,
        ld_k_rope: int,
        page_bytes: int,
        row_bytes: int,
        eps: float,
        c_kv_dtype: int,
        k_rope_dtype: int,
        norm_dtype: int,
        cache_dtype: int,
        wide_positions: bool,
        wide_slots: bool,
        fp8: bool,
        interleaved: bool,
        threads: int,
    ) -> None:
        """kv_cache[slot] = rmsnorm(c_kv[t]) * norm_weight ++ rope(k_rope[t]); norm_weight 0 leaves the norm out.

        kv_cache [num_pages, page_size, d_latent + d_rope] of `cache_dtype`, or with `fp8` the 656-byte rows. cos_sin
        fp32 [max_positions, d_rope]. positions and slots [num_tokens] are int64 if `wide_*`, else int32; positions are
        clamped, slots out of range are skipped, and of tokens with one slot the last is written.
        """

    @staticmethod
    def mla_decode_workspace(*, rows: int, d_latent: int, d_rope: int, threads: int) -> int:
        """fp32 elements of workspace for rows = s_q * h_q."""

    @staticmethod
    def mla_decode(
        *,
        q: int,
        kv_cache: int,
        block_table: int,
        seqlens_kv: int,
        sink: int,
        out: int,
        lse: int,
        workspace: int,
        b: int,
        s_q: int,
        h_q: int,
        d_latent: int,
        d_rope: int,
        num_pages: int,
        page_size: int,
        max_pages: int,
        q_stride_b: int,
        q_stride_s: int,
        q_stride_h: int,
        page_bytes: int,
        row_bytes: int,
        scale: float,
        dtype: int,
        causal: bool,
        fp8: bool,
        threads: int,
    ) -> None:
        """out, lse = attention of q [b, s_q, h_q, d_latent + d_rope] over a paged cache, as `mla_cache_write` fills it.

        block_table int32 [b, max_pages], seqlens_kv int32 [b], both clamped to what exists; tokens of a page that does
        not are left out. sink fp32 [h_q], may be 0. out [b, s_q, h_q, d_latent], lse fp32 [b, h_q, s_q]. The last bits
        depend on `threads`.
        """

    @staticmethod
    def mla_rope(
        *,
        x: int,
        cos_sin: int,
        positions: int,
        out: int,
        num_tokens: int,
        heads: int,
        d_rope: int,
        max_positions: int,
        x_stride_t: int,
        x_stride_h: int,
        dtype: int,
        wide_positions: bool,
        interleaved: bool,
        inverse: bool,
        threads: int,
    ) -> None:
        """out [num_tokens, heads, d_rope], contiguous, = x rotated by the angles of positions[t]; `inverse`: back."""

    @staticmethod
    def moe_gate_workspace(*, num_experts: int, num_groups: int, top_k: int, threads: int) -> int:
        """fp32 elements of workspace."""

    @staticmethod
    def moe_gate(
        *,
        logits: int,
        bias: int,
        mask: int,
        weights: int,
        indices: int,
        workspace: int,
        num_tokens: int,
        num_experts: int,
        ld_logits: int,
        top_k: int,
        num_groups: int,
        topk_groups: int,
        score: int,
        dtype: int,
        normalize: bool,
        scale: float,
        threads: int,
    ) -> None:
        """weights, indices = the top_k of score(logits) + bias in the best topk_groups groups.

        weights fp32 and indices int64 [num_tokens, top_k]; logits [num_tokens, num_experts]; bias fp32, may be 0; mask
        bool, may be 0. score: 0 sigmoid, 1 softmax, 2 sqrt(softplus). Tokens that are masked out get weights 0 and
        indices -1.
        """

    @staticmethod
    def moe_gate_backward_workspace(*, num_experts: int, top_k: int, threads: int) -> int:
        """fp32 elements of workspace."""

    @staticmethod
    def moe_gate_backward(
        *,
        grad_weights: int,
        logits: int,
        indices: int,
        grad_logits: int,
        workspace: int,
        num_tokens: int,
        num_experts: int,
        ld_logits: int,
        top_k: int,
        score: int,
        dtype: int,
        wide: bool,
        normalize: bool,
        scale: float,
        threads: int,
    ) -> None:
        """grad_logits [num_tokens, num_experts] of `dtype` from grad_weights fp32 [num_tokens, top_k].

        indices [num_tokens, top_k] int32, or with `wide` int64; those out of range have no gradient. score as above.
        """

    @staticmethod
    def moe_permute(
        *,
        x: int,
        scale: int,
        pos_to_token_topk: int,
        out: int,
        out_scale: int,
        num_tokens: int,
        top_k: int,
        num_rows: int,
        row_bytes: int,
        ldx_bytes: int,
        ld_out_bytes: int,
        scale_columns: int,
        scale_stride_t: int,
        scale_stride_s: int,
        out_scale_stride_r: int,
        out_scale_stride_s: int,
        threads: int,
    ) -> None:
        """out[r] = x[pos_to_token_topk[r] // top_k]; rows without an entry become zero. Arguments as above."""

    @staticmethod
    def moe_sort(
        *,
        indices: int,
        token_topk_to_pos: int,
        pos_to_token_topk: int,
        expert_offsets: int,
        workspace: int,
        num_entries: int,
        num_rows: int,
        expert_begin: int,
        expert_end: int,
        alignment: int,
        wide: bool,
        threads: int,
    ) -> None:
        """Counting sort of entries [num_entries] by expert, each expert's rows padded to a multiple of `alignment`.

        indices are int64 if `wide`, else int32; those outside [expert_begin, expert_end) get position -1.
        pos_to_token_topk [num_rows] is -1 where there is no entry. workspace int32 [threads, expert_end -
        expert_begin].
        """

    @staticmethod
    def moe_unpermute(
        *,
        y: int,
        token_topk_to_pos: int,
        weights: int,
        out: int,
        num_tokens: int,
        top_k: int,
        num_rows: int,
        hidden: int,
        dtype: int,
        ldy: int,
        ld_out: int,
        threads: int,
    ) -> None:
        """As `moe_unpermute` above."""

    @staticmethod
    def swiglu(
        *,
        gate_up: int,
        weights: int,
        pos_to_token_topk: int,
        out: int,
        scale_out: int,
        num_rows: int,
        intermediate: int,
        num_weights: int,
        ld: int,
        clamp: float,
        dtype: int,
        threads: int,
    ) -> None:
        """out = silu(min(gate, clamp)) * clip(up, -clamp, clamp) * weight of each row.

        gate_up [num_rows, 2 * intermediate]; weights fp32 [num_weights], may be 0: ones. pos_to_token_topk [num_rows]:
        the row's entry of weights; may be 0: row r has weights[r]. Rows without an entry become zero. With scale_out
        [num_rows, ceil(intermediate/128)] out is e4m3. clamp may be infinity.
        """

    @staticmethod
    def swiglu_backward(
        *,
        grad: int,
        gate_up: int,
        weights: int,
        pos_to_token_topk: int,
        grad_gate_up: int,
        grad_weights: int,
        num_rows: int,
        intermediate: int,
        num_weights: int,
        ld_grad: int,
        ld: int,
        clamp: float,
        dtype: int,
        threads: int,
    ) -> None:
        """grad_gate_up [num_rows, 2 * intermediate] and grad_weights fp32 [num_weights] of `swiglu`.

        grad [num_rows, intermediate]. Rows without an entry become zero; entries without a row keep what grad_weights
        held. Without weights (0) grad_weights is not touched.
        """
