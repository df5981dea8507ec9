"""One DeepSeek-V3 decoder layer on a real text, compared with `transformers` at every step.

Both layers have the same random weights. A text, as bytes through an embedding table, is prefilled and then fed one
byte at a time, each layer with its own cache: transformers' DynamicCache, and our paged latent cache. Attention,
experts and routing are compared separately, first in bf16, then with all our weights in FP8 against transformers on
the dequantised weights. Ends with exit status 1 where they disagree.

    python examples/deepseek_v3_layer.py                 # CPU: published widths, 32 experts, under 14 GiB
    python examples/deepseek_v3_layer.py --device cuda   # all 256 experts
    python examples/deepseek_v3_layer.py --quick         # tiny widths, seconds
"""

import argparse
import dataclasses
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_kernels import explain, fp8_dequantize, moe_gate, nn
from deepseek_kernels.ops._registry import OPERATORS

TEXT = """\
A mixture of experts is a committee that never meets. For every word a small clerk, the gate, reads the hidden state \
and sends it to eight of the experts; the others sleep through the sentence. What the chosen eight return is weighed, \
added up, and handed on to the next layer, where another clerk reads it. Attention keeps the minutes: of every word \
so far it stores not the keys and values of all one hundred and twenty-eight heads but one short latent row, from \
which each head can work out what it wanted to know. Decoding is then a matter of reading: the minutes, and the \
weights of eight experts, once for every new word. Whoever reads fewest bytes answers first.
"""

RELATIVE_ERROR = {"bf16": 0.03, "fp8": 0.15, "fp32": 1e-3}
"""Bound on |ours - theirs| / |theirs| of any token's attention output, expert output and router logits.

bf16: each of the six to eight roundings on the way to an output is up to 2^-9 of an element, and both sides round in
different places. FP8: every matmul sees activations in e4m3, each up to 2^-4 and about 2.6 % rms off; through queries
and keys that turns attention weights by 5 % for each unit of the scores.
"""

OP_DISTANCE = 1e-4
"""Bound on 1 - 2<x,y>/(<x,x>+<y,y>) between what an op returned and its reference on the same inputs."""


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, help="routed experts, in 8 groups (default: 256 on a GPU, 32 on a CPU)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="decode steps that are timed and compared")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--fp8", action=argparse.BooleanOptionalAction, default=True, help="the second phase")
    parser.add_argument("--quick", action="store_true", help="tiny widths")
    parser.add_argument("--out", type=Path, default=Path("out/deepseek_v3_layer.png"), help="the chart")
    given = parser.parse_args(arguments)
    if given.experts is None:
        given.experts = 256 if given.device != "cpu" and not given.quick else 32
    if given.experts % 8 or given.experts < 16:
        parser.error("--experts: wanted a multiple of 8 from 16 on")
    if given.prompt_tokens < 1 or given.steps < 1:
        parser.error("--prompt-tokens and --steps: wanted at least 1")
    return given


def make_transformers_layer(given: argparse.Namespace, dtype: torch.dtype):
    """Their layer with random weights, and its config: published widths and YaRN, and as many experts as asked for."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

    widths = {}
    if given.quick:
        widths = dict(
            hidden_size=256, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=128, moe_intermediate_size=128
        )
    config = DeepseekV3Config(
        **widths,
        n_routed_experts=given.experts,
        first_k_dense_replace=0,
        num_hidden_layers=1,
        max_position_embeddings=163840,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=4096, beta_fast=32,
            beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
        ),
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        layer = DeepseekV3DecoderLayer(config, 0)
    layer = layer.to(dtype).to_empty(device=given.device).eval().requires_grad_(False)
    gate = layer.mlp.gate
    gate.e_score_correction_bias = torch.empty_like(gate.e_score_correction_bias, dtype=torch.float32)
    generator = torch.Generator(given.device).manual_seed(0)
    for name, t in [*layer.named_parameters(), *layer.named_buffers()]:
        if "layernorm" in name:
            t.normal_(1, 0.1, generator=generator)
        elif "correction_bias" in name:
            t.normal_(0, 0.05, generator=generator)
        else:
            for part in t if t.dim() == 3 else [t]:
                part.normal_(0, t.shape[-1] ** -0.5, generator=generator)
    return layer, config


class Clock:
    """Milliseconds of a call, the device's work included."""

    def __init__(self, device: str):
        self.synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def __call__(self, function, *args):
        self.synchronize()
        start = time.perf_counter()
        result = function(*args)
        self.synchronize()
        return result, (time.perf_counter() - start) * 1e3


