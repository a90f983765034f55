"""Perplexity by the standard protocol: non-overlapping windows of a text, their length stated.

    text -> token ids -> windows (n, W), the rest dropped -> -log p(ids[i, t] | ids[i, :t]), t = 1
    .. W-1

Perplexity is exp of the mean over all predicted tokens. Nothing is prepended to a window.
"""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute.errors import FluteError, FormatError

TEXTS = ("wikitext2", "classics")
"""Texts shipped with the package: slices of the WikiText-2 test split and of five classics."""
DEFAULT_WINDOW = 2048
_TOKENS_PER_BATCH = 4096


class EvaluationError(FluteError, ValueError):
    """A text or a model that perplexity cannot be measured on."""


@dataclass(frozen=True)
class Perplexity:
    """The result of one evaluation.

    Args:
        losses: mean negative log-likelihood of each window, nats per token, fp64 on the CPU.
        window: tokens per window.
        seconds: time the forward passes took.
    """

    losses: Tensor
    window: int
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens predicted: ``window - 1`` in each window."""
        return len(self.losses) * (self.window - 1)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return float(self.losses.mean())

    @property
    def loss_error(self) -> float:
        """Standard error of `loss` over the windows."""
        return standard_error(self.losses)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def perplexity_error(self) -> float:
        """Standard error of `perplexity`, to first order: ``perplexity * loss_error``."""
        return self.perplexity * self.loss_error

    def excess(self, reference: Perplexity) -> tuple[float, float]:
        """Return the mean loss over the reference's on the same windows, and its standard error.

        Raises:
            EvaluationError: the two were measured on different windows.
        """
        if self.losses.shape != reference.losses.shape or self.window != reference.window:
            raise EvaluationError(
                f"{len(self.losses)} windows of {self.window} tokens cannot be paired with "
                f"{len(reference.losses)} of {reference.window}: the models tokenise differently."
            )
        difference = self.losses - reference.losses
        return float(difference.mean()), standard_error(difference)


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of some values; 0 of a single one.

    Args:
        values: one per window, any float dtype, shape (windows,).
    """
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def read_text(source: str | Path) -> str:
    """Return a shipped text by its name, or the content of a .txt (or .xz) file.

    Raises:
        EvaluationError: no such text, or not UTF-8.
    """
    if str(source) in TEXTS:
        return resources.files("flute").joinpath(f"data/{source}.txt").read_text(encoding="utf-8")
    path = Path(source)
    if not path.is_file():
        raise EvaluationError(
            f"`{source}` is no text file; expected a path or one of the shipped texts {TEXTS}."
        )
    try:
        content = path.read_bytes()
        return (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise EvaluationError(f"`{source}` cannot be read as UTF-8 text: {error}") from error


def to_windows(text: str, tokenizer: Any, window: int, max_tokens: int | None = None) -> Tensor:
    """Tokenise a text and cut it into windows.

    Args:
        text: any text.
        tokenizer: a transformers tokenizer.
        window: tokens per window, at least 2.
        max_tokens: use at most so many tokens of the text.

    Returns:
        int64, shape (number of windows, window).

    Raises:
        EvaluationError: the text is shorter than a window.
    """
    if window < 2:
        raise EvaluationError(f"`window` is {window}; expected at least 2 tokens.")
    whole = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    ids = whole[:max_tokens]
    count = len(ids) // window
    if not count:
        used = f", of which `--max-tokens` takes {len(ids)}" if len(ids) < len(whole) else ""
        raise EvaluationError(
            f"The text has {len(whole)} tokens{used}; a window takes {window}. Give more text or a "
            "smaller window (`--window`)."
        )
    windows: Tensor = ids[: count * window].view(count, window)
    return windows


def perplexity(
    model: Any, windows: Tensor, progress: Callable[[int], Any] | None = None
) -> Perplexity:
    """Measure a causal language model's loss on windows of tokens.

    Args:
        model: a transformers causal language model, on any device.
        windows: int64, shape (number of windows, window), from `to_windows`.
        progress: called with the number of tokens after each batch.

    Raises:
        EvaluationError: the windows are longer than the model's context, or hold tokens beyond its
            vocabulary, or the loss is not a number.
    """
    window = windows.shape[1]
    check_windows(model, windows)
    losses = []
    model.eval()
    start = time.perf_counter()
    for batch in windows.split(max(1, _TOKENS_PER_BATCH // window)):
        losses.append(_window_losses(model, batch))
        if progress:
            progress(batch.numel())
    result = Perplexity(torch.cat(losses), window, time.perf_counter() - start)
    broken = (~result.losses.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise EvaluationError(
            f"The model's loss is NaN or Inf in {len(broken)} of {len(windows)} windows, the first "
            f"at {broken[0]}: its weights or scales are broken."
        )
    return result


def check_windows(model: Any, windows: Tensor) -> None:
    """Check that a model can read windows of tokens.

    Args:
        model: a transformers model.
        windows: int64, shape (number of windows, window).

    Raises:
        EvaluationError: they are longer than its context, or hold tokens beyond its vocabulary.
    """
    window = windows.shape[1]
    context = context_of(model)
    if context and window > context:
        raise EvaluationError(f"`window` is {window}; the model's context is {context} tokens.")
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary and int(windows.max()) >= vocabulary:
        raise EvaluationError(
            f"The tokenizer gives id {int(windows.max())}; the model knows {vocabulary} tokens."
        )


@torch.inference_mode()
def _window_losses(model: Any, batch: Tensor) -> Tensor:
    batch = batch.to(model.device)
    logits = model(input_ids=batch, use_cache=False).logits
    losses = [
        torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:])
        for row, ids in zip(logits, batch, strict=True)
    ]
    return torch.stack(losses).double().cpu()


def default_window(model: Any) -> int:
    """Return 2,048 tokens, or the model's context if that is shorter."""
    return min(DEFAULT_WINDOW, context_of(model) or DEFAULT_WINDOW)


def context_of(model: Any) -> int | None:
    """Return the tokens of a model's context; None if its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def relative_error(dense: Tensor, quantized: Tensor) -> float:
    """Return ``||dense - quantized||^2 / ||dense||^2``, both of shape (N, K).

    Raises:
        FormatError: the shapes differ.
    """
    if dense.shape != quantized.shape:
        raise FormatError(
            f"`quantized` has shape {tuple(quantized.shape)}; the dense weight "
            f"{tuple(dense.shape)}."
        )
    dense = dense.float()
    difference = (dense - quantized.float()).square().sum()
    return float(difference / dense.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
