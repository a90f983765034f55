"""vLLM: `register`, which vLLM calls in each of its processes, and the original's command.

After ``pip install``, vLLM finds the entry point `vllm.general_plugins`, so ``vllm serve`` takes a
quantised folder without a flag. What it then calls is in `flute.integrations.vllm_config`, which
imports vLLM; this file does not.

    python -m flute.integrations.vllm vllm.entrypoints.openai.api_server --model QUANTISED
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

_EXAMPLES = """\
examples:
  flute quantize MODEL OUT
  python -m flute.integrations.vllm vllm.entrypoints.openai.api_server --model OUT
  python -m flute.integrations.vllm vllm.entrypoints.openai.api_server --model OUT \\
      --tensor-parallel-size 2 --quantization flute

The quantisation is read from OUT's config.json; `--quantization flute` only insists on it. Where
this package is installed, `vllm serve OUT` is the same.
"""


def register() -> None:
    """Make vLLM recognise ``quant_method: "flute"``; calling it again changes nothing.

    Without vLLM it does nothing. What fails is a warning: an exception here would end every vLLM
    in this environment, whatever it serves.
    """
    if find_spec("vllm") is None:
        return
    try:
        importlib.import_module("flute.integrations.vllm_config")  # registers
    except ImportError as error:
        warnings.warn(
            "FLUTE could not register with vLLM, which will not know the quantisation method "
            f"`flute`: {error}. FLUTE is tested with vLLM 0.32.",
            stacklevel=2,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a module of vLLM with FLUTE registered and return the exit code.

    What FLUTE refuses is told in one line, without vLLM's traceback.

    Args:
        arguments: the module's name and its arguments; None is those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flute.integrations.vllm",
        description="Run a module of vLLM with FLUTE registered, as the original FLUTE does.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("module", help="such as vllm.entrypoints.openai.api_server")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="given to the module")
    options = parser.parse_args(arguments)
    # Why here: the command line stands above this file and imports its neighbours.
    from flute.console import report_error
    from flute.errors import FluteError

    if find_spec("vllm") is None:
        report_error("vLLM is not installed here. Run `pip install 'vllm>=0.25,<0.34'`.")
        return 1
    if not _exists(options.module):
        parser.error(f"there is no module `{options.module}`")
    register()
    sys.argv = [options.module, *options.arguments]
    try:
        runpy.run_module(options.module, run_name="__main__", alter_sys=True)
    except Exception as error:
        own = next((found for found in _causes(error) if isinstance(found, FluteError)), None)
        if own is None:
            raise
        report_error(str(own))
        return 1
    return 0


def _causes(error: BaseException | None) -> Iterator[object]:
    """Yield an exception and all that led to it, also what pydantic keeps in a list."""
    while error is not None:
        yield error
        if type(error).__name__ == "ValidationError":
            details: Any = error
            yield from (detail.get("ctx", {}).get("error") for detail in details.errors())
        error = error.__cause__ or error.__context__


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent
        return False


if __name__ == "__main__":
    sys.exit(main())
