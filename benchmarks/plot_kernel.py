"""Draw what `bench_kernel.py` measured: the share of the limit, and the speed-up over cuBLAS.

Also prints the table of the README. Of problems with more than 32 tokens the speed-up is drawn from
one token on, if files with fewer are named too.

Usage: python benchmarks/plot_kernel.py results.json ... [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Record = dict[str, Any]
BITS = {4: "#0072B2", 3: "#E69F00", 2: "#009E73"}
"""Colours that the colour-blind tell apart (Okabe and Ito)."""
LINES = {
    "flute": ("#D55E00", "o"),
    "humming": ("#0072B2", "s"),
    "marlin": ("#009E73", "^"),
    "gemlite": ("#CC79A7", "D"),
    "bitsandbytes": ("#56B4E9", "v"),
    "tinygemm": ("#999999", "P"),
}
MOST_DECODED = 32
"""Tokens of the plots of decoding."""
KINDS = {
    "bitsandbytes": "bitsandbytes nf4",
    "tinygemm": "tinygemm int (bf16)",
    "flute": "flute, any table",
}


def one_setting(records: Sequence[Record]) -> list[Record]:
    """Return the records that agree with the first in dtype, group and table."""
    keys = ("dtype", "group_size", "table")
    return [r for r in records if all(r[key] == records[0][key] for key in keys)]


def subtitle(records: Sequence[Record]) -> str:
    r = records[0]
    return (
        f"{r['gpu']}, CUDA {r['cuda']}, {r['dtype']}, group {r['group_size']}, "
        f"a table per {r['table']}; commit {r['commit'] or '?'}, {r['date']}"
    )


def shapes_of(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Return (N, K), largest first."""
    return sorted({(r["n"], r["k"]) for r in records}, key=lambda s: (s[0] * s[1], s), reverse=True)


def bits_of(records: Sequence[Record]) -> list[int]:
    return sorted({r["num_bits"] for r in records}, reverse=True)


def markdown(records: Sequence[Record]) -> str:
    """Return a table of the times at M = 1: ours at all bit widths, others' at 4 bits."""
    bits = bits_of(records)
    here = {(r["n"], r["k"], r["num_bits"]): r for r in records if r["m"] == 1}
    names = [name for name in LINES if any(name in r["peers"] for r in here.values())]
    heads = ["N x K", f"flute {' / '.join(map(str, bits))} bits", f"cuBLAS {records[0]['dtype']}"]
    rows = [heads + [KINDS.get(name, f"{name} int") for name in names], ["---"] * (3 + len(names))]
    for N, K in shapes_of(records):
        ours = [here[N, K, b] for b in bits]
        times = [ours[0]["peers"].get(name) for name in names]
        rows.append(
            [
                f"{N} x {K}",
                " / ".join(f"{r['us']:.1f}" for r in ours),
                f"{ours[0]['cublas_us']:.1f}",
                *(f"{us:.1f}" if us else "-" for us in times),
            ]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"us at M = 1; {subtitle(records)}", "", *lines])


