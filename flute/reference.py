"""The specification: the whole product in plain PyTorch, on any device. Everything else must agree.

    weight[n, k] = table[codes[n, k]] * scales[n, k // group]
    out[m, n]    = sum_k x[m, k] * weight[n, k] + bias[n],  summed in fp32

The table is rounded to the dtype of the activations first (a kernel multiplies in that dtype); the
scale multiplies in fp32. So an identity ``x`` reproduces ``dequantize(..., dtype)`` bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flute.format import PackedWeight, QuantizedWeight, table_per_row
from flute.pack import row_bytes, unpack_codes

_CHUNK = 1 << 24
"""Weights expanded at a time; bounds the scratch of `dequantize_packed` to about 200 MB."""


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``table[codes] * scales``.

    Args:
        weight: the quantised matrix, shape (N, K).
        dtype: fp16, bf16 or fp32. The table is rounded to it, the product formed in fp32 and
            rounded.

    Returns:
        Shape (N, K), ``dtype``.
    """
    length = weight.spec.group_length(weight.shape[1])
    table = table_per_row(weight.table, weight.table_ends) if weight.table_ends else weight.table
    return _look_up(weight.codes, weight.scales, table, length, dtype)


def _look_up(
    codes: Tensor, scales: Tensor, table: Tensor, group_length: int, dtype: torch.dtype
) -> Tensor:
    table = table.to(dtype).float()
    index = codes.long()
    values = table[0][index] if table.shape[0] == 1 else table.gather(1, index)
    groups = values.view(*scales.shape, group_length)
    return (groups * scales.float().unsqueeze(-1)).flatten(1).to(dtype)


def dequantize_packed(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return `dequantize` of codes in the stored bit order, several codes per lookup.

    A byte holds two 4-bit or four 2-bit codes, and 12 bits hold four 3-bit codes: one index into a
    table of that many values at once, so a lookup costs a half or a quarter. Matrices with a table
    per row are looked up code by code.

    Args:
        weight: as stored: codes as `flute.pack.pack_codes` returns them.
        dtype: fp16, bf16 or fp32.

    Returns:
        Shape (N, K), ``dtype``.
    """
    out = torch.empty(weight.N, weight.K, dtype=dtype, device=weight.packed.device)
    if not weight.table_ends:
        _dequantize_rows(out, 0, weight.N, weight.table, weight)
    start = 0
    for table, stop in zip(weight.table, weight.table_ends, strict=False):
        _dequantize_rows(out, start, stop, table[None], weight)
        start = stop
    return out


def _dequantize_rows(
    out: Tensor, first: int, last: int, table: Tensor, weight: PackedWeight
) -> None:
    """Fill the rows ``first`` to ``last``, which share ``table`` or have a row of it each."""
    packed, scales, _, spec, _, K, _ = weight
    rows, length = max(1, _CHUNK // max(1, K)), spec.group_length(K)
    multi = None
    if table.shape[0] == 1:
        multi = _multi_table(table[0].to(out.dtype).float(), spec.num_bits)
    for start in range(first, last, rows):
        part = slice(start, min(start + rows, last))
        if multi is None:
            codes = unpack_codes(packed[part], spec.num_bits, K)
            out[part] = _look_up(codes, scales[part], table[part], length, out.dtype)
            continue
        index = _multi_index(packed[part], spec.num_bits)
        values = multi.index_select(0, index.view(-1)).view(torch.float32)
        values = values.view(len(index), values.numel() // len(index))
        groups = values[:, :K].reshape(*scales[part].shape, length)
        out[part] = (groups * scales[part].float().unsqueeze(-1)).flatten(1)


def _multi_table(table: Tensor, num_bits: int) -> Tensor:
    """Values of all runs of 2 (4 bits) or 4 (3, 2 bits) codes, a run viewed as one wide number."""
    per_index = 2 if num_bits == 4 else 4
    runs = torch.cartesian_prod(*[table] * per_index).flip(-1).contiguous()
    wide = torch.float64 if per_index == 2 else torch.complex128
    return runs.view(wide).squeeze(-1)


def _multi_index(packed: Tensor, num_bits: int) -> Tensor:
    """Indices into `_multi_table`: bytes (4 and 2 bits) or 12-bit fields (3 bits), int32."""
    stream = row_bytes(packed)
    if num_bits != 3:
        return stream.to(torch.int32)
    pad = -stream.shape[1] % 3
    stream = F.pad(stream, (0, pad)).view(stream.shape[0], -1, 3).to(torch.int32)
    low = stream[..., 0] | (stream[..., 1] & 15) << 8
    high = stream[..., 1] >> 4 | stream[..., 2] << 4
    return torch.stack((low, high), -1).flatten(1)


def lut_gemm(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Multiply by dequantising the whole matrix to fp32 and summing in fp32; see `flute.lut_gemm`.

    Args:
        x: fp16, bf16 or fp32, shape (M, K).
        weight: as stored.
        bias: shape (N,), or None.

    Returns:
        Shape (M, N), dtype of ``x``.
    """
    weight = weight._replace(table=weight.table.to(x.dtype).float())
    out = x.float() @ dequantize_packed(weight, torch.float32).T
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)
