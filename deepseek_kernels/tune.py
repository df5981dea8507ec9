"""Measure every configuration of every backend on the device at hand: `python -m deepseek_kernels tune`."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .ops import _device, _extension, _tuned
from .ops._registry import OPERATORS, Operator
from .plan.tuned import Measured, Table, options
from .shapes import BLOCK, V3, V3_MATMULS, ceil_div
from .testing.timer import measure

ops = torch.ops.deepseek_kernels


@dataclass(frozen=True)
class Family:
    """How to make the arguments of one op from sizes, and which sizes to measure unless told.

    `defined`: (result, args) -> the result with everything the op leaves undefined masked out.
    """

    inputs: Callable[..., tuple]
    sizes: tuple[dict[str, int], ...]
    defined: Callable = lambda result, args: result


def _bf16(*shape: int, device) -> torch.Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def _fp8(*shape: int, rows: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random e4m3 [..., n, k] and its scales, one for each `rows` x 128."""
    *batch, n, k = shape
    q = torch.randn(*shape, device=device).to(torch.float8_e4m3fn)
    return q, torch.rand(*batch, ceil_div(n, rows), ceil_div(k, BLOCK), device=device) + 0.5


def _offsets(num_rows: int, num_experts: int, device) -> torch.Tensor:
    return (torch.arange(num_experts + 1, device=device) * num_rows // max(num_experts, 1)).int()


def _matmul(device, m, n, k):
    return *_fp8(m, k, rows=1, device=device), *_fp8(n, k, rows=BLOCK, device=device)


def _wgrad(device, m, n, k):
    operands = *_fp8(m, k, rows=1, device=device), *_fp8(n, k, rows=1, device=device)
    return *operands, None, torch.zeros(m, n, device=device), True


def _grouped(device, num_rows, n, k, num_experts):
    return (
        _bf16(num_rows, k, device=device),
        _bf16(num_experts, n, k, device=device),
        _offsets(num_rows, num_experts, device),
    )


def _grouped_wgrad(device, num_rows, n, k, num_experts):
    return _bf16(num_rows, n, device=device), _bf16(num_rows, k, device=device), _offsets(num_rows, num_experts, device)


def _fp8_grouped(device, num_rows, n, k, num_experts):
    weights = _fp8(num_experts, n, k, rows=BLOCK, device=device)
    return *_fp8(num_rows, k, rows=1, device=device), *weights, _offsets(num_rows, num_experts, device)


def _masked(device, num_experts, m_max, n, k, expected_m):
    weights = _fp8(num_experts, n, k, rows=BLOCK, device=device)
    counts = torch.full((num_experts,), expected_m, dtype=torch.int32, device=device)
    return *_fp8(num_experts, m_max, k, rows=1, device=device), *weights, counts, None, expected_m


def _filled_rows(result, args):
    row = torch.arange(result.shape[1], device=result.device)
    return result.where((row < args[4][:, None])[:, :, None], 0)


def _indices(device, num_tokens, num_experts, top_k):
    return torch.rand(num_tokens, num_experts, device=device).topk(top_k, dim=1).indices


def _permute(device, num_tokens, hidden, num_experts, top_k):
    maps = ops.moe_sort(_indices(device, num_tokens, num_experts, top_k), num_experts)
    return _bf16(num_tokens, hidden, device=device), *maps[:2]


def _unpermute(device, num_tokens, hidden, num_experts, top_k):
    x, *maps = _permute(device, num_tokens, hidden, num_experts, top_k)
    return x.repeat(top_k, 1), *maps


def _decode(device, b, h_q, s_kv, page_size):
    pages = ceil_div(s_kv, page_size)
    table = torch.randperm(b * pages, device=device).view(b, pages).int()
    cache = _bf16(b * pages, page_size, V3.d_qk, device=device)
    lengths = torch.full((b,), s_kv, dtype=torch.int32, device=device)
    return _bf16(b, 1, h_q, V3.d_qk, device=device), cache, table, lengths, 192**-0.5


def _fused_moe(device, num_tokens, hidden, intermediate, num_experts, top_k):
    indices = _indices(device, num_tokens, num_experts, top_k)
    w_gate_up = _bf16(num_experts, 2 * intermediate, hidden, device=device) * hidden**-0.5
    w_down = _bf16(num_experts, hidden, intermediate, device=device) * intermediate**-0.5
    return (
        _bf16(num_tokens, hidden, device=device),
        w_gate_up,
        w_down,
        torch.rand(indices.shape, device=device),
        indices,
    )


def _sizes(**lists: Iterable[int]) -> tuple[dict[str, int], ...]:
    """Every combination."""
    return tuple(dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))


