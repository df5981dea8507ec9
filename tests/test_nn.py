"""The modules against transformers' own layers, on tiny DeepSeek-V3 and V2-Lite dimensions."""

import copy
from dataclasses import replace

import pytest
import torch

from deepseek_kernels import fp8_dequantize, fp8_quantize, nn
from deepseek_kernels.testing.compare import distance

transformers = pytest.importorskip("transformers")
from transformers.cache_utils import DynamicCache  # noqa: E402
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3  # noqa: E402

COMMON = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=512, qk_rope_head_dim=64,
    qk_nope_head_dim=16, v_head_dim=24, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2,
    vocab_size=8, first_k_dense_replace=1, max_position_embeddings=256, attn_implementation="sdpa",
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1,
    mscale=0.5, mscale_all_dim=1.0,
)  # fmt: skip


def make_config(model: str = "v3", yarn: bool = False, **changes):
    rope = YARN if yarn else dict(rope_type="default", rope_theta=10000.0)
    if model == "v3":
        own = dict(q_lora_rank=32, n_routed_experts=16, n_shared_experts=1, n_group=4, topk_group=2)
        return transformers.DeepseekV3Config(
            **{**COMMON, **own, "num_experts_per_tok": 4, "rope_parameters": dict(rope), **changes}
        )
    own = dict(q_lora_rank=None, n_routed_experts=6, n_shared_experts=2, topk_method="greedy")
    return transformers.DeepseekV2Config(
        **{**COMMON, **own, "num_experts_per_tok": 3, "rope_parameters": dict(rope), **changes}
    )


def randomize_(module: torch.nn.Module) -> torch.nn.Module:
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        with torch.no_grad():
            if "layernorm" in name:
                t.normal_(1, 0.2)
            elif "correction_bias" in name:
                t.normal_(0, 0.1)
            elif "inv_freq" not in name:
                t.normal_(0, t.shape[-1] ** -0.5)
    return module.eval()


def make_layer(config, layer_idx: int = 1) -> torch.nn.Module:
    cls = v3.DeepseekV3DecoderLayer if config.model_type == "deepseek_v3" else v2.DeepseekV2DecoderLayer
    return randomize_(cls(config, layer_idx))


class Theirs:
    """A transformers layer and its cache, called one chunk at a time."""

    def __init__(self, config, module):
        self.module = module
        is_v3 = config.model_type == "deepseek_v3"
        self.rotary = (v3.DeepseekV3RotaryEmbedding if is_v3 else v2.DeepseekV2RotaryEmbedding)(config)
        self.cache = DynamicCache(config=config)
        self.length = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(self.length, self.length + x.shape[1])[None]
        mask = torch.ones(x.shape[1], self.length + x.shape[1], dtype=torch.bool).tril(self.length)[None, None]
        self.length += x.shape[1]
        out = self.module(
            hidden_states=x,
            attention_mask=mask,
            past_key_values=self.cache,
            position_embeddings=self.rotary(x, positions),
        )
        return out[0] if isinstance(out, tuple) else out


def make_cache(config, batch: int = 2, max_tokens: int = 64, **changes) -> nn.LatentCache:
    made = dict(page_size=4, d_latent=config.kv_lora_rank, dtype=torch.float32, num_layers=2)
    cache = nn.LatentCache(batch, max_tokens, **{**made, **changes})
    if cache.pages.is_floating_point():
        cache.pages.fill_(float("nan"))
    else:
        cache.pages.fill_(0xFF)
    return cache


def assert_close(actual, expected, what="output"):
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5, msg=lambda m: f"{what}: {m}")


CHUNKS = (7, 1, 1, 3, 1)
"""Prefill over a page boundary, decode, a chunk of several tokens, decode."""


