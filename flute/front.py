"""Put a class in front of a module's own: its forward may then be asked first, and changed back.

    Fused(Front), own  ->  a class named as its own, whose bases are these two, in this order

Hooks, names, `isinstance` and state dicts stay as they are; copies and pickles are of its own
class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


class Front(nn.Module):
    """Base of what is put in front; it says which attributes a module then has besides its own."""

    OWN: ClassVar[tuple[str, ...]]
    MADE: ClassVar[str]
    """One of them: what was made of the parameters' memory, or None."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move everything, and let go of the memory where it was."""
        setattr(self, self.MADE, None)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle it as a module of its own class."""
        state = {k: v for k, v in self.__dict__.items() if k not in self.OWN}
        return _blank, (type(self).__bases__[1],), state


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Return a module of a class, with nothing in it: what copies and pickles begin with."""
    return kind.__new__(kind)


def put(front: type[Front], module: nn.Module, **attributes: Any) -> None:
    """Put a class in front of a module's own.

    Args:
        front: the class.
        module: changes its class.
        attributes: those of ``front.OWN``.
    """
    own: Any = type(module)
    module.__class__ = type(own.__name__, (front, own), {"__module__": own.__module__})
    module.__dict__.update(attributes)


def take_away(module: Front) -> None:
    """Give a module its own class back."""
    for name in module.OWN:
        del module.__dict__[name]
    module.__class__ = type(module).__bases__[1]
