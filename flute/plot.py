"""Plots, drawn with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flute.errors import UnsupportedProblemError


def check_plotting(path: str | Path) -> None:
    """Check that a plot could be drawn to ``path``, before the work whose result it shows.

    Raises:
        UnsupportedProblemError: matplotlib is missing, or the suffix or folder is no good.
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
    figure.savefig(path)
    plt.close(figure)
