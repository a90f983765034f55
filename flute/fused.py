"""Decoder blocks that take a token on a CPU in two calls of the library, not some fifty of PyTorch.

    x -> norm, q k v, rotation | the cache's own update | attention, o, norm, gate up, down -> out
         first call                                       second call        (kernels/cpu/block.h)

`fuse` gives the blocks of known architectures another class: a subclass of their own, whose
forward takes one new token of each of a few sequences so, where nothing asks for anything else. All
the rest goes to the block's own forward: prompts, training, gradients, hooks and other layers in
the block, `torch.compile`, autocast, other attention than "sdpa" and "eager", other devices.
Modules, parameters and state dicts stay as they are; a copy or a pickle of a block is of its own
class again. Whether a block computes what the library does is not taken for granted: the first of
each kind is run both ways when it is fused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as nn_module

from flute.cpu.block import PROJECTIONS, Block, Norm, Sizes, Step
from flute.cpu.ready import Ready
from flute.cpu.structures import TYPES
from flute.linear import LutLinear
from flute.ops import is_plain_call

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of transformers whose blocks are what `kernels/cpu/block.h` says."""
_KINDS = {
    f"transformers.models.{name}.modeling_{name}.{name.capitalize()}DecoderLayer"
    for name in ARCHITECTURES
}
_ATTENTION = ("sdpa", "eager")
"""Implementations that compute the same, up to rounding."""
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Of what a block adds to x, run both ways, as a relative norm: roundings are not the same."""


class _Parts(NamedTuple):
    """What a block is made of, and what it is told by."""

    children: tuple[tuple[dict[str, Any], str, nn.Module], ...]  # where, name, which
    layers: tuple[LutLinear, ...]  # of each of PROJECTIONS
    norms: dict[str, nn.Module]

    def are_untouched(self) -> bool:
        """Tell whether nothing was replaced, hooked, or given another forward."""
        for modules, name, child in self.children:
            if (
                modules.get(name) is not child
                or child._forward_hooks
                or child._forward_pre_hooks
                or "forward" in child.__dict__
            ):
                return False
        return not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


class FusedBlock(nn.Module):
    """What is put in front of a block's own class."""

    _parts: _Parts
    _block: Block | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block, as its own class does."""
        if (
            type(hidden_states) is Tensor
            and not is_compiling()
            and not args
            and hidden_states.shape[1] == 1
        ):
            out = self._decode(hidden_states, **kwargs)
            if out is not None:
                return out
        return super().forward(hidden_states, *args, **kwargs)

    def _decode(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        position_ids: object = None,
        use_cache: object = None,
        **rest: object,
    ) -> Tensor | None:
        """Return the block's result, or None if its own forward is to be asked."""
        attention: Any = self.self_attn
        if (
            torch.is_grad_enabled()
            or (self.training and attention.attention_dropout)
            or position_embeddings is None
            or any(value is not None and value is not False for value in rest.values())
            or not is_plain_call(x)
            or attention.config._attn_implementation not in _ATTENTION
            or not self._parts.are_untouched()
        ):
            return None
        block = self._ready_block(x)
        if block is None or not _fit(block, x, position_embeddings, attention_mask):
            return None
        step = Step(block, x, position_embeddings)
        keys, values = step.keys, step.values
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        return step.finish(_as(keys, x), _as(values, x), attention_mask)

    def _ready_block(self, x: Tensor) -> Block | None:
        """Return the block made ready for this dtype, made anew if parameters have changed."""
        parts, block = self._parts, self._block
        norms = [norm._parameters["weight"] for norm in parts.norms.values()]
        parameters = [layer._parameters for layer in parts.layers]
        if block is None or block.dtype != x.dtype or not block.holds(parameters, norms):
            self._block = block = _make_block(self, parts, x.dtype) if x.is_cpu else None
        return block

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move everything, and let go of the memory where it was."""
        self._block = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle it as a block of its own class."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_parts", "_block")}
        return _blank, (type(self).__mro__[2],), state


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _fit(block: Block, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> bool:
    """Tell whether a step can be taken with these."""
    M = x.shape[0]
    if not 0 < M <= block.max_tokens or not x.is_contiguous() or x.ndim != 3:
        return False
    for angle in angles:
        if (
            angle.dtype != x.dtype
            or not angle.is_contiguous()
            or angle.shape[0] not in (1, M)
            or tuple(angle.shape[1:]) != (1, block.sizes.dim)
        ):
            return False
    return mask is None or (
        type(mask) is Tensor
        and mask.dtype in (torch.bool, x.dtype)
        and mask.ndim == 4
        and mask.shape[0] in (1, M)
        and mask.shape[1] == mask.shape[2] == 1
        and mask.stride(3) == 1
        and mask.is_cpu
    )


def _as(past: Tensor, x: Tensor) -> Tensor:
    """Return a cache's keys or values as the library reads them."""
    past = past.to(x)
    return past if past.stride(3) == 1 else past.contiguous()


