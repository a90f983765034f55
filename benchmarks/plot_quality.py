"""Draw what `bench_quality.py` measured: loss over bf16 against bits per weight, Pareto front.

Writes the tables beside the plot, in Markdown, and prints them; the first is the README's.

Usage: python benchmarks/plot_quality.py [results.json] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, NullFormatter

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
COLOURS = (
    *("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9"),
    *("#222222", "#999999", "#8C510A", "#F0E442", "#5E3C99", "#B2DF8A"),
    *("#E7298A", "#A6761D", "#1B9E77", "#08306B", "#FB9A99", "#525252"),
    *("#CAB2D6", "#66C2A5"),
)
"""Colours that the colour-blind tell apart (Okabe and Ito), then some more."""
MARKERS = {32: "o", 64: "s", 128: "^", 256: "D"}
SHAPES = {32: "circle", 64: "square", 128: "triangle", 256: "diamond"}
"""Marker of a group size, and how the title calls it."""
ORDER = (
    *("nf", "int", "fp", "bof", "bof-s", "mse", "nfl from nf", "nfl", "nfl, end to end", "gptq"),
    *("gptq, guided", "lnq", "lnq, guided", "lnq, table per row", "nfl from lnq, end to end"),
    "nfl from lnq, table per row",
)
"""Rows of the tables; others follow as they come."""
TABLE_GROUP = 64
SIDEWAYS = 0.028
"""Bits per weight between the marks of methods of one size."""
FLOOR = 1e-3
"""Losses below this, nats per token, are drawn at it: the axis is logarithmic."""


def averaged(records: Iterable[Record]) -> list[Record]:
    """Return one record per model, text, method, bits, group and tokens: the mean over seeds.

    "spread" is the standard deviation over seeds, 0 where there is one; "commits" are those of all.
    """
    keys = ("model", "text", "method", "bits", "group", "tokens")
    cases: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cases.setdefault(tuple(record[key] for key in keys), []).append(record)
    out = []
    for same in cases.values():
        names = ("dloss", "dloss_error", "kl", "ppl", "seconds", "agreement")
        means = {name: fmean(r[name] for r in same) for name in names}
        losses = [r["dloss"] for r in same]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        commits = list(dict.fromkeys(r["commit"] or "?" for r in same))
        out.append({**same[0], **means, "spread": spread, "seeds": len(same), "commits": commits})
    return out


def longest(records: Sequence[Record]) -> list[Record]:
    """Return the records of the most tokens of each model and text that the bf16 model has."""
    most: dict[tuple[str, str], int] = {}
    for r in records:
        key = r["model"], r["text"]
        most[key] = max(most.get(key, 0), r["tokens"] if r["kind"] == "dense" else 0)
    return [r for r in records if r["tokens"] == most[r["model"], r["text"]]]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that none is at most as large as in both coordinates, by the first."""
    best, kept = float("inf"), []
    for x, y in sorted(points):
        if y < best:
            best = y
            kept.append((x, y))
    return kept


def cell(record: Record | None, reference: Record | None) -> str:
    """Return the loss over bf16 with its standard error, its share of nf's, the KL divergence."""
    if record is None:
        return "-"
    share = f" ({record['dloss'] / reference['dloss']:.0%})" if reference else ""
    loss = f"{record['dloss']:.3f} ± {record['dloss_error']:.3f}"
    return f"{loss}{share}, {record['kl']:.3f}"


