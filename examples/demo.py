"""The whole path on a real model, with no GPU: quantise to 4, 3 and 2 bits, measure, generate.

Prints one table (bits, bytes, ratio, perplexity) and a sample of text from each model, and writes a
plot. Run it with `make demo`, or `python examples/demo.py --out FOLDER`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import flute
from flute.checkpoint import CheckpointReader
from flute.cli.loading import load_model, load_tokenizer
from flute.console import Bar, megabytes, print_table, quiet_transformers
from flute.evaluate import perplexity, read_text, to_windows
from flute.model import QuantizeOptions
from flute.plot import plot_quality
from flute.stream import quantize_checkpoint

MODEL = Path(__file__).parent / "llama-demo-7m"
WINDOW = 1024
PROMPT = "The history of the city begins with"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="default: demo-out")
    parser.add_argument("--max-tokens", type=int, default=40_960, help="of the text; default 40960")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    start = time.perf_counter()

    folders = {"bf16": MODEL}
    for bits in (4, 3, 2):
        folders[f"{bits} bits"] = args.out / f"llama-demo-7m-{bits}bit"
        with Bar(f"quantising to {bits} bits", "weights") as bar:
            options = QuantizeOptions(num_bits=bits, group_size=64)
            quantize_checkpoint(
                MODEL, folders[f"{bits} bits"], options, overwrite=True, progress=bar
            )

    rows, points, samples = [], [], []
    tokenizer = load_tokenizer(str(MODEL))
    windows = to_windows(read_text("wikitext2"), tokenizer, WINDOW, args.max_tokens)
    for name, folder in folders.items():
        model = load_model(str(folder), "cpu")
        with Bar(f"measuring {name}", "tokens", windows.numel()) as bar:
            result = perplexity(model, windows, bar.advance)
        size, linears = sizes(folder)
        points.append((name, size, result.perplexity))
        ratio, linear_ratio = points[0][1] / size, sizes(MODEL)[1] / linears
        rows.append(
            [
                name,
                megabytes(linears),
                f"{linear_ratio:.2f}x",
                megabytes(size),
                f"{ratio:.2f}x",
                f"{result.perplexity:.2f}",
            ]
        )
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        torch.manual_seed(0)
        output = model.generate(
            input_ids=ids, max_new_tokens=40, do_sample=True, temperature=0.7, pad_token_id=0
        )
        samples.append([name, tokenizer.decode(output[0], skip_special_tokens=True)])

    print_table(
        f"Perplexity on WikiText-2 test (shipped slice, {result.num_tokens} tokens in windows of "
        f"{WINDOW}), flute {flute.__version__}",
        ["bits", "linear layers", "ratio", "whole model", "ratio", "perplexity"],
        rows,
        "The embeddings, 31 % of this small model's weights, stay bf16.",
    )
    print_table("What they write", ["", "text"], samples, left=True)
    plot = args.out / "perplexity-against-size.png"
    plot_quality(points, plot, f"WikiText-2 test slice, windows of {WINDOW} tokens")
    print_table(
        "",
        ["", ""],
        [["plot", plot], ["models", args.out], ["time", f"{time.perf_counter() - start:.0f} s"]],
    )


def sizes(folder: Path) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and of its linear layers (quantised or not)."""
    reader = CheckpointReader(folder)
    linears = [name for name in reader.names if "_proj." in name]
    total, part = (sum(map(reader.num_bytes, names)) for names in (reader.names, linears))
    return total, part


if __name__ == "__main__":
    main()
