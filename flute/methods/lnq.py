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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flute import cuda_quantize
from flute.format import QuantizedWeight, QuantSpec
from flute.methods import gptq
from flute.methods.absmax import storable_scales
from flute.methods.gptq import entry_of, ranks_of
from flute.methods.hessian import DAMPING, check_hessian, factored, row_groups
from flute.methods.nearest import midpoints

_ROUNDS = 4
_SWEEPS = 2
"""Rounds, and descents through the codes in each."""
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
        hessian: sum (or mean) of x x' over calibration inputs, shape (K, K), or (groups, K, K) of
            groups of rows (`hessian.row_groups`), on the same device.
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
    N, K = weight.shape
    check_hessian(hessian, K)
    parts, used = _split(weight, hessian, damping, name)
    start = gptq.quantize(weight, hessian, spec, table, scale_dtype, damping=used, name=name)
    entries, code_of_rank = start.table.sort(dim=1, stable=True)
    ranks = code_of_rank.argsort(dim=1).expand(N, -1).gather(1, start.codes.long())
    if per_row:
        entries = entries.expand(N, -1)
    scales = start.scales.float()
    for _ in range(_ROUNDS):
        entries, ranks = _fit_entries(parts, entries, ranks, scales)
        scales = torch.cat([_fit_scales(part, entries, ranks, scales) for part in parts])
        for _ in range(_SWEEPS):
            ranks = torch.cat([_descend(part, entries, ranks, scales) for part in parts])
    reach = entries.abs().amax(1, keepdim=True)
    reach = torch.where(reach > 0, reach, 1)
    entries, scales = entries / reach, scales * reach
    stored = storable_scales(scales, scale_dtype)
    ranks = torch.cat([_descend(part, entries, ranks, stored.float()) for part in parts])
    return QuantizedWeight(ranks.to(torch.uint8), stored, entries.contiguous(), spec)


@dataclass(frozen=True)
class Part:
    """Rows of the weight that share a Hessian.

    Args:
        rows: where they are.
        weight: these rows, shape (n, K).
        full: their damped Hessian, mean diagonal 1, shape (K, K).
        share: how much an error counts here, where parts share a table.
    """

    rows: slice
    weight: Tensor
    full: Tensor
    share: float = 1.0

    def of(self, entries: Tensor) -> Tensor:
        """Return the tables (1 | N, T) of these rows."""
        return entries if entries.shape[0] == 1 else entries[self.rows]


def _split(weight: Tensor, hessian: Tensor, damping: float, name: str) -> tuple[list[Part], float]:
    """Return the parts of a weight, and the damping that each of their Hessians can bear."""
    parts, used, total = [], damping, float(hessian.diagonal(dim1=-2, dim2=-1).double().mean())
    for rows, own in row_groups(len(weight), hessian):
        full, _, needed = factored(own, damping, name)
        share = float(own.diagonal().double().mean()) / total if total > 0 else 1.0
        parts.append(Part(rows, weight[rows], full, share))
        used = max(used, needed)
    return parts, used


def values_of(entries: Tensor, ranks: Tensor) -> Tensor:
    """Look ranks (N, K) up in (1 | N, T) entries: shape (N, K)."""
    return entries[0][ranks] if entries.shape[0] == 1 else entries.gather(1, ranks)


