"""`flute convert`: other projects' 4-bit checkpoints in, ours out."""

from __future__ import annotations

import argparse
from typing import Any

from flute.console import Bar, add_json, print_json, print_table

_EPILOG = """\
Read are bitsandbytes 4-bit checkpoints (nf4 and fp4, single and double quantised) and those of the
original FLUTE (its model zoo). Codes, tables and scales are taken over as they are; the format is
told from the files.

examples:
  flute convert unsloth/Meta-Llama-3.1-8B-bnb-4bit OUT
  flute convert radi-cho/Meta-Llama-3.1-8B-FLUTE OUT --revision nfl_w3g64
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="convert bitsandbytes or original FLUTE checkpoints",
        description="Convert a bitsandbytes 4-bit or original FLUTE checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of the checkpoint, or a name on the Hub")
    parser.add_argument("out", help="folder to create")
    parser.add_argument(
        "--tile",
        type=int,
        choices=(32, 64),
        help="original FLUTE: the tile its data were packed for, where the data don't tell",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="bitsandbytes: choose new codes for layers whose blocks fit no group (not exact)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is a checkpoint"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was done."""
    from flute.integrations.convert import convert_checkpoint

    with Bar("converting", "weights") as bar:
        conversion = convert_checkpoint(
            args.model,
            args.out,
            tile=args.tile,
            requantize=args.requantize,
            overwrite=args.overwrite,
            progress=bar,
            revision=args.revision,
        )
    config = conversion.config
    if args.json:
        print_json(
            {
                "out": str(args.out),
                "from": conversion.format,
                "config": config.to_dict(),
                "layers": len(conversion.shapes),
            }
        )
        return 0
    rows: list[list[Any]] = [
        ["from", conversion.format],
        ["layers", len(conversion.shapes)],
        ["bits, group, table", f"{config.num_bits}, {config.group_size}, {config.table}"],
        ["scales", config.scale_dtype],
    ]
    print_table(args.out, ["", ""], rows)
    return 0
