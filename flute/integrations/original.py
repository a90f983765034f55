"""Checkpoints of the original FLUTE (its model zoo) -> `QuantizedWeight`.

    <layer>.weight   int16 (N * b / 16, K)    codes of b bits, in the order of one kernel template
    <layer>.scales   fp16 | bf16 (N, K / G)
    <layer>.tables   fp16 | bf16 (2**b,)
    <layer>.tables2  ignored: all pairs of `tables`, viewed as fp32
    flute_config.json {version, num_sms, num_bits, group_size}

Two int16 neighbours along K form a little-endian 32-bit word. It holds codes of two neighbours
along K for S rows ("slices") of the weight; a pair is ``c[2 * k2] << b | c[2 * k2 + 1]``:

    4 bits, S = 4    | pair of s=3 | s=2 | s=1 | s=0 |     8 bits each
    2 bits, S = 8    | s=7 | s=6 | ... | s=0 |             4 bits each
    3 bits, S = 16   three words ("planes") of five 6-bit pairs each: s = plane, plane + 3, ..,
                     plane + 12 at bits 0, 6, .., 24. Bits 31:30 of planes 0, 1, 2 are bits 1:0,
                     3:2, 5:4 of s = 15. First all rows of plane 0, then 32 rows of plane 1, 32 of
                     plane 2, and so on.

Word row p and slice s belong to output feature ``n = (p // T) * S * T + s * T + p % T``. The tile
T, 32 or 64 (3 bits: 32), was a property of the kernel template and is not stored. It only permutes
the rows, so every group of codes is the same under both; what tells T is how codes fit scales. A
group with an outlier has a large scale and small codes: log scale and log rms of the looked-up
values are anti-correlated in the right order and unrelated in the wrong one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flute.errors import FormatError, UnsupportedProblemError
from flute.format import GROUP_SIZES, WHOLE_ROW, QuantizedWeight, QuantSpec

TILES = (32, 64)
_NUM_SLICES = {2: 8, 3: 16, 4: 4}
_SAMPLE = 1 << 22
"""Codes that `find_tile` looks at: enough for thousands of groups, 60 MB of scratch."""
_MIN_CORRELATION = 0.2
"""Anti-correlation that decides a tile. Measured at 2 and 4 bits, groups 32 .. 256, absmax and
searched scales, trained and Gaussian weights: 0.64 .. 0.94 in the right order, at most 0.09 in the
wrong one (2026-11)."""
_MIN_SIGMAS = 6
"""The same in standard errors of an uncorrelated sample, for layers with few groups."""


def row_order(N: int, num_bits: int, tile: int) -> Tensor:
    """Return the output feature of each stored row of codes: shape (N,), ordered (slice, word row).

    ``order[s * N / S + p] = (p // tile) * S * tile + s * tile + p % tile``
    """
    num_slices = _NUM_SLICES[num_bits]
    return torch.arange(N).view(-1, num_slices, tile).transpose(0, 1).reshape(-1)


def stored_codes(weight: Tensor, num_bits: int, num_rows: int | None = None) -> Tensor:
    """Unpack words into codes, in the order of the file.

    Args:
        weight: int16, shape (N * num_bits / 16, K).
        num_bits: 2, 3 or 4.
        num_rows: word rows to unpack, from the first; None is all.

    Returns:
        uint8, shape (S, num_rows, K).
    """
    K = weight.shape[1]
    if num_bits != 3:
        words = weight[:num_rows].contiguous().view(torch.int32)
        pair_bits = 2 * num_bits
        pairs = [_low_byte(words >> (pair_bits * s)) for s in range(_NUM_SLICES[num_bits])]
    else:
        size = weight.shape[0] // 3
        others = weight[size:].view(-1, 2, TILES[0], K).transpose(0, 1).reshape(2, size, K)
        parts = [part[:num_rows].contiguous() for part in (weight[:size], *others)]
        planes = [part.view(torch.int32) for part in parts]
        pairs = [_low_byte(planes[s % 3] >> (6 * (s // 3))) for s in range(15)]
        low, middle, high = (_low_byte(plane >> 30) & 3 for plane in planes)
        pairs.append(low | middle << 2 | high << 4)
    mask = (1 << num_bits) - 1
    codes = [torch.stack((pair >> num_bits & mask, pair & mask), -1) for pair in pairs]
    return torch.stack(codes).flatten(2)


def _low_byte(words: Tensor) -> Tensor:
    return (words & 255).to(torch.uint8)


def unpack_original(weight: Tensor, num_bits: int, tile: int) -> Tensor:
    """Return the codes of a stored weight.

    Args:
        weight: int16, shape (N * num_bits / 16, K).
        num_bits: 2, 3 or 4.
        tile: 32 or 64; 3 bits: 32.

    Returns:
        uint8, shape (N, K).

    Raises:
        FormatError: a shape or dtype that this layout cannot have.
    """
    if tile not in possible_tiles(weight, num_bits):
        raise FormatError(
            f"`weight` of shape {tuple(weight.shape)} at {num_bits} bits cannot have tile={tile}; "
            f"possible: {possible_tiles(weight, num_bits)}."
        )
    codes = stored_codes(weight, num_bits)
    out = torch.empty(codes.shape[0] * codes.shape[1], codes.shape[2], dtype=torch.uint8)
    out[row_order(len(out), num_bits, tile)] = codes.flatten(0, 1).cpu()
    return out.to(weight.device)


def possible_tiles(weight: Tensor, num_bits: int) -> tuple[int, ...]:
    """Return the tiles that a stored weight's shape admits.

    Raises:
        FormatError: none, or a wrong dtype.
    """
    rows, K = weight.shape if weight.ndim == 2 else (0, 0)
    tiles = TILES[:1] if num_bits == 3 else TILES
    N = rows * 16 // num_bits
    fits = tuple(t for t in tiles if N and N % (_NUM_SLICES[num_bits] * t) == 0)
    if weight.dtype != torch.int16 or not fits or K % 2 or rows * 16 % num_bits:
        raise FormatError(
            f"`weight` is {weight.dtype} of shape {tuple(weight.shape)}; expected torch.int16 "
            f"(N * {num_bits} / 16, K), N a multiple of {_NUM_SLICES[num_bits] * 32}, K even."
        )
    return fits


def find_tile(weight: Tensor, scales: Tensor, table: Tensor, name: str = "weight") -> int:
    """Tell the tile of a stored weight from its data.

    Args:
        weight: int16, shape (N * b / 16, K).
        scales: shape (N, K / G).
        table: shape (2**b,).
        name: of the layer, for messages.

    Returns:
        32 or 64.

    Raises:
        UnsupportedProblemError: both orders, or neither, fit; the message carries the correlations.
    """
    tiles = possible_tiles(weight, table.numel().bit_length() - 1)
    if len(tiles) == 1:
        return tiles[0]
    fits, num_groups = tile_correlations(weight, scales, table)
    best = min(fits, key=lambda tile: fits[tile])
    other = sum(tiles) - best
    needed = max(_MIN_CORRELATION, _MIN_SIGMAS / max(num_groups, 1) ** 0.5)
    if fits[best] > -needed or fits[other] < fits[best] / 2:
        raise UnsupportedProblemError(
            f"`{name}`: the data do not tell the tile of the stored order: codes and scales "
            f"correlate by {fits[32]:+.2f} at tile 32, {fits[64]:+.2f} at tile 64 ({num_groups} "
            f"groups); expected one below -{needed:.2f} and the other near 0. If you know it, give "
            "it: `tile=32` or `tile=64` (`--tile`)."
        )
    return best


def tile_correlations(
    weight: Tensor, scales: Tensor, table: Tensor
) -> tuple[dict[int, float], int]:
    """Correlate log scales with log rms of the looked-up values, under each tile.

    Only rows that the two orders place differently count, each corrected for its row and column.

    Args:
        weight: int16, shape (N * b / 16, K); N admits both tiles.
        scales: shape (N, K / G).
        table: shape (2**b,).

    Returns:
        Tile -> correlation (0 where nothing can be compared), and the number of groups compared.
    """
    num_bits = table.numel().bit_length() - 1
    N, num_slices = scales.shape[0], _NUM_SLICES[num_bits]
    num_rows = N // num_slices
    seen = min(num_rows, max(1, _SAMPLE // (weight.shape[1] * num_slices * 64)) * 64)
    codes = stored_codes(weight, num_bits, seen).flatten(0, 1)
    values = table.float()[codes.long()].unflatten(1, (scales.shape[1], -1))
    loudness = values.square().mean(2).sqrt()
    orders = [row_order(N, num_bits, t).view(num_slices, -1)[:, :seen].flatten() for t in TILES]
    sizes = [scales[order].float().abs() for order in orders]
    usable = (orders[0] != orders[1]).to(scales.device) & (loudness > 0).all(1)
    usable &= (sizes[0] > 0).all(1) & (sizes[1] > 0).all(1)
    target = _centred(loudness[usable].log())
    fits = {
        t: _correlation(_centred(s[usable].log()), target)
        for t, s in zip(TILES, sizes, strict=True)
    }
    return fits, target.numel()


def _centred(x: Tensor) -> Tensor:
    """Remove what columns and rows have in common; a single column loses its mean only."""
    if not x.numel():
        return x
    by_column = x - x.mean(0, keepdim=True)
    return by_column - by_column.mean(1, keepdim=True) if x.shape[1] > 1 else by_column


def _correlation(a: Tensor, b: Tensor) -> float:
    norm = float(a.norm() * b.norm())
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def from_original(
    weight: Tensor, scales: Tensor, tables: Tensor, *, tile: int | None = None, name: str = "weight"
) -> QuantizedWeight:
    """Convert one linear of an original FLUTE checkpoint: the same codes, scales and table.

    Args:
        weight: int16, shape (N * b / 16, K).
        scales: fp16, bf16 or fp32, shape (N, K / G).
        tables: shape (2**b,).
        tile: 32 or 64 where the data don't tell it; see `find_tile`.
        name: of the layer, for messages.

    Raises:
        FormatError: shapes that contradict each other or the layout.
        UnsupportedProblemError: the tile cannot be told and was not given.
    """
    try:
        spec = layer_spec(weight, scales, tables)
        tiles = possible_tiles(weight, spec.num_bits)
    except FormatError as error:
        raise FormatError(f"`{name}`: {error}") from error
    if tile is not None and tile not in TILES:
        raise FormatError(f"`tile` is {tile!r}; expected one of {TILES}.")
    try:
        tile = find_tile(weight, scales, tables, name)
    except UnsupportedProblemError:
        if tile not in tiles:
            raise
    codes, table = unpack_original(weight, spec.num_bits, tile), tables.float().view(1, -1)
    try:
        return QuantizedWeight(codes, scales.contiguous(), table, spec)
    except FormatError as error:
        raise FormatError(f"`{name}`: {error}") from error


def layer_spec(weight: Tensor, scales: Tensor, tables: Tensor) -> QuantSpec:
    """Return bits and group size of a stored layer, by its shapes ("meta" tensors suffice).

    Raises:
        FormatError: shapes that contradict each other, or a group size that is not supported.
    """
    num_bits = {4: 2, 8: 3, 16: 4}.get(tables.numel(), 0)
    if not num_bits or tables.ndim != 1:
        raise FormatError(
            f"`tables` has shape {tuple(tables.shape)}; expected 4, 8 or 16 entries. Tables of "
            "vectors (HIGGS) have no equivalent here."
        )
    N, K = (weight.shape[0] * 16 // num_bits, weight.shape[1]) if weight.ndim == 2 else (0, 0)
    groups = scales.shape[1] if scales.ndim == 2 else 0
    if not groups or scales.shape[0] != N or K % groups:
        raise FormatError(
            f"`scales` has shape {tuple(scales.shape)}; expected (N, K / group) with N={N}, K={K} "
            f"from `weight` {tuple(weight.shape)} at {num_bits} bits."
        )
    group_size = K // groups
    return QuantSpec(num_bits, WHOLE_ROW if groups == 1 and K not in GROUP_SIZES else group_size)
