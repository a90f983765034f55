"""GPTQ with any table: each column's rounding error is made up for by the columns after it.

H is the damped Hessian of the layer's inputs and U the upper Cholesky factor of its inverse. Column
by column, j = 0 .. K - 1:

    q_j = table[nearest(w_j / s)] * s,   e = (w_j - q_j) / U_jj,   w_k -= e U_jk  for k > j

so that what is still to be rounded absorbs the error as well as H allows. A group's scale is found
when its first column is reached, for the weights as they have become by then.

    columns   |-------- block --------|------- the rest ------->
              errors act at once        errors act when the block is done: one matrix product

On a GPU a kernel walks through a block's columns (`flute.cuda_quantize`), elsewhere torch does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flute import cuda_quantize
from flute.format import WHOLE_ROW, QuantizedWeight, QuantSpec
from flute.methods.absmax import storable_scales
from flute.methods.fit import fit_table, sample_rows
from flute.methods.hessian import DAMPING, check_hessian, factored, row_groups
from flute.methods.mse import NUM_REFINEMENTS, group_scales, signed_candidates
from flute.methods.nearest import midpoints
from flute.tables import get_table

_BLOCK = 128
"""Columns whose errors act at once. Each group size divides it or is a multiple, so that a group's
weights are all up to date when its scale is sought."""


def quantize(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    table: Tensor | None,
    scale_dtype: torch.dtype,
    *,
    damping: float = DAMPING,
    name: str = "the layer",
    reorder: bool = True,
) -> QuantizedWeight:
    """Quantise by error feedback, with scales of least squared error.

    Args:
        weight: fp32, finite, shape (N, K); on the CPU or a GPU.
        hessian: sum (or mean) of x x' over calibration inputs, shape (K, K), or (groups, K, K) of
            groups of rows (`hessian.row_groups`), on the same device.
        spec: bits and group size; K is a multiple of the group.
        table: fp32, shape (1 | N, 2**num_bits); None fits one to this weight (`fit_table`).
        scale_dtype: dtype of the scales; codes are chosen for the scale as stored.
        damping: added to the Hessian's diagonal, as a share of its mean.
        name: of the layer, for the warning that its damping had to be raised.
        reorder: round the groups of the most active columns first, and within each group its most
            active columns. Groups stay whole, so nothing of it is left in the result.

    Returns:
        The codes, scales (some of them negative) and table.

    Raises:
        FormatError: a Hessian of another shape, with NaN or Inf, or that cannot be factored.

    Reference: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
    """
    N, K = weight.shape
    check_hessian(hessian, K)
    length = spec.group_length(K)
    if table is None:
        table = table_of_rows(weight[sample_rows(N, K)], hessian, spec)
    if hessian.ndim == 3:
        parts = [
            quantize(
                *(weight[rows], own, spec, table[rows] if len(table) > 1 else table, scale_dtype),
                damping=damping,
                name=name,
                reorder=reorder,
            )
            for rows, own in row_groups(N, hessian)
        ]
        codes, scales = torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])
        return QuantizedWeight(codes, scales, table, spec)
    order, group_order = _column_order(hessian, length, reorder)
    _, upper, _ = factored(hessian[order][:, order], damping, name)
    entries, code_of_rank = table.sort(dim=1, stable=True)
    rest = weight[:, order]
    round_columns = _round_by_kernels if cuda_quantize.takes(rest) else _round_columns
    ranks, scales = round_columns(rest, upper, entries, length, spec.num_bits, scale_dtype)
    codes = torch.empty_like(ranks)
    codes[:, order] = code_of_rank.to(torch.uint8).expand(N, -1).gather(1, ranks.long())
    scales = scales[:, group_order.argsort()]
    return QuantizedWeight(codes, scales, table, spec)


def _round_columns(
    rest: Tensor,
    upper: Tensor,
    entries: Tensor,
    length: int,
    num_bits: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Round one column after the other, on any device.

    Args:
        rest: the weight in the order of rounding, shape (N, K); changed.
        upper: factor of the Hessian's inverse in that order, shape (K, K).
        entries: ascending, shape (1 | N, T).
        length: columns of a group.
        num_bits: of a code.
        scale_dtype: of the scales.

    Returns:
        Ranks of the entries, uint8, shape (N, K), and the scales as stored, shape (N, groups).
    """
    N, K = rest.shape
    bounds, whole = midpoints(entries), QuantSpec(num_bits, WHOLE_ROW)
    found = torch.empty(K, N, dtype=torch.uint8, device=rest.device)
    scales = torch.empty(N, K // length, dtype=scale_dtype, device=rest.device)
    for first in range(0, K, _BLOCK):
        stop = min(first + _BLOCK, K)
        errors = torch.empty(stop - first, N, dtype=rest.dtype, device=rest.device)
        fresh = first  # the errors of columns before it have acted on the current group
        for j in range(first, stop):
            if j % length == 0:
                group = slice(j, min(j + length, stop))
                rest[:, group] -= errors[: j - first].T @ upper[first:j, group]
                fresh = j
                best = group_scales(rest[:, j : j + length], entries, whole)
                stored = storable_scales(best, scale_dtype)
                scales[:, j // length] = stored[:, 0]
                s = stored[:, 0].float()
                divisor = s.masked_fill(s == 0, torch.inf)
            column = rest[:, j] - errors[fresh - first : j - first].T @ upper[fresh:j, j]
            ranks = ranks_of(column / divisor, bounds)
            found[j] = ranks
            errors[j - first] = (column - entry_of(entries, ranks) * s) / upper[j, j]
        rest[:, stop:].addmm_(errors.T, upper[first:stop, stop:], alpha=-1)
    return found.T.contiguous(), scales


def _round_by_kernels(
    rest: Tensor,
    upper: Tensor,
    entries: Tensor,
    length: int,
    num_bits: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Do the same on a GPU: a launch for a group's scales, one for its columns, then a product."""
    N, K = rest.shape
    bounds, candidates = midpoints(entries), signed_candidates(entries, num_bits)
    # Of a column's change on those after it; the factor comes with columns side by side.
    effect = (upper / -upper.diagonal().unsqueeze(1)).contiguous()
    ranks = torch.empty(N, K, dtype=torch.uint8, device=rest.device)
    scales = torch.empty(N, K // length, dtype=scale_dtype, device=rest.device)
    for start in range(0, K, length):
        group = rest[:, start : start + length]
        best = cuda_quantize.search(group, length, entries, bounds, candidates, NUM_REFINEMENTS)
        stored = storable_scales(best, scale_dtype)
        scales[:, start // length] = stored[:, 0]
        s = stored.float()
        for first in range(start, start + length, cuda_quantize.COLUMNS):
            stop = min(first + cuda_quantize.COLUMNS, start + length)
            block = slice(first, stop)
            changes = cuda_quantize.feedback(
                *(rest[:, block], None, s, entries, bounds, effect[block, block], ranks[:, block]),
                first=0,
                length=length,
            )
            rest[:, stop:].addmm_(changes, effect[block, stop:])
    return ranks, scales


def table_of_rows(rows: Tensor, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """Return the table that fits a weight best where inputs are large.

    Args:
        rows: fp32, shape (rows, K): of a large weight the `fit.sample_rows`.
        hessian: of the layer, shape (K, K) or (groups, K, K).
        spec: bits and group size.

    Returns:
        fp32, shape (1, 2**num_bits).
    """
    K = rows.shape[1]
    start = get_table("bof-s", spec.num_bits, spec.group_size).to(rows.device)
    activity = hessian.view(-1, K, K).diagonal(dim1=1, dim2=2).mean(0)
    return fit_table(rows, spec, start, activity)


def ranks_of(values: Tensor, bounds: Tensor, out: Tensor | None = None) -> Tensor:
    """Count the bounds below each value: (N,) and ascending (1 | N, T - 1) -> int64 (N,).

    Args:
        values: fp32.
        bounds: midpoints of neighbouring entries.
        out: int64, shape (N,): where the ranks go; None makes it.
    """
    if bounds.shape[0] == 1:
        return torch.bucketize(values, bounds[0], out=out)
    column = None if out is None else out.unsqueeze(1)
    return torch.searchsorted(bounds, values.unsqueeze(1), out=column)[:, 0]


def entry_of(entries: Tensor, ranks: Tensor) -> Tensor:
    """Look ranks (N,) up in (1 | N, T) entries: shape (N,)."""
    if entries.shape[0] == 1:
        return entries[0].index_select(0, ranks)
    return entries.gather(1, ranks.unsqueeze(1))[:, 0]


def _column_order(hessian: Tensor, length: int, reorder: bool) -> tuple[Tensor, Tensor]:
    """Return the order of columns, shape (K,), and that of groups; groups stay contiguous."""
    activity = hessian.diagonal().view(-1, length)
    if not reorder:
        columns = torch.arange(activity.numel(), device=hessian.device)
        return columns, columns[: len(activity)]
    groups = activity.sum(1).argsort(descending=True, stable=True)
    inner = activity.argsort(dim=1, descending=True, stable=True)
    return (groups.unsqueeze(1) * length + inner[groups]).flatten(), groups
