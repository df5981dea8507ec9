"""python -m deepseek_kernels info: what this installation has, and what each op would run on here.
python -m deepseek_kernels tune: measure every configuration on this device, for ops to choose by."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, Literal, get_args, get_origin

import torch

import deepseek_kernels

from .device import A100, B200, CPU, H100, L40S, DeviceSpec
from .ops import _device, _extension
from .ops._registry import OPERATORS, Operator, forced_backend
from .plan.backend import BACKENDS, Environment, choose
from .shapes import V3

SIZES = {
    "b": 128, "s_q": 1, "s_kv": 4096, "h_q": V3.h_q, "page_size": 64,
    "d_latent": V3.d_latent, "d_rope": V3.d_rope, "d_nope": V3.d_nope, "d_v": V3.d_v, "d_qk": V3.d_qk,
    "num_tokens": 4096, "num_rows": 4096 * V3.top_k, "hidden": V3.hidden, "intermediate": V3.intermediate,
    "num_experts": V3.num_experts, "num_local": V3.num_experts, "top_k": V3.top_k, "num_groups": V3.num_groups,
    "topk_groups": V3.topk_groups, "vocab": V3.vocab, "m": 4096, "n": V3.hidden, "k": V3.intermediate,
    "alignment": 1, "element_bytes": 2, "weight_bytes": 2, "wide_bytes": 2, "index_bytes": 8, "granularity": "1x128",
    "needs": (True,) * 4,
}  # fmt: skip
"""A DeepSeek-V3 problem in the words every plan shares."""

DEFAULTS: dict[Any, Any] = {int: 128, bool: False, float: 1.0, str: "bfloat16"}
DTYPES = ("bfloat16", "float16", "float32")


class _Everything(frozenset):
    def __contains__(self, name: object) -> bool:
        return True


FULL_BUILD = Environment(
    triton=True,
    extension_ops=_Everything(),
    extension_archs=frozenset({80, 90, 100}),
    torch_functions=_Everything(),
    cuda=(13, 0),
    cpu_ops=_Everything(),
)


def example(op: Operator, **fields) -> Any:
    """A representative `plan.Problem` of `op`, made of its field names and types."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(op.plan.Problem):
        if f.name in fields:
            values[f.name] = fields[f.name]
        elif get_origin(f.type) is Literal:
            named = [v for v in get_args(f.type) if isinstance(v, str) and v in op.name]
            values[f.name] = max(named, key=len) if named else get_args(f.type)[0]
        elif f.default is dataclasses.MISSING or f.default == ():
            values[f.name] = SIZES.get(f.name, DEFAULTS.get(f.type))
    return op.plan.Problem(**values)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(r) + " |" for r in (header, ("---",) * len(header), *escaped))


def _runs(op: Operator, problem, device: DeviceSpec) -> str:
    planned = op.plan.backends(problem, device, FULL_BUILD)
    reasons = {"reference": "", **{b: why_not for b, why_not in planned.items() if b in op.backends}}
    order = getattr(op.plan, "preference", lambda *_: BACKENDS)(problem, device)
    chosen = choose(op.name.partition(".")[0], device, reasons, order=order).backend or "nothing"
    others = [b for b in BACKENDS if b not in (chosen, "reference") and not reasons.get(b, "absent")]
    return ", ".join([chosen, *(f"({b})" for b in others)])


def support_matrix() -> str:
    """Markdown: op x dtype x device -> the automatic backend and, in brackets, those that run when asked for."""
    devices = {f"sm_{d.arch}": d for d in (A100, L40S, H100, B200)} | {"CPU": CPU}
    rows: dict[tuple[str, ...], list[str]] = {}
    for op in OPERATORS.values():
        if not hasattr(deepseek_kernels, op.name):
            continue  # an overload, or a step of another op
        has_dtype = any(f.name == "dtype" for f in dataclasses.fields(op.plan.Problem))
        for dtype in DTYPES if has_dtype else ("e4m3",) if "fp8" in op.name else ("integers",):
            problem = example(op, dtype=dtype, element_bytes=4 if dtype == "float32" else 2)
            cells = tuple(_runs(op, problem, device) for device in devices.values())
            rows.setdefault((f"`{op.name}`", *cells), []).append(dtype)
    return _table(
        ("op", "dtype", *devices), [(name, ", ".join(dtypes), *cells) for (name, *cells), dtypes in rows.items()]
    )


