"""`flute quantize`: a dense checkpoint in, a quantised one out."""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flute.blockwise import head_config
from flute.calibration import SAMPLES, SEQUENCE, CalibrationError
from flute.console import (
    Bar,
    add_device,
    add_json,
    group_size,
    megabytes,
    pick_device,
    print_json,
    print_table,
    quiet_transformers,
    seed,
)
from flute.format import NUM_BITS, SCALE_DTYPES, WHOLE_ROW, CheckpointConfig
from flute.methods import CALIBRATED, METHODS, TABLE_SCOPES
from flute.training import STARTS, LearnOptions

if TYPE_CHECKING:
    from torch import Tensor

    from flute.model import ModelPlan, QuantizeOptions

_EPILOG = """\
The default needs no data: it fits a table to each layer and searches each group's scale for the
least squared error. gptq, lnq and nfl read a calibration text and lose less, most at 3 and 2 bits;
lnq takes longest. nfl learns scales by gradients, from the result of another method. They hold one
decoder block in memory. Calibrate on text like that of use, never on the test text.
The output head stays dense unless --head-bits says otherwise. It is the largest matrix that each
token reads: a tenth of the time of a token on a GPU and a fifth on a CPU at 4 bits, and more of a
small model's. Its errors reach the logits directly: take 4 bits in groups of 64 or 32. gptq and lnq
quantise it against what enters it.
Memory stays bounded by a few blocks of rows, whatever the model's size. A run that was killed goes
on where it stopped when the same command is repeated. OUT appears only when complete (until then:
OUT.partial).

examples:
  flute quantize meta-llama/Llama-3.1-8B llama-4bit
  flute quantize MODEL OUT --bits 3 --group-size 128
  flute quantize MODEL OUT --method nf                 NormalFloat with absmax scales (as in QLoRA)
  flute quantize MODEL OUT --table my-table.json       any 16 numbers of yours
  flute quantize MODEL OUT --bits 3 --method gptq --calibration my-text.txt
  flute quantize MODEL OUT --bits 2 --method lnq --calibration texts/ --table-scope row
  flute quantize MODEL OUT --bits 3 --method nfl --calibration texts/ --samples 256
  flute quantize MODEL OUT --bits 2 --method nfl --learn-from lnq --calibration texts/
  flute quantize MODEL OUT --bits 3.25 --calibration my-text.txt     2 to 4 bits, as layers need
  flute quantize MODEL OUT --skip '*.layers.0.*'       leave some layers dense
  flute quantize MODEL OUT --head-bits 4 --head-group-size 32    the output head too
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "quantize",
        help="quantise a checkpoint to 2, 3 or 4 bits",
        description="Quantise the linear layers of a checkpoint to 2, 3 or 4 bits.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="folder with config.json and safetensors, or a name on the Hub"
    )
    parser.add_argument("out", help="folder to create")
    parser.add_argument(
        "--bits",
        type=_bits,
        default=4,
        metavar="B",
        help="bits per weight: 2, 3 or 4 (default 4), or a mean between them, such as 3.25: layers "
        "then take the bits that serve them, by their measured sensitivity (with --calibration)",
    )
    parser.add_argument(
        "--group-size",
        type=group_size,
        default=64,
        metavar="N",
        help="weights per scale: 32, 64, 128, 256 or row (default 64); smaller is more accurate "
        "and costs 16/N bits per weight",
    )
    parser.add_argument(
        "--method",
        choices=[*METHODS, *CALIBRATED],
        default="mse",
        help="mse: table and scales of least error (default); nf, int, fp, bof, bof-s, table: "
        "absmax scales; with --calibration gptq: error feedback, lnq: exact updates, nfl: learned "
        "scales",
    )
    parser.add_argument(
        "--table",
        help="int, fp, nf, bof, bof-s, or a .json, .txt, .npy or .safetensors file of 2**bits "
        "numbers (default: one that is fitted to each layer)",
    )
    parser.add_argument(
        "--table-scope",
        choices=TABLE_SCOPES,
        default="tensor",
        help="lnq: learn a table per layer (tensor, default) or per output row",
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=NUM_BITS,
        metavar="B",
        help="quantise the output head too, to 2, 3 or 4 bits (default: leave it dense; 4 is "
        "sane), by the method, but gptq instead of lnq and mse instead of nfl; one that is tied to "
        "the embedding gets a weight of its own",
    )
    parser.add_argument(
        "--head-group-size",
        type=group_size,
        metavar="N",
        help="weights per scale of the head (default: as --group-size; 64 or 32 is sane)",
    )
    parser.add_argument(
        "--hadamard",
        action="store_true",
        help="rotate the model first, which leaves what it computes as it is (Llama, Mistral, "
        "Qwen2, Qwen3): outliers are spread; a head tied to the embedding gets a weight of its own",
    )
    calibration = parser.add_argument_group("calibration, for gptq, lnq and nfl")
    calibration.add_argument(
        "--calibration",
        metavar="TEXT",
        help="a text file, .json or .jsonl (of strings or objects with a text), .xz of these, or a "
        "folder of them",
    )
    calibration.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"windows (default {SAMPLES})"
    )
    calibration.add_argument(
        "--sequence",
        type=int,
        default=SEQUENCE,
        metavar="N",
        help=f"tokens per window (default {SEQUENCE}); fewer take less memory",
    )
    calibration.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="which pieces of the text (default 0)"
    )
    calibration.add_argument(
        "--guided",
        action="store_true",
        help="gptq, lnq: count errors by what they cost the whole model, measured by one backward "
        "pass over the samples; the dense model must fit into memory",
    )
    learning = parser.add_argument_group("learning, for nfl")
    learning.add_argument(
        "--learn-from",
        choices=STARTS,
        help="method to start from (default mse; nf is the original's way); of gptq and lnq the "
        "codes are kept",
    )
    learning.add_argument("--learn-tables", action="store_true", help="learn the tables too")
    learning.add_argument(
        "--learn-end-to-end",
        action="store_true",
        help="learn all blocks at once, on the KL divergence of the model's output; the dense "
        "model and twice its quantised layers must fit into memory",
    )
    learning.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="per block, or end to end (default: each sample is seen once)",
    )
    learning.add_argument(
        "--batch", type=int, metavar="N", help=f"samples per step (default {LearnOptions.batch})"
    )
    learning.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help=f"relative change of a scale per step (default {LearnOptions.learning_rate:g})",
    )
    parser.add_argument(
        "--scale-dtype", choices=list(SCALE_DTYPES), help="default: the model's own 16-bit dtype"
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave layers of this name dense (wildcards; may be repeated)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is a checkpoint"
    )
    add_device(parser, "quantise")
    add_json(parser)
    parser.set_defaults(run=run)


def _bits(text: str) -> int | float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; expected 2, 3, 4 or 3.25")
    if number != int(number) and not NUM_BITS[0] < number < NUM_BITS[-1]:
        raise argparse.ArgumentTypeError(f"{text} is not between {NUM_BITS[0]} and {NUM_BITS[-1]}")
    if number == int(number) and int(number) not in NUM_BITS:
        raise argparse.ArgumentTypeError(f"{text} is not one of {NUM_BITS}, nor between them")
    return int(number) if number == int(number) else number


def _widths(config: CheckpointConfig, shapes: Mapping[str, tuple[int, int]]) -> str:
    """The bits of layers: "3", or "3.25 (12 layers of 2, 40 of 3, 4 of 4)"."""
    bits = {name: config.spec_of(name).num_bits for name in shapes}
    counts = Counter(bits.values())
    if len(counts) == 1:
        return str(next(iter(counts)))
    weights = {name: N * K for name, (N, K) in shapes.items()}
    mean = sum(weights[name] * b for name, b in bits.items()) / sum(weights.values())
    return f"{mean:.2f} ({', '.join(f'{n} layers of {b}' for b, n in sorted(counts.items()))})"


def _head_row(plan: ModelPlan) -> list[list[str]]:
    if not plan.head:
        return []
    spec, (N, K) = plan.config.spec_of(plan.head), plan.shapes[plan.head]
    group = "row" if spec.group_size == WHOLE_ROW else spec.group_size
    method = head_config(plan.config).method
    return [[f"head: {plan.head}", f"{N} x {K}, {spec.num_bits} bits, {group}, {method}"]]


def _learn_options(args: argparse.Namespace) -> LearnOptions | None:
    """What was said of learning; None if nothing was."""
    given = {
        "start": args.learn_from,
        "steps": args.steps,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "tables": args.learn_tables or None,
        "end_to_end": args.learn_end_to_end or None,
    }
    said = {key: value for key, value in given.items() if value is not None}
    return LearnOptions(**said) if said else None


def _folder(args: argparse.Namespace) -> str:
    """Return the folder of the dense model, of the revision that was asked for."""
    from flute.stream import find_source

    return str(find_source(args.model, args.revision))


def _windows(args: argparse.Namespace) -> Tensor:
    """Token ids of the calibration text."""
    from flute.calibration import read_documents, sample_windows
    from flute.cli.loading import load_tokenizer

    documents = read_documents(args.calibration)
    tokenizer = load_tokenizer(_folder(args))
    return sample_windows(documents, tokenizer, args.samples, args.sequence, args.seed)


def _choose_bits(
    args: argparse.Namespace, options: QuantizeOptions, windows: Tensor
) -> dict[str, int]:
    """Bits of each layer, by what the model loses when it alone is quantised."""
    from flute.cli.loading import load_model
    from flute.mixed import choose_bits, measure_units
    from flute.model import plan_model
    from flute.rotation import rotate_model

    quiet_transformers()
    model = load_model(_folder(args), pick_device(args.device))
    if options.hadamard:
        rotate_model(model)
    plan = plan_model(model, replace(options, head_bits=None, head_group_size=None))
    total = sum(N * K for N, K in plan.shapes.values())
    with Bar("measuring layers", "weights", total) as bar:
        units = measure_units(model, plan, windows, bar.advance)
    return choose_bits(units, args.bits)


def run(args: argparse.Namespace) -> int:
    """Quantise, and print what was done."""
    from flute.checkpoint import CheckpointReader
    from flute.model import QuantizeOptions, check_calibration
    from flute.stream import quantize_checkpoint

    base_bits = int(args.bits)
    options = QuantizeOptions(
        base_bits,
        args.group_size,
        args.method,
        args.table,
        args.scale_dtype,
        args.skip,
        args.table_scope,
        _learn_options(args),
        hadamard=args.hadamard,
        guided=args.guided,
        head_bits=args.head_bits,
        head_group_size=args.head_group_size,
    )
    is_mixed = args.bits != base_bits
    if not is_mixed or args.method in CALIBRATED:
        check_calibration(args.method, args.calibration)
    elif args.calibration is None:
        raise CalibrationError(
            f"--bits {args.bits} measures how much each layer matters: give --calibration TEXT, or "
            f"a whole number of bits, one of {NUM_BITS}."
        )
    start = time.perf_counter()
    windows = _windows(args) if args.calibration else None
    if is_mixed:
        assert windows is not None, "checked above"
        options = replace(options, bits_by_layer=_choose_bits(args, options, windows))
    with Bar("quantising", "weights") as bar:
        plan = quantize_checkpoint(
            args.model,
            args.out,
            options,
            calibration=windows if args.method in CALIBRATED else None,
            overwrite=args.overwrite,
            device=pick_device(args.device),
            progress=bar,
            revision=args.revision,
        )
    seconds = time.perf_counter() - start
    readers = CheckpointReader(plan.reader.directory), CheckpointReader(args.out)
    before, after = (sum(map(reader.num_bytes, reader.names)) for reader in readers)
    num_weights = sum(N * K for N, K in plan.model_plan.shapes.values())
    config = plan.model_plan.config
    if args.json:
        print_json(
            {
                "out": str(args.out),
                "config": config.to_dict(),
                "layers": len(plan.layers),
                "weights": num_weights,
                "dense": dict(plan.model_plan.dense),
                "bytes_before": before,
                "bytes_after": after,
                "seconds": seconds,
            }
        )
        return 0
    group = "row" if config.group_size == WHOLE_ROW else config.group_size
    rows: list[list[Any]] = [
        ["layers quantised", len(plan.layers)],
        ["weights", f"{num_weights / 1e6:.1f} M"],
        [
            "bits, group, method, table",
            f"{_widths(config, plan.model_plan.body)}, {group}, {config.method}, {config.table}",
        ],
        *_head_row(plan.model_plan),
        *([f"dense: {name}", why] for name, why in list(plan.model_plan.dense.items())[:6]),
        ["size", f"{megabytes(before)} -> {megabytes(after)} ({before / after:.2f}x smaller)"],
        ["time", f"{seconds:.1f} s"],
    ]
    more = len(plan.model_plan.dense) - 6
    print_table(args.out, ["", ""], rows, f"... and {more} more left dense" if more > 0 else "")
    return 0
