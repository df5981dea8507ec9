"""Time the ops against what a user would otherwise run.

    python benchmarks/run.py [--op NAME ...] [--device cpu|cuda] [--quick] [--seconds S] [--threads N] [--warm]
                             [--compile] [--out FILE.jsonl [--resume] [--budget SECONDS]]

Exit codes: 1 if any of our results was wrong or could not be made, 4 if the device stopped working (an illegal
access; with --resume the next run goes on after that case), 75 if the budget left cases over.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import Bench, Case, environment, failure, label, run_case, write

WRONG, DEVICE_LOST, LEFT_OVER = 1, 4, 75
COLUMNS = (
    "provider",
    "p20 us",
    "p50 us",
    "p80 us",
    "GB/s",
    "TFLOP/s",
    "% roof",
    "host us",
    "rel error",
    "ratio to peers",
)


def benches(families: list[str] | None) -> dict[str, list[Bench]]:
    """Family -> its benches, from every bench_<family>.py."""
    folder = Path(__file__).parent
    found = sorted(p.stem.removeprefix("bench_") for p in folder.glob("bench_*.py"))
    unknown = set(families or ()) - set(found)
    if unknown:
        raise SystemExit(f"no bench for {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return {name: importlib.import_module(f"bench_{name}").BENCHES for name in families or found}


def row(record: dict) -> tuple[str, ...]:
    if record["status"] != "ok":
        return (record["provider"], record["status"].upper(), record["reason"])
    t = record["time_us"]
    return (
        record["provider"],
        *(f"{t[q]:.1f}" for q in ("p20", "p50", "p80")),
        f"{record['gb_s']:.1f}",
        f"{record['tflop_s']:.3f}",
        f"{record['percent_of_roof']:.0f}",
        "-" if record["host_us"] is None else f"{record['host_us']:.1f}",
        f"{record['relative_error']:.1e}",
        ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in record.get("ratio", {}).items()),
    )


def show(bench: Bench, case: Case, records: list[dict]) -> None:
    dims = ", ".join(f"{k}={v}" for k, v in case.dims.items())
    print(f"\n{bench.label} {case.name} ({dims})")
    rows = [COLUMNS, *map(row, records)]
    widths = [max(len(r[i]) for r in rows if len(r) == len(COLUMNS)) for i in range(len(COLUMNS))]
    for r in rows:
        if len(r) == len(COLUMNS):
            print(
                "  " + "  ".join(f"{c:<{w}}" if i in (0, 9) else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r, widths)))
            )
        else:
            print(f"  {r[0]:<{widths[0]}}  {r[1]}  {r[2]}")
    sys.stdout.flush()


def chosen(options, device: torch.device) -> Iterator[tuple[Bench, Case]]:
    for family in benches(options.op).values():
        for bench in family:
            for case in bench.cases:
                if (options.quick and not case.quick) or device.type not in case.devices:
                    continue
                if not options.case or case.name in options.case:
                    yield bench, case


def finished(file: Path, about: dict) -> set[tuple[str, str]]:
    """(op, case) of the records that this commit already made on this device."""
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    same = ("device_name", "commit")
    return {(r["op"], r["case"]) for r in records if all(r[k] == about[k] for k in same)}


def measure(bench: Bench, case: Case, device: torch.device, options) -> list[dict]:
    try:
        return run_case(
            bench, case, device,
            quick=options.quick, compiled=options.compile, seconds=options.seconds, warm=options.warm,
        )  # fmt: skip
    except Exception as error:  # inputs or reference: the other cases still count
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [failure(bench, case, reason, options.warm)]


def usable(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access it does not, for the rest of the process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", metavar="NAME", help="families, as in bench_<NAME>.py; all if left out")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the small cases only, few samples")
    parser.add_argument("--seconds", type=float, help="about how long the samples of one provider may take (0.5)")
    parser.add_argument("--threads", type=int, help="of torch and of our CPU kernels")
    parser.add_argument("--warm", action="store_true", help="leave a CPU's caches as they are between samples")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager peer")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append one line per provider and case")
    parser.add_argument("--resume", action="store_true", help="leave out cases that --out holds for this commit")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="then start no more cases"
    )
    options = parser.parse_args()

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.warm and options.device != "cpu":
        parser.error("--warm is for --device cpu")
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    about = environment(device)
    print(f"{about['device_name']}, {about['versions']}, commit {about['commit']}")
    start, failures = time.perf_counter(), 0
    skip = finished(options.out, about) if options.resume and options.out else set()
    todo = [
        (bench, case) for bench, case in chosen(options, device) if (label(bench, options.warm), case.name) not in skip
    ]
    while todo and time.perf_counter() - start < options.budget:
        bench, case = todo.pop(0)
        records = measure(bench, case, device, options)
        failures += sum(bool(r["backend"]) and r["status"] != "ok" for r in records)
        show(bench, case, records)
        if options.out:
            write(options.out, [record | about for record in records])
        if not usable(device):
            print(f"the device stopped working in {bench.label} {case.name}")
            return DEVICE_LOST
    print(f"\n{time.perf_counter() - start:.0f} s, {failures} of our results wrong or missing, {len(todo)} cases left")
    return WRONG if failures else LEFT_OVER if todo else 0


if __name__ == "__main__":
    sys.exit(main())
