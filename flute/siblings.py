"""Layers of a module that are given the same x, as q, k and v: multiplied together on a CPU.

`share` gives such a module two hooks. While its forward runs, a scope watches the products of its
quantised children. In the first forward it only looks on: layers that were given the same x are
siblings. From then on the first sibling multiplies for all, in one call of the
library, and the others take their part, the bits of which are those of a call of their own.

    enter -> q(x): one call for q, k, v -> k(x): taken -> v(x): taken -> o(y): its own -> leave

A part is taken only within the same forward, by the same thread, within a second, by a layer whose
parameters are the same and lie where they lay, and for an x of the same bytes: not the same object,
which might have been changed. If a part is not taken, the module's layers are siblings no more.
Modules, parameters and state dicts stay as they are. Nothing is shared while `torch.compile` looks.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as nn_module

from flute.cpu.ready import Ready, Scope, multiply_together, open_scope
from flute.cpu.structures import is_by_rows
from flute.linear import LutLinear

MAX_BYTES = 1 << 16
"""Of an x that is shared: with more, comparing takes longer than multiplying together saves."""
MAX_SIBLINGS = 16
"""Of one call of the library."""
EXPIRES_S = 1.0
"""Why: an interrupt (no `Exception`) leaves a forward without its hook, so a scope open."""


class Part(NamedTuple):
    """The product of a layer that has not been called yet."""

    ready: Ready
    out: Tensor
    x: bytes
    until: float


class Siblings:
    """The hooks of a module, and what they have seen.

    Args:
        names: of the children that may be siblings.
        kinds: of each, a number: only those of one kind can be multiplied together.
    """

    def __init__(self, names: Sequence[str], kinds: Sequence[int]) -> None:
        self._names, self._kinds = tuple(names), tuple(kinds)
        self._groups: tuple[tuple[int, ...], ...] | None = None

    def enter(self, module: nn.Module, _args: object) -> None:
        """Open a scope, before the module's forward."""
        if is_compiling() or self._groups == ():
            return
        layers = [module._modules.get(name) for name in self._names]
        if all(isinstance(layer, LutLinear) and layer.cpu_order for layer in layers):
            scope = _Pass([layer for layer in layers if isinstance(layer, LutLinear)], self._groups)
            scope.before = open_scope(scope)
            scope.module = module

    def leave(self, module: nn.Module, _args: object, _out: object) -> None:
        """Close it, after the forward or when that failed."""
        if is_compiling():
            return
        scope = open_scope(None)
        if not isinstance(scope, _Pass) or scope.module is not module:
            open_scope(scope)
            return
        open_scope(scope.before)
        if self._groups is None:
            self._groups = scope.siblings(self._kinds)
        elif scope.parts:
            self._groups = ()


class _Pass:
    """The scope of one forward."""

    def __init__(self, layers: list[LutLinear], groups: tuple[tuple[int, ...], ...] | None) -> None:
        self.before: Scope | None = None
        self.module: nn.Module | None = None
        self.parts: dict[int, Part] = {}
        self._layers, self._groups = layers, groups
        self._seen: list[tuple[int, bytes]] = []

    def siblings(self, kinds: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
        """Return which layers were given the same x, in turn; None if none was called."""
        groups: dict[tuple[int, bytes], dict[int, None]] = {}
        for i, x in self._seen:
            groups.setdefault((kinds[i], x), {})[i] = None
        found = tuple(tuple(group)[:MAX_SIBLINGS] for group in groups.values() if len(group) > 1)
        return found if self._seen else None

    def take(self, ready: Ready, x: Tensor, parameters: dict[str, Any]) -> Tensor | None:
        """Return the product of a layer, or None if it is to be multiplied by itself."""
        layers, size = self._layers, x.numel() * x.itemsize
        i = next((i for i, layer in enumerate(layers) if layer._parameters is parameters), None)
        if i is None or size > MAX_BYTES or not x.is_contiguous():
            return None
        content = ctypes.string_at(x.data_ptr(), size) + bytes([torch.is_inference_mode_enabled()])
        if self._groups is None:
            self._seen.append((i, content))
            return None
        part = self.parts.get(i)
        if part is not None:
            usable = part.ready is ready and part.x == content and time.monotonic() < part.until
            return self.parts.pop(i).out if usable else None
        group = next((group for group in self._groups if group[0] == i), ())
        return self._multiply(group, ready, x, content) if group else None

    def _multiply(
        self, group: tuple[int, ...], ready: Ready, x: Tensor, content: bytes
    ) -> Tensor | None:
        """Multiply for all of a group; None if one of them wants a call of its own."""
        readies = [ready]
        for layer in (self._layers[i] for i in group[1:]):
            other = _ready_of(layer, x)
            if other is None:
                return None
            readies.append(other)
        first, *outs = multiply_together(readies, x)
        until = time.monotonic() + EXPIRES_S
        for i, other, out in zip(group[1:], readies[1:], outs, strict=True):
            self.parts[i] = Part(other, out, content, until)
        return first


def _ready_of(layer: LutLinear, x: Tensor) -> Ready | None:
    """What multiplies x if the layer is called with it; None if something else would happen."""
    ready = layer._ready.get((x.shape, x.dtype, x.device))
    watched = layer._forward_pre_hooks or nn_module._global_forward_pre_hooks
    if watched or "forward" in layer.__dict__ or not isinstance(ready, Ready):
        return None
    return ready if ready.holds(layer._parameters) else None


def share(model: nn.Module) -> int:
    """Let layers on a CPU that are given the same x be multiplied together.

    Args:
        model: modules of it with several layers in CPU order of the same K and spec get two hooks.

    Returns:
        How many modules have them.
    """
    count = 0
    for module in model.modules():
        alike: dict[object, list[str]] = {}
        for name, child in module.named_children():
            if isinstance(child, LutLinear) and child.cpu_order:
                by_rows = is_by_rows(child.table.shape[0], child.table_ends)
                alike.setdefault((child.in_features, child.spec, by_rows), []).append(name)
        kinds = [names for names in alike.values() if len(names) > 1]
        if not kinds:
            continue
        count += 1
        hooks = module._forward_pre_hooks.values()
        if not any(isinstance(getattr(hook, "__self__", None), Siblings) for hook in hooks):
            numbered = [(name, number) for number, names in enumerate(kinds) for name in names]
            siblings = Siblings(*zip(*numbered, strict=True))
            module.register_forward_pre_hook(siblings.enter)
            module.register_forward_hook(siblings.leave, always_call=True)
    return count
