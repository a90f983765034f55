"""Learning scales on the whole model at once: all blocks follow the divergence of its output.

    a window --dense model--> p (tokens, vocabulary)
             --all layers q = table[codes] * scales--> p'        loss = KL(p || p') per token

What blocks learn by themselves (`flute.training`) lowers the error of hidden states, wherever it
lies. Here only what reaches the next token counts, and blocks can make up for one another.

Memory, with P weights in quantised layers: the dense model, 2 P bytes of weights in its dtype and
as much of their gradients, P bytes of codes, and the activations of one window that its backward
pass needs. A layer's scales and table get their gradients one layer at a time.

Reference: Guo et al. 2024, arXiv 2407.10960, section 3.3 (the loss there is the text's); Chen et
al. 2024 (EfficientQAT), arXiv 2407.11062, tunes scales end to end last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flute.block_walk import BlockWalk, evaluating, explain_out_of_memory
from flute.blockwise import quantize_by_hessian, quantize_weight
from flute.calibration import CalibrationError
from flute.format import CheckpointConfig, QuantizedWeight
from flute.guidance import output_weights
from flute.methods import BY_HESSIAN
from flute.reference import dequantize
from flute.tables import TableLike
from flute.training import (
    LearnOptions,
    adam,
    learned_weights,
    picked_windows,
    split_windows,
)

Report = Callable[[str], Any]


def quantize_end_to_end(
    model: nn.Module,
    config: CheckpointConfig,
    layers: Sequence[str],
    table: TableLike | None,
    learn: LearnOptions,
    windows: Tensor,
    *,
    guided: bool = False,
    report: Report | None = None,
) -> dict[str, QuantizedWeight]:
    """Quantise a model by the method that learning starts from, then learn.

    Args:
        model: the dense causal language model, all of it on one device; it ends as it was.
        config: from `plan_model`.
        layers: full names of the layers to quantise.
        table: as in `QuantizeOptions`.
        learn: how to learn.
        windows: token ids of training text, int64, shape (samples, sequence).
        guided: as in `QuantizeOptions`.
        report: called with what is being done.

    Raises:
        FormatError: NaN or Inf, or a Hessian that cannot be used; the message names the layer.
        CalibrationError: windows that do not fit the model, NaN or Inf on the way, out of memory.
    """
    weights = {name: model.get_parameter(f"{name}.weight").data for name in layers}
    basis = replace(config, method=learn.start)
    if learn.start in BY_HESSIAN:
        start = _start_by_hessian(model, basis, weights, table, windows, guided, report)
    else:
        start = {
            name: quantize_weight(weight, name, basis, table) for name, weight in weights.items()
        }
    return learn_model(model, weights, start, windows, learn, report)


def _start_by_hessian(
    model: nn.Module,
    config: CheckpointConfig,
    weights: Mapping[str, Tensor],
    table: TableLike | None,
    windows: Tensor,
    guided: bool,
    report: Report | None,
) -> dict[str, QuantizedWeight]:
    """Quantise block by block; the dense weights wait on the CPU and are put back."""
    kept = {name: weight.clone().cpu() for name, weight in weights.items()}
    start: dict[str, QuantizedWeight] = {}
    token_weights = output_weights(model, list(weights), windows) if guided else None
    try:
        walk = BlockWalk(model, list(weights), windows, token_weights=token_weights)
        for block in walk.blocks:
            if report:
                report(block.name)
            dense = {name: weights[name] for name in block.layers}
            found = quantize_by_hessian(dense, walk.hessians(block), config, table)
            for name, quantized in found.items():
                weights[name].copy_(dequantize(quantized, weights[name].dtype))
            walk.advance(block)
            start |= found
    finally:
        for name, weight in weights.items():
            weight.copy_(kept[name])
    return {name: start[name] for name in weights}


def learn_model(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    start: Mapping[str, QuantizedWeight],
    windows: Tensor,
    options: LearnOptions,
    report: Report | None = None,
) -> dict[str, QuantizedWeight]:
    """Return the layers of a model with scales that were learned on its output.

    Every eighth window is held back; if the divergence on these has not fallen, the start is
    returned.

    Args:
        model: the dense model, which is what is learned from.
        weights: layer name -> dense weight, shape (N, K).
        start: layer name -> its quantised form, on the same device.
        windows: token ids of training text, int64, shape (samples, sequence).
        options: how to learn.
        report: called with the step and its loss.

    Raises:
        CalibrationError: the loss is NaN or Inf, or out of memory.
    """
    learned = learned_weights(weights, start, options)
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    optimiser = adam(learned, options)
    held, rest = split_windows(len(windows))
    steps = options.steps or math.ceil(len(rest) / options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    advice = "Use shorter samples (`--sequence`), or learn block by block."
    try:
        for p in trained:
            p.requires_grad_(False)
        with evaluating(model), explain_out_of_memory("learning end to end", advice):
            before = _held_loss(model, start, dtypes, windows[held])
            for step in range(steps):
                optimiser.zero_grad(set_to_none=True)
                codes = {name: x.codes_now() for name, x in learned.items()}
                with torch.no_grad():
                    values = {
                        name: x.dequantized(codes[name]).to(dtypes[name]).requires_grad_()
                        for name, x in learned.items()
                    }
                total = 0.0
                for i in picked_windows(rest, step, options):
                    loss = _divergence(model, values, windows[i]) / options.batch
                    loss.backward()
                    total += float(loss.detach())
                _check_loss(total, step)
                for name, x in learned.items():
                    gradient = values.pop(name).grad
                    assert gradient is not None, f"{name} is reached by the loss"
                    x.dequantized(codes.pop(name)).backward(gradient.float())
                optimiser.step()
                schedule.step()
                if report:
                    report(f"learning, step {step + 1} of {steps}, KL {total:.4f}")
            result = {name: x.result() for name, x in learned.items()}
            after = _held_loss(model, result, dtypes, windows[held])
    finally:
        for p in trained:
            p.requires_grad_(True)
    return result if after < before else dict(start)


def _check_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise CalibrationError(
            f"The divergence from the dense model is {loss} at step {step + 1}. Use a smaller "
            "`learning_rate` (`--learning-rate`); at step 1 the text gives NaN."
        )


def _divergence(model: Any, values: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return KL(dense || with other weights) of a window (sequence,), nats per token."""
    ids = ids.unsqueeze(0).to(next(model.parameters()).device)
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        log_p = model(**inputs).logits[0].float().log_softmax(1)
    own = {f"{name}.weight": value for name, value in values.items()}
    log_q = torch.func.functional_call(model, own, (), inputs).logits[0].float().log_softmax(1)
    return nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@torch.no_grad()
def _held_loss(
    model: nn.Module,
    quantized: Mapping[str, QuantizedWeight],
    dtypes: Mapping[str, torch.dtype],
    windows: Tensor,
) -> float:
    """Return the mean divergence of the model as it would be stored."""
    values = {name: dequantize(q, dtypes[name]) for name, q in quantized.items()}
    return sum(float(_divergence(model, values, ids)) for ids in windows) / len(windows)
