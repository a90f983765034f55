"""`Constant`: a parameter that never requires a gradient and tells when it gets other memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Constant(nn.Parameter):
    """A parameter of a quantised weight.

    ``model.requires_grad_(True)`` leaves it alone: codes are integers, and scales and tables have
    no gradient. Whoever has noted where its memory lies need not ask again, 0.1 us each, as long as
    ``moves`` stays the same; nothing else in Python tells that ``data`` was assigned.
    """

    moves: ClassVar[int] = 0
    """How often any constant got other memory."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Constant:
        """Make a constant that shares memory with ``data``."""
        return super().__new__(cls, data.detach() if type(data) is Constant else data, False)

    @staticmethod
    def of(parameter: nn.Parameter) -> None:
        """Make a constant of a parameter, in place: who else holds it must see the same object."""
        if type(parameter) is nn.Parameter:
            parameter.requires_grad_(False)
            parameter.__class__ = Constant

    def requires_grad_(self, requires_grad: bool = True) -> Constant:
        """Change nothing."""
        return self

    @property
    def requires_grad(self) -> bool:
        """False; setting it changes nothing."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        """Change nothing."""

    @property
    def data(self) -> Tensor:
        """The tensor without its history, as of every tensor."""
        tensor: Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return tensor

    @data.setter
    def data(self, value: Tensor) -> None:
        """Take another tensor's memory."""
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        Constant.moves += 1

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take another tensor's memory, as every tensor may."""
        out = super().set_(*args, **kwargs)
        Constant.moves += 1
        return out
