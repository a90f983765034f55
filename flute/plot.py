"""Plots, drawn with matplotlib where it is installed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flute.errors import UnsupportedProblemError


def check_plotting(path: str | Path) -> None:
    """Check that a plot could be drawn to ``path``, before the work whose result it shows.

    Raises:
        UnsupportedProblemError: matplotlib is missing, the suffix is unknown, or the file cannot be
            written.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UnsupportedProblemError("Plots need matplotlib: `pip install matplotlib`.") from error
    path = Path(path)
    known = plt.figure().canvas.get_supported_filetypes()
    plt.close("all")
    if path.suffix.lstrip(".") not in known:
        raise UnsupportedProblemError(
            f"`{path}` has suffix {path.suffix!r}; expected one of {sorted(known)}."
        )
    if not path.parent.is_dir():
        raise UnsupportedProblemError(f"`{path.parent}` is not a folder to put a plot in.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UnsupportedProblemError(f"`{path}` cannot be written. Choose another file.")


def plot_quality(points: Sequence[tuple[str, int, float]], path: str | Path, subtitle: str) -> None:
    """Plot perplexity against size.

    Args:
        points: (name, bytes, perplexity) of each model; the first is the reference, drawn as a
            line.
        path: file to write, .png or another suffix of matplotlib.
        subtitle: what was measured on.

    Raises:
        UnsupportedProblemError: matplotlib is missing.
    """
    check_plotting(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150)
    sizes = [num_bytes / 1e6 for _, num_bytes, _ in points]
    values = [value for _, _, value in points]
    axes.axhline(values[0], color="0.6", linewidth=1, linestyle="--", zorder=1)
    axes.scatter(sizes[:1], values[:1], color="0.3", s=50, zorder=3)
    order = sorted(range(1, len(points)), key=lambda i: sizes[i])
    axes.plot([sizes[i] for i in order], [values[i] for i in order], "o-", color="C0", zorder=2)
    for (name, _, value), size in zip(points, sizes, strict=True):
        axes.annotate(
            f"{name}: {value:.2f}", (size, value), (6, 6), textcoords="offset points", fontsize=8
        )
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
    axes.set(xlabel="size, MB", ylabel="perplexity (lower is better)")
    axes.set_title(f"Perplexity against size\n{subtitle}", fontsize=10, loc="left")
    axes.margins(x=0.15, y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def plot_evaluation(records: Sequence[Mapping[str, Any]], path: str | Path, subtitle: str) -> None:
    """Plot models side by side: perplexity, KL divergence and tasks, a panel each.

    Models that differ in bits per weight stand at their bits, others in a row.

    Args:
        records: of each model: "name", "bits_per_weight", "perplexity", "perplexity_error"; those
            but the reference "kl" ("mean", "error", "p50", "p99"); maybe "scores" (task -> (value,
            standard error)).
        path: file to write, .png or another suffix of matplotlib.
        subtitle: what was measured on.

    Raises:
        UnsupportedProblemError: matplotlib is missing.
    """
    check_plotting(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    compared = [record for record in records if record.get("kl")]
    asked = [record for record in records if record.get("scores")]
    panels = 1 + bool(compared) + bool(asked)
    figure, row = plt.subplots(1, panels, figsize=(1 + 4.5 * panels, 4.2), dpi=130, squeeze=False)
    axes = list(row[0])
    _plot_values(
        axes[0],
        records,
        [(r["perplexity"], r["perplexity_error"]) for r in records],
        "perplexity (lower is better)",
    )
    if compared:
        values = [(r["kl"]["mean"], r["kl"]["error"]) for r in compared]
        places = _plot_values(axes[1], compared, values, "KL to the reference, nats per token")
        for key, marker in (("p50", "_"), ("p99", "^")):
            heights = [r["kl"][key] for r in compared]
            label = f"{key[1:]} % of the tokens lie below"
            axes[1].plot(places, heights, marker, color="0.5", label=label)
        axes[1].legend(fontsize=7, frameon=False)
        if min(r["kl"]["p50"] for r in compared) > 0:
            axes[1].set_yscale("log")
    if asked:
        _plot_scores(axes[-1], asked)
    for one in axes:
        one.grid(axis="y", alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    figure.suptitle(f"Quality. {subtitle}", fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    _save(figure, path)


def _plot_values(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    values: Sequence[tuple[float, float]],
    label: str,
) -> list[float]:
    """Draw (value, standard error) of each model against bits, or in a row; return the places."""
    heights, errors = ([pair[i] for pair in values] for i in (0, 1))
    bits = [float(record["bits_per_weight"]) for record in records]
    by_bits = len(set(bits)) == len(bits) > 1
    places = bits if by_bits else [float(i) for i in range(len(bits))]
    order = sorted(range(len(places)), key=places.__getitem__)
    style = "o-" if by_bits else "o"
    axes.errorbar(
        [places[i] for i in order],
        [heights[i] for i in order],
        [errors[i] for i in order],
        fmt=style,
        color="C0",
        capsize=3,
    )
    for record, place, height in zip(records, places, heights, strict=True):
        name = f"{record['name']}\n" if by_bits else ""
        text = f"{name}{height:.3g}"
        axes.annotate(text, (place, height), (5, 4), textcoords="offset points", fontsize=7)
    if by_bits:
        axes.set_xlabel("bits per weight of the linear layers", fontsize=8)
    else:
        axes.set_xticks(places, [record["name"] for record in records], rotation=20, ha="right")
    if max(heights) > 4 * min(heights) > 0:
        axes.set_yscale("log")
    axes.set_ylabel(label, fontsize=8)
    axes.margins(x=0.15, y=0.15)
    return places


def _plot_scores(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw a group of bars per task, a bar per model."""
    tasks = list(dict.fromkeys(task for record in records for task in record["scores"]))
    width = 0.8 / len(records)
    for j, record in enumerate(records):
        places = [i + (j - (len(records) - 1) / 2) * width for i in range(len(tasks))]
        pairs = [record["scores"].get(task, (0.0, 0.0)) for task in tasks]
        heights, errors = ([pair[i] for pair in pairs] for i in (0, 1))
        axes.bar(places, heights, width, yerr=errors, capsize=2, label=record["name"])
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axes.set_ylabel("zero-shot, lm-eval", fontsize=8)
    axes.legend(fontsize=7, frameon=False)


def _save(figure: Any, path: str | Path) -> None:
    """Write a figure, and forget it.

    Raises:
        UnsupportedProblemError: the file cannot be written.
    """
    import matplotlib.pyplot as plt

    try:
        figure.savefig(path)
    except OSError as error:
        raise UnsupportedProblemError(
            f"The plot `{path}` cannot be written: {error.strerror or error}."
        ) from error
    finally:
        plt.close(figure)
