"""What is handed to the C library: the structures of `flute/kernels/cpu/lut.h`, field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flute.format import PackedWeight

TILE_N = 16
"""Rows of a tile."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the library calls a dtype."""


class Weight(ctypes.Structure):
    """A weight: addresses of its tensors, sizes, bits."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("num_tables", ctypes.c_int64),
        ("num_bits", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("by_rows", ctypes.c_int32),
    )


class Tokens(ctypes.Structure):
    """Activations: the address, how many, elements from one to the next."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("M", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("x_type", ctypes.c_int32),
    )


class Result(ctypes.Structure):
    """A bias, or none, and where the product goes."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("bias_type", ctypes.c_int32),
    )


def is_by_rows(num_tables: int, table_ends: Sequence[int]) -> bool:
    """Tell whether tables change within a tile, so that rows keep the order they are stored in."""
    if table_ends:
        return any(end % TILE_N for end in table_ends[:-1])
    return num_tables > 1


def c_weight(weight: PackedWeight, scales: Tensor) -> tuple[Weight, tuple[Any, ...]]:
    """Return the C structure of a weight, and what must live as long as it.

    Args:
        weight: as stored, or in CPU order.
        scales: contiguous, in the order of the weight.
    """
    packed, _, table, spec, N, K, ends = weight
    table, packed = table.contiguous(), packed.contiguous()
    c_ends = (ctypes.c_int64 * len(ends))(*ends) if ends else None
    by_rows = is_by_rows(table.shape[0], ends)
    numbers = (N, K, spec.group_length(K), table.shape[0], spec.num_bits, TYPES[scales.dtype])
    at_ends = ctypes.addressof(c_ends) if c_ends is not None else None
    addresses = (packed.data_ptr(), scales.data_ptr(), table.data_ptr(), at_ends)
    return Weight(*addresses, *numbers, by_rows), (packed, scales, table, c_ends)