def plain(axes: Axes) -> None:
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def plot_limit(records: Sequence[Record], path: Path) -> None:
    """Draw the share of the limit at the fewest tokens measured: a bar per shape and bit width."""
    m = min(r["m"] for r in records)
    shapes, bits = shapes_of(records), bits_of(records)
    share = {(r["n"], r["k"], r["num_bits"]): r["limit_fraction"] for r in records if r["m"] == m}
    figure, axes = plt.subplots(figsize=(8, 3.2), dpi=130)
    width = 0.8 / len(bits)
    for j, num_bits in enumerate(bits):
        places = [i + (j - (len(bits) - 1) / 2) * width for i in range(len(shapes))]
        heights = [100 * share.get((*shape, num_bits), 0) for shape in shapes]
        bars = axes.bar(places, heights, width, color=BITS[num_bits], label=f"{num_bits} bits")
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.axhline(100, color="0.4", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(shapes)), [f"{N} x\n{K}" for N, K in shapes])
    axes.set_ylabel("% of the bandwidth limit", fontsize=8)
    axes.set_ylim(0, 118)
    axes.legend(fontsize=8, ncols=len(bits), frameon=False, loc="upper right")
    plain(axes)
    axes.set_title(
        f"Time the bytes must take over time taken, M = {m}\n{subtitle(records)}",
        fontsize=9,
        loc="left",
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def speed_ups(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Return M and how many times as fast as cuBLAS a library is, where it was measured."""
    points = {}
    for r in records:
        us = r["us"] if name == "flute" else r["peers"].get(name)
        if us:
            points[r["m"]] = r["cublas_us"] / us
    return sorted(points), [points[m] for m in sorted(points)]


def plot_speed_up(
    records: Sequence[Record], path: Path, shapes: Sequence[tuple[int, int]] | None = None
) -> None:
    """Draw the speed-up over cuBLAS against M: a row per shape, a panel per bit width.

    Args:
        records: of one setting.
        path: file to write.
        shapes: (N, K) to draw; default the largest and the smallest measured.
    """
    every = shapes_of(records)
    shapes = shapes or list(dict.fromkeys((every[0], every[-1])))
    bits = bits_of(records)
    size = (2 + (2.6 if len(bits) > 1 else 6) * len(bits), 0.9 + 2.3 * len(shapes))
    figure, grid = plt.subplots(
        *(len(shapes), len(bits)), figsize=size, dpi=130, squeeze=False, sharex=True, sharey="row"
    )
    handles: dict[str, Any] = {}
    for row, (N, K) in zip(grid, shapes, strict=True):
        for axes, num_bits in zip(row, bits, strict=True):
            here = [r for r in records if (r["n"], r["k"], r["num_bits"]) == (N, K, num_bits)]
            for name, (colour, marker) in reversed(LINES.items()):  # flute in front
                tokens, values = speed_ups(here, name)
                if not tokens:
                    continue
                thick = {"linewidth": 2.2, "markersize": 5} if name == "flute" else {}
                style = {"linewidth": 1.2, "markersize": 4, **thick}
                (line,) = axes.plot(tokens, values, color=colour, marker=marker, **style)
                handles[name] = line
            axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
            axes.set_xscale("log", base=2)
            tokens = sorted({r["m"] for r in here})
            marks = [m for m in tokens if m & (m - 1) == 0]
            marks = marks[:: 1 + (len(marks) - 1) // 7]
            axes.set_xticks(marks, [str(m) for m in marks])
            axes.minorticks_off()
            plain(axes)
            axes.set_title(f"{N} x {K}, {num_bits} bits", fontsize=9)
        row[0].set_ylim(bottom=0)  # of the whole row, once its lines are drawn
        row[0].set_ylabel(f"x cuBLAS, {records[0]['dtype']}", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("tokens, M", fontsize=8)
    names = [name for name in LINES if name in handles]
    figure.suptitle(f"Speed-up over cuBLAS. {subtitle(records)}", fontsize=8, x=0.01, ha="left")
    figure.legend(
        [handles[name] for name in names],
        [KINDS.get(name, f"{name} int") for name in names],
        **{
            "fontsize": 8,
            "ncols": len(names),
            "frameon": False,
            "loc": "lower center",
            "columnspacing": 1.2,
        },
    )
    figure.tight_layout(rect=(0, 0.3 / size[1], 1, 1))
    figure.savefig(path)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", type=Path, nargs="+", help="what bench_kernel.py --json wrote, of one commit"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    every = [record for path in args.results for record in json.loads(path.read_text())]
    records = one_setting(every)
    few = [record for record in records if record["m"] <= MOST_DECODED]
    if few:
        for name, plot in (
            ("kernel_limit.png", plot_limit),
            ("kernel_speed_up.png", plot_speed_up),
        ):
            plot(few, args.out / name)
            print(args.out / name)
    kinds = {(r["n"], r["k"], r["num_bits"]) for r in records if r["m"] > MOST_DECODED}
    wide = [r for r in records if (r["n"], r["k"], r["num_bits"]) in kinds]
    if wide:
        plot_speed_up(wide, args.out / "kernel_batches.png", shapes_of(wide))
        print(args.out / "kernel_batches.png")
    if any(record["m"] == 1 for record in records):
        print(f"\n{markdown(few)}")


if __name__ == "__main__":
    main()
