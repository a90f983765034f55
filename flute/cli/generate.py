"""`flute generate`: text from a model, dense or quantised."""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from flute.console import (
    add_device,
    add_json,
    check_at_least,
    pick_device,
    print_json,
    quiet_transformers,
    report,
    seed,
)
from flute.errors import FormatError, reason_of

if TYPE_CHECKING:
    from torch import Tensor

_EPILOG = """\
examples:
  flute generate OUT "The king of the country"
  flute generate OUT "Once upon a time" --max-new-tokens 200 --temperature 0.8 --seed 1
  echo "A long prompt" | flute generate OUT -
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="generate text",
        description="Generate text from a model; it appears as it is generated.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="folder of a dense or quantised checkpoint, or a name on the Hub"
    )
    parser.add_argument("prompt", help="the text to go on from; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the sampling (default 0)")
    add_device(parser, "run")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    check_at_least("--max-new-tokens", args.max_new_tokens, 1)
    if not 0 <= args.temperature < math.inf:
        raise FormatError(f"`--temperature` is {args.temperature}; expected 0 or more.")
    prompt = _read_prompt() if args.prompt == "-" else args.prompt
    quiet_transformers()
    import torch
    from transformers import TextStreamer

    from flute.cli.loading import load_model, load_tokenizer

    model = load_model(args.model, pick_device(args.device))
    tokenizer = load_tokenizer(args.model)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs.input_ids.shape[1]:
        raise FormatError("The prompt is empty; expected at least one token.")
    max_new_tokens = _room(model, inputs.input_ids, args.max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        torch.manual_seed(args.seed)
        sampling = {"do_sample": True, "temperature": args.temperature}
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        streamer=None if args.json else TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )[0]
    seconds = time.perf_counter() - start
    count = len(output) - inputs.input_ids.shape[1]
    if args.json:
        text = tokenizer.decode(output, skip_special_tokens=True)
        print_json({"text": text, "new_tokens": count, "seconds": seconds})
    else:
        report(f"{count} tokens, {count / seconds:.1f} per second")
    return 0


def _read_prompt() -> str:
    """Return standard input.

    Raises:
        FormatError: it is no text.
    """
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"The prompt on standard input is no text: {reason_of(error)}."
        ) from error


def _room(model: Any, ids: Tensor, wanted: int) -> int:
    """Return how many tokens can follow a prompt: ``wanted``, or what its context leaves.

    Args:
        model: a transformers model.
        ids: the prompt, int64, shape (1, tokens).
        wanted: `--max-new-tokens`.

    Raises:
        FormatError: the prompt fills the context, or is none of the model's tokens.
    """
    from flute.evaluate import context_of

    vocabulary, context, have = model.config.vocab_size, context_of(model), ids.shape[1]
    if int(ids.max()) >= vocabulary:
        raise FormatError(
            f"The tokenizer gives id {int(ids.max())}; the model knows {vocabulary} tokens: they "
            "do not belong together."
        )
    if context is None or have + wanted <= context:
        return wanted
    if have >= context:
        raise FormatError(
            f"The prompt has {have} tokens; the model's context is {context}. Shorten the prompt."
        )
    report(f"The model's context is {context} tokens: at most {context - have} follow the prompt.")
    return context - have