@pytest.mark.parametrize("yarn", [False, True], ids=["rope", "yarn"])
@pytest.mark.parametrize("model", ["v3", "v2"])
@torch.no_grad()
def test_attention_follows_transformers_through_its_cache(model, yarn):
    config = make_config(model, yarn)
    theirs = Theirs(config, make_layer(config).self_attn)
    mine = nn.LatentAttention(nn.LayerConfig.from_transformers(config))
    mine.load_state_dict(theirs.module.state_dict())
    cache = make_cache(config)
    for s_q in CHUNKS:
        x = torch.randn(2, s_q, config.hidden_size)
        assert_close(mine(x, cache.append(s_q), layer=1), theirs(x), f"at {cache.seqlens_kv.tolist()}")
    assert cache.pages[0].isnan().all(), "another layer's pages were written"


@torch.no_grad()
def test_attention_with_halves_and_biases():
    config = make_config("v3", rope_interleave=False, attention_bias=True)
    theirs = Theirs(config, make_layer(config).self_attn)
    mine = nn.LatentAttention(nn.LayerConfig.from_transformers(config))
    mine.load_state_dict(theirs.module.state_dict())
    cache = make_cache(config)
    for s_q in CHUNKS:
        x = torch.randn(2, s_q, config.hidden_size)
        assert_close(mine(x, cache.append(s_q)), theirs(x))


@torch.no_grad()
def test_ragged_batch_equals_each_sequence_alone():
    config = make_config("v3")
    attention = make_layer(config).self_attn
    mine = nn.LatentAttention(nn.LayerConfig.from_transformers(config))
    mine.load_state_dict(attention.state_dict())
    alone = [Theirs(config, attention) for _ in range(4)]
    cache = make_cache(config, batch=4)
    for counts in [(5, 9, 1, 0), (1, 1, 1, 1), (2, 0, 3, 1), (1, 1, 1, 1)]:
        s_q = max(counts)
        x = torch.randn(4, s_q, config.hidden_size)
        out = mine(x, cache.append(s_q, counts))
        assert out.isfinite().all()
        for i, n in enumerate(counts):
            if n:
                assert_close(out[i, :n], alone[i](x[i : i + 1, :n])[0], f"sequence {i} of {counts}")
    assert cache.seqlens_kv.tolist() == [9, 11, 6, 3]


@torch.no_grad()
def test_fp8_cache_stays_near():
    config = make_config("v3")
    theirs = Theirs(config, make_layer(config).self_attn)
    mine = nn.LatentAttention(nn.LayerConfig.from_transformers(config))
    mine.load_state_dict(theirs.module.state_dict())
    cache = make_cache(config, dtype=torch.uint8)
    for s_q in CHUNKS:
        x = torch.randn(2, s_q, config.hidden_size)
        assert distance(mine(x, cache.append(s_q)), theirs(x)) < 1e-3  # e4m3 rows: 2 to 3 % of each element


@pytest.mark.parametrize("dense", [False, True], ids=["moe", "dense"])
@pytest.mark.parametrize("model", ["v3", "v2"])
@torch.no_grad()
def test_decoder_layer_follows_transformers(model, dense):
    config = make_config(model)
    theirs = Theirs(config, make_layer(config, layer_idx=0 if dense else 1))
    mine = nn.DecoderLayer.from_transformers(theirs.module)
    cache = make_cache(config)
    for s_q in CHUNKS:
        x = torch.randn(2, s_q, config.hidden_size)
        assert_close(mine(x, cache.append(s_q)), theirs(x))
    assert mine.self_attn.o_proj.weight.data_ptr() == theirs.module.self_attn.o_proj.weight.data_ptr()
    if not dense:
        assert mine.mlp.experts.down_proj.data_ptr() == theirs.module.mlp.experts.down_proj.data_ptr()


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@torch.no_grad()
def test_v2_gates(method):
    config = make_config("v2", topk_method=method, n_group=3, topk_group=2, routed_scaling_factor=1.5)
    theirs = make_layer(config).mlp
    x = torch.randn(33, config.hidden_size)
    assert_close(nn.MoE.from_transformers(theirs)(x), theirs(x[None])[0])


