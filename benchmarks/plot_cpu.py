"""Draw how many times as fast as others CPU products are, against tokens, from bench_cpu.py's JSON.

Usage: python benchmarks/plot_cpu.py benchmarks/results/cpu.json [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "torch bf16": "#1f77b4",
    "torch int4": "#2ca02c",
    "bitsandbytes nf4": "#9467bd",
    "llama.cpp IQ4_NL": "#d62728",
    "llama.cpp Q4_0": "#ff7f0e",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of bench_cpu.py")
    parser.add_argument("--shape", default="14336x4096", help="N x K")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    result = json.loads(args.results.read_text())
    records = [r for r in result["records"] if r["shape"] == args.shape and r["threads"] == 1]
    if not records:
        raise SystemExit(f"{args.results} has no records of {args.shape} with one thread.")
    every = sorted({r["bits"] for r in records}, reverse=True)
    figure, axes = plt.subplots(1, len(every), figsize=(9, 3.2), dpi=130, sharey=True)
    for axis, bits in zip(axes if len(every) > 1 else [axes], every, strict=True):
        ours = sorted((r for r in records if r["bits"] == bits), key=lambda r: r["M"])
        tokens = [r["M"] for r in ours]
        for name, colour in COLOURS.items():
            points = [r["ratios"].get(name) for r in ours]
            if any(points):
                axis.plot(tokens, points, "o-", color=colour, label=name, markersize=4)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{bits} bits", xlabel="tokens")
        axis.set_xticks(tokens, [str(m) for m in tokens])
        axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("their time / flute's")
    figure.axes[-1].legend(fontsize=7)
    figure.suptitle(f"{args.shape}, bf16, one thread, {result['machine']['cpu']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out / "cpu_speed_up.png")


if __name__ == "__main__":
    main()
