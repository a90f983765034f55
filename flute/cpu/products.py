"""Weights in CPU order: put into it and taken out, dequantised, multiplied, by the C library.

A weight in CPU order is a `PackedWeight` with uint8 codes (`flute/kernels/cpu/lut.h` states the
order), so the dtype of the codes tells the orders apart: int32 as stored or for GPUs, uint8 for
CPUs. Knows nothing of layers.

    M <= library.direct_m()    kernels; a decoded weight serves 8 tokens    fixed point, or exact
    more                       rows dequantised by slices, then torch's matmul
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flute.cpu import library
from flute.cpu.pages import large_pages
from flute.cpu.structures import TILE_N, TYPES, Result, Tokens, Weight, c_weight, is_by_rows
from flute.format import PackedWeight, QuantSpec

UNIT_K = 32
"""K is padded to a multiple of this."""
HEADER = 192
"""Bytes before the codes."""
HEADER_EXACT = 128
"""Which of them says that products are to be exact."""
SLICE_BYTES = 1 << 23
"""Most bytes of dequantised weight at a time: it should be in the cache when it is multiplied."""


def order_shapes(
    N: int, K: int, spec: QuantSpec, by_rows: bool
) -> tuple[tuple[int], tuple[int, ...]]:
    """Return the shapes of codes and scales in CPU order.

    Args:
        N: output features.
        K: input features.
        spec: bits and group size.
        by_rows: see `is_by_rows`.
    """
    rows = N if by_rows else -(-N // TILE_N) * TILE_N
    num_bytes = HEADER + rows * -(-K // UNIT_K) * 4 * spec.num_bits
    groups = spec.num_groups(K)
    return (num_bytes,), (N, groups) if by_rows else (rows // TILE_N, groups, TILE_N)


def order(weight: PackedWeight, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Put a stored weight into CPU order, in parallel.

    Args:
        weight: as stored; N and K at least 1.
        exact: whether its products are to be exact, whatever ``$FLUTE_CPU_EXACT`` says.

    Returns:
        Codes, uint8, and scales; see `order_shapes`.
    """
    scales = weight.scales.contiguous()
    by_rows = is_by_rows(weight.table.shape[0], weight.table_ends)
    code_shape, scale_shape = order_shapes(weight.N, weight.K, weight.spec, by_rows)
    codes = large_pages(code_shape[0])
    # Filling is a step of torch's threads: 112 of them took 0.5 s where other work has the cores.
    is_filled = by_rows or weight.N % TILE_N == 0
    make = torch.empty if is_filled else torch.zeros  # rows that pad a tile
    ordered = make(scale_shape, dtype=scales.dtype)
    stored, _kept = c_weight(weight, scales)
    out = (ctypes.c_void_p(codes.data_ptr()), ctypes.c_void_p(ordered.data_ptr()))
    place = (*out, ctypes.c_int64(codes.numel()))
    library.call("flute_order", ctypes.byref(stored), *place, int(exact), has_variants=False)
    return codes, ordered