class Taps:
    """What a layer's parts last returned, by name of the part."""

    def __init__(self, layer: torch.nn.Module):
        self.last: dict[str, object] = {}
        self.hooks = [
            layer.get_submodule(name).register_forward_hook(self._keep(name))
            for name in ("self_attn", "mlp", "mlp.gate")
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep(self, name: str):
        def hook(module, inputs, output):
            self.last[name] = output[0] if name == "self_attn" and isinstance(output, tuple) else output

        return hook


class Theirs:
    """transformers' layer with its own cache."""

    def __init__(self, layer, config, clock: Clock):
        from transformers.cache_utils import DynamicCache
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

        self.layer, self.clock = layer, clock
        self.rotary = DeepseekV3RotaryEmbedding(config).to(layer.input_layernorm.weight.device)
        self.cache = DynamicCache(config=config)
        self.taps = Taps(layer)
        self.length = 0

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        positions = torch.arange(self.length, self.length + x.shape[1], device=x.device)[None]
        self.length += x.shape[1]
        return self.clock(self._forward, x, positions)

    def _forward(self, x, positions):
        return self.layer(x, position_embeddings=self.rotary(x, positions), past_key_values=self.cache)


class Ours:
    """Our layer with its paged cache.

    Two correct bf16 layers may route a token differently where two scores nearly tie. Such a token is counted, the tie
    is verified, and their routing is taken over for it, so that everything after the gate is still compared.
    """

    def __init__(self, layer: nn.DecoderLayer, tokens: int, dtype: torch.dtype, clock: Clock, theirs: Theirs):
        self.layer, self.clock = layer, clock
        self.cache = self.make_cache(layer, tokens, dtype)
        self.taps = Taps(layer)
        self.theirs = theirs
        self.logits_error = 0.0
        self.flips = 0
        self.untied: list[str] = []
        self.taps.hooks.append(layer.mlp.gate.register_forward_hook(self._route))

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        return self.clock(lambda: self.layer(x, self.cache.append(x.shape[1])))

    @staticmethod
    def make_cache(layer: nn.DecoderLayer, tokens: int, dtype: torch.dtype) -> nn.LatentCache:
        shape, device = layer.self_attn.config.shape, layer.input_layernorm.weight.device
        return nn.LatentCache(1, tokens, d_latent=shape.d_latent, d_rope=shape.d_rope, dtype=dtype, device=device)

    def _route(self, gate, inputs, output):
        their_logits, their_weights, their_indices = self.theirs.taps.last["mlp.gate"]
        weights, indices = output
        flipped = (indices.sort(1).values != their_indices.sort(1).values).any(1)
        self.flips += int(flipped.sum())
        logits = torch.nn.functional.linear(inputs[0].float(), gate.weight)
        self.logits_error = max(self.logits_error, relative_error(logits, their_logits))
        for t in flipped.nonzero().flatten().tolist():
            gap, shift = tie(gate, logits[t], their_logits[t], indices[t])
            if gap > shift:
                self.untied.append(
                    f"scores apart by {gap:.2g} were ordered differently, rounding moved them {shift:.2g}"
                )
        return (
            torch.where(flipped[:, None], their_weights, weights),
            torch.where(flipped[:, None], their_indices, indices),
        )


def tie(gate: nn.Gate, logits, their_logits, chosen) -> tuple[float, float]:
    """By how much our choice misses being theirs, in their scores, and how far rounding can have moved such a gap."""
    shape = gate.shape
    scores, theirs = (x.sigmoid() + gate.e_score_correction_bias for x in (logits, their_logits))
    groups = scores.view(shape.num_groups, -1).topk(2).values.sum(1).topk(shape.topk_groups).indices
    their_groups = theirs.view(shape.num_groups, -1).topk(2).values.sum(1)
    is_chosen = torch.zeros_like(their_groups, dtype=torch.bool).index_fill_(0, groups, True)
    gap = 0.0
    if not is_chosen.all():
        gap = max(gap, (their_groups[~is_chosen].max() - their_groups[is_chosen].min()).item() / 2)
    members = torch.zeros_like(theirs, dtype=torch.bool).index_fill_(0, chosen, True)
    rest = ~members & is_chosen.repeat_interleave(len(theirs) // shape.num_groups)
    if rest.any():
        gap = max(gap, (theirs[rest].max() - theirs[members].min()).item())
    return gap, 2 * (scores - theirs).abs().max().item()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |actual - expected| / |expected| of any token."""
    actual, expected = (t.float().flatten(0, -2) for t in (actual, expected))
    return ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


class OpProfile(TorchDispatchMode):
    """Times every `deepseek_kernels` op in place and checks it against its reference on the same inputs."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock
        self.calls: dict[str, list[dict]] = defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "deepseek_kernels":
            return function(*args, **(kwargs or {}))
        op = OPERATORS[str(function).removeprefix("deepseek_kernels.").removesuffix(".default")]
        args = op.fill(args, kwargs or {})
        backend = explain(op.name, *args).backend
        written = [i for i, a in enumerate(function._schema.arguments) if a.alias_info and a.alias_info.is_write]
        before = [a.clone() if i in written else a for i, a in enumerate(args)]
        result, ms = self.clock(function, *args)
        actual = result
        if op.name == "fused_moe":  # the reference widens every weight it is given: one token, and its experts
            before, actual = last_token(args), result[-1:]
        expected = op.reference(*before)
        if written:
            actual, expected = [args[i] for i in written], [before[i] for i in written]
        self.calls[op.name].append(
            {"ms": ms, "bytes": moved_bytes(op, args), "backend": backend, "error": distance_of(actual, expected)}
        )
        return result

    def table(self, passes: int) -> list[dict]:
        """One row per op: calls and time in one pass, bandwidth, worst distance to the reference."""
        rows = []
        for name, calls in self.calls.items():
            per_pass = len(calls) // passes
            ms = sum(statistics.median(c["ms"] for c in calls[i::per_pass]) for i in range(per_pass))
            rows.append(
                {
                    "op": name,
                    "calls": per_pass,
                    "backend": "/".join(sorted({c["backend"] for c in calls})),
                    "ms": ms,
                    "gb_s": sum(c["bytes"] for c in calls) / passes / ms / 1e6,
                    "error": max(c["error"] for c in calls),
                }
            )
        return sorted(rows, key=lambda row: -row["ms"])


def last_token(args: tuple) -> list:
    """Arguments of `fused_moe` for the last token alone, with none but its experts."""
    x, w_gate_up, w_down, weights, indices, scale_gate_up, scale_down, *rest = args
    experts, compact = indices[-1].unique(return_inverse=True)

    def take(stack):
        return None if stack is None else torch.stack([stack[e] for e in experts.tolist()])

    return [
        x[-1:], take(w_gate_up), take(w_down), weights[-1:], compact[None], take(scale_gate_up), take(scale_down), *rest
    ]  # fmt: skip


def moved_bytes(op, args) -> int:
    problem = op.problem(*args)
    if op.name == "mla_decode":  # the op may not look at the lengths; a demo may
        problem = dataclasses.replace(problem, s_kv=int(args[op.keywords.index("seqlens_kv")].max()))
    return op.plan.bytes(problem)


def distance_of(actual, expected) -> float:
    """1 - 2<x,y>/(<x,x>+<y,y>) over all floating outputs together; of the bytes where a cache is FP8."""
    pairs = zip(*([t] if isinstance(t, torch.Tensor) else list(t) for t in (actual, expected)), strict=True)
    dot = norm = 0.0
    for a, e in pairs:
        a, e = (t.float().nan_to_num(0, 0, 0).double().flatten() for t in (a, e))
        dot, norm = dot + (a @ e).item(), norm + (a @ a + e @ e).item()
    return 0.0 if norm == 0 else max(0.0, 1 - 2 * dot / norm)


@dataclasses.dataclass
class Phase:
    """Results of one run over the text."""

    name: str
    prefill_ms: tuple[float, float] = (0.0, 0.0)
    decode_ms: tuple[list[float], list[float]] = dataclasses.field(default_factory=lambda: ([], []))
    errors: dict[str, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    prefill_ops: list[dict] = dataclasses.field(default_factory=list)
    decode_ops: list[dict] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def bound(self) -> float:
        return RELATIVE_ERROR[self.name]

    @property
    def step_ms(self) -> tuple[float, float]:
        """Median decode step: theirs, ours."""
        return statistics.median(self.decode_ms[0]), statistics.median(self.decode_ms[1])


PROFILED_STEPS = 3
PHASE_SECONDS = 90
"""A phase that has taken longer, for want of a kernel, leaves out the rest of its steps and profiles one step only."""


def run_phase(name: str, given, their_layer, config, layer, x: torch.Tensor, clock: Clock) -> Phase:
    """Prefill and decode the text in both layers, comparing; then profile our ops on the tokens that follow."""
    phase = Phase(name)
    start = time.perf_counter()
    layer(x[:, :1])  # the first calls compile or load kernels
    theirs = Theirs(their_layer, config, clock)
    ours = Ours(layer, x.shape[1], x.dtype, clock, theirs)
    prompt, *tokens = x[:, : given.prompt_tokens], *x[:, given.prompt_tokens :].split(1, dim=1)
    compare(phase, 0, prompt, theirs, ours)
    for step in range(1, given.steps + 1):
        compare(phase, step, tokens.pop(0), theirs, ours)
        if time.perf_counter() - start > PHASE_SECONDS:
            break
    conclude(phase, ours)
    ours.taps.remove()
    theirs.taps.remove()

    is_slow = time.perf_counter() - start > PHASE_SECONDS
    passes = 1 if is_slow else PROFILED_STEPS
    with OpProfile(clock) as profile:
        for token in tokens[:passes]:
            layer(token, ours.cache.append(1))
    phase.decode_ops = profile.table(passes)
    if not is_slow and phase.prefill_ms[1] < 5_000:
        again = Ours.make_cache(layer, given.prompt_tokens, x.dtype)
        with OpProfile(clock) as profile:
            layer(prompt, again.append(given.prompt_tokens))
        phase.prefill_ops = profile.table(1)
    for row in (*phase.decode_ops, *phase.prefill_ops):
        if not row["error"] <= OP_DISTANCE:
            phase.failures.append(f"{row['op']} is {row['error']:.2g} from its reference, allowed {OP_DISTANCE}")
    return phase


def compare(phase: Phase, step: int, x: torch.Tensor, theirs: Theirs, ours: Ours) -> None:
    """Both layers on the next tokens; step 0 is the prefill."""
    expected, their_ms = theirs(x)
    actual, our_ms = ours(x)
    if step == 0:
        phase.prefill_ms = their_ms, our_ms
    else:
        phase.decode_ms[0].append(their_ms)
        phase.decode_ms[1].append(our_ms)
    errors = {
        "attention": relative_error(ours.taps.last["self_attn"], theirs.taps.last["self_attn"]),
        "experts": relative_error(ours.taps.last["mlp"], theirs.taps.last["mlp"]),
        "layer": relative_error(actual, expected),
    }
    for part, error in errors.items():
        phase.errors[part].append(error)
        if not error <= phase.bound:
            phase.failures.append(f"step {step}: {part} off by {error:.3g}, allowed {phase.bound}")
    phase.failures += [f"step {step}: {line}" for line in check_gate(ours.layer.mlp.gate, theirs.taps.last["mlp.gate"])]


def conclude(phase: Phase, ours: Ours) -> None:
    phase.errors["router logits"].append(ours.logits_error)
    if not ours.logits_error <= phase.bound:
        phase.failures.append(f"router logits off by {ours.logits_error:.3g}, allowed {phase.bound}")
    phase.failures += [f"routing: {line}" for line in ours.untied]
    steps = len(phase.decode_ms[0])
    print(f"\n{phase.name}: prefill and {steps} steps; largest relative error of a token (allowed {phase.bound})")
    for part, errors in phase.errors.items():
        print(f"  {part:14} {max(errors):.2e}")
    print(f"  {ours.flips} tokens routed differently, {len(ours.untied)} of them without a near tie to explain it")


def check_gate(gate: nn.Gate, theirs) -> list[str]:
    """On their logits, our gate op must choose what they choose, and weigh it alike."""
    logits, their_weights, their_indices = theirs
    shape = gate.shape
    weights, indices = moe_gate(
        logits, gate.e_score_correction_bias, top_k=shape.top_k, num_groups=shape.num_groups,
        topk_groups=shape.topk_groups, score=shape.score, normalize=shape.normalize, scale=shape.routed_scale,
    )  # fmt: skip
    (indices, order), (their_indices, their_order) = indices.sort(1), their_indices.sort(1)
    if not torch.equal(indices, their_indices):
        return ["moe_gate chose other experts on the same logits"]
    apart = (weights.gather(1, order) - their_weights.gather(1, their_order)).abs().max().item()
    return [f"moe_gate weights off by {apart:.2g} on the same logits"] if apart > 1e-5 else []


@torch.no_grad()
def dequantize_into(theirs: torch.nn.Module, ours: nn.DecoderLayer) -> None:
    """Overwrite their weights by what ours became in FP8."""

    def put(weight, q, scale):
        weight.copy_(fp8_dequantize(q, scale, "128x128"))

    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
        fp8 = ours.self_attn.get_submodule(name)
        put(theirs.self_attn.get_submodule(name).weight, fp8.weight, fp8.weight_scale_inv)
    shared = ours.mlp.shared_experts
    joined = torch.empty_like(shared.gate_up_proj.weight, dtype=theirs.input_layernorm.weight.dtype)
    put(joined, shared.gate_up_proj.weight, shared.gate_up_proj.weight_scale_inv)
    gate, up = joined.chunk(2)
    theirs.mlp.shared_experts.gate_proj.weight.copy_(gate)
    theirs.mlp.shared_experts.up_proj.weight.copy_(up)
    put(theirs.mlp.shared_experts.down_proj.weight, shared.down_proj.weight, shared.down_proj.weight_scale_inv)
    for name in ("gate_up_proj", "down_proj"):
        stacks = (getattr(ours.mlp.experts, name), getattr(ours.mlp.experts, name + "_scale_inv"))
        for expert in zip(getattr(theirs.mlp.experts, name), *stacks, strict=True):
            put(*expert)


def report(phase: Phase) -> None:
    theirs, ours = phase.step_ms
    print(f"{phase.name}: prefill: transformers {phase.prefill_ms[0]:.1f} ms, ours {phase.prefill_ms[1]:.1f} ms")
    print(f"{phase.name}: decode step: transformers {theirs:.1f} ms, ours {ours:.1f} ms: {theirs / ours:.2f}x")
    for title, rows in (("decode", phase.decode_ops), ("prefill", phase.prefill_ops)):
        if not rows:
            print(f"  {phase.name} {title:8} not profiled: too slow")
            continue
        print(f"  {phase.name} {title:8} calls  backend           ms      GB/s  distance to the reference")
        for row in rows:
            print(
                f"  {row['op']:20} {row['calls']:>3}  {row['backend']:10} {row['ms']:9.3f} {row['gb_s']:9.1f}"
                f"  {row['error']:.1e}"
            )


def draw(phases: list[Phase], path: Path, title: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (steps, bandwidth, errors) = plt.subplots(1, 3, figsize=(16, 4.8))
    names = sorted({row["op"] for phase in phases for row in phase.decode_ops})
    colours = dict(zip(names, plt.get_cmap("tab10").colors))
    steps.bar("transformers", phases[0].step_ms[0], color="#777777")
    for phase in phases:
        bar, bottom = f"ours, {phase.name}", 0.0
        for row in phase.decode_ops:
            steps.bar(bar, row["ms"], bottom=bottom, color=colours[row["op"]])
            bottom += row["ms"]
        steps.bar(bar, max(phase.step_ms[1] - bottom, 0), bottom=bottom, color="#cccccc")
    steps.set_ylabel("ms, median decode step")
    steps.set_title("One decode step")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in [*colours.values(), "#cccccc"]]
    steps.legend(handles, [*names, "torch's own ops"], fontsize=7)

    labels, values, tints = [], [], []
    for phase in phases:
        for row in phase.decode_ops:
            labels.append(f"{row['op']}, {phase.name}")
            values.append(row["gb_s"])
            tints.append(colours[row["op"]])
    bandwidth.barh(labels[::-1], values[::-1], color=tints[::-1])
    bandwidth.set_xlabel("GB/s, bytes as planned")
    bandwidth.set_title("Bandwidth in the decode step")
    bandwidth.tick_params(axis="y", labelsize=7)

    for phase, style in zip(phases, ("-", "--")):
        for part, colour in zip(("attention", "experts", "layer"), ("C0", "C1", "C2")):
            errors.semilogy(phase.errors[part], style, color=colour, label=f"{part}, {phase.name}")
        errors.axhline(RELATIVE_ERROR[phase.name], linestyle=style, color="#cc0000", linewidth=0.8)
    errors.set_xlabel("step (0 is the prefill)")
    errors.set_title("Relative error to transformers (red: allowed)")
    errors.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"chart: {path}")


@torch.no_grad()
def main(arguments=None) -> int:
    given = parse_arguments(arguments)
    start = time.perf_counter()
    import transformers

    dtype = torch.bfloat16 if given.dtype == "bf16" else torch.float32
    their_layer, config = make_transformers_layer(given, dtype)
    layer = nn.DecoderLayer.from_transformers(their_layer)
    tokens = given.prompt_tokens + given.steps + PROFILED_STEPS
    text = (TEXT.encode() * (tokens // len(TEXT) + 1))[:tokens]
    embedding = torch.randn(256, config.hidden_size, generator=torch.Generator().manual_seed(1))
    x = embedding[torch.tensor(list(text))][None].to(given.device, dtype)

    where = torch.cuda.get_device_name() if given.device.startswith("cuda") else (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )  # fmt: skip
    title = (
        f"DeepSeek-V3 layer: hidden {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{config.n_routed_experts} routed experts in 8 groups, top 8, {given.prompt_tokens} tokens prefilled"
    )
    print(f"{title}\n{where}; torch {torch.__version__}, transformers {transformers.__version__}, "
          f"weights ready after {time.perf_counter() - start:.0f} s")  # fmt: skip
    if not given.quick and config.n_routed_experts != 256:
        print(f"The model has 256 experts; both layers here have {config.n_routed_experts} and route over those.")

    clock = Clock(given.device)
    phases = [run_phase(given.dtype, given, their_layer, config, layer, x, clock)]
    report(phases[-1])
    if given.fp8:
        layer.quantize_()
        dequantize_into(their_layer, layer)
        phases.append(run_phase("fp8", given, their_layer, config, layer, x, clock))
        report(phases[-1])
    draw(phases, given.out, f"{title}\n{where}")

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)
    print(f"peak memory {peak:.1f} GiB resident, {time.perf_counter() - start:.0f} s in all")
    failures = [f"{phase.name}: {line}" for phase in phases for line in phase.failures]
    for line in failures[:20]:
        print(f"MISMATCH {line}")
    print("mismatch" if failures else "every step agrees with transformers")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
