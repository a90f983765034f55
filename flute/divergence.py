"""How far a model's next-token distributions are from those of the model it was made from.

    windows (n, W) -> logits of both models -> at each of the W - 1 positions of a window with a
    next token:  KL(p || q) = sum_v p_v (log p_v - log q_v),  p of the reference, q of the model
                 agreement  = [argmax p == argmax q]

Perplexity sees only the probability of the token that came; two models can be equally surprised
and disagree on everything else. KL sees the whole distribution, and has far less noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flute.evaluate import EvaluationError, Perplexity, check_windows, standard_error

PERCENTILES = (50, 90, 99)
"""Percentiles of KL over tokens that are reported: a few tokens carry most of the mean."""
_TOKENS_PER_BATCH = 4096
_LOGITS_PER_BATCH = 1 << 28
"""Logits of a batch, per model: 0.5 GB in 16 bits. One window of 2,048 tokens at 128 k entries."""
_LOGITS_PER_CHUNK = 1 << 20
"""Logits turned into fp32 distributions at a time: 4 MB in each of half a dozen tensors."""


@dataclass(frozen=True)
class Divergence:
    """A model beside its reference, on the same windows.

    Args:
        kl: KL divergence at each position, nats, fp32 on the CPU, shape (windows, W - 1).
        agrees: whether both models hold the same token most likely, bool, shape (windows, W - 1).
        perplexity: the model's own, from the same forward pass.
    """

    kl: Tensor
    agrees: Tensor
    perplexity: Perplexity

    @property
    def mean(self) -> float:
        """Mean KL divergence, nats per token."""
        return float(self.kl.double().mean())

    @property
    def error(self) -> float:
        """Standard error of `mean` over the windows."""
        return standard_error(self.kl.double().mean(1))

    @property
    def percentiles(self) -> dict[int, float]:
        """Percentile -> KL divergence below which that share of the tokens lies, nats."""
        values = np.percentile(self.kl.numpy(), PERCENTILES)
        return {p: float(value) for p, value in zip(PERCENTILES, values, strict=True)}

    @property
    def agreement(self) -> float:
        """Share of the positions at which both models hold the same token most likely."""
        return float(self.agrees.double().mean())

    @property
    def agreement_error(self) -> float:
        """Standard error of `agreement` over the windows."""
        return standard_error(self.agrees.double().mean(1))


def divergence(
    model: Any, reference: Any, windows: Tensor, progress: Callable[[int], Any] | None = None
) -> Divergence:
    """Measure a causal language model against a reference: KL divergence, agreement and loss.

    Distributions are computed in fp32, a chunk of positions at a time, so that vocabularies of any
    size fit. The error of a position's KL divergence is below 1e-6 nats.

    Args:
        model: a transformers causal language model, on any device.
        reference: the dense model; both run on each batch.
        windows: int64, shape (number of windows, W), from `flute.evaluate.to_windows`.
        progress: called with the number of tokens after each batch.

    Raises:
        EvaluationError: the vocabularies differ, a model cannot read the windows, or its logits
            are NaN or Inf; the message says which model, window and token.
    """
    check_windows(model, windows)
    check_windows(reference, windows)
    sizes = [getattr(m.config, "vocab_size", None) for m in (model, reference)]
    _check_vocabulary(*sizes)
    window = windows.shape[1]
    tokens = min(_TOKENS_PER_BATCH, _LOGITS_PER_BATCH // (sizes[0] or 1 << 17))
    start = time.perf_counter()
    parts = []
    done = 0
    for batch in windows.split(max(1, tokens // window)):
        parts.append(_compare_batch(model, reference, batch, done))
        done += len(batch)
        if progress:
            progress(batch.numel())
    losses, kl, agrees = (torch.cat(column) for column in zip(*parts, strict=True))
    own = Perplexity(losses.double().mean(1), window, time.perf_counter() - start)
    return Divergence(kl, agrees.bool(), own)


def _check_vocabulary(model: int | None, reference: int | None) -> None:
    if model != reference:
        raise EvaluationError(
            f"The model's vocabulary has {model} tokens, the reference's {reference}: their "
            "distributions cannot be compared. Give the model it was quantised from."
        )


@torch.inference_mode()
def _compare_batch(model: Any, reference: Any, batch: Tensor, first: int) -> tuple[Tensor, ...]:
    """Return loss, KL divergence and agreement of each position, (windows, W - 1) each."""
    q_logits, p_logits = (
        m(input_ids=batch.to(m.device), use_cache=False).logits[:, :-1] for m in (model, reference)
    )
    _check_vocabulary(q_logits.shape[-1], p_logits.shape[-1])
    rows = max(1, _LOGITS_PER_CHUNK // q_logits.shape[-1])
    targets = batch[:, 1:].to(q_logits.device)
    width = targets.shape[1]
    out = torch.empty(3, *targets.shape)
    for i in range(len(batch)):
        for t in range(0, width, rows):
            chunk = slice(t, t + rows)
            log_q = q_logits[i, chunk].float().log_softmax(1)
            log_p = p_logits[i, chunk].to(log_q.device).float().log_softmax(1)
            likeliest = [
                _likeliest(x, first + i, t, name)
                for x, name in ((log_p, "reference"), (log_q, "model"))
            ]
            loss = -log_q.gather(1, targets[i, chunk, None])[:, 0]
            out[:, i, chunk] = torch.stack(
                (loss, kl_divergence(log_p, log_q), (likeliest[0] == likeliest[1]).float())
            ).cpu()
    infinite = (~out.isfinite()).nonzero()
    if len(infinite):
        _, i, t = infinite[0].tolist()
        raise EvaluationError(
            f"At token {t} of window {first + i} the model gives probability 0 (a logit of -Inf) "
            "where the reference does not: its KL divergence is infinite."
        )
    return out.unbind(0)


def _likeliest(log_probabilities: Tensor, window: int, first: int, name: str) -> Tensor:
    values, indices = log_probabilities.max(1)  # NaN is the largest
    broken = (~values.isfinite()).nonzero()
    if len(broken):
        raise EvaluationError(
            f"The {name}'s logits are NaN or Inf at token {first + int(broken[0])} of window "
            f"{window}: its weights or scales are broken."
        )
    return indices


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``sum_v p_v (log p_v - log q_v)`` of each row, in nats.

    Summed as ``p (log p - log q) - p + q``: no term is negative, and rounding in either logarithm
    cancels to first order, since sum p = sum q = 1. Distributions that differ by 1e-6 nats keep
    their digits in fp32 so; summed plainly they would drown in the rounding of log p.

    Args:
        log_p: fp32 or fp64, log-probabilities, shape (rows, entries); -Inf is probability 0.
        log_q: the same of the other distribution.
    """
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0)
    return terms.sub_(p).add_(log_q.exp()).sum(1)