def restore(weight: PackedWeight) -> PackedWeight:
    """Undo `order`: return the weight as it is stored."""
    spec = weight.spec
    codes = torch.empty(weight.N, spec.num_words(weight.K), dtype=torch.int32)
    scales = torch.empty(weight.N, spec.num_groups(weight.K), dtype=weight.scales.dtype)
    stored = weight._replace(packed=codes, scales=scales)
    structure, _kept = c_weight(stored, scales)
    ordered = (weight.packed.contiguous(), weight.scales.contiguous())
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in ordered]
    library.call("flute_restore", ctypes.byref(structure), *addresses, has_variants=False)
    return stored


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the dense weight (N, K) of one in CPU order, bit for bit `flute.reference`'s.

    Args:
        weight: in CPU order.
        dtype: fp16, bf16 or fp32.
    """
    out = torch.empty(weight.N, weight.K, dtype=dtype)
    _dequantize_into(out, weight, 0)
    return out


def _dequantize_into(out: Tensor, weight: PackedWeight, first: int) -> None:
    """Fill ``out`` (rows, K) with the rows from ``first`` on."""
    structure, _kept = c_weight(weight, weight.scales.contiguous())
    bounds = (ctypes.c_int64(first), ctypes.c_int64(first + out.shape[0]))
    at = ctypes.c_void_p(out.data_ptr())
    library.call("flute_dequantise", ctypes.byref(structure), *bounds, TYPES[out.dtype], at)


def multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Multiply by a weight in CPU order; see `flute.lut_gemm`.

    In fixed point the relative norm of the error is below 5e-4, besides that of rounding the table
    and the result to the dtype of ``x``; what that cannot hold is summed in fp32 (`lut.h`).

    Args:
        x: fp16, bf16 or fp32, shape (M, K), on the CPU.
        weight: in CPU order.
        bias: shape (N,), or None.

    Returns:
        Shape (M, N), dtype of ``x``.
    """
    return multiply_all(x, [weight], [bias])[0]


def multiply_all(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Multiply the same tokens by several weights; see `multiply`.

    Up to `library.direct_m` tokens go to the library together: tokens are converted and threads are
    woken once for all weights. Results are those of `multiply`, bit for bit.

    Args:
        x: fp16, bf16 or fp32, shape (M, K), on the CPU.
        weights: in CPU order, of the same K and spec, all by rows or none; at most 16.
        biases: shape (N,) each, or None.

    Returns:
        Shapes (M, N), dtype of ``x``.
    """
    exact = library.is_exact()
    if x.shape[0] > library.direct_m():
        return [
            _multiply_dense(x, weight, bias, exact or bool(weight.packed[HEADER_EXACT]))
            for weight, bias in zip(weights, biases, strict=True)
        ]
    M = x.shape[0]
    outs = [x.new_empty(M, weight.N) for weight in weights]
    if not M:
        return outs
    if x.stride(1) != 1:
        x = x.contiguous()
    filled = [c_weight(weight, weight.scales.contiguous()) for weight in weights]
    c_weights = (Weight * len(filled))(*(structure for structure, _ in filled))
    dense_biases = [
        None if b is None else (b if b.dtype in TYPES else b.float()).contiguous() for b in biases
    ]
    results = (Result * len(filled))()
    for result, bias in zip(results, dense_biases, strict=True):
        if bias is not None:
            result.bias, result.bias_type = bias.data_ptr(), TYPES[bias.dtype]
    row_bytes, x_at, stride, call = x.dtype.itemsize, x.data_ptr(), x.stride(0), library.entry()
    for first in range(0, M, library.MAX_M):
        for result, out in zip(results, outs, strict=True):
            result.out = out.data_ptr() + first * out.shape[1] * row_bytes
        at = x_at + first * stride * row_bytes
        tokens = Tokens(at, min(library.MAX_M, M - first), stride, TYPES[x.dtype])
        call(c_weights, results, len(filled), ctypes.byref(tokens))
    return outs


def _multiply_dense(x: Tensor, weight: PackedWeight, bias: Tensor | None, exact: bool) -> Tensor:
    """Multiply by slices of the dense weight: in fp32 if exact or fp16, else in the dtype of x."""
    dtype, out_dtype, N = x.dtype, x.dtype, weight.N
    if exact or dtype == torch.float16:
        weight, dtype = weight._replace(table=weight.table.to(dtype).float()), torch.float32
    x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    rows = max(TILE_N, SLICE_BYTES // (dtype.itemsize * weight.K) // TILE_N * TILE_N)
    out = torch.empty(x.shape[0], N, dtype=out_dtype)
    dense = torch.empty(min(rows, N), weight.K, dtype=dtype)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        part = dense[: stop - start]
        _dequantize_into(part, weight, start)
        out[:, start:stop] = F.linear(x, part, None if bias is None else bias[start:stop])
    return out
