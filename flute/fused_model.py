"""Models that take a token on a CPU through all blocks in one call of the library.

    ids -> embedding, rotation's angles | all blocks, the last norm | the cache's views -> hidden
           the model's own                one call                     longer by a token

`fuse_model` gives models of `flute.fused.ARCHITECTURES`, all of whose blocks are fused, another
class, as `flute.fused` does for blocks. Its forward takes one new token of each of a few sequences
with a `DynamicCache` of full attention so, where nothing asks for more; all else goes to the
model's own forward, and there to its blocks. Keys and values then lie in memory with room for more
tokens (`flute.cpu.stack`), and the cache holds views of it; when its owner has put other tensors
there, they are copied. The first token is taken both ways when the model is fused.
"""

from __future__ import annotations

import copy
import operator
import warnings
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from flute.cpu import library
from flute.cpu.block import Norm
from flute.cpu.held import Held
from flute.cpu.stack import Past, Stack
from flute.front import Front, put, take_away
from flute.fused import ARCHITECTURES, FusedBlock, Parts, fits
from flute.plain_call import is_plain_call

_KINDS = {
    f"transformers.models.{name}.modeling_{name}.{name.capitalize()}Model" for name in ARCHITECTURES
}
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Of the last norm's result, as a relative norm: only that norm differs."""


class _Whole(NamedTuple):
    """A model made ready: what it is made of, and the call."""

    parts: Parts  # of the model, its list of blocks and all blocks, side by side
    held: Held
    stack: Stack
    dtype: torch.dtype

    def is_ready(self, x: Tensor, environment: library.Environment) -> bool:
        """Tell whether all is as it was."""
        return (
            x.dtype == self.dtype
            and self.parts.are_untouched()
            and self.held.are(self.parts.parameters, environment)
        )


class _Growing(NamedTuple):
    """The memory of a cache's keys and values, and how they are found there."""

    past: Past
    layers: tuple[Any, ...]  # the cache's
    views: tuple[Tensor, ...]  # keys and values of each in turn


class FusedModel(Front):
    """What is put in front of a model's own class."""

    OWN = ("_whole", "_growing")
    MADE = "_whole"
    config: Any  # this and what follows are its own class's
    embed_tokens: Any
    layers: Any
    norm: Any
    rotary_emb: Any
    _whole: _Whole | None
    _growing: WeakKeyDictionary[Any, _Growing]  # by cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, as its own class does."""
        ids = kwargs.get("input_ids")
        if type(ids) is Tensor and not args and ids.ndim == 2 and ids.shape[1] == 1:
            out = None if is_compiling() else self._decode(**kwargs)
            if out is not None:
                return out
        return super().forward(*args, **kwargs)

    def _decode(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **rest: object,
    ) -> Any:
        """Return the model's output, or None if its own forward is to be asked."""
        if (
            torch.is_grad_enabled()
            or return_dict is False
            or not _is_plain(self.config, len(self.layers))
            or not (self.config.use_cache if use_cache is None else use_cache)
            or any(value is not None and value is not False for value in rest.values())
            or not _is_full_attention(past_key_values, len(self.layers))
        ):
            return None
        x = self.embed_tokens(input_ids)
        if not x.is_cpu or not is_plain_call(x):
            return None
        whole = self._make_ready(x)
        growing = self._grow(past_key_values, x, whole) if whole is not None else None
        if whole is None or growing is None:
            return None
        past = growing.past
        mask = None
        if attention_mask is not None:
            if type(attention_mask) is not Tensor or attention_mask.shape != (
                len(x),
                past.length + 1,
            ):
                return None
            if not attention_mask.all():
                mask = attention_mask.to(torch.bool).contiguous()
        if position_ids is None:
            position_ids = torch.full((1, 1), past.length)
        angles = self.rotary_emb(x, position_ids=position_ids)
        if not fits(whole.stack.blocks[0], x, angles, None):
            return None
        out = whole.stack(x, angles, past, mask)
        views = past.views()
        for layer, keys, values in zip(growing.layers, views[::2], views[1::2], strict=True):
            layer.keys, layer.values = keys, values
        self._growing[past_key_values] = growing._replace(views=views)
        return _output_class()(last_hidden_state=out, past_key_values=past_key_values)

    def _make_ready(self, x: Tensor) -> _Whole | None:
        """Return the model made ready, or None if the library does not take it as it is."""
        blocks: list[Any] = list(self.layers._modules.values())
        if self.training or any(map(_IS_TRAINING, blocks)) or any(map(_COMPILED, blocks)):
            return None
        environment = library.environment()
        if self._whole is None or not self._whole.is_ready(x, environment):
            self._whole = _make_whole(self, blocks, x, environment)
        return self._whole

    def _grow(self, cache: Any, x: Tensor, whole: _Whole) -> _Growing | None:
        """Return the memory of a cache's keys and values, with room; None if they do not fit."""
        growing = self._growing.get(cache)
        now = tuple(chain.from_iterable(map(_KEYS_AND_VALUES, cache.layers)))
        if (
            growing is None
            or not all(map(operator.is_, cache.layers, growing.layers))
            or not all(map(operator.is_, now, growing.views))
            or growing.past.is_full()
        ):
            sizes = whole.stack.blocks[0].sizes
            shape = (len(x), sizes.groups, -1, sizes.dim)
            if not all(type(t) is Tensor and _has(t, shape, x.dtype) for t in now):
                return None
            if len({t.shape for t in now}) > 1:
                return None
            growing = _Growing(Past(now[::2], now[1::2]), tuple(cache.layers), now)
        return growing


