"""`flute tune`: time the kernels that could serve a model's layers, and keep the fastest."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flute import model_shapes
from flute.cli.tune_report import as_json, print_check, print_results
from flute.console import (
    Bar,
    add_device,
    add_json,
    group_size,
    pick_device,
    print_json,
    report,
)
from flute.errors import CheckpointError, FormatError
from flute.format import NUM_BITS, SCALE_DTYPES

if TYPE_CHECKING:
    from flute.config import Problem
    from flute.tune import Result, Tuner

TOKENS = (1, 2, 4, 8, 16, 32, 64)
_SAVE_S = 10.0
_EPILOG = f"""\
Without tuning, a rule chooses the kernel of each product; plans for well-known models ship with the
package. Tuning times every candidate on this GPU and keeps the fastest for each shape and number of
tokens; other numbers of tokens take the plan of the next larger one. Results are read by the next
process that multiplies. Kernels of fp16 and bf16 are equally fast: one of them is enough.

A candidate is never kept if its product is wrong, or if its registers spill. Time is that of CUDA
graphs of calls that rotate through copies of the weight, so that each is read from memory.

MODEL is a folder (only its config.json is read) or a name on the Hub; of a quantised model, bits
and groups are its own. --model-family takes all, or these names or their beginnings:
  {"  ".join(model_shapes.MODELS)}

examples:
  flute tune OUT                                     a quantised model
  flute tune MODEL --bits 3 4 --group-size 128       what quantising it would need
  flute tune --shape 4096x4096 --tokens 1 8 16       one shape, (out features)x(in features)
  flute tune --shape 4096x4096 --tokens 1-32         every number of tokens from 1 to 32
  flute tune --model-family llama-3-8b --tp 2        its shards over two GPUs
  flute tune --model-family all --check-heuristic    how good the rule is; keeps nothing
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="find the fastest kernels for a model's layers on this GPU",
        description="Find the fastest kernels for a model's layers on this GPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", metavar="MODEL", help="folder, or a name on the Hub")
    what.add_argument("--shape", nargs="+", type=_shape, metavar="NxK", help="weights by shape")
    what.add_argument("--model-family", nargs="+", type=_family, metavar="NAME", help="see below")
    parser.add_argument(
        "--tp",
        nargs="+",
        type=int,
        choices=(1, 2, 4, 8),
        help="with --model-family: GPUs that layers are spread over (default 1; for all, those "
        "that shipped plans cover)",
    )
    parser.add_argument(
        "--bits", nargs="+", type=int, choices=NUM_BITS, default=[4], help="default 4"
    )
    parser.add_argument(
        "--group-size",
        nargs="+",
        type=group_size,
        default=[64],
        metavar="N",
        help="weights per scale: 32, 64, 128, 256 or row (default 64)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        help="of the activations (default: the model's own, or bfloat16)",
    )
    parser.add_argument(
        "--scale-dtype", choices=list(SCALE_DTYPES), help="default: that of the activations"
    )
    parser.add_argument("--row-tables", action="store_true", help="a table for each output row")
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=_tokens,
        metavar="M",
        help=f"numbers of tokens, or ranges (default {' '.join(map(str, TOKENS))})",
    )
    parser.add_argument(
        "--top", type=int, metavar="K", help="time only the first K candidates (default: all)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no further shape after so long; what was measured is kept",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="add to this file instead of the user's"
    )
    parser.add_argument(
        "--check-heuristic",
        action="store_true",
        help="report how far the untuned rule is from the best; keep nothing without --output",
    )
    add_device(parser, "tune")
    add_json(parser)
    parser.set_defaults(run=run)


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected NxK such as 4096x14336")
    return int(n), int(k)


def _family(text: str) -> str:
    if text != "all" and not any(name.startswith(text) for name in model_shapes.MODELS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is unknown; expected all, or one of {', '.join(model_shapes.MODELS)}"
        )
    return text


def _tokens(text: str) -> range:
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and 0 < int(first) <= int(last or first)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1, or a range 1-32")
    return range(int(first), int(last or first) + 1)


def run(args: argparse.Namespace) -> int:
    """Tune, and print what was found."""
    from flute import tuning
    from flute.tune import Tuner, check_device

    start = time.monotonic()
    device = check_device(pick_device(args.device))
    tuner = Tuner(problems_of(args), device, args.top)
    output = args.output
    if output is None and not args.check_heuristic:
        output = tuning.user_folder() / tuning.file_name(tuner.gpu)
    if output is not None:
        tuning.read(output)  # one that is damaged is named now, not after the work
    with Bar("compiling", "kernels") as bar:
        count = tuner.compile(_advance(bar))
    compile_s = time.monotonic() - start
    deadline = start + args.budget if args.budget else float("inf")
    results = _measure(tuner, deadline, output)
    tuning.forget()
    left = len(tuner.plans) - len(results)
    if left:
        report(f"{left} of {len(tuner.plans)} problems were not measured in the time given.")
    if args.json:
        seconds = {"compile": compile_s, "all": time.monotonic() - start}
        print_json(as_json(tuner, results, output, count, seconds))
        return 0
    if args.check_heuristic:
        print_check(tuner, results)
    else:
        print_results(tuner, results)
    if output is not None:
        report(f"Written to {output}")
    return 0