def ops_table() -> str:
    """Markdown: one row per op."""
    rows = []
    for op in OPERATORS.values():
        face = getattr(deepseek_kernels, op.name, None) or op.reference
        summary = (face.__doc__ or "").strip().partition("\n")[0]
        backends = ", ".join([b for b in BACKENDS if b in op.backends] + ["reference"])
        rows.append((f"`{op.schema}`", summary, backends, "yes" if op.differentiable else "no"))
    return _table(("op", "what it does", "backends", "differentiable"), rows)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Everything `info` prints, as plain values."""
    env = _extension.environment()
    devices = [("cpu", CPU)]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices.append((f"cuda:{i}", _device.spec(torch.device("cuda", i))))
    ops: dict[str, Any] = {}
    for op in OPERATORS.values():
        ops[op.name] = {}
        for name, spec in devices:
            choice = op.choice(example(op), spec, forced_backend())
            ops[op.name][name] = {"backend": choice.backend, "not": {b: r for b, r in choice.reasons.items() if r}}
    return {
        "versions": {
            "deepseek_kernels": deepseek_kernels.__version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
        "compiled": {
            "architectures": sorted(env.extension_archs),
            "ops": sorted(env.extension_ops),
            "why_not": env.extension_error,
        },
        "devices": {name: dataclasses.asdict(spec) for name, spec in devices},
        "forced_backend": forced_backend(),
        "ops": ops,
    }


def _print(about: dict[str, Any]) -> None:
    print(", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    compiled = about["compiled"]
    archs = ", ".join(f"sm_{a}" for a in compiled["architectures"])
    count = len(compiled["ops"])
    print(f"compiled kernels: {count} for {archs}" if archs else f"compiled kernels: none; {compiled['why_not']}")
    if about["forced_backend"]:
        print(f"every op is asked to run on {about['forced_backend']}")
    for device, spec in about["devices"].items():
        print(f"\n{device}: {spec['name']}" + (f", sm_{spec['arch']}, {spec['num_sms']} SMs" if spec["arch"] else ""))
        for name, where in about["ops"].items():
            print(f"  {name:<28} {where[device]['backend'] or 'nothing can run it'}")
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, where in about["ops"].items():
            for backend, reason in where[device]["not"].items():
                if backend in OPERATORS[name].backends:
                    reasons.setdefault((backend, reason), []).append(name)
        for (backend, reason), names in reasons.items():
            print(f"  not {backend}: {reason} ({'every op' if len(names) == len(OPERATORS) else ', '.join(names)})")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deepseek_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, and the backend of every op here")
    info.add_argument("--json", action="store_true")
    info.add_argument("--support-matrix", action="store_true", help="markdown: op x dtype x device, from the plans")
    info.add_argument("--ops", action="store_true", help="markdown: every op with its signature")
    tuning = commands.add_parser("tune", help="measure every configuration here; ops then choose by the times")
    tuning.add_argument("--op", nargs="+", metavar="NAME", help="ops to measure; all with a choice if left out")
    tuning.add_argument("--shapes", nargs="+", metavar="m=16,n=7168,k=2048", help="in place of DeepSeek-V3's sizes")
    tuning.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    tuning.add_argument("--seconds", type=float, default=0.05, help="for the samples of one configuration")
    options = parser.parse_args(arguments)
    if options.command == "tune":
        from .tune import tune  # it times, as the benchmarks do; nothing else needs that

        try:
            tune(options.op, options.shapes, torch.device(options.device), options.seconds)
        except ValueError as error:
            parser.error(str(error))
    elif options.support_matrix or options.ops:
        print("\n\n".join([support_matrix()] * options.support_matrix + [ops_table()] * options.ops))
    elif options.json:
        print(json.dumps(collect(), indent=2))
    else:
        _print(collect())
    return 0


if __name__ == "__main__":
    sys.exit(main())