def _find_parts(block: nn.Module) -> _Parts | None:
    """Return the parts of a block if all are what the library takes, else None."""
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return None
    children = [(block._modules, name, child) for name, child in block.named_children()]
    for parent in (attention, mlp):
        children += [(parent._modules, name, child) for name, child in parent.named_children()]
    named = {name: child for _, name, child in children}
    layers = [named.get(f"{name}_proj") for name in PROJECTIONS]
    norms = {
        "before": named.get("input_layernorm"),
        "after": named.get("post_attention_layernorm"),
        "q": named.get("q_norm"),
        "k": named.get("k_norm"),
    }
    found = {name: norm for name, norm in norms.items() if norm is not None}
    expected = {"self_attn", "mlp", "act_fn", *(f"{name}_proj" for name in PROJECTIONS)}
    if len(named) != len(expected) + len(found) or not expected <= named.keys():
        return None
    if type(named["act_fn"]).__name__ not in ("SiLUActivation", "SiLU"):
        return None
    lut = tuple(layer for layer in layers if isinstance(layer, LutLinear))
    if len(lut) < len(layers):
        return None
    return _Parts(tuple(children), lut, found)


def _make_block(module: nn.Module, parts: _Parts, dtype: torch.dtype) -> Block | None:
    """Return a block made ready, or None if the library does not take it as it is."""
    attention: Any = module.self_attn
    q, k, gate = (parts.layers[PROJECTIONS.index(name)] for name in ("q", "k", "gate"))
    dim = attention.head_dim
    sizes = Sizes(
        q.in_features, gate.out_features, q.out_features // dim, k.out_features // dim, dim
    )
    shapes = [(layer.out_features, layer.in_features) for layer in parts.layers]
    hidden, inner, heads, groups, _ = sizes
    wide, narrow = (heads * dim, hidden), (groups * dim, hidden)
    expected = [wide, narrow, narrow, (hidden, heads * dim), (inner, hidden), (inner, hidden)]
    if shapes != [*expected, (hidden, inner)] or not sizes.are_taken() or dtype not in TYPES:
        return None
    products = {}
    for name, layer in zip(PROJECTIONS, parts.layers, strict=True):
        bias = layer.bias
        if not layer.cpu_order or (
            bias is not None
            and (bias.dtype not in TYPES or not bias.is_contiguous() or not bias.is_cpu)
        ):
            return None
        shape = (1, layer.out_features)
        products[name] = Ready(layer.packed_weight(), layer._parameters, shape, dtype)
    norms = {}
    for name, norm in parts.norms.items():
        weight = norm.weight
        length = dim if name in ("q", "k") else hidden
        if not isinstance(weight, Tensor) or weight.dtype != dtype or not weight.is_cpu:
            return None
        if tuple(weight.shape) != (length,) or not weight.is_contiguous():
            return None
        norms[name] = Norm(weight, float(norm.variance_epsilon))  # type: ignore[arg-type]
    return Block(products, norms, sizes, float(attention.scaling), dtype)


class _Past:
    """A cache with a few tokens in it, for trying a block."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Return what was there and what is new; keep nothing."""
        return torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)


def _agrees(module: FusedBlock, dtype: torch.dtype) -> bool | None:
    """Tell whether the block's own forward and the library's give the same for some token.

    None: the library does not take the block.
    """
    block = _make_block(module, module._parts, dtype)
    if block is None:
        return None
    hidden, _, _, groups, dim = block.sizes
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((1, 1, hidden), generator=draw).to(dtype)
    past = _Past(*torch.randn((2, 1, groups, 5, dim), generator=draw).to(dtype))
    angle = torch.randn(1, 1, dim // 2, generator=draw).repeat(1, 1, 2)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype))
    with torch.inference_mode():
        ours = module._decode(x, position_embeddings=angles, past_key_values=past)
        own = super(FusedBlock, module).forward(x, position_embeddings=angles, past_key_values=past)
    if ours is None:
        return None
    error = (ours - own).float().norm() / (own - x).float().norm()
    return bool(error <= _TOLERANCE[dtype])


@cache
def _fused_class(own: Any) -> Any:
    return type(own.__name__, (FusedBlock, own), {"__module__": own.__module__})


def fuse(model: nn.Module) -> int:
    """Let the decoder blocks of a model take single tokens by two calls of the library each.

    Args:
        model: its blocks of `ARCHITECTURES` with all linear layers in CPU order change their class.

    Returns:
        How many are fused.
    """
    agree: dict[object, bool | None] = {}
    count = 0
    for module in model.modules():
        own: Any = type(module)
        if isinstance(module, FusedBlock):
            count += 1
            continue
        parts = _find_parts(module) if f"{own.__module__}.{own.__name__}" in _KINDS else None
        if parts is None or not all(layer.cpu_order for layer in parts.layers):
            continue
        dtype = parts.norms["before"].weight.dtype
        assert isinstance(dtype, torch.dtype), "a norm's weight is a parameter"
        kind = (own, dtype, *((layer.in_features, layer.out_features) for layer in parts.layers))
        module.__class__ = _fused_class(own)
        module.__dict__.update(_parts=parts, _block=None)
        assert isinstance(module, FusedBlock), "it was made one"
        if kind not in agree:
            agree[kind] = _agrees(module, dtype)
            if agree[kind] is False:
                warnings.warn(
                    f"{own.__name__} of this version of transformers does not compute what flute's "
                    "fused block does: each token takes its own forward, which is slower.",
                    stacklevel=4,
                )
        if agree[kind]:
            count += 1
        else:
            module.__class__ = own
            del module.__dict__["_parts"], module.__dict__["_block"]
    return count
