"""bitsandbytes 4-bit weights (nf4, fp4) -> `QuantizedWeight`, bit for bit. Imports no bitsandbytes.

    weight      uint8, ceil(N * K / 2) bytes, rows running on; the first element is the high nibble
    quant_map   fp32 [16]: our table
    absmax      fp32, one per block of `blocksize` elements, rows running on. "Double quantised", it
                is uint8: nested_quant_map[absmax] * nested_absmax[i // nested_blocksize] + offset

A group that lies inside one block takes that block's absmax, so the conversion is exact for every
group size that divides both block and row, and for whole rows where the row divides the block:

    blocksize 128, K = 192   |------- block 0 -------|------- block 1 -------|------- block 2 ----
    groups of 64             |--row 0----|--row 0----|--row 0----|--row 1----|--row 1----|--row 1-
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from flute.errors import FormatError, UnsupportedProblemError
from flute.format import GROUP_SIZES, WHOLE_ROW, QuantizedWeight, QuantSpec
from flute.methods import quantize

_CPU_BLOCK_N = 32
"""Rows that bitsandbytes interleaves when it repacks a weight for CPUs with AVX512-BF16."""


def exact_group_size(K: int, blocksize: int) -> int | None:
    """Return the largest group size that holds blocks of ``blocksize`` in rows of ``K`` exactly.

    Returns:
        One of 32 .. 256, -1 for one scale per row, or None if groups would straddle blocks.
    """
    sizes = (*sorted(GROUP_SIZES, reverse=True), WHOLE_ROW)
    return next((group for group in sizes if _is_exact(group, K, blocksize)), None)


def unnest_absmax(
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_quant_map: Tensor,
    blocksize: int,
    offset: float,
    *,
    name: str = "weight",
) -> Tensor:
    """Undo the quantisation of the absmax values ("double quantisation").

    ``out[i] = nested_quant_map[absmax[i]] * nested_absmax[i // blocksize] + offset``, in fp32
    and that order, as in bitsandbytes.

    Args:
        absmax: uint8, any shape.
        nested_absmax: fp32, one per ``blocksize`` values.
        nested_quant_map: fp32, shape (256,).
        blocksize: 256 in all versions so far.
        offset: mean of the absmax values before they were quantised.
        name: of the weight, for messages.

    Returns:
        fp32, shape (absmax.numel(),).

    Raises:
        FormatError: sizes that contradict each other.
    """
    num_blocks = -(-absmax.numel() // blocksize)
    if nested_absmax.numel() != num_blocks or nested_quant_map.numel() != 256:
        raise FormatError(
            f"`{name}` has {nested_absmax.numel()} nested absmax and {nested_quant_map.numel()} "
            f"nested table entries; expected {num_blocks} and 256 ({absmax.numel()} absmax values)."
        )
    index = torch.arange(absmax.numel(), device=absmax.device) // blocksize
    values = nested_quant_map.float()[absmax.reshape(-1).long()] * nested_absmax.float()[index]
    return values + torch.tensor(offset, dtype=torch.float32, device=absmax.device)


def from_quant_state(
    packed: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    *,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
    requantize: bool = False,
    name: str = "weight",
) -> QuantizedWeight:
    """Convert one bitsandbytes 4-bit weight.

    Exact: `flute.dequantize` in fp32 equals ``bitsandbytes.functional.dequantize_4bit`` in fp32 bit
    for bit, if the dtype of the scales holds every absmax.

    Args:
        packed: the weight's bytes, of any dtype and shape, ``ceil(N * K / 2)`` in all.
        absmax: fp32 (see `unnest_absmax`), one per block.
        quant_map: fp32, shape (16,).
        shape: (N, K).
        blocksize: consecutive elements per absmax.
        group_size: group of the result; None is the largest exact one.
        scale_dtype: dtype of the scales; None is fp32, which is always exact.
        requantize: where the group is not exact, dequantise and choose new codes and scales (of
            least squared error, same table) instead of refusing. Loses accuracy.
        name: of the weight, for messages.

    Raises:
        FormatError: sizes that contradict each other, or NaN or Inf.
        UnsupportedProblemError: not exact at this group size, or at any.
    """
    N, K = shape
    num_blocks = -(-N * K // blocksize)
    for what, found, expected in (
        ("packed bytes", packed.numel() * packed.element_size(), -(-N * K // 2)),
        ("absmax values", absmax.numel(), num_blocks),
        ("table entries", quant_map.numel(), 16),
    ):
        if found != expected:
            raise FormatError(
                f"`{name}` has {found} {what}; expected {expected} for shape {tuple(shape)}, "
                f"blocksize {blocksize}."
            )
    codes = _unpack_nibbles(packed, N * K).view(N, K)
    scales, table = absmax.reshape(-1).float(), quant_map.reshape(1, -1).float()
    dtype = scale_dtype or torch.float32
    group = group_size or exact_group_size(K, blocksize) or finest_group_size(K)
    if not requantize:
        check_group_size(group, K, blocksize, name)
    try:
        if _is_exact(group, K, blocksize):
            spec = QuantSpec(4, group)
            starts = torch.arange(0, N * K, spec.group_length(K), device=codes.device)
            scales = scales[starts // blocksize].view(N, -1).to(dtype)
            return QuantizedWeight(codes, scales, table, spec)
        block = torch.arange(N * K, device=codes.device).view(N, K) // blocksize
        dense = table[0][codes.long()] * scales[block]
        return quantize(dense, 4, group, table=table, scale_dtype=dtype)
    except FormatError as error:
        raise FormatError(f"`{name}`: {error}") from error


def _unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    stream = packed.detach().contiguous().view(-1).view(torch.uint8)
    return torch.stack((stream >> 4, stream & 15), -1).view(-1)[:count]


def _is_exact(group_size: int, K: int, blocksize: int) -> bool:
    if group_size == WHOLE_ROW:
        return blocksize % K == 0
    return K % group_size == 0 and blocksize % group_size == 0


def finest_group_size(K: int) -> int:
    """Return the smallest group size that divides a row, or -1 for the whole row."""
    return min((group for group in GROUP_SIZES if K % group == 0), default=WHOLE_ROW)


def check_group_size(group_size: int, K: int, blocksize: int, name: str) -> None:
    """Check that groups hold blocks of ``blocksize`` in rows of ``K`` exactly.

    Raises:
        UnsupportedProblemError: they do not; the message names a group size that does, if any.
    """
    if not _is_exact(group_size, K, blocksize):
        raise UnsupportedProblemError(_inexact_message(name, K, blocksize, group_size))


def _inexact_message(name: str, K: int, blocksize: int, group_size: int | None = None) -> str:
    start = f"`{name}` has bitsandbytes blocks of {blocksize} in rows of K={K}: "
    exact = exact_group_size(K, blocksize)
    if exact is not None:
        return (
            f"{start}group_size={group_size} cannot hold them. Use group_size={exact}, or a "
            "smaller one that divides it."
        )
    return (
        f"{start}no group of 32, 64, 128 or 256 and no whole row lies inside one block, so the "
        "conversion cannot be exact. Allow new codes with `requantize=True` (`--requantize`), or "
        "quantise the dense model."
    )


def storable_dtype(absmax: Tensor, preferred: torch.dtype) -> torch.dtype:
    """Return ``preferred`` if it holds every absmax exactly, else fp32.

    Args:
        absmax: a scale per block, fp32, any shape.
        preferred: a 16-bit float.
    """
    exact = torch.equal(absmax.to(preferred).float(), absmax.float())
    return preferred if exact else torch.float32


def is_linear4bit(module: nn.Module) -> bool:
    """Tell whether a module is a `bitsandbytes.nn.Linear4bit`, without importing bitsandbytes."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit)


def module_quant_state(module: nn.Module, name: str) -> Any:
    """Return the quantisation state of a live `bitsandbytes.nn.Linear4bit`.

    Raises:
        UnsupportedProblemError: the weight is not quantised yet, or accelerate holds it elsewhere.
    """
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if weight.device.type == "meta":
        raise UnsupportedProblemError(
            f"`{name}` is a bitsandbytes layer offloaded by accelerate. Load the model on one "
            "device, or convert its checkpoint with `flute convert`."
        )
    if state is None:
        raise UnsupportedProblemError(
            f"`{name}` is a bitsandbytes layer that is not quantised yet. Move it to a device "
            'first (`model.to("cpu")`), or quantise the dense model.'
        )
    return state


def from_module(
    module: nn.Module,
    *,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Convert the weight of a live `bitsandbytes.nn.Linear4bit`, on its device.

    A layer that has run on a CPU with AVX512-BF16 was repacked by bitsandbytes, its absmax rounded
    to bf16; what is converted then is that weight.

    Args:
        module: the layer.
        group_size: as in `from_quant_state`.
        scale_dtype: dtype of the scales; None is the weight's own where that is exact, else fp32.
        name: of the layer, for messages.

    Raises:
        FormatError: as `from_quant_state`.
        UnsupportedProblemError: no exact group, or a layer without a quantised weight.
    """
    state = module_quant_state(module, name)
    weight: Any = module.weight
    packed = weight.detach().as_subclass(Tensor)
    absmax = state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        packed, absmax = _undo_cpu_packing(packed), absmax.T.contiguous()
    elif state.nested:
        nested = state.state2
        absmax = unnest_absmax(
            absmax, nested.absmax, nested.code, nested.blocksize, float(state.offset), name=name
        )
    N, K = state.shape
    return from_quant_state(
        packed,
        absmax,
        state.code,
        (N, K),
        state.blocksize,
        group_size=group_size,
        scale_dtype=scale_dtype or storable_dtype(absmax, state.dtype),
        name=name,
    )


def _undo_cpu_packing(packed: Tensor) -> Tensor:
    """Return the row-major bytes of a weight (N, K / 2) repacked for AVX512-BF16.

    There, 32 bytes hold the 64 codes of two columns and 32 rows, row by row; the first 32 codes are
    the low nibbles.
    """
    N, half_K = packed.shape
    runs = packed.reshape(-1, 32)
    codes = torch.cat((runs & 15, runs >> 4), 1).view(N // _CPU_BLOCK_N, half_K, _CPU_BLOCK_N, 2)
    high, low = codes.transpose(1, 2).reshape(-1, 2).unbind(1)
    return high << 4 | low