def gradients(module, x, grad):
    x = x.clone().requires_grad_()
    module.zero_grad()
    module(x).backward(grad)
    named = {name: p.grad for name, p in module.named_parameters()}
    shared = "shared_experts."
    if shared + "gate_proj.weight" in named:
        parts = [named.pop(f"{shared}{name}_proj.weight") for name in ("gate", "up")]
        named[shared + "gate_up_proj.weight"] = torch.cat(parts)
    return {"x": x.grad, **named}


@pytest.mark.parametrize("model", ["v3", "v2"])
def test_moe_gradients(model):
    config = make_config(model)
    theirs = make_layer(config).mlp
    mine = nn.MoE.from_transformers(theirs)
    x, grad = torch.randn(2, 2, 13, config.hidden_size)
    expected, actual = gradients(theirs, x, grad), gradients(mine, x, grad)
    assert actual.keys() == expected.keys()
    for name, g in actual.items():
        assert_close(g, expected[name], name)


def test_moe_gradients_in_bf16_are_as_near_to_fp32_as_transformers():
    config = make_config("v3")
    exact = make_layer(config).mlp
    for p in exact.parameters():
        p.data = p.data.bfloat16().float()
    theirs = copy.deepcopy(exact).bfloat16()
    mine = nn.MoE.from_transformers(theirs)
    x, grad = torch.randn(2, 2, 13, config.hidden_size).bfloat16()
    expected = gradients(exact, x.float(), grad.float())
    peer, actual = gradients(theirs, x, grad), gradients(mine, x, grad)
    for name, g in actual.items():
        assert distance(g, expected[name]) <= 2 * distance(peer[name], expected[name]) + 1e-6, name


def test_layer_gradients_without_a_cache():
    config = make_config("v3")
    theirs = make_layer(config)
    mine = nn.DecoderLayer.from_transformers(theirs)
    x, grad = torch.randn(2, 2, 9, config.hidden_size)
    rotary = v3.DeepseekV3RotaryEmbedding(config)(x, torch.arange(9)[None])
    leaf = x.clone().requires_grad_()
    theirs(leaf, position_embeddings=rotary).backward(grad)
    actual = gradients(mine, x, grad)
    assert_close(actual["x"], leaf.grad, "x")
    for name, p in theirs.named_parameters():
        if name in actual:
            assert_close(actual[name], p.grad, name)


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    return fp8_dequantize(*fp8_quantize(weight, "128x128"), "128x128").to(weight.dtype)


@torch.no_grad()
def dequantize_(layer: torch.nn.Module) -> None:
    """What `quantize_` makes of a transformers layer's weights, back in their dtype."""
    for name, p in layer.named_parameters():
        if p.dim() == 3:
            for expert in p:
                expert.copy_(dequantized(expert))
        elif p.dim() == 2 and "kv_b" not in name and "mlp.gate." not in name:
            p.copy_(dequantized(p))


@torch.no_grad()
def test_fp8_attention_and_experts_stay_near_their_dequantized_weights():
    config = make_config("v3", hidden_size=256, moe_intermediate_size=128, q_lora_rank=128)
    layer = make_layer(config)
    mine = nn.DecoderLayer.from_transformers(layer).quantize_()
    dequantize_(layer)
    attention = Theirs(config, layer.self_attn)
    cache = make_cache(config)
    for s_q in CHUNKS:
        x = torch.randn(2, s_q, config.hidden_size)
        # activations in e4m3, 2 to 3 % of each element, before each of four and of two matmuls
        assert distance(mine.self_attn(x, cache.append(s_q)), attention(x)) < 3e-3
        assert distance(mine.mlp(x), layer.mlp(x)) < 3e-3
    assert mine.mlp.experts.quantized and mine.mlp.gate.weight.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64)], ids=str)
def test_mlp_takes_any_leading_dimensions(shape):
    mlp = nn.SwigluMLP(64, 32)
    assert mlp(torch.randn(shape)).shape == shape
    assert mlp.quantize_()(torch.randn(shape)).shape == shape
    assert nn.FP8Linear.from_linear(torch.nn.Linear(64, 48))(torch.randn(shape)).shape == (*shape[:-1], 48)


