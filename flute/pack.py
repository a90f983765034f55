"""Packing: codes <-> bits. Pure functions, each with its inverse; they know no file and no kernel.

On disk a row of codes is one little-endian bit stream along K, in 32-bit words. Code k occupies
bits [k * b, (k + 1) * b) of the row, so every cut at a multiple of 32 codes is a plain slice of the
words:

    4 bits   byte j = c[2j] | c[2j+1] << 4
    3 bits   bytes 3j..3j+2 = c[8j] | c[8j+1] << 3 | ... | c[8j+7] << 21
    2 bits   byte j = c[4j] | c[4j+1] << 2 | c[4j+2] << 4 | c[4j+3] << 6

A row that does not fill its last word is padded with zero bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flute.errors import FormatError
from flute.format import QuantSpec, check_codes

_CODES_PER_UNIT = {2: 4, 3: 8, 4: 2}
"""Fewest codes that fill whole bytes."""


def pack_codes(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes into the bit stream stored on disk.

    Args:
        codes: uint8, shape (N, K), each below ``2**num_bits``; any N and K.
        num_bits: 2, 3 or 4.

    Returns:
        int32, shape (N, ceil(K * num_bits / 32)), on the same device.

    Raises:
        FormatError: another dtype or shape, or a code out of range.
    """
    check_codes(codes, num_bits)
    N, K = codes.shape
    num_words = QuantSpec(num_bits).num_words(K)
    unit = _CODES_PER_UNIT[num_bits]
    num_padded = K + -K % 32
    codes = F.pad(codes, (0, num_padded - K)).view(N, num_padded // unit, unit)
    if num_bits == 3:
        stream = codes[..., 0].to(torch.int32)
        for i in range(1, unit):
            stream |= codes[..., i].to(torch.int32) << (3 * i)
        stream = stream.unsqueeze(-1).view(torch.uint8)[..., :3]
    else:
        stream = codes[..., 0].clone()
        for i in range(1, unit):
            stream |= codes[..., i] << (num_bits * i)
    stream = stream.reshape(N, num_padded * num_bits // 8)[:, : 4 * num_words]
    return _compact(stream).view(torch.int32).view(N, num_words)


def unpack_codes(packed: Tensor, num_bits: int, K: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: int32, shape (N, ceil(K * num_bits / 32)).
        num_bits: 2, 3 or 4.
        K: codes per row.

    Returns:
        uint8, shape (N, K).

    Raises:
        FormatError: the row length disagrees with ``K``.
    """
    check_packed(packed, num_bits, K)
    N = packed.shape[0]
    unit = _CODES_PER_UNIT[num_bits]
    stream = row_bytes(packed)
    if num_bits == 3:
        stream = F.pad(stream, (0, -stream.shape[1] % 3))
        stream = F.pad(stream.view(N, stream.shape[1] // 3, 3), (0, 1)).view(torch.int32)
        stream = stream.squeeze(-1)
    mask = (1 << num_bits) - 1
    codes = [(stream >> (num_bits * i)).to(torch.uint8) & mask for i in range(unit)]
    return torch.stack(codes, -1).flatten(1)[:, :K].contiguous()


def row_bytes(packed: Tensor) -> Tensor:
    """Return packed codes as bytes: uint8, shape (N, 4 * words)."""
    return _compact(packed).view(torch.uint8).view(packed.shape[0], 4 * packed.shape[1])


def _compact(tensor: Tensor) -> Tensor:
    """A flat copy. `contiguous` won't do: a dimension of length 1 keeps a stride no view allows."""
    return tensor.clone(memory_format=torch.contiguous_format).view(-1)


def check_packed(packed: Tensor, num_bits: int, K: int) -> None:
    """Check dtype and row length of packed codes.

    Args:
        packed: from `pack_codes`: int32, shape (N, words of a row).
        num_bits: 2, 3 or 4.
        K: codes of a row.

    Raises:
        FormatError: they disagree with ``num_bits`` and ``K``.
    """
    num_words = QuantSpec(num_bits).num_words(K)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != num_words:
        raise FormatError(
            f"`codes` is {packed.dtype} of shape {tuple(packed.shape)}; expected torch.int32 "
            f"(N, {num_words}) for K={K}, num_bits={num_bits}."
        )
