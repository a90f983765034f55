"""Mixed width: bits per layer, so that the model loses least within a budget of bits.

    dense model --one unit quantised at a time--> KL divergence from the dense model, per unit
    units, their losses at 2, 3 and 4 bits    --greedy, best loss saved per bit first--> bits

A unit is all layers that read one tensor (q, k and v; gate and up of a block): engines fuse these
into one matrix, which has one width. What a unit loses is measured at 3 bits and carried over to 4
and 2 by the squared error of its weights, to which small losses are proportional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flute.divergence import kl_divergence
from flute.errors import FormatError
from flute.format import NUM_BITS
from flute.methods import quantize
from flute.model import ModelPlan
from flute.reference import dequantize

MEASURED_BITS = 3
WINDOWS = 4
"""Windows of calibration text that losses are measured on. With four of 512 tokens, 3 bits on
average beat 3 bits for all on a model of 7 M weights; see docs/measurements.md."""


@dataclass(frozen=True)
class Unit:
    """Layers that take the same bits.

    Args:
        layers: full names.
        num_weights: of all of them.
        losses: number of bits -> what the model loses by them, nats per token; falling.
    """

    layers: tuple[str, ...]
    num_weights: int
    losses: Mapping[int, float]


def check_mean_bits(mean_bits: float) -> None:
    """Check a number of bits per weight that layers are to have on average.

    Raises:
        FormatError: it is not within 2 to 4.
    """
    if not NUM_BITS[0] <= mean_bits <= NUM_BITS[-1]:
        raise FormatError(
            f"`bits` is {mean_bits:g}; expected {', '.join(map(str, NUM_BITS))}, or a number "
            "between them, such as 3.25, for layers of different widths."
        )


def choose_bits(units: Sequence[Unit], mean_bits: float) -> dict[str, int]:
    """Return full layer name -> bits, of least loss with at most ``mean_bits`` on average.

    From 2 bits each, the step that saves most loss per bit it costs is taken while one fits. Losses
    fall ever more slowly with bits, so the result differs from the best by less than one step.

    Args:
        units: of all layers that are quantised.
        mean_bits: bits per weight, scales and tables not counted; 2 to 4.

    Raises:
        FormatError: ``mean_bits`` is out of range.
    """
    check_mean_bits(mean_bits)
    bits = [NUM_BITS[0]] * len(units)
    total = sum(unit.num_weights for unit in units)
    left = int(mean_bits * total + 1e-6) - NUM_BITS[0] * total
    while True:
        steps = [
            ((unit.losses[b] - unit.losses[b + 1]) / unit.num_weights, i)
            for i, (unit, b) in enumerate(zip(units, bits, strict=True))
            if b < NUM_BITS[-1] and unit.num_weights <= left
        ]
        if not steps:
            break
        _, best = max(steps, key=lambda step: (step[0], -step[1]))
        bits[best] += 1
        left -= units[best].num_weights
    return {name: b for unit, b in zip(units, bits, strict=True) for name in unit.layers}


@torch.no_grad()
def measure_units(
    model: Any,
    plan: ModelPlan,
    windows: Tensor,
    progress: Callable[[int, str], Any] | None = None,
) -> list[Unit]:
    """Measure what a dense model loses when one unit of its layers is quantised.

    Weights are changed in place, a unit at a time, and put back.

    Args:
        model: a transformers causal language model, in memory as a whole.
        plan: which layers are quantised, in groups of what size.
        windows: token ids of training text, int64, shape (samples, sequence); the first few serve.
        progress: called with (weights done, first layer's name) after each unit.

    Raises:
        FormatError: a weight that cannot be quantised, or a loss that is NaN or Inf.
    """
    model.eval()
    device = next(model.parameters()).device
    batch = windows[:WINDOWS].to(device)
    references = [_log_probabilities(model, row) for row in batch]
    units = []
    for layers in units_of(model, list(plan.shapes), batch[:1]):
        weights = {name: model.get_parameter(f"{name}.weight") for name in layers}
        errors = dict.fromkeys(NUM_BITS, 0.0)
        replaced: dict[str, Tensor] = {}
        for name, weight in weights.items():
            group_size = plan.config.spec_of(name).group_size
            for b in NUM_BITS:
                values = dequantize(quantize(weight, b, group_size))
                errors[b] += float((values - weight.float()).square().sum())
                if b == MEASURED_BITS:
                    replaced[name] = values.to(weight.dtype)
        with _replaced(weights, replaced):
            loss = sum(
                float(kl_divergence(reference, _log_probabilities(model, row)).mean())
                for reference, row in zip(references, batch, strict=True)
            ) / len(batch)
        if not math.isfinite(loss):
            raise FormatError(f"The model's loss with `{layers[0]}` quantised is {loss}.")
        scale = max(loss, 0.0) / max(errors[MEASURED_BITS], 1e-30)  # below 0 by rounding
        num_weights = sum(weight.numel() for weight in weights.values())
        units.append(Unit(layers, num_weights, {b: scale * e for b, e in errors.items()}))
        if progress:
            progress(num_weights, layers[0])
    return units


def units_of(model: Any, layers: Sequence[str], ids: Tensor) -> list[tuple[str, ...]]:
    """Return the layers that read one tensor together; of a layer that is not reached, it alone.

    Args:
        model: a transformers causal language model.
        layers: full names of linear layers.
        ids: a window of tokens to run, int64, shape (1, sequence).
    """
    groups: list[list[str]] = []
    inputs: list[Tensor] = []  # kept, so that no two have one id

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            known = next((i for i, x in enumerate(inputs) if x is args[0]), None)
            if known is None:
                inputs.append(args[0])
                groups.append([name])
            elif name not in groups[known]:
                groups[known].append(name)

        return see

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in layers]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    seen = {name for group in groups for name in group}
    return [*(tuple(g) for g in groups), *((name,) for name in layers if name not in seen)]


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Of each position of a window: fp32, shape (sequence, vocabulary)."""
    logits: Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
    return logits.float().log_softmax(1)


@contextmanager
def _replaced(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    kept = {name: weight.data.clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data.copy_(values[name])
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(kept[name])
