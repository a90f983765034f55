"""`flute eval`: perplexity of one or several models, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flute.console import (
    Bar,
    add_device,
    add_json,
    megabytes,
    pick_device,
    print_json,
    print_table,
    quiet_transformers,
)
from flute.evaluate import DEFAULT_WINDOW, TEXTS

_EPILOG = f"""\
Protocol: the text is tokenised in one piece and cut into windows that don't overlap; the rest is
dropped. Within a window each token is predicted from those before it, nothing is prepended.
Perplexity is exp of the mean loss. Figures compare only for the same text, window and tokenizer.

--text takes a file, or one of the shipped texts: {", ".join(TEXTS)}.

examples:
  flute eval OUT
  flute eval MODEL OUT-4bit OUT-3bit OUT-2bit --plot quality.png
  flute eval MODEL OUT --text my-test.txt --window 1024 --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help="measure perplexity",
        description="Measure the perplexity of dense and quantised models on a text.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folders; losses are given over the first one's"
    )
    parser.add_argument("--text", default="wikitext2", help="default wikitext2")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens per window (default: {DEFAULT_WINDOW}, or the model's context if shorter)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens only")
    parser.add_argument("--plot", metavar="PNG", help="plot perplexity against size")
    add_device(parser, "run")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate each model and print them side by side."""
    from flute.evaluate import read_text

    if args.plot:
        from flute.plot import check_plotting

        check_plotting(args.plot)
    text = read_text(args.text)
    quiet_transformers()
    device = pick_device(args.device)
    records: list[dict[str, Any]] = []
    first = None
    for path in args.models:
        record, result = _evaluate(path, text, args.window, args.max_tokens, device)
        if first is None:
            first = result
        else:
            record["excess_loss"], record["excess_loss_error"] = result.excess(first)
        records.append(record)
    if args.plot:
        from flute.plot import plot_quality

        plot_quality(
            [(r["name"], r["bytes"], r["perplexity"]) for r in records],
            args.plot,
            f"{args.text}, windows of {records[0]['window']} tokens",
        )
    if args.json:
        print_json({"text": str(args.text), "results": records})
        return 0
    print_table(
        f"Perplexity on {args.text}, {records[0]['tokens']} tokens in windows of "
        f"{records[0]['window']}",
        ["model", "bits", "size", "perplexity", "loss over first", "seconds"],
        [_row(record) for record in records],
        "loss in nats per token, +- its standard error over the windows"
        if len(records) > 1
        else "",
    )
    return 0


def _evaluate(
    path: str, text: str, window: int | None, max_tokens: int | None, device: str
) -> tuple[dict[str, Any], Any]:
    from flute.checkpoint import CheckpointReader
    from flute.cli.loading import load_model, load_tokenizer
    from flute.evaluate import default_window, perplexity, to_windows
    from flute.stream import find_source

    tokenizer = load_tokenizer(path)
    reader = CheckpointReader(find_source(path))
    model = load_model(path, device)
    windows = to_windows(text, tokenizer, window or default_window(model), max_tokens)
    name = Path(path).name or str(path)
    with Bar(name, "tokens", windows.numel()) as bar:
        result = perplexity(model, windows, bar.advance)
    config = reader.config.get("quantization_config")
    return {
        "model": str(path),
        "name": name,
        "bits": config.get("num_bits") if config else 8 * model.dtype.itemsize,
        "bytes": sum(map(reader.num_bytes, reader.names)),
        "window": result.window,
        "tokens": result.num_tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "seconds": result.seconds,
    }, result


def _row(record: dict[str, Any]) -> list[str]:
    excess = ""
    if "excess_loss" in record:
        excess = f"{record['excess_loss']:+.4f} +- {record['excess_loss_error']:.4f}"
    return [
        record["name"],
        str(record["bits"]),
        megabytes(record["bytes"]),
        f"{record['perplexity']:.3f}",
        excess,
        f"{record['seconds']:.1f}",
    ]
