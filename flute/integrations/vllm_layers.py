"""What a checkpoint says of a layer of vLLM, and how it is cut over GPUs. Pure; imports no vLLM.

vLLM merges layers of one input (q, k, v; gate, up) and cuts each for tensor parallelism:

    column parallel    rows of codes, scales and a table per row are cut    (q, k, v, gate, up)
    row parallel       their columns are cut: words of codes, scales        (o, down)

Codes are a bit stream along K, 32 of which fill whole words. So a cut along K at a multiple of 32
codes and of the group is a plain slice, and vLLM's own loaders, which slice, do the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import NamedTuple

from flute.errors import UnsupportedProblemError
from flute.format import GROUP_SIZES, WHOLE_ROW, CheckpointConfig, QuantSpec
from flute.model import ROUTER_NAMES

_WORD_CODES = 32
"""Codes of any width that fill whole words."""
_SIZES = (1, 2, 4, 8, 16)
"""Tensor-parallel sizes that a message may suggest."""


class Shard(NamedTuple):
    """Sizes of one rank's part of the rows of a weight.

    Args:
        K: input features.
        words: 32-bit words of codes per row.
        groups: scales per row.
    """

    K: int
    words: int
    groups: int


def cut_rows(name: str, spec: QuantSpec, K: int, num_shards: int) -> Shard:
    """Return the sizes of each of ``num_shards`` equal parts of rows of K weights.

    Rank r has the words from ``r * words`` on and the scales from ``r * groups`` on; a scale per
    row is every rank's.

    Args:
        name: of the layer, for messages.
        spec: bits and group size.
        K: input features of the whole layer.
        num_shards: ranks that share it.

    Raises:
        UnsupportedProblemError: a part is no multiple of 32 codes and of the group.
        FormatError: K is not a multiple of the group size.
    """
    groups = spec.num_groups(K)
    if num_shards == 1:
        return Shard(K, spec.num_words(K), groups)
    if not _divides(spec.group_size, K, num_shards):
        raise _uneven(name, spec, K, num_shards)
    part = K // num_shards
    shared = spec.group_size == WHOLE_ROW
    return Shard(part, spec.num_words(part), groups if shared else groups // num_shards)


def _divides(group_size: int, K: int, num_shards: int) -> bool:
    grain = _WORD_CODES if group_size == WHOLE_ROW else lcm(_WORD_CODES, group_size)
    return K % (num_shards * grain) == 0


def _uneven(name: str, spec: QuantSpec, K: int, num_shards: int) -> UnsupportedProblemError:
    grain = _WORD_CODES if spec.group_size == WHOLE_ROW else spec.group_size
    sizes = [str(size) for size in _SIZES if size < num_shards and _divides(grain, K, size)]
    smaller = (*(g for g in GROUP_SIZES if g < grain), WHOLE_ROW)
    groups = [str(g) for g in smaller if g != spec.group_size and _divides(g, K, num_shards)]
    ways = [f"a tensor parallel size of {' or '.join(sizes or ['1'])}"]
    if groups:
        ways.append(f"a checkpoint quantised with --group-size {' or '.join(groups)}")
    return UnsupportedProblemError(
        f"`{name}`: a tensor parallel size of {num_shards} cuts its K={K} input features into "
        f"parts of {K / num_shards:g}; expected a multiple of {grain}, "
        f"{'its group' if grain == spec.group_size else 'whole words of codes'}. Use "
        f"{', or '.join(ways)}."
    )


def parts_of(
    name: str, config: CheckpointConfig, merged: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Return the names, in the checkpoint, of the layers that a layer of vLLM stands for.

    Args:
        name: of vLLM's layer, as `model.layers.0.self_attn.qkv_proj`.
        config: of the checkpoint. A name that it mentions is merged on disk too.
        merged: vLLM's last component -> those of its parts.
    """
    parent, dot, leaf = name.rpartition(".")
    if name in config.modules_to_not_convert or name in config.overrides:
        return (name,)
    return tuple(f"{parent}{dot}{part}" for part in merged.get(leaf, (leaf,)))


def spec_of_parts(parts: Sequence[str], config: CheckpointConfig) -> QuantSpec | None:
    """Return bits and group size of layers that vLLM merges, or None if they are dense.

    Args:
        parts: their names in the checkpoint.
        config: of the checkpoint.

    Raises:
        UnsupportedProblemError: they differ, so one matrix cannot hold them.
    """
    dense = [part for part in parts if _is_dense(part, config)]
    if len(dense) == len(parts):
        return None
    if dense:
        other = next(part for part in parts if part not in dense)
        raise UnsupportedProblemError(
            f"vLLM merges {_listed(parts)} into one matrix, but `{dense[0]}` is dense and "
            f"`{other}` quantised. Quantise the model again with all of them skipped, or none."
        )
    specs = {part: config.spec_of(part) for part in parts}
    first = specs[parts[0]]
    for part, spec in specs.items():
        if spec != first:
            raise UnsupportedProblemError(
                f"vLLM merges {_listed(parts)} into one matrix, but `{parts[0]}` has "
                f"{first.num_bits} bits and group size {first.group_size}, `{part}` "
                f"{spec.num_bits} and {spec.group_size}. Quantise them alike."
            )
    return first


def _is_dense(name: str, config: CheckpointConfig) -> bool:
    """Tell whether a layer is dense: named so, or a router, which is never quantised."""
    return name in config.modules_to_not_convert or name.rpartition(".")[2] in ROUTER_NAMES


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
