"""Layers of a module that are given the same x, as q, k and v: multiplied together on a CPU.

`share` gives such a module two hooks. While its forward runs, a scope watches the products of its
quantised children. In the first forward it only looks on: layers that were given the same x are
siblings. From then on the first of them multiplies for all, in one call of the library, and the
others take their part, the bits of which are those of a call of their own.

    enter -> q(x): one call for q, k, v -> k(x): taken -> v(x): taken -> o(y): its own -> leave

A part is taken only within the same forward, by the same thread, within a second, by a layer whose
parameters are the same and lie where they lay, and for an x of the same bytes: not the same object,
which might have been changed. If a part is not taken, the module's layers are siblings no more.
Modules, parameters and state dicts stay as they are. Nothing is shared while `torch.compile` looks,
nor with one thread: what it saves is waking the others. `flute.prepare(model, together=True)` asks
for it: a token of a 1.1 B Llama took 45.9 ms so and 43.6 without, by two threads of a quiet Zen 4
(medians of 40 in turns, 2026-11-22); the calls of gate and up alone 1.4 times as long apart.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as nn_module

from flute.cpu.library import equal_bytes
from flute.cpu.ready import Ready, Scope, Together, open_scope
from flute.cpu.structures import is_by_rows
from flute.linear import LutLinear

MAX_BYTES = 1 << 16
"""Of an x that is shared: with more, comparing takes longer than multiplying together saves."""
MAX_SIBLINGS = 16
"""Of one call of the library."""
EXPIRES_S = 1.0
"""Why: an interrupt (no `Exception`) leaves a forward without its hook, so a scope open."""


class Plan(NamedTuple):
    """With whom a product is multiplied: nobody, if there are no followers. Kept at the product."""

    siblings: Siblings
    followers: tuple[LutLinear, ...]
    together: Together | None


class Part(NamedTuple):
    """The product of a layer that has not been called yet."""

    out: Tensor
    x: Tensor  # a copy
    until: float

    def is_of(self, x: Tensor) -> bool:
        """Tell whether x, of the shape and dtype of the copy, gives this product."""
        return (
            x.is_contiguous()
            and equal_bytes(x, self.x)
            and time.monotonic() < self.until
            and self.out.is_inference() == torch.is_inference_mode_enabled()
        )


class Siblings:
    """The hooks of a module, and what they have seen.

    Args:
        names: of the children that may be siblings.
        kinds: of each, a number: only those of one kind can be multiplied together.
    """

    def __init__(self, names: Sequence[str], kinds: Sequence[int]) -> None:
        self._names, self._kinds = tuple(names), tuple(kinds)
        self._groups: tuple[tuple[str, ...], ...] | None = None

    def enter(self, module: nn.Module, _args: object) -> None:
        """Open a scope, before the module's forward."""
        if not is_compiling() and self._groups != () and torch.get_num_threads() > 1:
            scope = _Forward(self, module)
            scope.before = open_scope(scope)

    def leave(self, module: nn.Module, _args: object, _out: object) -> None:
        """Close it, after the forward or when that failed."""
        if is_compiling() or self._groups == ():
            return
        scope = open_scope(None)
        if not isinstance(scope, _Forward) or scope.module is not module:
            open_scope(scope)
            return
        open_scope(scope.before)
        if scope.seen:
            self._groups = self._group(scope.seen)
        elif scope.parts or scope.wasted:
            self._groups = ()

    def _group(self, seen: list[tuple[str, bytes]]) -> tuple[tuple[str, ...], ...]:
        """Which layers were given the same x, in turn."""
        groups: dict[tuple[int, bytes], dict[str, None]] = {}
        for name, x in seen:
            kind = self._kinds[self._names.index(name)]
            groups.setdefault((kind, x), {})[name] = None
        return tuple(tuple(group)[:MAX_SIBLINGS] for group in groups.values() if len(group) > 1)

    def plan(self, scope: _Forward, ready: Ready, x: Tensor, parameters: object) -> Plan | None:
        """Return with whom a layer is multiplied, None if it is not known yet.

        Args:
            scope: of the module's forward that runs.
            ready: the layer's product.
            x: what it is given.
            parameters: of the layer.
        """
        children = scope.module._modules
        layers = {name: children.get(name) for name in self._names}
        found = [name for name, layer in layers.items() if _parameters(layer) is parameters]
        if not found:  # of another module
            return None
        if self._groups is None:
            if _can_share(x):
                scope.seen.append((found[0], ctypes.string_at(x.data_ptr(), x.nbytes)))
            return None
        group = next((group for group in self._groups if group[0] == found[0]), ())
        followers = [layers[name] for name in group[1:]]
        readies = [_ready_of(layer, x) for layer in followers]
        if not followers or not _can_share(x):
            ready.plan = Plan(self, (), None)
            return None
        together = [other for other in readies if other and other.environment == ready.environment]
        if len(together) < len(followers):
            return None
        lut = tuple(layer for layer in followers if isinstance(layer, LutLinear))
        ready.plan = plan = Plan(self, lut, Together([ready, *together]))
        return plan


class _Forward:
    """The scope of one forward."""

    __slots__ = ("before", "module", "parts", "seen", "siblings", "wasted")

    def __init__(self, siblings: Siblings, module: nn.Module) -> None:
        self.siblings, self.module = siblings, module
        self.before: Scope | None = None
        self.parts: dict[Ready, Part] = {}
        self.seen: list[tuple[str, bytes]] = []
        self.wasted = False

    def take(self, ready: Ready, x: Tensor, parameters: dict[str, Any]) -> Tensor | None:
        """Return the product of a layer, or None if it is to be multiplied by itself."""
        part = self.parts.pop(ready, None)
        if part is not None:
            if part.is_of(x):
                return part.out
            self.wasted = True
            return None
        plan = ready.plan
        if not isinstance(plan, Plan) or plan.siblings is not self.siblings:
            plan = self.siblings.plan(self, ready, x, parameters)
        if plan is None or plan.together is None or not x.is_contiguous():
            return None
        followers, readies = plan.followers, plan.together.readies
        for layer, other in zip(followers, readies[1:], strict=True):
            if _is_watched(layer) or not other.is_of(layer._parameters):
                ready.plan = None
                return None
        out, *outs = plan.together(x)
        copy, until = x.clone(), time.monotonic() + EXPIRES_S
        for other, part_out in zip(readies[1:], outs, strict=True):
            self.parts[other] = Part(part_out, copy, until)
        return out


def _can_share(x: Tensor) -> bool:
    return x.is_contiguous() and x.nbytes <= MAX_BYTES


def _parameters(layer: nn.Module | None) -> object:
    return None if layer is None else layer._parameters


def _is_watched(layer: LutLinear) -> bool:
    """Tell whether a call of the layer may do more, before it multiplies, than multiply."""
    hooks = layer._forward_pre_hooks or nn_module._global_forward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__


def _ready_of(layer: nn.Module | None, x: Tensor) -> Ready | None:
    """What multiplies x if the layer is called with it; None if something else would happen."""
    if not isinstance(layer, LutLinear) or _is_watched(layer):
        return None
    ready = layer._ready.get((x.shape, x.dtype, x.device))
    return ready if isinstance(ready, Ready) and ready.is_of(layer._parameters) else None


def share(model: nn.Module, but: Collection[nn.Module] = ()) -> int:
    """Let layers on a CPU that are given the same x be multiplied together.

    Args:
        model: modules of it with several layers in CPU order of the same K and spec get two hooks.
        but: modules that get none.

    Returns:
        How many modules have them.
    """
    count = 0
    for module in model.modules():
        if module in but:
            continue
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
