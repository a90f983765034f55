"""Tokens per second of a whole model on a CPU, quantised against bf16, and where the time goes.

A Llama of random weights (1.1 B: 22 layers, 2048, 5632, 32 heads of which 4 for keys, a vocabulary
of 32,000) decodes one token after another, the bf16 model and the quantised one in turns, eagerly.
With one thread time is that thread's on a CPU. With --head-bits a third model takes turns with
them, whose output head is quantised too (group 64).

    python benchmarks/bench_cpu_decode.py --tokens 20 --threads 1 --bits 4 --head-bits 4
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import flute
from flute.linear import LutLinear

PROMPT = 16


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

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.cache = model, DynamicCache()
        self.tokens = torch.arange(PROMPT)[None]

    def __call__(self) -> None:
        """Decode the next token."""
        out = self.model(self.tokens, past_key_values=self.cache, use_cache=True)
        self.tokens = out.logits[:, -1:].argmax(-1)


def with_head(model: LlamaForCausalLM, head: torch.nn.Linear, num_bits: int) -> LlamaForCausalLM:
    """A model that shares the decoder blocks of another, but not its dense head."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    layer = LutLinear.from_quantized(flute.quantize(head.weight, num_bits, 64, method="nf"))
    layer.to_cpu_order()
    other.lm_head = layer
    return other


def share_of_a_token(decode: Decoder, tokens: int, clock: Callable[[], float]) -> dict[str, float]:
    """What the parts of a model take of its tokens."""
    model = decode.model
    blocks = [m for m in model.model.modules() if isinstance(m, LutLinear)]
    spent = {
        "quantised layers": time_layers(blocks, clock),
        "head": time_layers([model.lm_head], clock),
    }
    start = clock()
    for _ in range(tokens):
        decode()
    whole = clock() - start
    for module in (*blocks, model.lm_head):
        del module.forward
    share = {part: round(seconds[0] / whole, 3) for part, seconds in spent.items()}
    share["rest (attention, norms, rotation, Python)"] = round(1 - sum(share.values()), 3)
    return share


def time_layers(modules: Iterable[torch.nn.Module], clock: Callable[[], float]) -> list[float]:
    """Time calls of modules from now on; the sum is in the list's only element."""
    spent = [0.0]

    def wrap(forward: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **kwargs: object) -> object:
            start = clock()
            out = forward(*args, **kwargs)
            spent[0] += clock() - start
            return out

        return timed

    for module in modules:
        module.forward = wrap(module.forward)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--head-bits", type=int, help="of the head of a third model")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    dense = build()
    quantised = copy.deepcopy(dense)
    start = time.perf_counter()
    flute.quantize_model(quantised, args.bits, 128, method="nf")
    quantise_s = time.perf_counter() - start
    start = time.perf_counter()
    flute.prepare(quantised)
    prepare_s = time.perf_counter() - start
    models = {"bf16": dense, "flute": quantised}
    if args.head_bits:
        models["flute, head"] = with_head(quantised, dense.lm_head, args.head_bits)
    decoders = {name: Decoder(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in decoders}
    with torch.inference_mode():
        for i in range(args.tokens + 2):
            for name, decode in decoders.items():
                start = clock()
                decode()
                if i > 1:  # the prompt, and the first token
                    times[name].append(clock() - start)
        shares = {
            name: share_of_a_token(decoders[name], args.tokens, clock)
            for name in decoders
            if name != "bf16"
        }
    ratios = [t / o for t, o in zip(times["bf16"], times["flute"], strict=True)]
    record = {
        "bits": args.bits,
        "threads": args.threads,
        "tokens_per_s_best": {name: round(1 / min(t), 2) for name, t in times.items()},
        "tokens_per_s_median": {
            name: round(1 / statistics.median(t), 2) for name, t in times.items()
        },
        "bf16_over_flute": round(statistics.median(ratios), 2),
        "bf16_over_flute_with_head": None,
        "share_of_a_token": shares,
        "quantise_s": round(quantise_s, 1),
        "prepare_s": round(prepare_s, 2),
        "torch": torch.__version__,
    }
    if args.head_bits:
        pairs = zip(times["bf16"], times["flute, head"], strict=True)
        record["bf16_over_flute_with_head"] = round(statistics.median(t / o for t, o in pairs), 2)
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
