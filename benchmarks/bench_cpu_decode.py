"""Tokens per second of a whole model on a CPU, quantised against bf16, and where the time goes.

A Llama of random weights (1.1 B: 22 layers, 2048, 5632, 32 heads of which 4 for keys, a vocabulary
of 32,000) decodes one token after another, eagerly, in turns: the bf16 model, the quantised one,
and that with its own decoder blocks and head (neither `flute.fused_model` nor
`flute.dense_linear`). With --head-bits a fourth takes turns with them, whose output head is
quantised too (group 64); else heads are bf16.
With one thread time is that thread's on a CPU. --context says how many tokens there are before.

    python benchmarks/bench_cpu_decode.py --tokens 20 --threads 1 --bits 4 --head-bits 4
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import flute
from flute.fused_model import FusedModel
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


def with_head(model: LlamaForCausalLM, head: torch.nn.Linear, num_bits: int) -> LlamaForCausalLM:
    """A model that shares the decoder blocks of another, but not its dense head."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    layer = LutLinear.from_quantized(flute.quantize(head.weight, num_bits, 64, method="nf"))
    layer.to_cpu_order()
    other.lm_head = layer
    return other


def share_of_a_token(decode: Decoder, tokens: int, clock: Callable[[], float]) -> dict[str, float]:
    """What all but the head, or else quantised layers, and the head take of a model's tokens."""
    model = decode.model
    parts = (
        {"all but the head": [model.model]}
        if isinstance(model.model, FusedModel)
        else {"quantised layers": [m for m in model.model.modules() if isinstance(m, LutLinear)]}
    )
    parts["head"] = [model.lm_head]
    with contextlib.ExitStack() as stack:
        spent = {
            name: stack.enter_context(timed(modules, clock)) for name, modules in parts.items()
        }
        start = clock()
        for _ in range(tokens):
            decode()
        whole = clock() - start
    share = {name: round(seconds[0] / whole, 3) for name, seconds in spent.items()}
    return {**share, "rest": round(1 - sum(share.values()), 3)}


@contextlib.contextmanager
def timed(modules: Sequence[torch.nn.Module], clock: Callable[[], float]) -> Iterator[list[float]]:
    """Time calls of modules of one class; the sum is in the list's only element.

    Why by their class: a module with a hook or another forward takes another path.
    """
    spent, (kind,), chosen = [0.0], {type(m) for m in modules}, {id(m) for m in modules}
    call, is_own = kind.__call__, "__call__" in vars(kind)

    def timed_call(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        start = clock()
        out = call(self, *args, **kwargs)
        spent[0] += clock() - start if id(self) in chosen else 0
        return out

    kind.__call__ = timed_call
    yield spent
    if is_own:
        kind.__call__ = call
    else:
        del kind.__call__


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--head-bits", type=int, help="of the head of a fourth model")
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
    flute.prepare(unfused, fused=False, dense=False)
    start = time.perf_counter()
    flute.prepare(quantised)
    prepare_s = time.perf_counter() - start
    models = {"bf16": dense, "flute": quantised, "flute, not fused": unfused}
    if args.head_bits:
        models["flute, head"] = with_head(quantised, dense.lm_head, args.head_bits)
    decoders = {name: Decoder(model, args.context) for name, model in models.items()}
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

    def over(faster: str, slower: str = "bf16") -> float:
        pairs = zip(times[slower], times[faster], strict=True)
        return round(statistics.median(s / f for s, f in pairs), 2)

    record = {
        "bits": args.bits,
        "threads": args.threads,
        "context": args.context,
        "tokens_per_s_best": {name: round(1 / min(t), 2) for name, t in times.items()},
        "tokens_per_s_median": {
            name: round(1 / statistics.median(t), 2) for name, t in times.items()
        },
        "bf16_over_flute": over("flute"),
        "not_fused_over_flute": over("flute", "flute, not fused"),
        "bf16_over_flute_with_head": over("flute, head") if args.head_bits else None,
        "share_of_a_token": shares,
        "quantise_s": round(quantise_s, 1),
        "prepare_s": round(prepare_s, 2),
        "load": [round(load, 1) for load in os.getloadavg()],  # of 1, 5 and 15 minutes
        "torch": torch.__version__,
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
