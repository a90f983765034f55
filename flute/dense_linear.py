"""Dense linear layers that multiply few tokens by the CPU's library: the output head, above all.

    x (..., K), few tokens, nothing that watches -> kernels/cpu/dense.c, at the memory's speed
    all else                                     -> torch.nn.Linear

`adopt` gives a model's large linear layers the class `DenseLinear`, which differs from theirs in
how it is called. Parameters, state dicts and forwards stay as they are; a copy or a pickle is a
`torch.nn.Linear` again. Nothing is kept between calls, so weights may be changed at any time.
A weight that nothing else shares memory with is moved into large pages, which are read faster.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module

from flute.cpu import dense, library
from flute.cpu.pages import large_pages
from flute.cpu.structures import TYPES
from flute.plain_call import is_plain_call

MIN_WEIGHTS = 1 << 20
"""Of a layer: torch multiplies smaller ones as fast, out of the caches."""


class DenseLinear(nn.Linear):
    """A `torch.nn.Linear` that asks the library for the product of few tokens."""

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply by the library, or, where it does not serve, call as every module is called."""
        if (
            not is_dynamo_compiling()
            and type(x) is Tensor
            and _takes(x, self._parameters["weight"], self._parameters["bias"])
            and not (
                self._forward_hooks
                or self._forward_pre_hooks
                or self._backward_hooks
                or module._global_forward_hooks
                or module._global_forward_pre_hooks
                or self._compiled_call_impl is not None
                or "forward" in self.__dict__  # replaced, as accelerate does
            )
        ):
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            assert weight is not None, "it is taken"
            rows = dense.multiply(x.reshape(-1, x.shape[-1]), weight, bias)
            return rows.view(*x.shape[:-1], -1)
        out: Tensor = super().__call__(x)
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle it as what it was."""
        return _blank, (), self.__dict__.copy()


def _blank() -> nn.Linear:
    return nn.Linear.__new__(nn.Linear)


def _takes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Tell whether the library multiplies these, faster than torch, and nothing watches."""
    if weight is None or not weight.is_cpu or not x.is_cpu or x.dtype != weight.dtype:
        return False
    if x.ndim == 0 or x.shape[-1] != weight.shape[1] or not x.shape[-1]:
        return False
    if not 0 < x.numel() // x.shape[-1] <= _most_tokens(x.dtype, library.environment()):
        return False
    if torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad):
        return False
    if not weight.is_contiguous() or type(weight) not in (Tensor, nn.Parameter):
        return False
    if bias is not None and (
        not bias.is_cpu or not bias.is_contiguous() or bias.dtype != weight.dtype
    ):
        return False
    return is_plain_call(x, bias)


@cache
def _most_tokens(dtype: torch.dtype, environment: library.Environment) -> int:
    """`flute.cpu.dense.most_tokens`, which the environment decides."""
    return dense.most_tokens(dtype)


def adopt(model: nn.Module) -> int:
    """Let a model's large dense linear layers multiply few tokens by the CPU's library.

    Args:
        model: its layers that are `torch.nn.Linear`, no subclass, of `MIN_WEIGHTS` or more fp16,
            bf16 or fp32 weights on a CPU change their class. None does where there is no library.

    Returns:
        How many multiply so.
    """
    count = 0
    tensors = chain(model.parameters(), model.buffers())  # a tied one is the same object: once
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    for layer in model.modules():
        if type(layer) is nn.Linear and not library.why_not():
            weight = layer._parameters["weight"]
            if (
                weight is not None
                and weight.is_cpu
                and weight.dtype in TYPES
                and weight.numel() >= MIN_WEIGHTS
            ):
                layer.__class__ = DenseLinear
                if places[weight.untyped_storage().data_ptr()] == 1:
                    _move(weight)
        count += type(layer) is DenseLinear
    return count


def _move(weight: Tensor) -> None:
    """Move a weight into large pages, if it is all of its memory and no other process's too."""
    data = weight.data
    if (
        type(data) is Tensor
        and data.is_contiguous()
        and data.nbytes == data.untyped_storage().nbytes()
        and not data.is_shared()
    ):
        pages = large_pages(data.nbytes).view(data.dtype).view(data.shape)
        weight.data = pages.copy_(data)