_IS_TRAINING = operator.attrgetter("training")
_COMPILED = operator.attrgetter("_compiled_call_impl")
_KEYS_AND_VALUES = operator.attrgetter("keys", "values")


def _is_plain(config: Any, count: int) -> bool:
    """Tell whether a config asks for the last of so many blocks' results, by full attention."""
    kinds = getattr(config, "layer_types", None) or ()
    return (
        config.num_hidden_layers >= count
        and not getattr(config, "output_hidden_states", False)
        and not getattr(config, "output_attentions", False)
        and getattr(config, "return_dict", True) is not False
        and getattr(config, "sliding_window", None) is None
        and all(kind == "full_attention" for kind in kinds)
    )


@cache
def _cache_classes() -> tuple[Any, Any]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return DynamicCache, DynamicLayer


@cache
def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return BaseModelOutputWithPast


def _is_full_attention(past: Any, count: int) -> bool:
    """Tell whether a cache holds all keys and values of so many blocks, where they are computed."""
    whole, layer = _cache_classes()
    return (
        type(past) is whole
        and not past.offloading
        and len(past.layers) == count
        and all(type(one) is layer for one in past.layers)
    )


def _has(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return (
        tensor.is_cpu
        and tensor.dtype == dtype
        and tensor.ndim == len(shape)
        and tensor.shape[2] > 0
        and all(n in (-1, m) for n, m in zip(shape, tensor.shape, strict=True))
    )


def _make_whole(
    model: Any, blocks: list[Any], x: Tensor, environment: library.Environment
) -> _Whole | None:
    config, norm = model.config, model.norm
    weight = norm._parameters.get("weight")
    if (
        not all(isinstance(block, FusedBlock) for block in blocks)
        or type(norm) is not type(blocks[0].parts.norms["before"])
        or not isinstance(weight, Tensor)
        or weight.dtype != x.dtype
        or not weight.is_cpu
        or not weight.is_contiguous()
        or tuple(weight.shape) != x.shape[2:]
        or not all(block.parts.attention.config is config for block in blocks)
        or [block.parts.attention.layer_idx for block in blocks] != list(range(len(blocks)))
        or not all(block.is_ready(x, environment) for block in blocks)
    ):
        return None
    ready = [block._block for block in blocks]
    if len({(block.sizes.hidden, block.sizes.groups, block.sizes.dim) for block in ready}) > 1:
        return None
    each = [block.parts for block in blocks]
    watched = (*blocks, norm)
    parents = (model._modules, model.layers._modules)
    parts = each[0]._replace(
        parents=(*parents, *chain.from_iterable(p.parents for p in each)),
        children=(
            *chain.from_iterable(modules.values() for modules in parents),
            *chain.from_iterable(p.children for p in each),
        ),
        attributes=(
            *(module.__dict__ for module in watched),
            *chain.from_iterable(p.attributes for p in each),
        ),
        hooks=(
            *chain.from_iterable((m._forward_hooks, m._forward_pre_hooks) for m in watched),
            *chain.from_iterable(p.hooks for p in each),
        ),
        parameters=(
            *chain.from_iterable(p.parameters for p in each),
            norm._parameters,
        ),
    )
    if not parts.are_untouched():
        return None
    stack = Stack(ready, Norm(weight, float(norm.variance_epsilon)))
    return _Whole(parts, Held(parts.parameters), stack, x.dtype)


def _agrees(model: FusedModel) -> bool | None:
    """Tell whether the model's own forward gives the same for a second token.

    None: the library does not take the model.
    """
    whole, _ = _cache_classes()
    past = whole(config=model.config)
    first, second = torch.tensor([[[0]], [[1]]]) % len(model.embed_tokens.weight)
    with torch.inference_mode():
        super(FusedModel, model).forward(input_ids=first, past_key_values=past, use_cache=True)
        other = copy.deepcopy(past)
        ours = model._decode(input_ids=second, past_key_values=past, use_cache=True)
        if ours is None:
            return None
        own = super(FusedModel, model).forward(
            input_ids=second, past_key_values=other, use_cache=True
        )
    expected = own.last_hidden_state.float()
    error = (ours.last_hidden_state.float() - expected).norm() / expected.norm()
    return bool(error <= _TOLERANCE[expected.dtype if model._whole is None else model._whole.dtype])


def fuse_model(model: nn.Module) -> int:
    """Let models whose blocks are all fused take single tokens by one call of the library.

    Args:
        model: it, or a part of it that is of `ARCHITECTURES`, changes its class.

    Returns:
        How many are fused.
    """
    count = 0
    for module in model.modules():
        own: Any = type(module)
        if isinstance(module, FusedModel):
            count += 1
            continue
        if f"{own.__module__}.{own.__name__}" not in _KINDS:
            continue
        layers, weight = cast(Any, module.layers), cast(Any, module.embed_tokens).weight
        are_fused = all(isinstance(block, FusedBlock) for block in layers)
        if module.training or not are_fused or not weight.is_cpu:
            continue
        put(FusedModel, module, _whole=None, _growing=WeakKeyDictionary())
        assert isinstance(module, FusedModel), "it was made one"
        agrees = _agrees(module)
        if agrees is False:
            warnings.warn(
                f"{own.__name__} of this version of transformers does not compute what flute's "
                "fused model does: each token takes its own forward, which is slower.",
                stacklevel=4,
            )
        if agrees:
            count += 1
        else:
            take_away(module)
    return count
