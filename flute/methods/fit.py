"""The table of least squared error for one matrix: alternate codes, scales and entries.

With importances h per column, groups w and entries c = table[codes] of their codes:

    codes = nearest(w / s, table),  s = <h w, c> / <h c, c>,
    table[i] = sum h s w / sum h s^2 over the weights with code i

Each step lowers sum h (w - s c)^2; it is Lloyd's algorithm with a scale per group.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from flute.format import QuantSpec
from flute.methods.absmax import round_to_table
from flute.methods.mse import group_scales

_ROUNDS = 15
"""Gaussian weights, group 64, bof-s's start: the error falls by less than 0.2 % after these."""
_SAMPLE = 1 << 16
"""Weights that the table is fitted to; of larger matrices, rows at even distances."""


def sample_rows(N: int, K: int) -> list[int]:
    """Return the rows of a matrix (N, K) that its table is fitted to, at even distances."""
    return list(range(0, N, max(1, N * K // _SAMPLE)))


def fit_table(
    weight: Tensor, spec: QuantSpec, start: Tensor, importance: Tensor | None = None
) -> Tensor:
    """Return the table, ascending and with a largest magnitude of 1, that fits a matrix best.

    Args:
        weight: fp32, shape (rows, K): of a large matrix the `sample_rows`.
        spec: bits and group size; K is a multiple of the group.
        start: fp32, shape (1, 2**num_bits).
        importance: fp32, shape (K,): how much an error in each column counts; None: all alike.

    Returns:
        fp32, shape (1, 2**num_bits). An entry that no weight takes stays where it is, or moves to
        the end that it would lie beyond.

    Reference: Lloyd 1982 for a fixed scale; Blumenberg et al. 2025, arXiv 2505.06653, for blocks.
    """
    fit = functools.partial(_alternate, weight, spec, start, importance)
    if weight.device.type != "cpu" or torch.get_num_threads() == 1:
        return fit()
    # Why: torch's threads meet after each of these small steps, and wait where others hold a core.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(fit).result()


def _alternate(weight: Tensor, spec: QuantSpec, start: Tensor, importance: Tensor | None) -> Tensor:
    N, K = weight.shape
    length = spec.group_length(K)
    largest = weight.abs().max()  # in units of it, squares neither overflow nor vanish
    groups = (weight / torch.where(largest > 0, largest, 1)).view(N, -1, length)
    h = torch.ones(K, dtype=weight.dtype, device=weight.device)
    if importance is not None and float(importance.max()) > 0:
        h = importance / importance.mean()
    h = h.view(1, -1, length).expand_as(groups)
    table = start.sort(dim=1)[0]
    table = table / table.abs().max()
    scales = group_scales(groups.flatten(1), table, spec)
    for _ in range(_ROUNDS):
        ranks = round_to_table(groups, scales, table).view(groups.shape)
        values = table[0][ranks.int()]
        norms = (h * values * values).sum(2)
        scales = torch.where(norms > 0, (h * groups * values).sum(2) / norms, scales)
        s = scales.unsqueeze(2)
        above, below = h * s * groups, (h * s * s).expand_as(groups)
        mass = sum_by_rank(ranks, below, table.shape[1])
        means = sum_by_rank(ranks, above, table.shape[1]) / mass
        entries = torch.where(mass > 0, means, table[0])
        reach = torch.where(mass > 0, entries.abs(), 0).max()  # of those that a weight takes
        reach = torch.where(reach > 0, reach, 1)
        table = (entries / reach).clamp(-1, 1).sort()[0].unsqueeze(0)
        scales = scales * reach
    return table


def sum_by_rank(ranks: Tensor, values: Tensor, num_ranks: int) -> Tensor:
    """Sum values by their ranks: shape (num_ranks,), the same from run to run."""
    if ranks.device.type == "cpu":
        sums = torch.bincount(ranks.flatten(), values.flatten(), minlength=num_ranks)
        return sums.to(values.dtype)
    # On a GPU the order of bincount's sums differs; of a product's it does not.
    every = torch.arange(num_ranks, device=ranks.device).unsqueeze(1)
    return (ranks.flatten() == every).to(values.dtype) @ values.flatten()
