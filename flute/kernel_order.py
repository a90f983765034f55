"""Kernel order: codes and scales as the GPU kernels read them. Pure, invertible, on any device.

Knows plain codes and the order below, the same for all GPUs; `flute/kernels/lookup.cuh` states it
in CUDA C++. A matrix (N, K) is padded with zeros: N = 16 tiles, K = 64 chunks = 256 i:

    packed int32 (tiles, chunks, words of a chunk)
    scales (tiles, groups, 8, 2): rows g and g + 8 side by side; one scale per row: (16 tiles,)

    k = chunk*64 + step*16 + half*8 + q*2 + e     row = tile*16 + h*8 + g     lane = g*4 + q
    pair[step][half*2 + h] = code[e = 0] | code[e = 1] << num_bits

    4 bits, lane's 4 words:  w[step] = sum_i pair[step][i] << 8i
    3 bits, 3 words:         byte h*2 + half of w[s], s < 3, has the codes of pair[s][half*2 + h] at
                             bits 0 and 4, and at bits 3 and 7 bit 2 - s of those of step 3
    2 bits, 2 words:         w[s/2] = steps s = 2i, 2i + 1 as half-words; a step has code j of row h
                             at bits 4j + 2h; j = half*2 + e

Lanes' words lie side by side, 16 (4 bits) or 8 (2 bits) bytes a lane; 3 bits: 8 bytes a lane,
then 4 bytes a lane.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flute.errors import FormatError
from flute.pack import pack_codes, unpack_codes

TILE_N = 16
"""Rows of a tile."""
CHUNK_K = 64
"""Codes per row of a chunk."""
PADDED_K = 256
"""K of packed codes is a multiple of this."""
_BLOCK = 1 << 24
"""Codes converted at a time; bounds the scratch to some hundred MB."""


def padded_k(K: int) -> int:
    """Return K rounded up to a whole number of 256."""
    return -(-K // PADDED_K) * PADDED_K


def num_tiles(N: int) -> int:
    """Return the tiles of 16 rows that N rows take."""
    return -(-N // TILE_N)


def to_kernel_order(packed: Tensor, scales: Tensor, num_bits: int, K: int) -> tuple[Tensor, Tensor]:
    """Put a weight's stored codes and scales into kernel order.

    Args:
        packed: int32, shape (N, ceil(K * num_bits / 32)), as `flute.pack_codes` returns it.
        scales: shape (N, K / group length).
        num_bits: 2, 3 or 4.
        K: codes per row, a multiple of 32.

    Returns:
        Codes (tiles, chunks, words of a chunk) and scales, on the same device.

    Raises:
        FormatError: K is not a multiple of 32.
    """
    if K % 32:
        raise FormatError(f"K={K} is not a multiple of 32; kernel order needs one.")
    N = packed.shape[0]
    shape = (num_tiles(N), padded_k(K) // CHUNK_K, TILE_N * CHUNK_K * num_bits // 32)
    out = torch.empty(shape, dtype=torch.int32, device=packed.device)
    step = max(1, _BLOCK // (TILE_N * padded_k(K)))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        codes = unpack_codes(packed[start * TILE_N : stop * TILE_N], num_bits, K)
        out[start:stop] = order_codes(codes, num_bits)
    return out, order_scales(scales, K)


def to_plain_order(
    packed: Tensor, scales: Tensor, num_bits: int, N: int, K: int, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Undo `to_kernel_order`.

    Args:
        packed: int32, shape (tiles, chunks, words of a chunk).
        scales: in kernel order.
        num_bits: 2, 3 or 4.
        N: rows.
        K: codes per row.
        num_groups: scales per row.

    Returns:
        Codes (N, ceil(K * num_bits / 32)) and scales (N, num_groups), as they are stored.
    """
    out = torch.empty(N, -(-K * num_bits // 32), dtype=torch.int32, device=packed.device)
    step = max(1, _BLOCK // (TILE_N * padded_k(K)))
    for start in range(0, packed.shape[0], step):
        rows = min((start + step) * TILE_N, N) - start * TILE_N
        codes = plain_codes(packed[start : start + step], num_bits, rows, K)
        out[start * TILE_N : start * TILE_N + rows] = pack_codes(codes, num_bits)
    return out, plain_scales(scales, N, num_groups)


def order_codes(codes: Tensor, num_bits: int) -> Tensor:
    """Put codes into kernel order.

    Args:
        codes: uint8, shape (N, K), each below ``2**num_bits``.
        num_bits: 2, 3 or 4.

    Returns:
        int32, shape (tiles, chunks, words of a chunk).
    """
    N, K = codes.shape
    tiles, chunks = num_tiles(N), padded_k(K) // CHUNK_K
    codes = F.pad(codes, (0, padded_k(K) - K, 0, tiles * TILE_N - N))
    # (tile, h, g, chunk, step, half, q, e) -> (tile, chunk, g, q, step, half, h, e)
    c = codes.view(tiles, 2, 8, chunks, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7).to(torch.int32)
    pair = (c[..., 0] | c[..., 1] << num_bits).reshape(tiles, chunks, 32, 4, 4)  # lane, step, i
    if num_bits == 4:
        return _bytes_to_word(pair).reshape(tiles, chunks, 128)
    if num_bits == 2:
        spread = (pair & 3) | (pair & 12) << 2  # codes e = 0, 1 at bits 0 and 4
        steps = spread[..., 0] | spread[..., 1] << 2 | spread[..., 2] << 8 | spread[..., 3] << 10
        steps = steps.reshape(tiles, chunks, 32, 2, 2)
        return (steps[..., 0] | steps[..., 1] << 16).reshape(tiles, chunks, 64)
    spread = ((pair & 7) | (pair & 56) << 1)[..., [0, 2, 1, 3]]  # codes at bits 0 and 4
    shift = torch.tensor([2, 1, 0], dtype=torch.int32, device=codes.device)[:, None]
    words = _bytes_to_word(spread[..., :3, :] | (spread[..., 3:, :] >> shift & 0x11) << 3)
    return torch.cat((words[..., :2].reshape(tiles, chunks, 64), words[..., 2]), dim=-1)


def plain_codes(packed: Tensor, num_bits: int, N: int, K: int) -> Tensor:
    """Undo `order_codes`.

    Args:
        packed: int32, shape (tiles, chunks, words of a chunk).
        num_bits: 2, 3 or 4.
        N: rows.
        K: codes per row.

    Returns:
        uint8, shape (N, K).
    """
    tiles, chunks = packed.shape[:2]
    byte = torch.arange(4, dtype=torch.int32, device=packed.device) * 8
    mask = (1 << 2 * num_bits) - 1
    if num_bits == 4:
        pair = packed.reshape(tiles, chunks, 32, 4, 1) >> byte & mask
    elif num_bits == 2:
        half_word = packed.reshape(tiles, chunks, 32, 2, 1) >> byte[:2] * 2
        shift = torch.tensor([0, 2, 8, 10], dtype=torch.int32, device=packed.device)
        spread = (half_word & 0xFFFF).reshape(tiles, chunks, 32, 4, 1) >> shift
        pair = spread & 3 | spread >> 2 & 12
    else:
        low = packed[..., :64].reshape(tiles, chunks, 32, 2)
        field = torch.cat((low, packed[..., 64:, None]), dim=-1)[..., None] >> byte & 0xFF
        shift = torch.tensor([2, 1, 0], dtype=torch.int32, device=packed.device)[:, None]
        last = ((field >> 3 & 0x11) << shift).sum(-2, dtype=torch.int32)  # of step 3
        spread = torch.cat((field & 0x77, last[..., None, :]), dim=-2)[..., [0, 2, 1, 3]]
        pair = spread & 7 | spread >> 1 & 56  # lane, step, i
    pair = pair.reshape(tiles, chunks, 8, 4, 4, 2, 2)  # tile, chunk, g, q, step, half, h
    codes = torch.stack((pair & (1 << num_bits) - 1, pair >> num_bits), dim=-1).to(torch.uint8)
    codes = codes.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(tiles * TILE_N, chunks * CHUNK_K)
    return codes[:N, :K].contiguous()


def order_scales(scales: Tensor, K: int) -> Tensor:
    """Put scales (N, groups) into kernel order, padded with zeros; (16 tiles,) if groups is 1."""
    N, groups = scales.shape
    missing = num_tiles(N) * TILE_N - N
    if groups == 1:
        return F.pad(scales[:, 0], (0, missing)).contiguous()
    padded_groups = padded_k(K) * groups // K
    scales = F.pad(scales, (0, padded_groups - groups, 0, missing))
    return scales.view(-1, 2, 8, padded_groups).permute(0, 3, 2, 1).contiguous()


def plain_scales(ordered: Tensor, N: int, num_groups: int) -> Tensor:
    """Return the scales (N, num_groups) that `order_scales` put into ``ordered``."""
    if num_groups == 1:
        return ordered[:N, None].contiguous()
    return ordered.permute(0, 3, 2, 1).reshape(-1, ordered.shape[1])[:N, :num_groups].contiguous()


def _bytes_to_word(b: Tensor) -> Tensor:
    return b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16 | b[..., 3] << 24
