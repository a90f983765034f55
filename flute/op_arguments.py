"""What the tensors and numbers that an op is given mean: checked, or refused by name.

A weight comes in one of three orders, told apart by ``out_features`` (None: as stored) and by the
dtype of its codes (uint8: CPU order, else kernel order). Checks read shapes, strides, dtypes and
devices, never a value, so they hold for fake tensors too, and what they found is looked up again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flute.cpu import products
from flute.cpu.structures import is_by_rows
from flute.errors import FormatError
from flute.format import FLOAT_DTYPES, PackedWeight, QuantSpec, check_scales, check_table
from flute.kernel_order import CHUNK_K, TILE_N, num_tiles, padded_k
from flute.pack import check_packed

_MAX_CHECKED = 4096
_checked: dict[tuple[object, ...], tuple[QuantSpec, int, tuple[int, ...]]] = {}
"""What a call's shapes, dtypes, devices and numbers were found to mean; see `check_product`."""


def checked_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
    out_features: int | None = None,
    table_ends: Sequence[int] | None = None,
) -> PackedWeight:
    """Do as `check_product`, looking up what was checked before: 2 us instead of 7.

    Args:
        x: as `check_product` says, like all others.
        packed: codes.
        scales: scales.
        table: table or tables.
        bias: (N,), or None.
        num_bits: bits per code.
        group_size: weights per scale.
        out_features: None, or N.
        table_ends: ends of ranges of rows, or None.

    Raises:
        FormatError: as `check_product`.
    """
    ends = None if table_ends is None else tuple(table_ends)
    device = x.device
    key = (
        *(x.shape[1:], x.dtype, device, num_bits, group_size, out_features, ends),
        *(packed.shape, packed.dtype, packed.is_contiguous(), packed.device == device),
        *(scales.shape, scales.dtype, scales.is_contiguous(), scales.device == device),
        *(table.shape, table.dtype, table.device == device),
        None if bias is None else (bias.shape, bias.dtype, bias.device == device),
    )
    found = _checked.get(key)
    if found is None:
        weight = check_product(
            x, packed, scales, table, bias, num_bits, group_size, out_features, ends
        )
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        found = _checked[key] = (weight.spec, weight.N, weight.table_ends)
    spec, N, ends = found
    return PackedWeight(packed, scales, table, spec, N, x.shape[1], ends)


def check_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
    out_features: int | None = None,
    table_ends: Sequence[int] | None = None,
) -> PackedWeight:
    """Check the arguments of `flute::lut_gemm`; return its weight.

    Args:
        x: fp16, bf16 or fp32, shape (M, K).
        packed: codes, in one of the three orders, on the device of ``x``, as are all tensors.
        scales: fp16, bf16 or fp32, in the order of ``packed``.
        table: fp32, shape (1 | R | N, 2**num_bits).
        bias: any floating dtype, shape (N,), or None.
        num_bits: 2, 3 or 4.
        group_size: weights per scale along K, or -1.
        out_features: None if the weight is as stored; N if it is in kernel order or CPU order.
        table_ends: where each of R ranges of rows ends; None or empty if there are no ranges.

    Raises:
        FormatError: a shape, dtype or device disagrees with the rest; the message names the
            argument.
    """
    spec = QuantSpec(num_bits, group_size)
    if x.ndim != 2 or x.dtype not in FLOAT_DTYPES:
        raise FormatError(
            f"`x` is {x.dtype} of shape {tuple(x.shape)}; expected fp16, bf16 or fp32 (M, K)."
        )
    K, N = x.shape[1], out_features
    weight = check_weight(packed, scales, table, spec, K, N, table_ends)
    if bias is not None and tuple(bias.shape) != (weight.N,):
        raise FormatError(f"`bias` has shape {tuple(bias.shape)}; expected (N,) = ({weight.N},).")
    if bias is not None and not bias.is_floating_point():
        raise FormatError(f"`bias` is {bias.dtype}; expected a floating-point dtype.")
    for name, tensor in (("packed", packed), ("scales", scales), ("table", table), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise FormatError(f"`{name}` is on {tensor.device}; expected {x.device}, where `x` is.")
    return weight


def check_weight(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    K: int,
    out_features: int | None,
    table_ends: Sequence[int] | None,
) -> PackedWeight:
    """Check the tensors of a weight.

    Args:
        packed: codes, in one of the three orders.
        scales: in the order of ``packed``.
        table: fp32, shape (1 | R | N, 2**num_bits).
        spec: bits and group size.
        K: in features.
        out_features: None if the weight is as stored; N if it is in kernel order or CPU order.
        table_ends: where each of R ranges of rows ends; None or empty if there are no ranges.

    Raises:
        FormatError: a shape or dtype disagrees with ``spec``, N or K; the message names it.
    """
    ends = tuple(table_ends or ())
    if out_features is None:
        check_packed(packed, spec.num_bits, K)
        N = packed.shape[0]
        check_scales(scales, N, K, spec)
        check_table(table, N, spec, ends)
        return PackedWeight(packed, scales, table, spec, N, K, ends)
    if packed.dtype == torch.uint8:
        return _cpu_weight(packed, scales, table, spec, K, out_features, ends)
    N, groups = out_features, spec.num_groups(K)
    tiles = num_tiles(N)
    shape = (tiles, padded_k(K) // CHUNK_K, TILE_N * CHUNK_K * spec.num_bits // 32)
    if tuple(packed.shape) != shape or packed.dtype != torch.int32 or not packed.is_contiguous():
        raise FormatError(
            f"`packed` is {packed.dtype} of shape {tuple(packed.shape)}; expected contiguous int32 "
            f"{shape} in kernel order for N={N}, K={K}, num_bits={spec.num_bits}."
        )
    one = groups == 1
    expected = (tiles * TILE_N,) if one else (tiles, padded_k(K) * groups // K, 8, 2)
    if tuple(scales.shape) != expected or not scales.is_contiguous():
        raise FormatError(
            f"`scales` has shape {tuple(scales.shape)}; expected contiguous {expected} in kernel "
            f"order for N={N}, K={K}, group_size={spec.group_size}."
        )
    if scales.dtype not in FLOAT_DTYPES:
        raise FormatError(f"`scales` is {scales.dtype}; expected float16, bfloat16 or float32.")
    check_table(table, N, spec, ends)
    return PackedWeight(packed, scales, table, spec, N, K, ends)


def _cpu_weight(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    K: int,
    N: int,
    ends: tuple[int, ...],
) -> PackedWeight:
    """Check a weight's tensors in CPU order."""
    check_table(table, N, spec, ends)
    shapes = products.order_shapes(N, K, spec, is_by_rows(table.shape[0], ends))
    if (tuple(packed.shape), tuple(scales.shape)) != shapes:
        raise FormatError(
            f"`packed` and `scales` have shapes {tuple(packed.shape)} and {tuple(scales.shape)}; "
            f"expected {shapes[0]} and {shapes[1]} in CPU order for N={N}, K={K}, {spec}."
        )
    if scales.dtype not in FLOAT_DTYPES:
        raise FormatError(f"`scales` is {scales.dtype}; expected float16, bfloat16 or float32.")
    if packed.device.type == "cuda":
        raise FormatError(f"`packed` is in CPU order, on {packed.device}; expected the CPU.")
    return PackedWeight(packed, scales, table, spec, N, K, ends)