@torch.no_grad()
def test_published_fp8_checkpoint_loads_onto_a_quantized_layer():
    config = make_config("v3", hidden_size=256, moe_intermediate_size=128, q_lora_rank=128)
    theirs = make_layer(config)
    mine = nn.DecoderLayer.from_transformers(theirs).quantize_()
    published = {}
    for name, t in theirs.state_dict().items():
        split = {name: t}
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            halves = [e.chunk(2) for e in t]
            split = {f"{prefix}{e}.{n}_proj.weight": w for e, h in enumerate(halves) for n, w in zip(("gate", "up"), h)}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            split = {f"{prefix}{e}.down_proj.weight": w for e, w in enumerate(t)}
        for key, w in split.items():
            if w.dim() == 2 and "mlp.gate." not in key:
                published[key], published[key + "_scale_inv"] = fp8_quantize(w.contiguous(), "128x128")
            else:
                published[key] = w
    nn_config = nn.LayerConfig.from_transformers(config)
    loaded = nn.DecoderLayer(nn_config, rotary=mine.self_attn.rotary, device="meta").quantize_()
    loaded.load_state_dict(published, assign=True)
    x = torch.randn(2, 5, config.hidden_size)
    mine.self_attn.kv_b_proj.weight.copy_(dequantized(mine.self_attn.kv_b_proj.weight))
    assert torch.equal(loaded(x), mine(x))


@torch.no_grad()
def test_dtype_of_gate_rotary_and_fp8_survives_a_cast():
    config = replace(nn.LayerConfig.from_transformers(make_config("v3")), max_positions=16)
    layer = nn.DecoderLayer(config).quantize_().to(torch.bfloat16)
    assert layer.mlp.gate.weight.dtype == layer.self_attn.rotary.cos_sin.dtype == torch.float32
    assert layer.mlp.experts.down_proj.dtype == layer.self_attn.o_proj.weight.dtype == torch.float8_e4m3fn
    assert layer.mlp.experts.down_proj_scale_inv.dtype == torch.float32
    assert layer.input_layernorm.weight.dtype == layer.self_attn.kv_b_proj.weight.dtype == torch.bfloat16


def test_layer_compiles_into_one_graph():
    config = make_config("v3")
    layer = nn.DecoderLayer(nn.LayerConfig.from_transformers(config))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, config.hidden_size)
    assert_close(compiled(x), layer(x))
    with torch.no_grad():
        caches = [make_cache(config) for _ in range(2)]
        for s_q in (5, 1):
            x = torch.randn(2, s_q, config.hidden_size)
            steps = [cache.append(s_q) for cache in caches]
            assert_close(compiled(x, steps[0]), layer(x, steps[1]))


@pytest.mark.parametrize(("b", "s_q"), [(0, 5), (2, 0), (0, 0)])
@torch.no_grad()
def test_a_layer_takes_no_tokens(b, s_q):
    config = make_config("v3")
    layer = nn.DecoderLayer(nn.LayerConfig.from_transformers(config))
    for _ in range(2):
        x, cache = torch.randn(b, s_q, config.hidden_size), make_cache(config, batch=b)
        assert layer(x).shape == layer(x, cache.append(s_q)).shape == layer(x, cache.append(s_q)).shape == x.shape
        layer.quantize_()


@torch.no_grad()
def test_attention_refuses_other_tokens_than_were_appended():
    config = make_config("v3", max_position_embeddings=16)
    attention = nn.LatentAttention(nn.LayerConfig.from_transformers(config))
    with pytest.raises(ValueError, match=r"x: wanted shape \[2, 3, \*\] as appended, got \[2, 4, 64\]"):
        attention(torch.randn(2, 4, 64), make_cache(config, max_tokens=16).append(3))
    with pytest.raises(ValueError, match="max_positions: wanted at least 17 for these tokens, got 16"):
        attention(torch.randn(2, 3, 64), make_cache(config, max_tokens=17).append(3))