def markdown(records: Sequence[Record], model: str, text: str, group: int = TABLE_GROUP) -> str:
    """Return a table of one model and text: a row per method, a column per number of bits."""
    means = [r for r in averaged(records) if (r["model"], r["text"]) == (model, text)]
    here = {(r["method"], r["bits"]): r for r in means if r["group"] == group}
    bits = sorted({r["bits"] for r in means if r["kind"] == "method"}, reverse=True)
    known = dict.fromkeys(r["method"] for r in means if r["kind"] != "control")
    methods = sorted(known, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    rows = [["method", *(f"{b} bits" for b in bits)], ["---"] * (1 + len(bits))]
    for method in methods:
        cells = [cell(here.get((method, b)), here.get(("nf", b))) for b in bits]
        if any(text != "-" for text in cells):
            rows.append([method, *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    dense = next(r for r in means if r["kind"] == "dense")
    commits = ", ".join(dict.fromkeys(commit for r in means for commit in r["commits"]))
    about = (
        "Loss over bf16 in nats per token, ± its standard error over the windows (share of "
        "`nf`'s), and KL divergence from bf16; group "
        f"{group}; {model}, {dense['tokens']} tokens of {text} in windows of {dense['window']}, "
        f"bf16 perplexity {dense['ppl']:.2f}; commit {commits}, {dense['date']}"
    )
    return "\n".join([about, "", *lines])


def tables(records: Sequence[Record]) -> str:
    """Return the table of each model, text and group size; the usual group size first."""
    found = []
    for model, text in dict.fromkeys((r["model"], r["text"]) for r in records):
        here = [r for r in records if (r["model"], r["text"], r["kind"]) == (model, text, "method")]
        groups = sorted({r["group"] for r in here}, key=lambda g: (g != TABLE_GROUP, g))
        found += [(group, markdown(records, model, text, group)) for group in groups]
    found.sort(key=lambda pair: pair[0] != TABLE_GROUP)  # stable
    return "\n\n".join(text for _, text in found) + "\n"


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw a panel per model and text: loss over bf16 against bits per weight."""
    means = [r for r in averaged(records) if r["kind"] in ("method", "baseline")]
    panels = list(dict.fromkeys((r["model"], r["text"]) for r in means))
    methods = list(dict.fromkeys(r["method"] for r in means))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    legend_height = 0.3 + 0.17 * -(-len(methods) // 4)  # inches
    size = (5.2 * columns + 0.6, 3.9 * rows + legend_height)
    figure, grid = plt.subplots(rows, columns, figsize=size, dpi=130, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (model, text) in zip(grid.flat, panels, strict=False):
        here = [r for r in means if (r["model"], r["text"]) == (model, text)]
        handles |= draw_panel(axes, here, methods)
        axes.set_title(f"{model}, {here[0]['tokens']} tokens of {text}", fontsize=9, loc="left")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    groups = ", ".join(f"{SHAPES[g]} {g}" for g in sorted({r["group"] for r in means}))
    dated = (f"{commit} ({r['date']})" for r in means for commit in r["commits"])
    commits = ", ".join(dict.fromkeys(dated))
    figure.suptitle(
        f"Loss over bf16 against size of the linear layers; group: {groups}; line: Pareto front; "
        "methods of one size side by side, the worst first; bars: standard error over windows; "
        f"commit {commits}",
        **{"fontsize": 7, "x": 0.01, "ha": "left"},
    )
    legend = {"fontsize": 8, "ncols": 4, "frameon": False, "loc": "lower center"}
    figure.legend(list(handles.values()), list(handles), **legend)
    figure.tight_layout(rect=(0, legend_height / size[1], 1, 1))
    figure.savefig(path)
    plt.close(figure)


def side_by_side(points: Sequence[tuple[float, float]]) -> list[float]:
    """Return how far to draw each (size, loss) from its size: those of one size in their order."""
    sizes: dict[float, list[int]] = {}
    for i, (x, _) in enumerate(points):
        sizes.setdefault(round(x, 2), []).append(i)
    shifts = [0.0] * len(points)
    for same in sizes.values():
        worst_first = sorted(same, key=lambda i: -points[i][1])
        for place, i in enumerate(worst_first):
            shifts[i] = (place - (len(same) - 1) / 2) * SIDEWAYS
    return shifts


def draw_panel(axes: Axes, records: Sequence[Record], methods: Sequence[str]) -> dict[str, Any]:
    """Draw one model's points and their front; return name -> handle for the legend."""
    handles: dict[str, Any] = {}
    points = [(r["bits_per_weight"], max(FLOOR, r["dloss"])) for r in records]
    shifts = side_by_side(points)
    at = dict(zip(points, shifts, strict=True))
    edge = [(x + at[x, y], y) for x, y in front(points)]
    points = [(x + shift, y) for (x, y), shift in zip(points, shifts, strict=True)]
    axes.plot(*zip(*edge, strict=True), color="0.7", linewidth=1, zorder=1)
    for record, (x, y) in zip(records, points, strict=True):
        colour = COLOURS[methods.index(record["method"]) % len(COLOURS)]
        filled = record["kind"] == "method"
        handle = axes.scatter(
            *([x], [y]),
            s=26,
            marker=MARKERS.get(record["group"], "P"),
            facecolor=colour if filled else "white",
            edgecolor=colour,
            linewidth=1.2,
            zorder=3,
        )
        error = record["dloss_error"]
        ends = [[y - max(FLOOR, y - error)], [error]]
        axes.errorbar([x], [y], ends, color=colour, linewidth=0.8, zorder=2)
        if record["group"] == TABLE_GROUP or record["method"] not in handles:
            handles[record["method"]] = handle
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bits per weight, scales and tables included", fontsize=8)
    axes.set_ylabel("nats per token over bf16", fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return handles


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "quality.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="quality", help="of the files; default quality")
    args = parser.parse_args(argv)
    records = longest(json.loads(args.results.read_text()))
    plot(records, args.out / f"{args.name}.png")
    (args.out / f"{args.name}.md").write_text(tables(records))
    print(f"{args.out / f'{args.name}.png'}\n\n{tables(records)}", end="")


if __name__ == "__main__":
    main()