def _advance(bar: Bar) -> Callable[[int, int], None]:
    last = 0

    def done(count: int, total: int) -> None:
        nonlocal last
        if not count:
            bar.start(total, 0)
        bar.advance(count - last)
        last = count

    return done


def _measure(tuner: Tuner, deadline: float, output: Path | None) -> list[Result]:
    """Measure, keeping what was found every few seconds and at the end, also of an interruption."""
    results: list[Result] = []
    kept, saved = 0, time.monotonic()
    with Bar("timing", "weights", len(tuner.tokens)) as bar:
        try:
            for found in tuner.measure(deadline):
                results += found
                key = found[0].problem if found else None
                bar.advance(1, f"{key.n} x {key.k}, {key.num_bits} bits" if key else "")
                if time.monotonic() - saved > _SAVE_S:
                    _save(output, tuner, results[kept:])
                    kept, saved = len(results), time.monotonic()
        finally:
            _save(output, tuner, results[kept:])
    return results


def _save(output: Path | None, tuner: Tuner, results: list[Result]) -> None:
    from flute import tuning

    if output is None or not results:
        return
    store: tuning.Store = {}
    for result in results:
        store.setdefault(result.problem._replace(m=0), {})[result.problem.m] = result.record()
    try:
        tuning.write(output, tuner.gpu, store)
    except OSError as error:
        raise CheckpointError(
            f"`{output}` cannot be written ({error.strerror}). Say where with `--output`."
        ) from error


# ---- what to tune


def problems_of(args: argparse.Namespace) -> list[Problem]:
    """Return the problems that the arguments ask for.

    Raises:
        FormatError: a shape that the group size does not divide.
        CheckpointError: the model has no config.json that can be had.
    """
    from flute.config import Problem, kernel_group_size

    if args.model is not None:
        weights = _weights_of_model(args)
    else:
        shapes = args.shape or model_shapes.shapes_of(args.model_family, args.tp)
        dtype = args.dtype or "bfloat16"
        kinds = [(bits, group) for bits in args.bits for group in args.group_size]
        weights = {
            Problem(bits, group, dtype, args.scale_dtype or dtype, args.row_tables, 0, *shape): None
            for shape in shapes
            for bits, group in kinds
        }
    tokens = sorted({m for part in args.tokens or [TOKENS] for m in part})
    problems: dict[Problem, None] = {}
    for weight in weights:
        group, k = weight.group_size, weight.k
        if k % 32 or (group > 0 and k % group):
            raise FormatError(
                f"No kernel serves K={k} with group_size={group}: K must be a multiple of 32 and "
                "of the group size."
            )
        key = weight._replace(group_size=kernel_group_size(group, k))
        problems |= {key._replace(m=m): None for m in tokens}
    return list(problems)


def _weights_of_model(args: argparse.Namespace) -> dict[Problem, None]:
    """Distinct linear layers of a model, by its config.json alone."""
    from torch import nn

    from flute.architecture import meta_model
    from flute.checkpoint import read_json
    from flute.config import Problem
    from flute.format import CheckpointConfig
    from flute.model import QuantizeOptions, plan_model
    from flute.stream import find_source

    folder = find_source(args.model, patterns=["config.json"])
    content = read_json(folder / "config.json")
    model = meta_model(folder, content)
    dtype = args.dtype or str(content.get("dtype") or content.get("torch_dtype") or "bfloat16")
    dtype = dtype if dtype in ("float16", "bfloat16") else "bfloat16"
    if content.get("quantization_config"):
        configs = [CheckpointConfig.from_dict(content["quantization_config"])]
    else:
        kinds = [(bits, group) for bits in args.bits for group in args.group_size]
        scale_dtype = args.scale_dtype or dtype
        configs = [
            plan_model(model, QuantizeOptions(*kind, scale_dtype=scale_dtype)).config
            for kind in kinds
        ]
    weights: dict[Problem, None] = {}
    for config in configs:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name not in config.modules_to_not_convert:
                spec, rows = config.spec_of(name), config.table_scope == "row" or args.row_tables
                shape = module.out_features, module.in_features
                weights[
                    Problem(
                        spec.num_bits, spec.group_size, dtype, config.scale_dtype, rows, 0, *shape
                    )
                ] = None
    return weights
