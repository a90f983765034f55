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

import operator
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import chain, repeat
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as nn_module

from flute.cpu import library
from flute.cpu.block import PROJECTIONS, Block, Norm, Sizes, Step
from flute.cpu.ready import Ready
from flute.cpu.structures import TYPES
from flute.front import Front, put, take_away
from flute.linear import LutLinear
from flute.plain_call import is_plain_call

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of transformers whose blocks are what `kernels/cpu/block.h` says."""
_KINDS = {
    f"transformers.models.{name}.modeling_{name}.{name.capitalize()}DecoderLayer"
    for name in ARCHITECTURES
}
_ATTENTION = ("sdpa", "eager")
"""Implementations that compute the same, up to rounding."""
_EXPIRES_S = 0.25
"""How long what was made sure of counts for the next block."""
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Of what a block adds to x, run both ways, as a relative norm: roundings are not the same."""


class Parts(NamedTuple):
    """What a block is made of, and what tells that somebody has changed that."""

    attention: Any
    layers: tuple[LutLinear, ...]  # of each of PROJECTIONS
    norms: dict[str, nn.Module]
    parents: tuple[dict[str, Any], ...]  # children by name: of the block, the attention, the MLP
    children: tuple[nn.Module, ...]
    attributes: tuple[dict[str, Any], ...]  # of each child
    hooks: tuple[dict[Any, Any], ...]
    parameters: tuple[dict[str, Any], ...]  # of the layers, then of the norms

    def are_untouched(self) -> bool:
        """Tell whether nothing was replaced, hooked, or given another forward."""
        return not (
            any(self.hooks)
            or any(map(operator.contains, self.attributes, repeat("forward")))
            or nn_module._global_forward_hooks
            or nn_module._global_forward_pre_hooks
        ) and all(
            map(operator.is_, chain.from_iterable(map(dict.values, self.parents)), self.children)
        )


class _Run(NamedTuple):
    """What was made sure of when a forward of the model began, for the block that comes next."""

    x: Tensor  # its input: what the block before has returned, that very object
    angles: tuple[Tensor, Tensor]
    mask: Tensor | None
    place: int
    until: float


class _Stack:
    """The fused blocks of one list of modules, which run one after another.

    Why: looking at one block takes 0.1 ms when its weights have just gone through the caches, at
    all of them in a row 0.2. So the first looks for all; the others see that they are next.
    """

    def __init__(self, blocks: Sequence[FusedBlock]) -> None:
        self.blocks = tuple(blocks)
        self.run: _Run | None = None

    def are_ready(self, x: Tensor) -> bool:
        """Tell whether all blocks may take a token and are of the same sizes."""
        environment = library.environment()
        if not all(block.is_ready(x, environment) for block in self.blocks):
            return False
        sizes = {
            (b.sizes.hidden, b.sizes.dim) for b in (block._block for block in self.blocks) if b
        }
        return len(sizes) == 1


class FusedBlock(Front):
    """What is put in front of a block's own class."""

    OWN = ("parts", "_block", "_stack", "_index")
    MADE = "_block"
    parts: Parts
    _block: Block | None
    _stack: _Stack
    _index: int  # in the stack

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
        stack, index, angles, mask = self._stack, self._index, position_embeddings, attention_mask
        if (
            torch.is_grad_enabled()
            or angles is None
            or (rest and any(value is not None and value is not False for value in rest.values()))
        ):
            return None
        run = stack.run
        is_next = (
            run is not None
            and run.x is x
            and run.place == index
            and run.angles is angles
            and run.mask is mask
            and monotonic() < run.until
            and not any(self.parts.hooks)
        )
        if not is_next:
            if not is_plain_call(x):
                return None
            is_next = index == 0 and stack.are_ready(x)
            if not is_next and not self.is_ready(x, library.environment()):
                return None
        block = self._block
        assert block is not None, "it is ready"
        if (index == 0 or not is_next) and not fits(block, x, angles, mask):
            return None
        step = Step(block, x, angles)
        keys, values = step.keys, step.values
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.parts.attention.layer_idx)
        out = step.finish(_as(keys, x), _as(values, x), mask)
        if is_next:
            stack.run = _Run(out, angles, mask, index + 1, monotonic() + _EXPIRES_S)
        return out

    def is_ready(self, x: Tensor, environment: library.Environment) -> bool:
        """Tell whether nobody asks for more than the block's result; make it ready if need be."""
        parts, block = self.parts, self._block
        attention = parts.attention
        if (
            (self.training and attention.attention_dropout)
            or attention.config._attn_implementation not in _ATTENTION
            or not parts.are_untouched()
        ):
            return False
        if (
            block is None
            or block.dtype != x.dtype
            or not block.held.are(parts.parameters, environment)
        ):
            self._block = block = _make_block(parts, x.dtype) if x.is_cpu else None
        return block is not None


def fits(block: Block, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> bool:
    """Tell whether a step of `flute.cpu.block` can be taken with these.

    Args:
        block: made ready.
        x: of any shape, dtype of the block.
        angles: cosine and sine of the tokens' positions.
        mask: as the model makes it for attention, or None.
    """
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
    past = past if past.dtype is x.dtype and past.is_cpu else past.to(x)
    return past if past.stride(3) == 1 else past.contiguous()


def _find_parts(block: nn.Module) -> Parts | None:
    """Return the parts of a block if all are what the library takes, else None."""
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return None
    parents = (block._modules, attention._modules, mlp._modules)
    named = {name: child for modules in parents for name, child in modules.items()}
    layers = [named.get(f"{name}_proj") for name in PROJECTIONS]
    norms = {
        "before": named.get("input_layernorm"),
        "after": named.get("post_attention_layernorm"),
        "q": named.get("q_norm"),
        "k": named.get("k_norm"),
    }
    found = {name: norm for name, norm in norms.items() if norm is not None}
    children = tuple(c for modules in parents for c in modules.values() if c is not None)
    expected = {"self_attn", "mlp", "act_fn", *(f"{name}_proj" for name in PROJECTIONS)}
    if len(children) != len(expected) + len(found) or not expected <= named.keys():
        return None
    if type(named["act_fn"]).__name__ not in ("SiLUActivation", "SiLU"):
        return None
    lut = tuple(layer for layer in layers if isinstance(layer, LutLinear))
    if len(lut) < len(layers):
        return None
    hooks = tuple(h for child in children for h in (child._forward_hooks, child._forward_pre_hooks))
    parameters = tuple(module._parameters for module in (*lut, *found.values()))
    attributes = tuple(child.__dict__ for child in children)
    return Parts(attention, lut, found, parents, children, attributes, hooks, parameters)


def _make_block(parts: Parts, dtype: torch.dtype) -> Block | None:
    """Return a block made ready, or None if the library does not take it as it is."""
    attention = parts.attention
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
    return Block(
        products,
        parts.parameters,
        norms,
        sizes,
        float(attention.scaling),
        dtype,
    )


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
    block = _make_block(module.parts, dtype)
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
        put(FusedBlock, module, parts=parts, _block=None, _index=0)
        assert isinstance(module, FusedBlock), "it was made one"
        module.__dict__["_stack"] = _Stack([module])
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
            take_away(module)
    for parent in model.modules():
        blocks = [child for child in parent.children() if isinstance(child, FusedBlock)]
        stack = _Stack(blocks)
        for index, block in enumerate(blocks):
            block.__dict__.update(_stack=stack, _index=index)
    return count