def _per_column(scales: Tensor, K: int) -> Tensor:
    return scales.repeat_interleave(K // scales.shape[1], 1)


def _normal_equations(
    part: Part, entries: Tensor, ranks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return A H A' and A H w of the rows of a part, fp64, shapes (n, T, T) and (n, T).

    Their sums over the rows, with a first dimension of 1, if ``entries`` has one row.
    """
    K, T = part.weight.shape[1], entries.shape[1]
    ranks, target = ranks[part.rows], part.weight @ part.full
    column_scales = _per_column(scales[part.rows], K)
    grams, sides = [], []
    step = max(1, _SCRATCH // (T * K))
    for first in range(0, len(ranks), step):
        some = slice(first, first + step)
        s, codes = column_scales[some], ranks[some]
        chosen = torch.zeros(len(codes), T, K, dtype=s.dtype, device=s.device)
        chosen.scatter_(1, codes.unsqueeze(1), s.unsqueeze(1))
        grams.append((chosen.view(-1, K) @ part.full).view(chosen.shape) @ chosen.transpose(1, 2))
        sides.append((chosen @ target[some].unsqueeze(2)).squeeze(2))
        if entries.shape[0] == 1:
            grams[-1], sides[-1] = grams[-1].sum(0, keepdim=True), sides[-1].sum(0, keepdim=True)
    gram, side = torch.cat(grams).double(), torch.cat(sides).double()
    if entries.shape[0] == 1:
        gram, side = gram.sum(0, keepdim=True), side.sum(0, keepdim=True)
    return gram, side


def _fit_entries(
    parts: Sequence[Part], entries: Tensor, ranks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tables of least error for codes and scales, ascending, and the codes' new ranks.

    A table is shared by all rows if ``entries`` has one row.
    """
    systems = [_normal_equations(part, entries, ranks, scales) for part in parts]
    if entries.shape[0] == 1:
        systems = [
            (gram * p.share, side * p.share) for (gram, side), p in zip(systems, parts, strict=True)
        ]
        gram, side = (torch.stack(column).sum(0) for column in zip(*systems, strict=True))
    else:
        gram, side = (torch.cat(column) for column in zip(*systems, strict=True))
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    side += ridge.unsqueeze(1) * entries
    fitted = torch.linalg.solve(gram, side.unsqueeze(2)).squeeze(2).float()
    fitted = torch.where(torch.isfinite(fitted).all(1, keepdim=True), fitted, entries)
    ascending, order = fitted.sort(dim=1, stable=True)
    return ascending, order.argsort(dim=1).expand(len(ranks), -1).gather(1, ranks)


def _fit_scales(part: Part, entries: Tensor, ranks: Tensor, scales: Tensor) -> Tensor:
    """Return the scales of a part's rows of least error, each given those before it."""
    K = part.weight.shape[1]
    scales = scales[part.rows].clone()
    length = K // scales.shape[1]
    values = values_of(part.of(entries), ranks[part.rows])
    errors = part.weight - values * _per_column(scales, K)
    for g in range(scales.shape[1]):
        columns = slice(g * length, (g + 1) * length)
        c = values[:, columns]
        norm = ((c @ part.full[columns, columns]) * c).sum(1)
        gradient = (c * (errors @ part.full[:, columns])).sum(1)
        change = torch.where(norm > 0, gradient / norm, 0)
        scales[:, g] += change
        errors[:, columns] -= c * change.unsqueeze(1)
    return scales


def _descend(part: Part, entries: Tensor, ranks: Tensor, scales: Tensor) -> Tensor:
    """Return better codes of a part's rows: one sweep, each code the best given all others."""
    own = (part.of(entries), ranks[part.rows], scales[part.rows])
    if cuda_quantize.takes(part.weight):
        return _descend_by_kernels(part, *own)
    return _descend_by_columns(part, *own)


def _descend_by_columns(part: Part, entries: Tensor, ranks: Tensor, scales: Tensor) -> Tensor:
    """Descend on any device; entries, ranks and scales are those of the part's rows."""
    weight, full = part.weight, part.full
    N, K = weight.shape
    bounds = midpoints(entries)
    errors = weight - values_of(entries, ranks) * _per_column(scales, K)
    scales_by_group = scales.T.contiguous()
    divisors = scales_by_group.masked_fill(scales_by_group == 0, torch.inf)
    length = K // scales.shape[1]
    found = torch.empty(K, N, dtype=torch.int64, device=weight.device)
    for first in range(0, K, _BLOCK):
        block = slice(first, min(first + _BLOCK, K))
        within = full[block, block] / full.diagonal()[block]
        values = (weight[:, block] - errors[:, block]).T.contiguous()
        aims = torch.addcdiv(values, (errors @ full[:, block]).T, full.diagonal()[block, None])
        changes = torch.empty_like(values)
        for i in range(len(values)):  # few and small steps: their number decides how long it takes
            g = (first + i) // length
            aim = torch.addmv(aims[i], changes[:i].T, within[:i, i]).div_(divisors[g])
            rank = ranks_of(aim, bounds, found[first + i])
            entry = entry_of(entries, rank)
            torch.addcmul(values[i], entry, scales_by_group[g], value=-1, out=changes[i])
        errors[:, block] += changes.T
    return found.T.contiguous()


def _descend_by_kernels(part: Part, entries: Tensor, ranks: Tensor, scales: Tensor) -> Tensor:
    """Descend on a GPU: a product for what a block's columns should be, a launch to round them."""
    K = part.weight.shape[1]
    length = K // scales.shape[1]
    errors = part.weight - values_of(entries, ranks) * _per_column(scales, K)
    effect = (part.full / part.full.diagonal()).contiguous()
    bounds = midpoints(entries)
    found = torch.empty(ranks.shape, dtype=torch.uint8, device=ranks.device)
    for first in range(0, K, cuda_quantize.COLUMNS):
        block = slice(first, min(first + cuda_quantize.COLUMNS, K))
        values = part.weight[:, block] - errors[:, block]
        aims = torch.addmm(values, errors, effect[:, block])
        errors[:, block] += cuda_quantize.feedback(
            *(aims, values, scales[:, first // length :], entries, bounds, effect[block, block]),
            found[:, block],
            first=first % length,
            length=length,
        )
    return found.long()
