"""The command line: one file per command, each with `add_parser` and `run`.

Results go to standard output (tables, or JSON with `--json`), progress and errors to standard
error. Exit codes: 0 done, 1 a clear failure (one line says why), 2 wrong arguments, 130
interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from flute import __version__
from flute.cli import convert, doctor, evaluate, generate, inspect, quantize, serve, tune
from flute.console import report_error, show_warnings_plainly
from flute.errors import FluteError

COMMANDS = (quantize, generate, serve, evaluate, inspect, convert, tune, doctor)

_EPILOG = """\
examples:
  flute quantize MODEL OUT                    4 bits, groups of 64, no data needed
  flute quantize MODEL OUT --bits 3           smaller
  flute generate OUT "Once upon a time"       try it
  flute serve OUT                             answer OpenAI requests
  flute eval MODEL OUT --plot quality.png     what it cost
  flute inspect OUT                           what is inside
  flute tune OUT                              find its fastest kernels on this GPU
  flute doctor                                what this machine will use

MODEL is a folder with config.json and safetensors, or a name on the Hugging Face Hub.
"""


class _Parser(argparse.ArgumentParser):
    """A parser that tells a wrong argument in one line, and where the right ones stand."""

    def error(self, message: str) -> NoReturn:
        report_error(f"{message}. `{self.prog} --help` shows what it takes.")
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="flute",
        description="Lookup-table quantised language models: weight = table[code] * scale.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flute {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    show_warnings_plainly()
    try:
        code: int = args.run(args)
    except FluteError as error:
        report_error(str(error))
        return 1
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        report_error(
            f"{str(error).partition('. ')[0] or 'Out of memory'}. Take a smaller model or fewer "
            "tokens at once (`--window`, `--sequence`), end what else runs there, or try "
            "`--device cpu`."
        )
        return 1
    except KeyboardInterrupt:
        report_error("Interrupted.")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return code
