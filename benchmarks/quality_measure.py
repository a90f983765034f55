"""Measures one model for `bench_quality.py`: its texts, its own losses, a record per case.

    Material (texts, calibration windows) --Bench--> records of the dense model, then of each case

Losses are paired with the dense model's on the same windows.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from quality_cases import Case, collect_hessians, quantized_copy
from torch import Tensor, nn

from flute.cli.loading import load_model, load_tokenizer
from flute.divergence import Divergence, divergence
from flute.evaluate import Perplexity, perplexity, read_text, to_windows
from flute.linear import LutLinear
from flute.model import QuantizeOptions, plan_model

Record = dict[str, Any]


def draw(windows: Tensor, count: int, seed: int) -> Tensor:
    """Return ``count`` of the windows, drawn by the seed."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


class Remembered:
    """A model whose logits are kept: the reference of many comparisons runs once."""

    def __init__(self, model: Any) -> None:
        self._model, self._kept = model, {}
        self.config, self.device = model.config, model.device

    def eval(self) -> Remembered:
        """Do nothing: it is."""
        return self

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        """Return the logits of a batch, from the first time it was seen."""
        key = input_ids.cpu().numpy().tobytes()
        if key not in self._kept:
            self._kept[key] = self._model(input_ids=input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=self._kept[key])


@dataclasses.dataclass(frozen=True)
class Material:
    """What a model is measured on.

    Args:
        path: the model's folder.
        texts: name -> windows to measure on, int64, shape (windows, window).
        lengths: numbers of windows to give figures of, from the first on.
        calibration: seed -> windows to calibrate on; empty without a calibration text.
        calibration_name: the text and its tokens, None without.
    """

    path: str
    texts: dict[str, Tensor]
    lengths: tuple[int, ...]
    calibration: dict[int, Tensor]
    calibration_name: str | None


def read_material(path: str, args: argparse.Namespace) -> Material:
    tokenizer = load_tokenizer(path)
    longest = max(args.max_tokens) if args.max_tokens else None
    texts = {
        Path(name).stem: to_windows(read_text(name), tokenizer, args.window, longest)
        for name in args.texts
    }
    counts = {min(n // args.window, *map(len, texts.values())) for n in args.max_tokens or ()}
    picked, name = {}, None
    if args.calibration:
        pool = to_windows(read_text(args.calibration), tokenizer, args.window)
        picked = {seed: draw(pool, args.calibration_windows, seed) for seed in args.seeds}
        tokens = args.calibration_windows * args.window
        name = f"{Path(args.calibration).stem}, {tokens} tokens"
    whole = max(map(len, texts.values()))
    return Material(path, texts, tuple(sorted(counts)) or (whole,), picked, name)


class Bench:
    """A dense model, its own losses, and what quantised copies of it are compared with.

    Args:
        material: what it is measured on.
        device: where all of it runs.
        head: what each record begins with.
    """

    def __init__(self, material: Material, device: str, head: Record) -> None:
        self.material = material
        self.dense = load_model(material.path, device)
        self._reference = Remembered(self.dense) if device == "cpu" else self.dense
        self._hessians: dict[int, dict[str, Tensor]] = {}
        window = next(iter(material.texts.values())).shape[1]
        self._head = {**head, "model": Path(material.path).name, "window": window}
        self._size = sum(p.numel() * p.element_size() for p in self.dense.parameters())
        plan = plan_model(self.dense, QuantizeOptions(4, -1))
        self._num_weights = sum(N * K for N, K in plan.shapes.values())
        self._plain = {name: perplexity(self.dense, w) for name, w in material.texts.items()}

    def dense_records(self) -> Iterator[Record]:
        """Yield a record of the dense model per text and length."""
        for name, result in self._plain.items():
            for count in self.material.lengths:
                part = first_windows(result, count)
                yield {
                    **{**self._head, "text": name, "tokens": part.num_tokens},
                    **{"method": "bf16", "kind": "dense", "bits": 16, "group": None},
                    **{"seed": None, "calibration": None},
                    **{"bits_per_weight": 16.0, "bytes": self._size, "ppl": part.perplexity},
                    **{"loss": part.loss, "dloss": 0.0, "dloss_error": 0.0, "kl": 0.0},
                    **{"kl_error": 0.0, "agreement": 1.0, "seconds": 0.0},
                }

    def records(self, case: Case) -> Iterator[Record]:
        """Quantise, measure, and yield a record per text and length."""
        material, picked, sums = self.material, None, None
        if case.seed is not None:
            picked = material.calibration[case.seed]
            if case.kind == "baseline":
                if case.seed not in self._hessians:
                    self._hessians[case.seed] = collect_hessians(self.dense, picked)
                sums = self._hessians[case.seed]
        model, bits, seconds = quantized_copy(self.dense, case, picked, sums)
        if self.dense.device.type != "cpu":
            make_dense(model)
        for name, windows in material.texts.items():
            whole = divergence(model, self._reference, windows)
            for count in material.lengths:
                own = first_windows(whole.perplexity, count)
                result = Divergence(whole.kl[:count], whole.agrees[:count], own)
                excess, error = own.excess(first_windows(self._plain[name], count))
                yield {
                    **{**self._head, "text": name, "tokens": own.num_tokens},
                    **{"method": case.method, "kind": case.kind, "bits": case.bits},
                    **{"group": case.group, "seed": case.seed, "bits_per_weight": bits},
                    "bytes": round(self._size - self._num_weights * (16 - bits) / 8),
                    **{"ppl": own.perplexity, "loss": own.loss},
                    **{"dloss": excess, "dloss_error": error, "kl": result.mean},
                    "calibration": None if case.seed is None else material.calibration_name,
                    **{"kl_error": result.error, "agreement": result.agreement},
                    "seconds": seconds,
                }


def first_windows(result: Perplexity, count: int) -> Perplexity:
    return Perplexity(result.losses[:count], result.window, result.seconds)


def make_dense(model: Any) -> None:
    """Put dense layers of the dequantised weights in place of quantised ones."""
    dtype = model.get_input_embeddings().weight.dtype
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LutLinear):
            weight = layer.dequantize(dtype)
            linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight), layer.bias
            model.set_submodule(name, linear)
