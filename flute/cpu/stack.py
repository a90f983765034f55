"""All blocks of a model in one call of the library, and the keys and values that grow for it.

    memory  (blocks, 2, M, groups, capacity, dim)    of each block keys, then values
            |---- length ----|  views of it are what the cache's owner sees; the rest is to come

Knows addresses and sizes, not models or caches: `flute.fused_model` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from flute.cpu import library
from flute.cpu.block import Block, CNorm, CStep, Norm

_SPARE = 64
"""Fewest tokens that memory has left when it is made; more, a quarter of what it holds."""


class _Blocks(ctypes.Structure):
    _fields_ = (
        ("each", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("past", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("last", CNorm),
    )


class Past:
    """Keys and values of some tokens, with room for more.

    Args:
        keys: of each block, shape (M, groups, length, dim); copied.
        values: as the keys.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        M, groups, self.length, dim = keys[0].shape
        capacity = self.length + 1 + max(_SPARE, self.length // 4)
        shape = (len(keys), 2, M, groups, capacity, dim)
        self.memory = torch.empty(shape, dtype=keys[0].dtype)
        for i, pair in enumerate(zip(keys, values, strict=True)):
            for part, tensor in enumerate(pair):
                self.memory[i, part, :, :, : self.length] = tensor

    def is_full(self) -> bool:
        """Tell whether there is no room for another token."""
        return self.length == self.memory.shape[4]

    def views(self) -> tuple[Tensor, ...]:
        """Return keys, then values of each block in turn, as they are now: views of the memory.

        Tokens that are added later lie behind them, so what a view shows never changes.
        """
        return self.memory[:, :, :, :, : self.length].flatten(0, 1).unbind(0)


class Stack:
    """Blocks made ready that run one after another, and the norm behind them.

    Args:
        blocks: of the same hidden size, heads of keys, dim of a head and dtype.
        norm: of the last block's result; its weight is contiguous and of that dtype.
    """

    def __init__(self, blocks: Sequence[Block], norm: Norm) -> None:
        self.blocks, first = tuple(blocks), blocks[0]
        self._norm = norm  # its memory, whose address `_last` holds
        self._first, self._run = first, library.function("flute_blocks")
        self._each = (ctypes.c_void_p * len(blocks))(*(block.address for block in blocks))
        self._last = CNorm(norm.weight.data_ptr(), norm.eps)

    def __call__(
        self, x: Tensor, angles: tuple[Tensor, Tensor], past: Past, mask: Tensor | None
    ) -> Tensor:
        """Take a token of each of M sequences through all blocks and the norm.

        Args:
            x: contiguous, shape (M, 1, hidden), M at least 1 and at most `Block.max_tokens`.
            angles: cosine and sine of the tokens' positions; see `Step`.
            past: not full; the tokens' keys and values are added.
            mask: None, or bool, shape (M, length), the new token included; the last dimension is
                contiguous.

        Returns:
            Shape (M, 1, hidden).

        Raises:
            MemoryError: no memory for scratch; nothing was added.
        """
        cosine, sine = angles
        out, dim = torch.empty_like(x), self._first.sizes.dim
        step = CStep(
            x=x.data_ptr(),
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            M=x.shape[0],
            angle_stride=dim if cosine.shape[0] > 1 else 0,
            length=past.length + 1,
            out=out.data_ptr(),
        )
        if mask is not None:
            step.mask, step.mask_stride, step.mask_kind = mask.data_ptr(), mask.stride(0), 1
        each, capacity = ctypes.addressof(self._each), past.memory.shape[4]
        blocks = _Blocks(each, len(self.blocks), past.memory.data_ptr(), capacity, self._last)
        numbers = self._first.numbers
        library.check(self._run(ctypes.byref(blocks), ctypes.byref(step), *numbers))
        past.length += 1
        return out
