"""Tokens per second of a whole model on a CPU, quantised against bf16, and where the time goes.

A Llama of random weights (1.1 B: 22 layers, 2048, 5632, 32 heads of which 4 for keys, a vocabulary
of 32,000) decodes one token after another, eagerly, in turns: the bf16 model, the quantised one,
and that with its own decoder blocks instead of fused ones (`flute.fused`). With one thread time is
that thread's on a CPU. The language-model head is bf16 in all. --context says how many tokens there
are before.

    python benchmarks/bench_cpu_decode.py --tokens 20 --threads 1 --bits 4
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import flute
from flute.fused import FusedBlock
from flute.linear import LutLinear


def build() -> LlamaForCausalLM:
    """The model, of random weights in bf16."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are no parameters
    return model


class Decoder:
    """A model that decodes greedily, a token a call."""

    def __init__(self, model: torch.nn.Module, context: int) -> None:
        self.model, self.cache = model, DynamicCache()
        self.tokens = torch.arange(context)[None]

    def __call__(self) -> None:
        """Decode the next token."""
        out = self.model(self.tokens, past_key_values=self.cache, use_cache=True)
        self.tokens = out.logits[:, -1:].argmax(-1)


def time_layers(model: torch.nn.Module, kind: type, clock: Callable[[], float]) -> list[float]:
    """Time every layer of a kind from now on; the sum is in the list's only element."""
    spent = [0.0]

    def wrap(forward: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **kwargs: object) -> object:
            start = clock()
            out = forward(*args, **kwargs)
            spent[0] += clock() - start
            return out

        return timed

    for module in model.modules():
        if isinstance(module, kind):
            module.forward = wrap(module.forward)
    return spent


def shares(
    decoder: Decoder, parts: dict[str, type], tokens: int, clock: Callable[[], float]
) -> dict[str, float]:
    """What part of some more tokens' time is spent in layers of these kinds, and in the head."""
    kinds = {**parts, "head": torch.nn.Linear}
    spent = {part: time_layers(decoder.model, kind, clock) for part, kind in kinds.items()}
    start = clock()
    for _ in range(tokens):
        decoder()
    whole = clock() - start
    found = {part: round(seconds[0] / whole, 3) for part, seconds in spent.items()}
    return {**found, "rest": round(1 - sum(found.values()), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    dense = build()
    quantised = copy.deepcopy(dense)
    start = time.perf_counter()
    flute.quantize_model(quantised, args.bits, 128, method="nf")
    quantise_s = time.perf_counter() - start
    unfused = copy.deepcopy(quantised)
    flute.prepare(unfused, fused=False)
    start = time.perf_counter()
    flute.prepare(quantised)
    prepare_s = time.perf_counter() - start
    models = {"bf16": dense, "flute": quantised, "flute, not fused": unfused}
    decoders = {name: Decoder(model, args.context) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in decoders}
    with torch.inference_mode():
        for i in range(args.tokens + 2):
            for name, decode in decoders.items():
                start = clock()
                decode()
                if i > 1:  # the prompt, and the first token
                    times[name].append(clock() - start)
        share = {
            "flute": shares(decoders["flute"], {"decoder blocks": FusedBlock}, args.tokens, clock),
            "flute, not fused": shares(
                decoders["flute, not fused"], {"quantised layers": LutLinear}, args.tokens, clock
            ),
        }

    def over_flute(name: str) -> float:
        pairs = zip(times[name], times["flute"], strict=True)
        return round(statistics.median(other / ours for other, ours in pairs), 2)

    record = {
        "bits": args.bits,
        "threads": args.threads,
        "context": args.context,
        "tokens_per_s_best": {name: round(1 / min(t), 2) for name, t in times.items()},
        "tokens_per_s_median": {
            name: round(1 / statistics.median(t), 2) for name, t in times.items()
        },
        "bf16_over_flute": over_flute("bf16"),
        "not_fused_over_flute": over_flute("flute, not fused"),
        "share_of_a_token": share,
        "quantise_s": round(quantise_s, 1),
        "prepare_s": round(prepare_s, 2),
        "torch": torch.__version__,
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
