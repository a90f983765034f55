"""Learning scales on calibration text, a decoder block at a time.

    hidden states of the quantised blocks before --> block with q = table[codes] * scales --> out
    hidden states of the dense blocks before     --> dense block ---------------------------> target

    loss = |out - target|^2 / |target - its mean|^2

so that a block also makes up for what the blocks before it have lost. Memory holds one block, its
gradients, and the hidden states of both streams (on the CPU).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flute.block_walk import Block, BlockWalk
from flute.calibration import CalibrationError
from flute.errors import FormatError
from flute.format import QuantizedWeight
from flute.methods.nfl import LearnedWeight

STARTS = ("mse", "nf", "gptq", "lnq")
"""Methods that learning may start from. Of the last two the codes are kept."""
_HELD_BACK = 8
"""One of so many windows is not learned from, but tells whether what was learned holds."""


@dataclass(frozen=True)
class LearnOptions:
    """How "nfl" learns.

    Args:
        start: method whose result is learned from: "mse", "nf" (the original's), or "gptq" or
            "lnq", whose codes are kept while scales move.
        steps: of the optimiser in each block, or end to end; None passes through the windows once.
        batch: windows per step.
        learning_rate: of Adam, for relative changes of scales; falls to zero along a cosine.
        tables: learn the tables too.
        end_to_end: learn all blocks at once, on the model's output (`flute.end_to_end`), instead of
            a block at a time. The dense model must fit into memory.

    Raises:
        FormatError: a value out of range.
    """

    start: str = "mse"
    steps: int | None = None
    batch: int = 1
    learning_rate: float = 5e-3
    tables: bool = False
    end_to_end: bool = False

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise FormatError(f"`start` is {self.start!r}; expected one of {STARTS}.")
        if self.batch < 1 or (self.steps is not None and self.steps < 1):
            raise FormatError(
                f"`steps` is {self.steps} and `batch` is {self.batch}; expected at least 1."
            )
        if not 0 < self.learning_rate < 1:
            raise FormatError(
                f"`learning_rate` is {self.learning_rate:g}; expected a number between 0 and 1, "
                "such as 1e-3."
            )

    @property
    def holds_codes(self) -> bool:
        """Whether the codes of the start are kept."""
        return self.start in ("gptq", "lnq")


def learn_block(
    walk: BlockWalk,
    block: Block,
    weights: Mapping[str, Tensor],
    start: Mapping[str, QuantizedWeight],
    options: LearnOptions,
) -> dict[str, QuantizedWeight]:
    """Return the layers of a block with scales that were learned on the walk's windows.

    Every eighth window is held back; if the loss on these has not fallen, the start is returned.

    Args:
        walk: at this block, with its dense stream past it (`BlockWalk.advance_dense`).
        block: the block; its other parameters stay as they are.
        weights: layer name -> dense weight, shape (N, K).
        start: layer name -> its quantised form.
        options: how to learn.

    Raises:
        CalibrationError: the loss is NaN or Inf.
    """
    learned = learned_weights(weights, start, options)
    optimiser = adam(learned, options)
    held, rest = split_windows(walk.num_windows)
    steps = options.steps or math.ceil(len(rest) / options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    before = _held_loss(walk, block, learned, held)
    for step in range(steps):
        picked = picked_windows(rest, step, options)
        optimiser.zero_grad(set_to_none=True)
        loss = _loss(walk, block, learned, picked)
        if not bool(loss.isfinite()):
            raise CalibrationError(
                f"The loss of `{block.name}` is {float(loss.detach())} at step {step + 1}. Use a "
                "smaller `learning_rate` (`--learning-rate`); at step 1 the text gives NaN."
            )
        loss.backward()
        optimiser.step()
        schedule.step()
    after = _held_loss(walk, block, learned, held)
    return {name: x.result() for name, x in learned.items()} if after < before else dict(start)


def learned_weights(
    weights: Mapping[str, Tensor], start: Mapping[str, QuantizedWeight], options: LearnOptions
) -> dict[str, LearnedWeight]:
    """Return layer name -> what is learned of it.

    Args:
        weights: layer name -> dense weight, shape (N, K).
        start: layer name -> its quantised form.
        options: how to learn.
    """
    return {
        name: LearnedWeight(
            weight.detach(), start[name], hold_codes=options.holds_codes, tables=options.tables
        )
        for name, weight in weights.items()
    }


def adam(learned: Mapping[str, LearnedWeight], options: LearnOptions) -> torch.optim.Adam:
    """Return the optimiser of all scales, and of the tables if they are learned."""
    groups = [{"params": [x.scale_change for x in learned.values()]}]
    if options.tables:
        groups.append({"params": [x.table_change for x in learned.values()]})
    # Why: a scale's share of a large model's loss can be below Adam's usual eps of 1e-8.
    return torch.optim.Adam(groups, lr=options.learning_rate, betas=(0.9, 0.99), eps=1e-12)


def split_windows(count: int) -> tuple[list[int], list[int]]:
    """Return the windows held back, and the others; of a single one both are that."""
    held = list(range(0, count, _HELD_BACK))
    return held, [i for i in range(count) if i % _HELD_BACK] or held


def picked_windows(windows: Sequence[int], step: int, options: LearnOptions) -> list[int]:
    """Return the windows of a step: they are gone through in order, again and again."""
    first = step * options.batch
    return [windows[(first + i) % len(windows)] for i in range(options.batch)]


def _loss(
    walk: BlockWalk, block: Block, learned: Mapping[str, LearnedWeight], windows: Sequence[int]
) -> Tensor:
    """Return the squared error of the block's output over the variance of its target."""
    values = {name: x.dequantized() for name, x in learned.items()}
    total = torch.zeros((), device=next(iter(values.values())).device)
    for i in windows:
        target = walk.target(i).float()
        error = (walk.output(block, i, values).float() - target).square().sum()
        spread = (target - target.mean((0, 1))).square().sum()
        total = total + error / spread.clamp_min(torch.finfo(torch.float32).tiny)
    return total / len(windows)


@torch.no_grad()
def _held_loss(
    walk: BlockWalk, block: Block, learned: Mapping[str, LearnedWeight], windows: Sequence[int]
) -> float:
    return float(_loss(walk, block, learned, windows))
