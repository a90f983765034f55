"""`flute eval`: perplexity, KL divergence and tasks of one or several models, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flute.console import (
    Bar,
    add_device,
    add_json,
    check_at_least,
    megabytes,
    pick_device,
    print_json,
    print_table,
    quiet_transformers,
)
from flute.divergence import PERCENTILES
from flute.evaluate import DEFAULT_WINDOW, TEXTS

_PROTOCOL = (
    "tokenised in one piece, windows without overlap, the rest dropped; each token of a window but "
    "its first is predicted from those before it, nothing is prepended; standard errors over "
    "windows"
)
_EPILOG = f"""\
Protocol: the text is tokenised in one piece and cut into windows that don't overlap; the rest is
dropped. Within a window each token is predicted from those before it, nothing is prepended.
Perplexity is exp of the mean loss. Figures compare only for the same text, window and tokenizer.
What follows +- is one standard error over the windows.

--reference DENSE measures each model against DENSE at every position of the same windows: the KL
divergence of its next-token distribution from DENSE's, in nats (mean, and what {PERCENTILES[0]}, \
{PERCENTILES[1]} and {PERCENTILES[2]} % of
the tokens stay below), and how often both hold the same token most likely. Both models are in
memory. KL tells models apart on far less text than perplexity does.

--text takes a file, or one of the shipped texts: {", ".join(TEXTS)}.

--tasks asks multiple-choice questions without examples, through lm-eval (`pip install lm-eval`). It
takes .jsonl files or a folder of them, one question per line:
  {{"query": "The opposite of hot is", "choices": ["cold", "warm"], "gold": 0}}
  {{"context_options": ["Ice", "Fire"], "continuation": "is cold.", "gold": 0}}
or names of lm-eval's own tasks (their data must be at hand), or a folder of its YAML files (which
may run the Python code beside them: use those that you trust).

examples:
  flute eval OUT
  flute eval MODEL OUT-4bit OUT-3bit OUT-2bit --plot quality.png
  flute eval OUT-4bit OUT-3bit --reference MODEL --plot quality.png
  flute eval MODEL OUT --text my-test.txt --window 1024 --json
  flute eval MODEL OUT --tasks my-tasks/ piqa --task-limit 200
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help="measure perplexity, distance from the dense model, and tasks",
        description="Measure dense and quantised models on a text, and on zero-shot tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folders, or names on the Hub; losses are over the first",
    )
    parser.add_argument(
        "--reference",
        metavar="DENSE",
        help="also give KL divergence and agreement of each model with this one, which comes first",
    )
    parser.add_argument("--text", default="wikitext2", help="default wikitext2")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens per window (default: {DEFAULT_WINDOW}, or the model's context if shorter)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens only")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="zero-shot tasks: .jsonl files, folders, or names that lm-eval knows",
    )
    parser.add_argument(
        "--task-limit", type=int, metavar="N", help="ask the first N questions of each task only"
    )
    parser.add_argument(
        "--plot",
        metavar="PNG",
        help="plot perplexity against size; with --reference or --tasks, all",
    )
    add_device(parser, "run")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate each model and print them side by side."""
    from flute.cli.loading import find_model
    from flute.evaluate import EvaluationError, read_text

    check_at_least("--window", args.window, 2)
    check_at_least("--max-tokens", args.max_tokens, 2)
    check_at_least("--task-limit", args.task_limit, 1)
    if args.plot:
        from flute.plot import check_plotting

        check_plotting(args.plot)
    tasks = _find_tasks(args)
    text = read_text(args.text)
    quiet_transformers()
    device = pick_device(args.device)
    paths = list(args.models)
    if args.reference:
        paths = [args.reference, *(path for path in paths if path != args.reference)]
    for path in paths:
        find_model(path)  # before the first is measured
    reference: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    first = None
    for path in paths:
        try:
            record, result = _evaluate(path, text, args, device, tasks, reference)
        except EvaluationError as error:
            raise EvaluationError(f"`{path}`: {error}") from error
        if first is None:
            first = result
        else:
            record["excess_loss"], record["excess_loss_error"] = result.excess(first)
        records.append(record)
    if args.json:
        content = {"text": str(args.text), "protocol": _PROTOCOL, "reference": args.reference}
        print_json({**content, "results": records})
    else:
        _print(records, args)
    if args.plot:  # last: what was measured is told even if it cannot be drawn
        _plot(records, args)
    return 0


def _find_tasks(args: argparse.Namespace) -> Any:
    """Return what to ask, or None; a missing library or file is found before any model runs."""
    if not args.tasks:
        return None
    from flute.integrations.lm_eval import check_installed, find_tasks

    tasks = find_tasks(args.tasks, args.task_limit)
    check_installed()
    return tasks


def _evaluate(
    path: str,
    text: str,
    args: argparse.Namespace,
    device: str,
    tasks: Any,
    reference: dict[str, Any],
) -> tuple[dict[str, Any], Any]:
    """Measure one model; the reference, which comes first, is left in ``reference``."""
    from flute.checkpoint import CheckpointReader
    from flute.cli.loading import find_model, load_model, load_tokenizer
    from flute.divergence import divergence
    from flute.evaluate import default_window, perplexity, to_windows

    tokenizer = load_tokenizer(path)
    reader = CheckpointReader(find_model(path))
    model = load_model(path, device)
    window = args.window or reference.get("window") or default_window(model)
    windows = to_windows(text, tokenizer, window, args.max_tokens)
    name = Path(path).name or str(path)
    distance = None
    with Bar(name, "tokens", windows.numel()) as bar:
        if reference:
            _check_same_tokens(windows, reference["windows"])
            distance = divergence(model, reference["model"], windows, bar.advance)
            result = distance.perplexity
        else:
            result = perplexity(model, windows, bar.advance)
    if args.reference and not reference:
        reference |= {"model": model, "windows": windows, "window": window}
    config = reader.config.get("quantization_config")
    record = {
        "model": str(path),
        "name": name,
        "bits": config.get("num_bits") if config else 8 * model.dtype.itemsize,
        "bits_per_weight": _bits_per_weight(model, reader),
        "bytes": sum(map(reader.num_bytes, reader.names)),
        "window": result.window,
        "tokens": result.num_tokens,
        "loss": result.loss,
        "loss_error": result.loss_error,
        "perplexity": result.perplexity,
        "perplexity_error": result.perplexity_error,
        "seconds": result.seconds,
    }
    if distance:
        percentiles = {f"p{p}": value for p, value in distance.percentiles.items()}
        record["kl"] = {"mean": distance.mean, "error": distance.error, **percentiles}
        record["agreement"] = {"mean": distance.agreement, "error": distance.agreement_error}
    if tasks:
        from flute.integrations.lm_eval import run_tasks

        record["tasks"] = run_tasks(model, tokenizer, tasks, args.task_limit)
    return record, result


def _check_same_tokens(windows: Any, reference: Any) -> None:
    from flute.evaluate import EvaluationError

    if windows.shape != reference.shape or bool((windows != reference).any()):
        raise EvaluationError(
            "This model's tokenizer cuts the text into other tokens than the reference's: their "
            "distributions cannot be compared. Give the model that it was quantised from."
        )


def _bits_per_weight(model: Any, reader: Any) -> float:
    """Return the bits that the quantised layers store per weight; of a dense model, its dtype's."""
    from flute.format import TENSOR_NAMES
    from flute.linear import LutLinear

    layers = {n: m for n, m in model.named_modules() if isinstance(m, LutLinear)}
    if not layers:
        return 8.0 * float(model.dtype.itemsize)
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    stored: int = sum(
        reader.num_bytes(name) for name in reader.names if name.rpartition(".")[2] in TENSOR_NAMES
    )
    return 8 * stored / weights


