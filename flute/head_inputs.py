"""What enters the output head: its Hessian, once windows have been taken through all blocks.

embedding -> (blocks: skipped) -> hidden states of the walk -> final norm -> x -> head: not run
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flute.block_walk import BlockWalk, evaluating
from flute.calibration import CalibrationError
from flute.errors import UnsupportedProblemError


class _HeadReachedError(Exception):
    """Ends a pass through the model where the head would multiply."""


@torch.no_grad()
def head_hessian(model: Any, head: str, walk: BlockWalk, windows: Tensor) -> Tensor:
    """Return the sum of x x' over the inputs of an output head, fp32, shape (K, K).

    Args:
        model: of transformers; its embedding and final norm have their weights, blocks and head
            need none.
        head: full name of the head.
        walk: made with ``keep_outputs``, past its last block.
        windows: those that the walk took: int64, shape (samples, sequence).

    Raises:
        CalibrationError: NaN or Inf in the inputs.
        UnsupportedProblemError: the model does not call its head.
    """
    total: Tensor | None = None

    def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total
        rows = args[0].detach().flatten(0, -2).float()
        if total is None:
            total = rows.new_zeros(rows.shape[1], rows.shape[1])
        total.addmm_(rows.T, rows)
        raise _HeadReachedError

    handle = model.get_submodule(head).register_forward_pre_hook(collect)
    try:
        with evaluating(model):
            for i, window in enumerate(windows):
                _pass(model, walk, i, window)
    finally:
        handle.remove()
    if total is None:
        raise UnsupportedProblemError(
            f"{type(model).__name__} does not call its output head `{head}`. Leave `head_bits` "
            "(`--head-bits`) out."
        )
    if not all(bool(torch.isfinite(end)) for end in total.aminmax()):
        raise CalibrationError(
            f"`{head}` is given NaN or Inf by the calibration text: the weights before it are "
            "broken, or overflow in this dtype."
        )
    return total


def _pass(model: Any, walk: BlockWalk, index: int, window: Tensor) -> None:
    """Run a model on a window, with the walk's hidden states in place of what its blocks give."""
    hidden = walk.output_of(index)
    for block in walk.blocks:
        block.module.forward = lambda *args, **kwargs: hidden
    try:
        model(input_ids=window.unsqueeze(0).to(hidden.device), use_cache=False)
    except _HeadReachedError:
        return
    finally:
        for block in walk.blocks:
            del block.module.forward
