"""Rotating a model without changing what it computes, so that its weights are easier to quantise.

    residual stream   x' = x R1        embedding E R1, inputs W diag(g) R1, outputs R1' W
    values of a head  v' = v R2        v_proj R2' W (each head), o_proj W R2 (each head)

where g is the weight of the RMSNorm before a layer; the norm itself keeps ones. It is exact since
RMSNorm takes only the length of x besides g, and attention mixes tokens, not dimensions. A head
that is tied to the embedding has another g, so it gets a weight of its own. What enters down_proj
goes through a product of two layers first, so no rotation can be folded in there; it stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flute.checkpoint import CheckpointReader
from flute.errors import UnsupportedProblemError
from flute.methods.hadamard import random_signs, rotate_columns, rotate_rows

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose blocks are norm, attention, norm, gated MLP, each RMSNorm times a weight."""
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_READERS = {
    **dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"
    ),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
}
"""Layer that reads the residual stream -> the norm before it."""
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_UNTOUCHED = ("self_attn.q_norm", "self_attn.k_norm")


class Rotation:
    """What each tensor of a model becomes.

    Args:
        config: the model's config.json.
        names: of all tensors, as transformers' model has them.
        load: returns a tensor by its name; of a tied head the embedding.
        seed: of the random signs.

    Raises:
        UnsupportedProblemError: an architecture, or a tensor in it, that this cannot be done with.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        names: Iterable[str],
        load: Callable[[str], Tensor],
        seed: int = 0,
    ) -> None:
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise UnsupportedProblemError(
                f"No rotation can be folded into model_type {kind!r} exactly; expected one of "
                f"{MODEL_TYPES}. Quantise it without `hadamard` (`--hadamard`)."
            )
        self._load = load
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        self._stream = random_signs(hidden, seed)
        self._value = random_signs(int(config.get("head_dim") or hidden // heads), seed + 1)
        names = set(names)
        unknown = sorted(name for name in names if not _is_known(name))
        missing = {_EMBEDDING, _NORM, "model.layers.0.self_attn.v_proj.weight"} - names
        if unknown or missing:
            what = f"has `{unknown[0]}`" if unknown else f"lacks `{min(missing)}`"
            raise UnsupportedProblemError(
                f"This {kind} model {what}, so no rotation can be folded in exactly. Quantise it "
                "without `hadamard` (`--hadamard`)."
            )

    def apply(self, name: str) -> Tensor:
        """Return a tensor of the rotated model, in its own dtype; products in fp32."""
        tensor = self._load(name)
        return self._rotated(name, tensor.float()).to(tensor.dtype)

    def _rotated(self, name: str, x: Tensor) -> Tensor:
        if name == _EMBEDDING:
            return rotate_rows(x, self._stream)
        if name == _HEAD:
            return rotate_rows(x * self._load(_NORM).float(), self._stream)
        if name == _NORM:
            return torch.ones_like(x)
        match = _LAYER.fullmatch(name)
        assert match is not None, f"{name} was checked on construction"
        index, layer, kind = match.groups()
        if layer in _READERS.values():
            return torch.ones_like(x)
        if layer in _READERS and kind == "weight":
            norm = self._load(f"model.layers.{index}.{_READERS[layer]}.weight").float()
            x = rotate_rows(x * norm, self._stream)
        if layer == "self_attn.v_proj":
            return _rotate_outputs(x, self._value)
        if layer == "self_attn.o_proj" and kind == "weight":
            x = rotate_rows(x, self._value)
        return _rotate_outputs(x, self._stream) if layer in _WRITERS else x


def _rotate_outputs(x: Tensor, signs: Tensor) -> Tensor:
    """Rotate what a weight (N, K) or a bias (N,) puts out."""
    return rotate_rows(x[None], signs)[0] if x.ndim == 1 else rotate_columns(x, signs)


def _is_known(name: str) -> bool:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name in (_EMBEDDING, _HEAD, _NORM)
    layer, kind = match[2], match[3]
    norms = (*_READERS.values(), *_UNTOUCHED)
    return layer in (*_READERS, *_WRITERS) or (layer in norms and kind == "weight")


@torch.no_grad()
def rotate_model(model: Any, seed: int = 0) -> None:
    """Rotate a transformers model in memory, in place; a tied head gets a weight of its own.

    Args:
        model: a causal language model of `MODEL_TYPES`, on the CPU or a GPU.
        seed: of the random signs.

    Raises:
        UnsupportedProblemError: an architecture that this cannot be done with.
    """
    parameters = dict(model.named_parameters())
    tied = {_HEAD: parameters[_EMBEDDING]} if _EMBEDDING in parameters else {}
    rotation = Rotation(
        model.config.to_dict(), parameters, lambda name: (tied | parameters)[name], seed
    )
    rotated = {name: rotation.apply(name) for name in {*parameters, _HEAD}}
    if _HEAD not in parameters:
        model.lm_head.weight = nn.Parameter(rotated[_HEAD], requires_grad=False)
        model.config.tie_word_embeddings = False
    for name, parameter in model.named_parameters():
        parameter.data.copy_(rotated[name])


class RotatedReader(CheckpointReader):
    """A dense checkpoint, read as if its model had been rotated. Holds one tensor in memory.

    Args:
        directory: the folder.
        seed: of the random signs.

    Raises:
        CheckpointError: the folder cannot be read.
        UnsupportedProblemError: an architecture that this cannot be done with.
    """

    def __init__(self, directory: str | Path, seed: int = 0) -> None:
        super().__init__(directory)
        self._rotation = Rotation(self.config, self._info, super().tensor, seed)
        if _HEAD not in self._info:
            self.alias(_HEAD, _EMBEDDING)
        self.config = {**self.config, "tie_word_embeddings": False}
        self._last: tuple[str, Tensor] | None = None

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor of the rotated model."""
        if self._last is None or self._last[0] != name:
            self._last = (name, self._rotation.apply(name))
        return self._last[1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` (excluded) of a tensor of the rotated model."""
        return self.tensor(name)[start:stop]
