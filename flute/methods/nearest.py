"""Nearest table entries, for tables in any order; shared by all methods."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_codes(values: Tensor, table: Tensor) -> Tensor:
    """Return the code of the entry nearest to each value.

    A value halfway between two entries takes the smaller one.

    Args:
        values: fp32, shape (N, L).
        table: fp32, shape (1, T) or (N, T), in any order.

    Returns:
        uint8, shape (N, L).
    """
    entries, order = table.sort(dim=1, stable=True)
    bounds = midpoints(entries)
    if table.shape[0] == 1:
        ranks = torch.bucketize(values, bounds[0], out_int32=True)
    else:
        ranks = torch.searchsorted(bounds, values, out_int32=True)
    ranks = ranks.to(torch.uint8)
    identity = torch.arange(table.shape[1], device=table.device)
    if bool((order == identity).all()):
        return ranks
    order = order.to(torch.uint8)
    return order[0][ranks.int()] if table.shape[0] == 1 else order.gather(1, ranks.long())


def midpoints(entries: Tensor) -> Tensor:
    """Return the midpoints between neighbouring entries: shape (..., T - 1) for (..., T)."""
    return ((entries[..., 1:].double() + entries[..., :-1].double()) / 2).float()
