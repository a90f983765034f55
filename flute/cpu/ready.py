"""Products made ready: what a layer's call hands to the library but for x and the result.

Looking at a weight's shapes, dtypes and addresses takes longer than a small product, so a layer
keeps what was found (`LutLinear`), for each shape and dtype of x. While a scope is open
(`open_scope`), layers that are given the same x may be multiplied together; which, it decides.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flute.constant import Constant
from flute.cpu import library
from flute.cpu.structures import TYPES, Result, Tokens, Weight, c_weight
from flute.format import TENSOR_NAMES, PackedWeight


class Scope(Protocol):
    """Decides, while it is open, which layers are multiplied together."""

    def take(self, ready: Ready, x: Tensor, parameters: dict[str, Any]) -> Tensor | None:
        """Return the product of a layer, or None if it is to be multiplied by itself."""


class _Open(threading.local):
    scope: Scope | None = None


_open = _Open()


def open_scope(scope: Scope | None) -> Scope | None:
    """Open a scope for the products of this thread and return the one that was open before.

    Args:
        scope: the new one; None closes.
    """
    before, _open.scope = _open.scope, scope
    return before


class Ready:
    """A layer's product made ready for one shape and dtype of x.

    It keeps the weight's memory alive, so that an address which it knows cannot have become
    another tensor's.

    Args:
        weight: in CPU order.
        parameters: of the layer, by name: codes, scales and table are constants.
        shape: of the result.
        dtype: of x and the result.
    """

    __slots__ = (
        "_bias",
        "_bias_at",
        "_codes",
        "_kept",
        "_moves",
        "_scales",
        "_table",
        "bias_type",
        "call",
        "dtype",
        "environment",
        "num_tokens",
        "plan",
        "shape",
        "weight",
    )

    def __init__(
        self,
        weight: PackedWeight,
        parameters: dict[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self._moves = Constant.moves
        self.environment = library.environment()
        self.call = library.entry()
        self._codes, self._scales, self._table = (parameters[name] for name in TENSOR_NAMES)
        self._bias = parameters["bias"]
        self._bias_at = None if self._bias is None else self._bias.data_ptr()
        self.bias_type = 0 if self._bias is None else TYPES[self._bias.dtype]
        self.weight, self._kept = c_weight(weight, weight.scales.contiguous())
        self.shape, self.dtype = shape, dtype
        self.plan: object = None  # of the scope: with whom it is multiplied
        self.num_tokens = torch.Size(shape[:-1]).numel()

    def holds(self, parameters: dict[str, Any]) -> bool:
        """Tell whether the layer's parameters and the environment are what it was made for."""
        return self.is_of(parameters) and library.environment() == self.environment

    def is_of(self, parameters: dict[str, Any]) -> bool:
        """Tell whether the layer's parameters are what it was made for."""
        bias = parameters["bias"]
        return (
            Constant.moves == self._moves
            and parameters["codes"] is self._codes
            and parameters["scales"] is self._scales
            and parameters["table"] is self._table
            and bias is self._bias
            and (
                bias is None
                or (
                    bias.data_ptr() == self._bias_at
                    and TYPES.get(bias.dtype) == self.bias_type
                    and not (bias.requires_grad and torch.is_grad_enabled())
                )
            )
        )

    def result(self) -> tuple[Result, Tensor]:
        """Return memory for the product: the C structure, and the tensor."""
        out = torch.empty(self.shape, dtype=self.dtype)
        return Result(self._bias_at, out.data_ptr(), self.bias_type), out

    def c_bias(self) -> Result:
        """Return the bias, without memory for the product."""
        return Result(self._bias_at, None, self.bias_type)

    def __call__(self, x: Tensor, parameters: dict[str, Any]) -> Tensor | None:
        """Multiply, or return None where it does not hold any more.

        Args:
            x: of the shape and dtype it was made for.
            parameters: of the layer, by name.
        """
        if not self.holds(parameters):
            return None
        if _open.scope is not None:
            out = _open.scope.take(self, x, parameters)
            if out is not None:
                return out
        result, out = self.result()
        _multiply(ctypes.byref(self.weight), ctypes.byref(result), 1, self, x)
        return out


class Together:
    """Several products made ready, for one x, in one call of the library.

    Results are those of one call each, bit for bit.

    Args:
        readies: for the same shape of x, dtype and environment; of the same K and spec, all by rows
            or none; at most 16.
    """

    def __init__(self, readies: Sequence[Ready]) -> None:
        self.readies = tuple(readies)
        self._weights = (Weight * len(readies))(*(ready.weight for ready in readies))
        self._results = (Result * len(readies))(*(ready.result()[0] for ready in readies))

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Multiply x, of the shape and dtype they were made for, by each weight."""
        results = type(self._results).from_buffer_copy(self._results)
        outs = []
        for ready, result in zip(self.readies, results, strict=True):
            out = torch.empty(ready.shape, dtype=ready.dtype)
            result.out = out.data_ptr()
            outs.append(out)
        _multiply(ctypes.byref(self._weights), results, len(outs), self.readies[0], x)
        return outs


def _multiply(weights: Any, results: Any, count: int, ready: Ready, x: Tensor) -> None:
    if not x.is_contiguous():
        x = x.contiguous()
    K = ready.weight.K
    tokens = Tokens(x.data_ptr(), ready.num_tokens, K, TYPES[ready.dtype])
    ready.call(weights, results, count, ctypes.byref(tokens))


def make_ready(x: Tensor, weight: PackedWeight, parameters: dict[str, Any]) -> Ready | None:
    """Return a product made ready, or None if `products.multiply` has to look at each call.

    Args:
        x: shape (..., K).
        weight: in CPU order.
        parameters: of the layer whose weight it is, by name.
    """
    bias: Tensor | None = parameters["bias"]
    num_tokens = x.shape[:-1].numel()
    if x.dtype not in TYPES or not x.is_cpu or not weight.packed.is_cpu or not weight.N:
        return None
    if not 0 < num_tokens <= min(library.MAX_M, library.direct_m()):
        return None
    if bias is not None and (
        bias.dtype not in TYPES or not bias.is_contiguous() or not bias.is_cpu
    ):
        return None
    return Ready(weight, parameters, (*x.shape[:-1], weight.N), x.dtype)