_MATMULS = [{"n": n, "k": k} for n, k in V3_MATMULS]
_TOKENS = (1, 16, 128, 1024, 4096)
_EXPERTS = {"num_experts": V3.num_experts, "top_k": V3.top_k}
_UP = {"n": 2 * V3.intermediate, "k": V3.hidden, "num_experts": 32}
_DOWN = {"n": V3.hidden, "k": V3.intermediate, "num_experts": 32}
_GROUPED = tuple({"num_rows": r, **shape} for shape in (_UP, _DOWN) for r in (32, 512, 8192, 32768))

FAMILIES: dict[str, Family] = {
    "fp8_matmul": Family(_matmul, tuple({"m": m, **nk} for nk in _MATMULS for m in (1, 16, 64, 128, 512, 4096))),
    "fp8_matmul.out": Family(_wgrad, tuple({"m": n, "n": k, "k": 4096} for n, k in V3_MATMULS)),
    "fp8_grouped_matmul": Family(_fp8_grouped, _GROUPED),
    "fp8_grouped_matmul_masked": Family(
        _masked, tuple({**s, "m_max": 4096, "expected_m": m} for s in (_UP, _DOWN) for m in (20, 128, 512)),
        _filled_rows,
    ),
    "grouped_matmul": Family(_grouped, _GROUPED),
    "grouped_matmul_wgrad": Family(_grouped_wgrad, _GROUPED[2:4] + _GROUPED[6:]),
    "fp8_quantize": Family(lambda device, m, k: (_bf16(m, k, device=device),), _sizes(m=_TOKENS, k=(V3.hidden,))),
    "fp8_quantize_both": Family(lambda device, m, k: (_bf16(m, k, device=device),), _sizes(m=(4096,), k=(V3.hidden,))),
    "swiglu": Family(
        lambda device, num_rows, intermediate: (_bf16(num_rows, 2 * intermediate, device=device),),
        _sizes(num_rows=_TOKENS, intermediate=(V3.intermediate,)),
    ),
    "moe_permute": Family(_permute, tuple({"num_tokens": t, "hidden": V3.hidden, **_EXPERTS} for t in _TOKENS)),
    "moe_unpermute": Family(_unpermute, tuple({"num_tokens": t, "hidden": V3.hidden, **_EXPERTS} for t in _TOKENS)),
    "moe_sort": Family(
        lambda device, num_tokens, num_experts, top_k: (_indices(device, num_tokens, num_experts, top_k), num_experts),
        tuple({"num_tokens": t, **_EXPERTS} for t in _TOKENS),
    ),
    "moe_gate": Family(
        lambda device, num_tokens, num_experts, top_k: (
            torch.randn(num_tokens, num_experts, device=device), torch.zeros(num_experts, device=device),
            top_k, V3.num_groups, V3.topk_groups,
        ),
        tuple({"num_tokens": t, **_EXPERTS} for t in _TOKENS),
    ),
    "mla_decode": Family(_decode, _sizes(b=(1, 16, 128), h_q=(16, 128), s_kv=(4096, 32768), page_size=(64,))),
    "fused_moe": Family(
        _fused_moe,
        tuple(
            {"num_tokens": t, "hidden": V3.hidden, "intermediate": V3.intermediate, "num_experts": 32, "top_k": 8}
            for t in (1, 4, 16, 64)
        ),
    ),
}  # fmt: skip
"""Ops whose kernels have a choice, and DeepSeek-V3's sizes of them."""

WRONG = 0.02
"""Relative distance from the reference beyond which a configuration is left out."""


def candidates(op: Operator, problem, device) -> Iterator[tuple[str, Any]]:
    """Every (backend, configuration) that could run `problem`."""
    reasons = op.plan.backends(problem, device, _extension.environment())
    for backend in op.backends:
        interpreted = backend == "triton" and device.kind == "cpu"
        if not reasons.get(backend, "absent") and not interpreted:
            for config in options(op.plan, problem, device, backend):
                yield backend, config


def _results(op: Operator, run: Callable, args: tuple) -> tuple[torch.Tensor, ...]:
    """Outputs and mutated arguments of one call on fresh copies."""
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    out = run(*args)
    if op.name in FAMILIES and out is not None:
        out = FAMILIES[op.name].defined(out, args)
    outputs = () if out is None else out if isinstance(out, tuple) else (out,)
    mutated = (a for a, s in zip(args, op.overload._schema.arguments, strict=True) if s.is_write)
    return *outputs, *mutated