@pytest.mark.parametrize("yarn", [False, True], ids=["rope", "yarn"])
def test_rotary_table_is_transformers_to_the_bit(yarn):
    config = make_config("v3", yarn, max_position_embeddings=163840)
    theirs = v3.DeepseekV3RotaryEmbedding(config)
    cos, sin = theirs(torch.empty(0), torch.arange(163840)[None])
    half = config.qk_rope_head_dim // 2
    mine = nn.RotaryTable(nn.LayerConfig.from_transformers(config)).cos_sin
    assert torch.equal(mine, torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1))


def test_published_configs():
    assert nn.V3.attention_scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert nn.V3.rope.amplitude == nn.V2_LITE.rope.amplitude == 1.0
    assert nn.V2_LITE.attention_scale == pytest.approx(192**-0.5 * (0.0707 * 3.6888794541139363 + 1) ** 2)


class TestLatentCache:
    def test_slots_cross_pages_and_skip_padding(self):
        cache = nn.LatentCache(2, 8, page_size=4, d_latent=8, d_rope=4)
        first = cache.append(3, [3, 1])
        assert first.starts_empty and first.counts.tolist() == [3, 1]
        assert first.slots.tolist() == [0, 1, 2, 4, -1, -1]
        second = cache.append(3)
        assert not second.starts_empty and second.counts is None
        assert second.positions.tolist() == [3, 4, 5, 1, 2, 3]
        assert second.slots.tolist() == [3, 8, 9, 5, 6, 7]
        assert second.seqlens_kv.tolist() == [6, 4]
        assert cache.block_table.tolist() == [[0, 2], [1, -1]]

    def test_full_says_so_and_changes_nothing(self):
        cache = nn.LatentCache(2, 8, page_size=4, num_pages=3)
        cache.append(4)
        with pytest.raises(nn.CacheFull, match="wanted 2 more pages of 4 tokens, 1 of 3 are free"):
            cache.append(1)
        with pytest.raises(nn.CacheFull, match="sequence 1 would hold 9 tokens; max_tokens is 8"):
            cache.append(5, [0, 5])
        assert cache.seqlens_kv.tolist() == [4, 4] and cache.free_pages == 1
        assert cache.append(1, [1, 0]).slots.tolist() == [8, -1]

    def test_free_pages_serve_other_sequences(self):
        cache = nn.LatentCache(2, 8, page_size=4, num_pages=2)
        cache.append(4)
        cache.free(0)
        assert cache.append(4, [0, 4]).slots.tolist() == [-1] * 4 + [0, 1, 2, 3]
        assert cache.seqlens_kv.tolist() == [0, 8] and cache.free_pages == 0

    def test_dropped_tokens_are_written_again(self):
        cache = nn.LatentCache(2, 8, page_size=4)
        cache.append(6)
        cache.drop(torch.tensor([2, 0], dtype=torch.int32))
        cache.refresh()
        step = cache.append(2)
        assert step.positions.tolist() == [4, 5, 6, 7] and step.seqlens_kv.tolist() == [6, 8]

    def test_past_the_reserved_pages_nothing_is_written(self):
        cache = nn.LatentCache(1, 8, page_size=4)
        cache.reserve(4)
        assert cache.slots_for(torch.tensor([[3, 4, 8, -1]])).tolist() == [[3, -1, -1, -1]]

    def test_wrong_arguments(self):
        cache = nn.LatentCache(2, 8)
        with pytest.raises(ValueError, match="counts: wanted 2 numbers, got 1"):
            cache.append(1, [1])
        with pytest.raises(ValueError, match="counts: wanted 0 to s_q = 1, got"):
            cache.append(1, [2, 0])
        with pytest.raises(ValueError, match="wanted d_latent 512"):
            nn.LatentCache(2, 8, d_latent=256, dtype=torch.uint8)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_act="gelu"), "hidden_act: wanted 'silu', got 'gelu'"),
        (
            dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
            "wanted rope_type default or yarn",
        ),
    ],
    ids=["activation", "rope"],
)
def test_config_refuses_what_is_not_built(changes, message):
    with pytest.raises(ValueError, match=message):
        nn.LayerConfig.from_transformers(make_config("v3", **changes))