def _plot(records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from flute.plot import plot_evaluation, plot_quality

    measured_on = f"{args.text}, windows of {records[0]['window']} tokens"
    if not args.reference and not args.tasks:
        points = [(r["name"], r["bytes"], r["perplexity"]) for r in records]
        plot_quality(points, args.plot, measured_on)
        return
    scored = [
        {**r, "scores": {task: _score(values) for task, values in r.get("tasks", {}).items()}}
        for r in records
    ]
    plot_evaluation(scored, args.plot, measured_on)


def _score(values: dict[str, float]) -> tuple[float, float]:
    from flute.integrations.lm_eval import main_metric

    metric = main_metric(values)
    return values[metric], values.get(f"{metric}_error", 0.0)


def _print(records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    columns = ["model", "bits", "size", "perplexity", "loss over first", "seconds"]
    print_table(
        f"Perplexity on {args.text}, {records[0]['tokens']} tokens in windows of "
        f"{records[0]['window']}",
        columns,
        [_row(record) for record in records],
        f"loss in nats per token; {_PROTOCOL}",
    )
    compared = [record for record in records if "kl" in record]
    if compared:
        columns = ["model", "bits/weight", "KL, mean", *(f"{p} %" for p in PERCENTILES)]
        rows = [
            [
                record["name"],
                f"{record['bits_per_weight']:.3f}",
                f"{record['kl']['mean']:.5f} +- {record['kl']['error']:.5f}",
                *(f"{record['kl'][f'p{p}']:.5f}" for p in PERCENTILES),
                f"{record['agreement']['mean']:.2%} +- {record['agreement']['error']:.2%}",
            ]
            for record in compared
        ]
        print_table(
            f"Next-token distributions beside those of {records[0]['name']}",
            [*columns, "same top token"],
            rows,
            "KL(reference || model) in nats per token: mean, and percentiles over tokens",
        )
    if args.tasks:
        tasks = list(dict.fromkeys(task for record in records for task in record["tasks"]))
        rows = [[r["name"], *(_cell(r["tasks"].get(task)) for task in tasks)] for r in records]
        print_table("Zero-shot tasks (lm-eval)", ["model", *tasks], rows)


def _cell(values: dict[str, float] | None) -> str:
    if not values:
        return ""
    from flute.integrations.lm_eval import main_metric

    value, error = _score(values)
    return f"{main_metric(values)} {value:.3f} +- {error:.3f}"


def _row(record: dict[str, Any]) -> list[str]:
    excess = ""
    if "excess_loss" in record:
        excess = f"{record['excess_loss']:+.4f} +- {record['excess_loss_error']:.4f}"
    return [
        record["name"],
        str(record["bits"]),
        megabytes(record["bytes"]),
        f"{record['perplexity']:.3f} +- {record['perplexity_error']:.3f}",
        excess,
        f"{record['seconds']:.1f}",
    ]
