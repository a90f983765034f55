"""LNQ, layer-wise non-uniform quantisation, with group scales: exact updates in turn.

Minimises (w - q) H (w - q)' over the codes, the scales and the table of q = table[codes] * s, where
H is the damped Hessian of the layer's inputs. From GPTQ's result, a round does

    table    least squares: (A H A') t = A H w, A (entries, K) one-hot codes times the scales; a
             table per row solves one such system per row, a table per matrix their sum
    scales   least squares, a group after the other: s_g += <c, (E H)_g> / <c, H_gg c>, E = w - q
    codes    coordinate descent, a column after the other: the entry nearest to
             w_j + sum_{l != j} E_l H_lj / H_jj

and no step raises the error but the last, which rounds the scales to their stored dtype; after that
the codes go through one more descent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flute.format import QuantizedWeight, QuantSpec
from flute.methods import gptq
from flute.methods.absmax import storable_scales
from flute.methods.gptq import entry_of, ranks_of
from flute.methods.hessian import DAMPING, check_hessian, factored
from flute.methods.nearest import midpoints

_ROUNDS = 4
_SWEEPS = 2
"""Rounds, and descents through the codes in each. See the measured facts in ARCHITECTURE.md."""
_BLOCK = 128
"""Columns whose changes act at once; the rest hears of them by one matrix product."""
_SCRATCH = 1 << 24
"""Numbers of scratch in an update of the table: rows are taken in blocks of so many."""
_RIDGE = 1e-6
"""Pulls the table to what it was, as a share of the system's mean diagonal: settles entries that no
code takes, and rows whose entries the data cannot tell apart."""


def quantize(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    table: Tensor | None,
    scale_dtype: torch.dtype,
    *,
    per_row: bool = False,
    damping: float = DAMPING,
    name: str = "the layer",
) -> QuantizedWeight:
    """Quantise by alternating least squares and coordinate descent.

    Args:
        weight: fp32, finite, shape (N, K); on the CPU or a GPU.
        hessian: sum (or mean) of x x' over calibration inputs, shape (K, K), on the same device.
        spec: bits and group size; K is a multiple of the group.
        table: where the table starts, fp32, shape (1 | N, 2**num_bits); None fits one first.
        scale_dtype: dtype of the scales; codes are chosen for the scale as stored.
        per_row: learn a table for each row instead of one for the matrix.
        damping: added to the Hessian's diagonal, as a share of its mean.
        name: of the layer, for the warning that its damping had to be raised.

    Returns:
        The codes, scales (some of them negative) and the table, shape (N, 2**num_bits) if
        ``per_row`` or if it started so, else (1, 2**num_bits).

    Raises:
        FormatError: a Hessian of another shape, with NaN or Inf, or that cannot be factored.

    Reference: Kim et al. 2025 (GuidedQuant), arXiv 2505.07004, section 4; the scales are ours.
    """
    N = len(weight)
    check_hessian(hessian, weight.shape[1])
    full, _, used = factored(hessian, damping, name)
    start = gptq.quantize(weight, hessian, spec, table, scale_dtype, damping=used, name=name)
    entries, code_of_rank = start.table.sort(dim=1, stable=True)
    rank_of_code = code_of_rank.argsort(dim=1)
    ranks = rank_of_code.expand(N, -1).gather(1, start.codes.long())
    if per_row:
        entries = entries.expand(N, -1)
    scales = start.scales.float()
    for _ in range(_ROUNDS):
        entries, ranks = _fit_entries(weight, full, entries, ranks, scales)
        scales = _fit_scales(weight, full, entries, ranks, scales)
        for _ in range(_SWEEPS):
            ranks = _descend(weight, full, entries, ranks, scales)
    reach = entries.abs().amax(1, keepdim=True)
    reach = torch.where(reach > 0, reach, 1)
    entries, scales = entries / reach, scales * reach
    stored = storable_scales(scales, scale_dtype)
    ranks = _descend(weight, full, entries, ranks, stored.float())
    return QuantizedWeight(ranks.to(torch.uint8), stored, entries.contiguous(), spec)


def values_of(entries: Tensor, ranks: Tensor) -> Tensor:
    """Look ranks (N, K) up in (1 | N, T) entries: shape (N, K)."""
    return entries[0][ranks] if entries.shape[0] == 1 else entries.gather(1, ranks)


def _per_column(scales: Tensor, K: int) -> Tensor:
    return scales.repeat_interleave(K // scales.shape[1], 1)


def _fit_entries(
    weight: Tensor, full: Tensor, entries: Tensor, ranks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tables of least error for codes and scales, ascending, and the codes' new ranks.

    A table is shared by all rows if ``entries`` has one row.
    """
    N, K = weight.shape
    T = entries.shape[1]
    column_scales, target = _per_column(scales, K), weight @ full
    grams, sides = [], []
    step = max(1, _SCRATCH // (T * K))
    for first in range(0, N, step):
        part = slice(first, first + step)
        s, codes = column_scales[part], ranks[part]
        chosen = torch.zeros(len(codes), T, K, dtype=weight.dtype, device=weight.device)
        chosen.scatter_(1, codes.unsqueeze(1), s.unsqueeze(1))
        grams.append((chosen.view(-1, K) @ full).view(chosen.shape) @ chosen.transpose(1, 2))
        sides.append((chosen @ target[part].unsqueeze(2)).squeeze(2))
        if entries.shape[0] == 1:
            grams[-1], sides[-1] = grams[-1].sum(0, keepdim=True), sides[-1].sum(0, keepdim=True)
    gram, side = torch.cat(grams).double(), torch.cat(sides).double()
    if entries.shape[0] == 1:
        gram, side = gram.sum(0, keepdim=True), side.sum(0, keepdim=True)
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    side += ridge.unsqueeze(1) * entries
    fitted = torch.linalg.solve(gram, side.unsqueeze(2)).squeeze(2).float()
    fitted = torch.where(torch.isfinite(fitted).all(1, keepdim=True), fitted, entries)
    ascending, order = fitted.sort(dim=1, stable=True)
    return ascending, order.argsort(dim=1).expand(N, -1).gather(1, ranks)


def _fit_scales(
    weight: Tensor, full: Tensor, entries: Tensor, ranks: Tensor, scales: Tensor
) -> Tensor:
    """Return the scales of least error for codes and table, each given those before it."""
    K = weight.shape[1]
    length = K // scales.shape[1]
    values = values_of(entries, ranks)
    errors = weight - values * _per_column(scales, K)
    scales = scales.clone()
    for g in range(scales.shape[1]):
        columns = slice(g * length, (g + 1) * length)
        c = values[:, columns]
        norm = ((c @ full[columns, columns]) * c).sum(1)
        gradient = (c * (errors @ full[:, columns])).sum(1)
        change = torch.where(norm > 0, gradient / norm, 0)
        scales[:, g] += change
        errors[:, columns] -= c * change.unsqueeze(1)
    return scales


def _descend(
    weight: Tensor, full: Tensor, entries: Tensor, ranks: Tensor, scales: Tensor
) -> Tensor:
    """Return better codes: one sweep over the columns, each code the best given all others."""
    K = weight.shape[1]
    bounds = midpoints(entries)
    errors = weight - values_of(entries, ranks) * _per_column(scales, K)
    scales_by_group = scales.T.contiguous()
    divisors = scales_by_group.masked_fill(scales_by_group == 0, torch.inf)
    length = K // scales.shape[1]
    ranks = ranks.clone()
    for first in range(0, K, _BLOCK):
        block = slice(first, min(first + _BLOCK, K))
        pull = (errors @ full[:, block]).T.contiguous()
        within, dense = full[block, block], weight[:, block].T.contiguous()
        old = errors[:, block].T.contiguous()
        changes = torch.empty_like(old)
        for i in range(len(old)):
            g = (first + i) // length
            felt = pull[i] + changes[:i].T @ within[:i, i]
            target = dense[i] + felt / within[i, i] - old[i]
            rank = ranks_of(target / divisors[g], bounds)
            changes[i] = dense[i] - entry_of(entries, rank) * scales_by_group[g] - old[i]
            ranks[:, first + i] = rank
        errors[:, block] += changes.T
    return ranks