def _off(results, expected) -> float:
    """The largest relative distance of the outputs, NaN where one is NaN."""
    worst = 0.0
    for r, e in zip(results, expected, strict=True):
        r, e = r.double(), e.double()
        off = ((r - e).norm() / e.norm().clamp(min=1e-30)).item()
        worst = worst if off <= worst else off  # also where it is NaN
    return worst


def measure_problem(
    op: Operator, args: tuple, seconds: float, timer: Callable = measure, say: Callable[[str], None] = print
) -> list[Measured]:
    """Every candidate on `args`, the fastest first. What fails or gives a wrong result is said and left out."""
    args = op.fill(args, {})
    op.check(*args)
    device = _device.of(args)
    problem, spec = op.problem(*args), _device.spec(device)
    expected, calls = _results(op, op.reference, args), {}
    for backend, config in candidates(op, problem, spec):

        def run(*args, backend=backend, config=config):
            return op.backends[backend](config, *args)

        try:
            off = _off(_results(op, run, args), expected)
        except Exception as error:
            say(f"{op.name}: {backend} {config}: left out, {type(error).__name__}: {error}".splitlines()[0])
            continue
        if not off <= WRONG:
            say(f"{op.name}: {backend} {config}: left out, its result is off by {off:.3g}")
            continue
        calls[backend, config] = [lambda run=run: run(*args)]
    times = timer(calls, device, seconds=seconds) if calls else {}
    return sorted((Measured(*key, t.p50) for key, t in times.items()), key=lambda m: m.microseconds)


def _progress(items: list) -> Iterator:
    """With tqdm's bar where it is installed, else with a count on stderr."""
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"\r{i}/{len(items)}", end="\n" if i == len(items) else "", file=sys.stderr, flush=True)
            yield item
    else:
        yield from tqdm(items, unit="problem")


def problems(names: list[str] | None, shapes: list[str] | None) -> list[tuple[str, dict[str, int]]]:
    """(op, sizes) to measure. `shapes` are like "m=16,n=7168,k=2048", for every named op."""
    unknown = [n for n in names or () if n not in FAMILIES]
    if unknown:
        raise ValueError(f"tune: op: wanted one of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    found = []
    for name in names or FAMILIES:
        sizes = [_parsed(name, shape) for shape in shapes] if shapes else FAMILIES[name].sizes
        found += [(name, s) for s in sizes]
    return found


def _parsed(op: str, shape: str) -> dict[str, int]:
    wanted = tuple(FAMILIES[op].sizes[0])
    try:
        sizes = {name: int(value) for name, value in (part.split("=") for part in shape.split(","))}
    except ValueError:
        sizes = {}
    if set(sizes) != set(wanted):
        raise ValueError(f"tune: shapes: wanted {','.join(f'{w}=..' for w in wanted)} for {op}, got {shape!r}")
    return sizes


def tune(names: list[str] | None, shapes: list[str] | None, device: torch.device, seconds: float) -> Table:
    """Measure and add to the table of `device`; what is measured is saved even if a later problem fails."""
    spec, table = _device.spec(device), {}
    try:
        for name, sizes in _progress(problems(names, shapes)):
            op = OPERATORS[name]
            try:
                args = FAMILIES[name].inputs(device, **sizes)
                measured = measure_problem(op, args, seconds)
            except torch.OutOfMemoryError:
                print(f"{name} {sizes}: does not fit the memory of {spec.name}")
                continue
            if measured:
                problem = op.problem(*op.fill(args, {}))
                table[name, problem] = measured
                print(_line(op, problem, spec, sizes, measured))
    finally:
        if table:
            print(f"{len(table)} problems in {_tuned.save(spec, table)}")
    return table


def _line(op: Operator, problem, spec, sizes: dict[str, int], measured: list[Measured]) -> str:
    best = measured[0]
    where = ", ".join(f"{k}={v}" for k, v in sizes.items())
    line = f"{op.name} {where}: {best.microseconds:.1f} us by {best.backend} {best.config or ''}".rstrip()
    if len(measured) == 1:
        return line + ", the only choice here"
    if not hasattr(op.plan, "select"):
        return line
    guess = op.plan.select(problem, spec, best.backend)
    of_model = next((m for m in measured if (m.backend, m.config) == (best.backend, guess)), None)
    if of_model is None or of_model is best:
        return line
    return f"{line}; the model's {guess} takes {of_model.microseconds:.1f} us"
