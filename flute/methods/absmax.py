"""Round to nearest with absmax scales: the largest weight of a group meets the table's end."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from flute.cpu import quantize as quantize_by_library
from flute.errors import FormatError
from flute.format import QuantizedWeight, QuantSpec
from flute.methods.nearest import midpoints, nearest_codes


def quantize(
    weight: Tensor, spec: QuantSpec, table: Tensor, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Quantise each group by ``scale = max|w| / reach``, codes to the nearest entry.

    ``reach`` is the table's end nearer to zero (7 for int4, 1 for nf4), so that no weight is
    clipped.

    Args:
        weight: fp32, shape (N, K).
        spec: bits and group size; K is a multiple of the group.
        table: fp32, shape (1 | N, 2**num_bits).
        scale_dtype: dtype of the scales; codes are chosen for the scale as stored.

    Returns:
        The codes, scales and table.
    """
    N, K = weight.shape
    groups = weight.view(N, spec.num_groups(K), spec.group_length(K))
    scales = storable_scales(groups.abs().amax(2) / reach_of(table)[:, None], scale_dtype)
    return QuantizedWeight(round_to_table(groups, scales, table), scales, table, spec)


def quantize_signed(
    weight: Tensor, spec: QuantSpec, table: Tensor, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Quantise each group by the scale that takes its largest weight, sign included, to 1.

    Args:
        weight: fp32, shape (N, K).
        spec: bits and group size; K is a multiple of the group.
        table: fp32, shape (1 | N, 2**num_bits), whose largest entry is 1.
        scale_dtype: dtype of the scales; codes are chosen for the scale as stored.

    Returns:
        The codes, scales (some of them negative) and table.

    Reference: Blumenberg et al. 2025, arXiv 2505.06653 (BOF4-S).
    """
    N, K = weight.shape
    groups = weight.view(N, spec.num_groups(K), spec.group_length(K))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    scales = storable_scales(largest, scale_dtype)
    return QuantizedWeight(round_to_table(groups, scales, table), scales, table, spec)


def reach_of(table: Tensor) -> Tensor:
    """Return how far each row of a table reaches to both sides of zero, shape (1 | N,)."""
    ends = torch.stack((-table.amin(1), table.amax(1)))
    return ends.masked_fill(ends <= 0, torch.inf).amin(0)


def round_to_table(groups: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Return the codes nearest to ``groups / scales``, shape (N, K); a zero scale takes anything.

    Args:
        groups: fp32, shape (N, groups, group length).
        scales: as stored, shape (N, groups).
        table: fp32, shape (1 | N, 2**num_bits).
    """
    weight = groups.flatten(1)
    if quantize_by_library.takes(weight):
        entries, order = table.sort(dim=1, stable=True)
        return quantize_by_library.nearest(weight, scales, midpoints(entries), order)
    divisor = scales.float().masked_fill(scales == 0, torch.inf)
    return nearest_codes((groups / divisor.unsqueeze(-1)).flatten(1), table)


def storable_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the dtype they are stored in.

    A scale at most 10 % beyond its finite range is clamped; codes chosen for it make up for that.
    Where scales vanish in ``dtype``, so do the weights of their groups: a warning says so.

    Args:
        scales: fp32, shape (N, K // group_size).
        dtype: a 16-bit float, or fp32.

    Raises:
        FormatError: a scale is further out of range.
    """
    limit = torch.finfo(dtype).max
    largest = float(scales.abs().max())
    if not largest <= 1.1 * limit:
        raise FormatError(
            f"A group needs the scale {largest:.4g}; {dtype} ends at {limit:.4g}. Store wider "
            "scales (`scale_dtype`), or use a table of larger numbers."
        )
    stored = scales.clamp(-limit, limit).to(dtype)
    lost = int(((stored == 0) & (scales != 0)).sum())
    if lost:
        warnings.warn(
            f"{lost} of {scales.numel()} groups need scales too small for {dtype}; their weights "
            "become zero. Store wider scales (`scale_dtype`) if they matter.",
            stacklevel=4,
        )
    return stored
