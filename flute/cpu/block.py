"""A decoder block's call into the library, made ready: the structures of `kernels/cpu/block.h`.

Knows addresses and sizes, not modules: `flute.fused` finds them in a model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flute.cpu import library
from flute.cpu.held import Held
from flute.cpu.ready import Ready
from flute.cpu.structures import TYPES, Result, Weight

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The products of a block, in the order of `enum projection`."""
MAX_DIM = 256
"""Most elements of a head."""
LANES = 16
"""Sizes are multiples of it."""
_ADDED = 2


class Norm(NamedTuple):
    """An RMSNorm: its weight, and what is added to the mean square."""

    weight: Tensor
    eps: float


class Sizes(NamedTuple):
    """Of a block; see `kernels/cpu/block.h`."""

    hidden: int
    inner: int
    heads: int
    groups: int  # heads of keys and values
    dim: int  # of a head

    def are_taken(self) -> bool:
        """Tell whether the library takes them."""
        wide = (self.hidden, self.inner, self.dim)
        return (
            all(size > 0 and size % LANES == 0 for size in wide)
            and self.dim <= MAX_DIM
            and self.groups > 0
            and self.heads % self.groups == 0
        )


class CNorm(ctypes.Structure):
    """A norm: the address of its weight, and what is added."""

    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Block(ctypes.Structure):
    _fields_ = (
        ("weights", Weight * len(PROJECTIONS)),
        ("biases", Result * len(PROJECTIONS)),
        ("before", CNorm),
        ("after", CNorm),
        ("q", CNorm),
        ("k", CNorm),
        *((name, ctypes.c_int64) for name in Sizes._fields),
        ("scaling", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class CStep(ctypes.Structure):
    """A step: addresses, sizes, strides."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("M", ctypes.c_int64),
        ("angle_stride", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        *((f"key_stride_{i}", ctypes.c_int64) for i in range(3)),
        ("values", ctypes.c_void_p),
        *((f"value_stride_{i}", ctypes.c_int64) for i in range(3)),
        ("length", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("mask_kind", ctypes.c_int32),
    )


class Step:
    """One token of each of M sequences on its way through a block.

    Args:
        block: whose.
        x: contiguous, shape (M, 1, hidden), M at least 1 and at most `Block.max_tokens`.
        angles: cosine and sine of the tokens' positions, shape (1 | M, 1, dim), contiguous, dtype
            of ``x``.
    """

    __slots__ = ("_block", "_kept", "_step", "keys", "values", "x")

    def __init__(self, block: Block, x: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        self._block, self.x = block, x
        M, (_, _, heads, groups, dim) = x.shape[0], block.sizes
        q = torch.empty((M, heads * dim), dtype=x.dtype)
        self.keys = torch.empty((M, groups, 1, dim), dtype=x.dtype)
        """Of the new tokens, shape (M, groups, 1, dim)."""
        self.values = torch.empty((M, groups, 1, dim), dtype=x.dtype)
        """As the keys."""
        cosine, sine = angles
        self._kept = (q, angles)
        addresses = [t.data_ptr() for t in (x, q, self.keys, self.values, cosine, sine)]
        self._step = CStep(*addresses, M, dim if cosine.shape[0] > 1 else 0)
        block.begin(self._step)

    def finish(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to all tokens so far and return what the block makes of ``x``.

        Args:
            keys: shape (M, groups, length, dim), dtype of ``x``; a token's elements side by side.
            values: as the keys.
            mask: None; or, with the last dimension contiguous, (1 | M, 1, 1, length), bool, true
                where there is something to attend to, or of the dtype of ``x``, which is added.

        Raises:
            ValueError: ``keys``, ``values`` or ``mask`` are of other shapes.
        """
        step, x = self._step, self.x
        M, (_, _, _, groups, dim) = x.shape[0], self._block.sizes
        length = keys.shape[2]
        expected = (M, groups, length, dim)
        if keys.shape != expected or values.shape != expected:
            raise ValueError(
                f"the cache returned keys {tuple(keys.shape)} and values {tuple(values.shape)}; "
                f"expected {expected}."
            )
        step.keys, step.values, step.length = keys.data_ptr(), values.data_ptr(), length
        step.key_stride_0, step.key_stride_1, step.key_stride_2, _ = keys.stride()
        step.value_stride_0, step.value_stride_1, step.value_stride_2, _ = values.stride()
        if mask is not None:
            if mask.shape[3] != length:
                raise ValueError(f"`attention_mask` is of {mask.shape[3]} tokens, not {length}.")
            step.mask, step.mask_kind = mask.data_ptr(), 1 if mask.dtype == torch.bool else _ADDED
            step.mask_stride = mask.stride(0) if mask.shape[0] > 1 else 0
        out = torch.empty_like(x)
        step.out = out.data_ptr()
        self._block.finish(step)
        return out


class Block:
    """A block made ready; it keeps the memory that it knows alive.

    Args:
        products: for each of `PROJECTIONS`, made ready for one token of the dtype.
        parameters: by name, of the layer of each product, then of each norm.
        norms: "before" attention and "after" it, contiguous and of the dtype; "q" and "k" of each
            head, or neither.
        sizes: that `Sizes.are_taken`.
        scaling: of a query's products with the keys.
        dtype: of all activations.
    """

    def __init__(
        self,
        products: Mapping[str, Ready],
        parameters: Sequence[dict[str, Tensor | None]],
        norms: Mapping[str, Norm],
        sizes: Sizes,
        scaling: float,
        dtype: torch.dtype,
    ) -> None:
        self.sizes, self.dtype = sizes, dtype
        self._products = [products[name] for name in PROJECTIONS]
        self.held = Held(parameters)
        """What it knows the addresses of."""
        self._before = library.function("flute_block_before")
        self._after = library.function("flute_block_after")
        self.max_tokens = min(library.MAX_M, library.direct_m())
        """Most sequences of a step."""
        self._block = block = _Block(scaling=scaling, type=TYPES[dtype], **sizes._asdict())
        for i, product in enumerate(self._products):
            block.weights[i] = product.weight
            block.biases[i] = product.c_bias()
        for name, norm in norms.items():
            setattr(block, name, CNorm(norm.weight.data_ptr(), norm.eps))
        self._at = ctypes.byref(block)
        entry = self._products[0].call
        self.numbers = (entry.variant, entry.exact, entry.run)
        """What every function of the library takes last: which variant, whether exact, a loop."""

    @property
    def address(self) -> int:
        """Where the structure is, as long as this lives."""
        return ctypes.addressof(self._block)

    def begin(self, step: CStep) -> None:
        """Compute queries, keys and values."""
        library.check(self._before(self._at, ctypes.byref(step), *self.numbers))

    def finish(self, step: CStep) -> None:
        """Compute the result."""
        library.check(self._after(self._at, ctypes.byref(step), *self.numbers))
