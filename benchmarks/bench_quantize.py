"""Seconds that quantising a model of Llama-3.1-8B's shape takes, from one decoder block of it.

Weights and text are random: time does not depend on what they hold. Every block of the model has
the same shapes, so the model takes as many times a block's seconds as it has blocks; reading and
writing files is not counted. `mse` quantises the block's layers; `lnq` and `gptq` take windows of
text through the block, sum Hessians, quantise, and go on through the quantised block.

Usage: python benchmarks/bench_quantize.py --device cuda --json quantize.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flute.block_walk import BlockWalk
from flute.blockwise import quantize_by_hessian, quantize_weight
from flute.console import print_table, quiet_transformers
from flute.methods import BY_HESSIAN
from flute.model import ModelPlan, QuantizeOptions, plan_model
from flute.reference import dequantize

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
BLOCKS = 32
VOCABULARY = 1024
"""Of the random model: what is embedded is not timed."""


def random_block(device: str, shape: dict[str, int]) -> Any:
    """Return a model of two blocks, bf16, normal weights, on the device; the second is not timed.

    It is there so that windows are passed on to it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, shape["hidden_size"] // 128)
    config = LlamaConfig(
        **shape, num_attention_heads=heads, num_hidden_layers=2, vocab_size=VOCABULARY
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if "norm" in name else p.normal_(std=0.02, generator=generator)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model


class Clock:
    """Seconds of each step, the device waited for.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, function: Callable[[], Any]) -> Any:
        """Return what a function returns; add its time to that of the step."""
        start = time.perf_counter()
        result = function()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[step] = self.seconds.get(step, 0) + time.perf_counter() - start
        return result


def time_method(
    model: nn.Module, plan: ModelPlan, windows: torch.Tensor, device: str
) -> dict[str, float]:
    """Return the seconds of each step for the first block.

    Args:
        model: from `random_block`; calibration leaves its weights quantised.
        plan: of its layers.
        windows: token ids, int64, shape (samples, sequence), for methods with Hessians.
        device: where the model is.
    """
    clock, config = Clock(device), plan.config
    layers = [name for name in plan.shapes if ".layers.0." in name]
    weights = {name: model.get_parameter(f"{name}.weight").data for name in layers}
    if config.method not in BY_HESSIAN:
        for name, weight in weights.items():
            clock("quantise", lambda n=name, w=weight: quantize_weight(w, n, config, None))
        return clock.seconds
    walk = BlockWalk(model, layers, windows)
    block = walk.blocks[0]
    hessians = clock("Hessians", lambda: walk.hessians(block))
    quantized = clock("quantise", lambda: quantize_by_hessian(weights, hessians, config, None))
    for name, weight in quantized.items():
        weights[name].copy_(dequantize(weight, torch.bfloat16))
    clock("pass on", lambda: walk.advance(block))
    return clock.seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--methods", nargs="+", default=["mse", "gptq", "lnq", "lnq row"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=128, metavar="N")
    parser.add_argument("--samples", type=int, default=128, metavar="N")
    parser.add_argument("--sequence", type=int, default=2048, metavar="N")
    parser.add_argument("--hidden", type=int, default=LLAMA_8B["hidden_size"], metavar="N")
    parser.add_argument("--mlp", type=int, default=LLAMA_8B["intermediate_size"], metavar="N")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing after these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write records after each method")
    args = parser.parse_args(argv)
    quiet_transformers()
    begin = time.perf_counter()
    cuda = args.device != "cpu"
    shape = {**LLAMA_8B, "hidden_size": args.hidden, "intermediate_size": args.mlp}
    shape["num_key_value_heads"] = max(1, args.hidden // 512)
    size = (args.samples, args.sequence)
    windows = torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(0))
    model = random_block(args.device, shape)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records: list[dict[str, Any]] = []
    for bits in args.bits:
        for method in args.methods:
            if args.budget is not None and time.perf_counter() - begin > args.budget:
                continue
            name, _, scope = method.partition(" ")
            options = QuantizeOptions(bits, args.group_size, name, table_scope=scope or "tensor")
            model.load_state_dict(dense)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            steps = time_method(model, plan_model(model, options), windows, args.device)
            record = {
                **{"method": method, "bits": bits, "group": args.group_size, **shape},
                **{"samples": args.samples, "sequence": args.sequence},
                **{"steps": {k: round(v, 3) for k, v in steps.items()}},
                "block_seconds": round(sum(steps.values()), 3),
                "model_minutes": round(sum(steps.values()) * BLOCKS / 60, 2),
                "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                **{"torch": torch.__version__, "date": datetime.date.today().isoformat()},
            }
            records.append(record)
            print(json.dumps(record), flush=True)
            if args.json:
                args.json.write_text(json.dumps(records, indent=1) + "\n")
    columns = ["method", "bits", "block_seconds", "model_minutes", "peak_gb"]
    rows = [[r[c] for c in columns] for r in records]
    print_table(f"One block, and {BLOCKS} of them", columns, rows)


if __name__ == "__main__":
    main()
