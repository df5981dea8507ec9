"""Tables and a figure from what run.py wrote.

    python benchmarks/report.py FILE.jsonl ... [--out FOLDER]

Writes FOLDER/report.md and FOLDER/report.png. Of several records of one case and provider the last counts.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

HEADER = (
    "case", "provider", "p20 us", "p50 us", "p80 us", "GB/s", "TFLOP/s", "% of roof", "bound", "host us", "rel. error",
    "ratio to peers",
)  # fmt: skip


def load(files: Iterable[Path]) -> list[dict]:
    records = {}
    for file in files:
        for line in file.read_text().splitlines():
            r = json.loads(line)
            key = (r["device_name"], r["op"], r["case"], r["provider"])
            records.pop(key, None)
            records[key] = r
    return list(records.values())


def row(r: dict) -> tuple[str, ...]:
    if r["status"] != "ok":
        return (r["case"], r["provider"], f"**{r['status'].upper()}** {r['reason']}".replace("|", "\\|"))
    t = r["time_us"]
    return (
        r["case"],
        r["provider"],
        *(f"{t[q]:.1f}" for q in ("p20", "p50", "p80")),
        f"{r['gb_s']:.0f}",
        f"{r['tflop_s']:.1f}",
        f"{r['percent_of_roof']:.0f}",
        r["bound"],
        "-" if r["host_us"] is None else f"{r['host_us']:.1f}",
        f"{r['relative_error']:.1e}",
        ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in r.get("ratio", {}).items()),
    )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def about(records: list[dict]) -> list[str]:
    """What the numbers were made with, each value once."""
    lines = []
    for name in dict.fromkeys(r["device_name"] for r in records):
        here = [r for r in records if r["device_name"] == name]
        versions = ", ".join(f"{k} {v}" for k, v in here[-1]["versions"].items() if v)
        commits = ", ".join(dict.fromkeys(str(r["commit"]) + ("+" if r["dirty"] else "") for r in here))
        lines += [f"**{name}**", "", f"- {versions}", f"- commit {commits}"]
        if here[-1].get("device") == "cpu":
            lines.append("- threads " + ", ".join(dict.fromkeys(str(r["threads"]) for r in here)))
            disturbed = sum(r.get("method") == "disturbed clock" for r in here)
            lines += [f"- other processes disturbed {disturbed} of {len(here)} rows"] if disturbed else []
        if here[-1]["clocks"]:
            lines.append("- " + ", ".join(f"{k} {v}" for k, v in here[-1]["clocks"].items()))
        ceilings = {k: v for r in here for k, v in r.get("ceilings", {}).items()}
        for k, v in ceilings.items():
            measured = f"{v / 1e9:.0f} GB/s, read and written" if k == "copy" else f"{v / 1e12:.1f} TFLOP/s"
            lines.append(f"- measured {k}: {measured}")
        lines += [f"- `{command}`" for command in dict.fromkeys(r["command"] for r in here)] + [""]
    return lines


def markdown(records: list[dict]) -> str:
    lines = ["# Benchmarks", "", *about(records)]
    lines += [
        "Times are quantiles over samples taken in rotation, with the last-level cache cold except where",
        "the heading says that it was warm. The roof is the larger of bytes over the measured copy bandwidth and flops",
        "over the measured matmul rate.",
        "",
        "![percent of the roof, and ratio to the best peer](report.png)",
        "",
    ]
    for op in dict.fromkeys(r["op"] for r in records):
        lines += [f"## {op}", "", _line(HEADER), _line(["---"] * len(HEADER))]
        lines += [
            _line((*cells, *[""] * (len(HEADER) - len(cells)))) for r in records if r["op"] == op and (cells := row(r))
        ]
        lines.append("")
    return "\n".join(lines)


def draw(records: list[dict], file: Path) -> None:
    """One row per case: percent of the roof for each of our backends, and how many times faster than the best peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = [r for r in records if r["status"] == "ok" and r["backend"]]
    if not ours:
        return
    cases = list(dict.fromkeys((r["op"], r["case"]) for r in ours))
    backends = list(dict.fromkeys(r["backend"] for r in ours))
    place = {case: len(cases) - 1 - i for i, case in enumerate(cases)}
    height = 0.8 / len(backends)
    figure, (roof, ratio) = plt.subplots(
        1, 2, sharey=True, figsize=(11, 1.4 + 0.26 * len(cases) * max(1, len(backends) / 2)), layout="constrained"
    )
    for i, backend in enumerate(backends):
        mine = [r for r in ours if r["backend"] == backend]
        y = [place[r["op"], r["case"]] + 0.4 - (i + 0.5) * height for r in mine]
        roof.barh(y, [r["percent_of_roof"] for r in mine], height, label=f"ours {backend}", color=f"C{i}")
        compared = [(at, min(r["ratio"].values())) for at, r in zip(y, mine) if r.get("ratio")]
        ratio.barh([at for at, _ in compared], [x - 1 for _, x in compared], height, left=1, color=f"C{i}")
    roof.set_yticks([place[c] for c in cases], [f"{op}  {case}" for op, case in cases], fontsize=7)
    roof.set_xlabel("percent of the roof")
    roof.axvline(100, color="grey", linewidth=0.8)
    roof.set_xlim(0, max(105, *(r["percent_of_roof"] for r in ours)))
    roof.set_ylim(-0.6, len(cases) - 0.4)
    figure.legend(*roof.get_legend_handles_labels(), loc="outside upper right", ncols=len(backends), fontsize=8)
    ratio.set_xscale("log")
    ratio.axvline(1, color="grey", linewidth=0.8)
    ratio.set_xlabel("times as fast as the best peer")
    ratio.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    figure.suptitle(", ".join(dict.fromkeys(r["device_name"] for r in ours)), x=0.01, ha="left", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="beside the first file if left out")
    options = parser.parse_args()
    folder = options.out or options.files[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    records = load(options.files)
    (folder / "report.md").write_text(markdown(records))
    try:
        draw(records, folder / "report.png")
    except ImportError:
        print("no figure: needs matplotlib")


if __name__ == "__main__":
    main()
