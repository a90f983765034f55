"""What commands print with: tables, JSON, progress bars, errors; and the options they share."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flute.errors import FormatError, UnsupportedProblemError, reason_of
from flute.format import GROUP_SIZES, WHOLE_ROW

stderr = Console(stderr=True, soft_wrap=True)


def print_table(
    title: str,
    columns: list[str],
    rows: list[list[Any]],
    caption: str = "",
    *,
    left: bool = False,
) -> None:
    """Print a table on standard output; columns after the first right-aligned unless ``left``."""
    table = Table(
        title=title,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        show_header=any(columns),
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if left or i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    wide = None if sys.stdout.isatty() else 160
    Console(width=wide).print(table)


def print_json(content: Any) -> None:
    """Print JSON on standard output."""
    print(json.dumps(content, indent=2, ensure_ascii=False))  # noqa: T201


def report_error(message: str) -> None:
    """Print one line on standard error."""
    stderr.print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def report(message: str) -> None:
    """Print a remark on standard error."""
    stderr.print(escape(message), highlight=False)


def show_warnings_plainly() -> None:
    """Print warnings, whoever gives them, as one line without a source position."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        stderr.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False)

    warnings.showwarning = show


def quiet_transformers() -> None:
    """Silence transformers' own progress bars and remarks; errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text("" if speed is None else f"{_scaled(speed)} {unit}/s", style="magenta")


def _scaled(number: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {suffix}"
    return f"{number:.0f} "


class Bar:
    """A progress bar on standard error: done, speed, time left. Use as a context manager.

    Args:
        description: what is being done.
        unit: what is counted, such as "weights".
        total: how many in all; `start` may set it later.
    """

    def __init__(self, description: str, unit: str, total: int | None = None) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _SpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[name]}"),
            console=stderr,
            disable=not stderr.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, unit=unit, name="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.update(self._task, name="")
        self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Set the total, and what an earlier run has done already."""
        if done:
            report(f"Going on after {done / max(total, 1):.0%} of an interrupted run.")
        self._bar.reset(self._task, total=total, completed=done)

    def advance(self, count: int, name: str = "") -> None:
        """Count ``count`` more."""
        self._bar.update(self._task, advance=count, name=name)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_device(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device",
        default="auto",
        help=f"where to {purpose}: cpu, cuda, cuda:1, ... (default: the first GPU, else cpu)",
    )


def seed(text: str) -> int:
    """Parse a seed of torch's generators: 64 bits, and below 0 what torch takes."""
    number = int(text)
    if not -(1 << 63) <= number < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is no seed; expected a number of 64 bits")
    return number


def group_size(text: str) -> int:
    """Parse weights per scale: a number of `GROUP_SIZES`, or "row"."""
    sizes = {str(size): size for size in (*GROUP_SIZES, WHOLE_ROW)} | {"row": WHOLE_ROW}
    if text not in sizes:
        expected = f"{', '.join(map(str, GROUP_SIZES))} or row"
        raise argparse.ArgumentTypeError(f"{text!r} is no group size; expected {expected}")
    return sizes[text]


def check_at_least(option: str, value: int | None, minimum: int) -> None:
    """Refuse a number that is too small; None is one that was not given.

    Raises:
        FormatError: it is below ``minimum``.
    """
    if value is not None and value < minimum:
        raise FormatError(f"`{option}` is {value}; expected at least {minimum}.")


def pick_device(name: str) -> str:
    """Return the device a user asked for, "auto" resolved.

    Raises:
        UnsupportedProblemError: the device is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        is_gpu = torch.device(name).type == "cuda"
    except RuntimeError as error:
        message = f"Device {name!r} cannot be used: torch knows none of this name. Use cpu or cuda."
        raise UnsupportedProblemError(message) from error
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        hint = "`flute doctor` shows the GPUs that torch sees." if is_gpu else "Use cpu or cuda."
        message = f"Device {name!r} cannot be used: {reason_of(error)}. {hint}"
        raise UnsupportedProblemError(message) from error
    return name


def megabytes(num_bytes: float) -> str:
    """Return a size in MB or GB (powers of ten)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
