"""Shapes (N, K) of the linear layers of well-known models, whole and sharded. Pure data.

Sharded over T GPUs, a layer that reads the hidden state keeps N / T of its rows, and one that
writes it (o, down) K / T of its columns. v is as k, up as gate. qkv and
gate_up are merged, as inference engines do.
"""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """What of a model's config.json decides its shapes.

    Args:
        hidden: hidden_size.
        intermediate: intermediate_size.
        heads: num_attention_heads.
        kv_heads: num_key_value_heads.
        head_dim: of one head.
        shards: numbers of GPUs that the shipped plans cover.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    shards: tuple[int, ...] = (1,)


MODELS = {
    "llama-3-8b": Model(4096, 14336, 32, 8, shards=(1, 2, 4, 8)),
    "llama-3-70b": Model(8192, 28672, 64, 8, shards=(1, 2, 4, 8)),
    "llama-3-405b": Model(16384, 53248, 128, 8, shards=(1, 2, 4, 8)),
    "gemma-2-9b": Model(3584, 14336, 16, 8, 256),
    "gemma-2-27b": Model(4608, 36864, 32, 16),
    "qwen-3-8b": Model(4096, 12288, 32, 8),
    "qwen-3-32b": Model(5120, 25600, 64, 8),
}


def layer_shapes(model: Model, shards: int = 1) -> dict[str, tuple[int, int]]:
    """Return layer -> (N, K) of one shard; layers that the shards do not divide are left out.

    Args:
        model: one of `MODELS`.
        shards: GPUs that a layer is spread over (tensor parallelism).
    """
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    rows = {
        "qkv": (q + 2 * kv, model.kv_heads),
        "q": (q, model.heads),
        "k": (kv, model.kv_heads),
        "gate_up": (2 * model.intermediate, model.intermediate),
        "gate": (model.intermediate, model.intermediate),
    }
    columns = {"o": (q, model.heads), "down": (model.intermediate, model.intermediate)}
    shapes = {
        name: (N // shards, model.hidden) for name, (N, unit) in rows.items() if unit % shards == 0
    }
    return shapes | {
        name: (model.hidden, K // shards)
        for name, (K, unit) in columns.items()
        if not unit % shards
    }


def shapes_of(names: list[str], shards: list[int] | None = None) -> list[tuple[int, int]]:
    """Return the distinct shapes (N, K) of models.

    Args:
        names: keys of `MODELS`, beginnings of keys such as "llama-3", or "all".
        shards: numbers of GPUs; None is 1, and for "all" what is shipped.

    Returns:
        In order of the models.
    """
    shapes: dict[tuple[int, int], None] = {}
    for name, model in MODELS.items():
        if not any(wanted == "all" or name.startswith(wanted) for wanted in names):
            continue
        for count in shards or (model.shards if "all" in names else (1,)):
            shapes |= dict.fromkeys(layer_shapes(model, count).values())
    return list(shapes)
