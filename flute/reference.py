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

from flute.format import QuantizedWeight, QuantSpec
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
    K = weight.shape[1]
    length = weight.spec.group_length(K)
    return _look_up(weight.codes, weight.scales, weight.table, length, dtype)


def _look_up(
    codes: Tensor, scales: Tensor, table: Tensor, group_length: int, dtype: torch.dtype
) -> Tensor:
    table = table.to(dtype).float()
    index = codes.long()
    values = table[0][index] if table.shape[0] == 1 else table.gather(1, index)
    groups = values.view(*scales.shape, group_length)
    return (groups * scales.float().unsqueeze(-1)).flatten(1).to(dtype)


def dequantize_packed(
    packed: Tensor, scales: Tensor, table: Tensor, spec: QuantSpec, K: int, dtype: torch.dtype
) -> Tensor:
    """Return `dequantize` of codes in the stored bit order, several codes per lookup.

    A byte holds two 4-bit or four 2-bit codes, and 12 bits hold four 3-bit codes: one index into a
    table of that many values at once, so a lookup costs a half or a quarter. Matrices with a table
    per row are looked up code by code.

    Args:
        packed: int32, shape (N, ceil(K * num_bits / 32)), as `flute.pack.pack_codes` returns it.
        scales: shape (N, K / group length).
        table: fp32, shape (1 | N, 2**num_bits).
        spec: bits and group size.
        K: weights per row.
        dtype: fp16, bf16 or fp32.

    Returns:
        Shape (N, K), ``dtype``.
    """
    N = packed.shape[0]
    out = torch.empty(N, K, dtype=dtype, device=packed.device)
    rows, length = max(1, _CHUNK // max(1, K)), spec.group_length(K)
    per_row = table.shape[0] != 1
    multi = None if per_row else _multi_table(table[0].to(dtype).float(), spec.num_bits)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        if multi is None:
            codes = unpack_codes(packed[part], spec.num_bits, K)
            out[part] = _look_up(codes, scales[part], table[part], length, dtype)
            continue
        index = _multi_index(packed[part], spec.num_bits)
        values = multi.index_select(0, index.view(-1)).view(torch.float32)
        values = values.view(len(index), values.numel() // len(index))
        groups = values[:, :K].reshape(*scales[part].shape, length)
        out[part] = (groups * scales[part].float().unsqueeze(-1)).flatten(1)
    return out


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


def lut_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    spec: QuantSpec,
) -> Tensor:
    """Multiply by dequantising the whole matrix to fp32 and summing in fp32; see `flute.lut_gemm`.

    Args:
        x: fp16, bf16 or fp32, shape (M, K).
        packed: int32, shape (N, ceil(K * num_bits / 32)).
        scales: shape (N, K / group length).
        table: fp32, shape (1 | N, 2**num_bits).
        bias: shape (N,), or None.
        spec: bits and group size.

    Returns:
        Shape (M, N), dtype of ``x``.
    """
    K = x.shape[1]
    table = table.to(x.dtype).float()
    weight = dequantize_packed(packed, scales, table, spec, K, torch.float32)
    out = x.float() @ weight.T
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)
