"""Scales that minimise the squared error of the weight, group by group. Needs no data.

For codes fixed, the best scale of a group w with entries c = table[codes] is <w, c> / <c, c>, and
the error it leaves is <w, w> - <w, c>^2 / <c, c>. So the search maximises the *gain* <w, c>^2 / <c,
c> over candidate scales. Both sums come cheaply once the group is sorted: as the scale moves, each
boundary between two neighbouring entries just moves through the sorted weights, and

    <w, c> = t_0 * sum(w)  + sum_j (t_{j+1}   - t_j)   * sum of the weights above boundary j
    <c, c> = t_0^2 * G     + sum_j (t_{j+1}^2 - t_j^2) * number of the weights above boundary j

are read off prefix sums: 2**b - 1 binary searches for a whole group instead of one per weight.
A scale's sign is free, so an asymmetric table is tried both ways round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from flute import cuda_quantize
from flute.cpu import quantize as quantize_by_library
from flute.format import QuantizedWeight, QuantSpec
from flute.methods.absmax import reach_of, round_to_table, storable_scales
from flute.methods.nearest import midpoints

_NUM_CANDIDATES = quantize_by_library.CANDIDATES
"""Scales tried per sign, the first of them that of absmax, so that the result is never worse.
Gaussian weights, group 64, nf4: 0.3 % more error than 1200 candidates."""
_RATIOS = {4: (0.55, 1.5), 3: (0.30, 1.05), 2: (0.30, 1.05)}
"""Smallest and largest candidate as shares of the absmax scale, by bits. Above 1, the largest
weight of a group moves to the entry inside the table's end: it pays for 16 entries (group 32: 2 %
less error for nf4, 6 % for fp4), not for fewer, nor beyond the scale that puts it there."""
NUM_REFINEMENTS = 2
"""Rounds of (codes for the scale, best scale for those codes) from each candidate."""
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Weights searched at a time: about 200 bytes of scratch each at 4 bits. On the CPU it stays in the
caches, on a GPU it fills the machine."""


def quantize(
    weight: Tensor, spec: QuantSpec, table: Tensor, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Quantise with the scale of least squared error per group, codes to the nearest entry.

    Args:
        weight: fp32, shape (N, K).
        spec: bits and group size; K is a multiple of the group.
        table: fp32, shape (1 | N, 2**num_bits).
        scale_dtype: dtype of the scales; codes are chosen for the scale as stored.

    Returns:
        The codes, scales (some of them negative) and table.

    Reference: the search over shrunk scales is that of Nagel et al. 2021, arXiv 2106.08295, section
    3.1; the signed scale follows Blumenberg et al. 2025, arXiv 2505.06653 (BOF4-S).
    """
    stored = storable_scales(group_scales(weight, table, spec), scale_dtype)
    groups = weight.view(*stored.shape, -1)
    return QuantizedWeight(round_to_table(groups, stored, table), stored, table, spec)


def group_scales(weight: Tensor, table: Tensor, spec: QuantSpec) -> Tensor:
    """Return the scale of least squared error of each group, signed and not yet rounded.

    Args:
        weight: fp32, shape (N, K).
        table: fp32, shape (1 | N, 2**num_bits), in any order.
        spec: bits and group size; K is a multiple of the group.

    Returns:
        fp32, shape (N, groups).
    """
    N, K = weight.shape
    length = spec.group_length(K)
    if quantize_by_library.takes(weight):
        entries = table.sort(dim=1)[0]
        trials = [
            [_candidates(one, _RATIOS[spec.num_bits]), midpoints(one), *_steps(one, length)]
            for one in (entries, -entries.flip(1))
        ]
        return quantize_by_library.search(weight, length, trials, NUM_REFINEMENTS)
    if cuda_quantize.takes(weight):
        entries = table.sort(dim=1)[0]
        table_of = (entries, midpoints(entries), signed_candidates(entries, spec.num_bits))
        return cuda_quantize.search(weight, length, *table_of, NUM_REFINEMENTS)
    rows = max(1, _BLOCK.get(weight.device.type, 1 << 22) // K)

    def search(start: int) -> Tensor:
        groups = weight[start : start + rows].reshape(-1, length)
        entries = _table_per_group(table, start, rows, K // length)
        return search_scales(groups, entries, _RATIOS[spec.num_bits])

    scales = torch.cat(_map_blocks(search, range(0, N, rows), weight.device))
    return scales.view(N, K // length)


def _map_blocks(
    search: Callable[[int], Tensor], starts: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Search blocks of rows: on the CPU one per thread, each thread running torch on one core.

    Why: torch's own threads meet after every small step. Where other work holds a core, they wait:
    five busy processes on two cores took 470 ns a weight of each core, not 230.
    """
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1 or len(starts) == 1:
        return [search(start) for start in starts]
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(search, starts))


def _table_per_group(table: Tensor, start: int, rows: int, num_groups: int) -> Tensor:
    """Sorted table of each group of some rows: (1, T), or (rows * groups, T) for tables per row."""
    if table.shape[0] > 1:
        table = table[start : start + rows].repeat_interleave(num_groups, 0)
    return table.sort(dim=1)[0]


