"""Round to nearest with absmax scales: the largest weight of a group meets the table's end."""

from __future__ import annotations

import torch
from torch import Tensor

from flute.format import QuantizedWeight, QuantSpec
from flute.methods.nearest import nearest_codes


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
    groups = weight.view(N, -1, spec.group_length(K))
    low, high = -table.amin(1), table.amax(1)
    ends = torch.stack((low, high)).masked_fill(torch.stack((low, high)) <= 0, torch.inf)
    reach = ends.amin(0)[:, None]
    scales = storable_scales(groups.abs().amax(2) / reach, scale_dtype)
    return QuantizedWeight(round_to_table(groups, scales, table), scales, table, spec)


def round_to_table(groups: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Return the codes nearest to ``groups / scales``, shape (N, K); a zero scale takes anything.

    Args:
        groups: fp32, shape (N, groups, group length).
        scales: as stored, shape (N, groups).
        table: fp32, shape (1 | N, 2**num_bits).
    """
    inverse = scales.float().reciprocal().nan_to_num(0.0, 0.0, 0.0)
    return nearest_codes((groups * inverse.unsqueeze(-1)).flatten(1), table)


def storable_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the dtype they are stored in, within its finite range."""
    limit = torch.finfo(dtype).max
    return scales.clamp(-limit, limit).to(dtype)
