"""Quantising by the library: nearest entries, and scales, bit for bit those of PyTorch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flute.cpu import library

_ENTRIES = 16
"""Numbers of each kind in a trial of `quantise.c`."""
CANDIDATES = 12
"""Scales that it tries for each sign."""


def takes(weight: Tensor) -> bool:
    """Tell whether the library serves this weight: fp32, contiguous, on a CPU that has kernels."""
    return (
        type(weight) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() > 0
        and weight.is_contiguous()
        and not library.why_not()
    )


def nearest(weight: Tensor, scales: Tensor, bounds: Tensor, order: Tensor) -> Tensor:
    """Return the codes nearest to ``weight / scales``; where a scale is zero, to zero.

    Args:
        weight: see `takes`, shape (N, K).
        scales: shape (N, groups), as stored.
        bounds: midpoints of neighbouring entries, ascending, fp32, shape (1 | N, T - 1).
        order: where the entry of each rank is in the table, shape (1 | N, T).

    Returns:
        uint8, shape (N, K).
    """
    (N, K), entries = weight.shape, order.shape[1]
    codes = torch.empty(N, K, dtype=torch.uint8)
    kept = (weight, scales.float().contiguous(), bounds.contiguous(), order.to(torch.uint8))
    numbers = (N, K, K // scales.shape[1])
    library.call(
        "flute_nearest",
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in kept),
        *(ctypes.c_int64(number) for number in numbers),
        entries,
        int(order.shape[0] > 1),
        ctypes.c_void_p(codes.data_ptr()),
    )
    return codes


def search(weight: Tensor, group: int, trials: list[list[Tensor]], refinements: int) -> Tensor:
    """Return the signed scale of least squared error of each group; see `flute.methods.mse`.

    Args:
        weight: see `takes`, shape (N, K).
        group: weights per scale.
        trials: of the table and of its negative: CANDIDATES scales, T - 1 midpoints, T - 1
            differences of entries and as many of their squares, the lowest entry, and its
            square times ``group``; fp32, (1 | N, as many) each.
        refinements: rounds after the first.

    Returns:
        fp32, shape (N, groups).
    """
    N, K = weight.shape
    parts = []
    for candidates, midpoints, steps, square_steps, low, low_norm in trials:
        wide = [candidates, midpoints, steps, square_steps]
        padded = [torch.nn.functional.pad(part, (0, _ENTRIES - part.shape[1])) for part in wide]
        parts.append(torch.cat((*padded, low, low_norm), 1))
    packed = torch.stack(parts, 1).float().contiguous()
    scales = torch.empty(N, K // group)
    library.call(
        "flute_search",
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(packed.data_ptr()),
        *(ctypes.c_int64(number) for number in (N, K, group)),
        trials[0][1].shape[1] + 1,
        refinements,
        int(packed.shape[0] > 1),
        ctypes.c_void_p(scales.data_ptr()),
    )
    return scales