def search_scales(groups: Tensor, entries: Tensor, ratios: tuple[float, float]) -> Tensor:
    """Return the signed scale of least squared error for each group.

    Args:
        groups: fp32, shape (R, G): R groups of G weights.
        entries: fp32, ascending, shape (1, T) or (R, T).
        ratios: the smallest and the largest candidate, as shares of the absmax scale.

    Returns:
        fp32, shape (R,).
    """
    largest = groups.abs().amax(1)
    # In units of the largest weight, so that squares neither overflow nor vanish.
    ascending = (groups / largest.masked_fill(largest == 0, 1)[:, None]).sort(dim=1)[0]
    sums_above = torch.nn.functional.pad(ascending.flip(1).cumsum(1).flip(1), (0, 1))
    best_gain = groups.new_zeros(len(groups))
    best_scale = groups.new_zeros(len(groups))
    for sign, table in ((1, entries), (-1, -entries.flip(1))):
        scales = _candidates(table, ratios)
        below = _count_below(ascending, scales.unsqueeze(2) * midpoints(table).unsqueeze(1))
        for refinement in range(1 + NUM_REFINEMENTS):
            if refinement:
                below = torch.searchsorted(ascending, scales * midpoints(table), right=True)
                below = below.unsqueeze(1)
            gains, scales = _gains(sums_above, below, table)
            gain, winner = gains.max(dim=1)
            scales = scales.gather(1, winner.unsqueeze(1))
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better, sign * scales[:, 0], best_scale)
    return best_scale * largest


def _candidates(table: Tensor, ratios: tuple[float, float]) -> Tensor:
    """Scales to try for groups whose largest weight is 1: ascending table (1 | R, T) -> (1 | R, C).

    A lopsided table's smallest is counted from its farther end, its largest from the nearer.
    """
    reach = reach_of(table)[:, None]
    inner = torch.where(-table[:, :1] == reach, -table[:, 1:2], table[:, -2:-1])
    low = ratios[0] / table.abs().amax(1, keepdim=True)
    high = (reach / inner.clamp_min(1e-9 * reach)).clamp(1.05, ratios[1]) / reach
    steps = torch.linspace(0, 1, _NUM_CANDIDATES - 1, dtype=table.dtype, device=table.device)
    return torch.cat((1 / reach, low + (high - low) * steps), 1)


def signed_candidates(entries: Tensor, num_bits: int) -> Tensor:
    """Scales to try for tables and for their negatives: ascending (1 | N, T) -> (1 | N, 2, C)."""
    ratios = _RATIOS[num_bits]
    return torch.stack([_candidates(one, ratios) for one in (entries, -entries.flip(1))], 1)


def _count_below(ascending: Tensor, bounds: Tensor) -> Tensor:
    """Count the weights at or below each bound: groups (R, G), (1 | R, C, J) -> (R, C, J).

    Why not a search per bound: there are three times as many bounds as weights in a group of 64.
    The weights are sorted into the bounds instead, and in ascending order, which is predictable.
    """
    in_order, order = bounds.flatten(1).sort(dim=1)
    R, L = len(ascending), in_order.shape[1]
    place = torch.searchsorted(in_order[0] if len(in_order) == 1 else in_order, ascending)
    counts = ascending.new_zeros(R, L + 1)
    counts.scatter_add_(1, place, torch.ones_like(ascending))
    below = counts.cumsum(1)
    if len(order) == 1:
        below = below.index_select(1, order[0].argsort())
    else:
        below = below.gather(1, order.argsort(dim=1))
    return below.view(R, *bounds.shape[1:]).long()


def _gains(sums_above: Tensor, below: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return <w, c>^2 / <c, c> and the best scale <w, c> / <c, c> of each candidate's codes.

    Args:
        sums_above: (R, G + 1), sum of the weights from each sorted position on.
        below: int64 (R, C, T - 1), weights at or below each candidate's boundaries.
        table: ascending, (1 | R, T).

    Returns:
        Two tensors (R, C); a gain is -1 where the codes' best scale would not be positive.
    """
    G = sums_above.shape[1] - 1
    above = sums_above.gather(1, below.flatten(1)).view(below.shape)
    counts = (G - below).to(above.dtype)
    steps, square_steps, low, low_norm = _steps(table, G)
    dot, norm = low * sums_above[:, :1], low_norm
    # NOTE: entry by entry, so that the library (`quantise.c`) adds in the same order.
    for j in range(steps.shape[1]):
        dot = dot + above[:, :, j] * steps[:, j : j + 1]
        norm = norm + counts[:, :, j] * square_steps[:, j : j + 1]
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.where(dot > 0, dot * dot / norm, -1.0), dot / norm


def _steps(table: Tensor, G: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the sums of `_gains` are made of, for an ascending table (1 | R, T).

    Returns:
        Differences of neighbouring entries and of their squares (1 | R, T - 1); the lowest entry,
        and its square times the length G of a group (1 | R, 1).
    """
    low = table[:, :1]
    return table.diff(), (table * table).diff(), low, low * low * G
