"""What a checkpoint says of a layer of vLLM, and how it is cut over GPUs. Pure; imports no vLLM.

vLLM merges layers of one input (q, k, v; gate, up) and cuts each for tensor parallelism:

    column parallel    rows of codes, scales and a table per row are cut    (q, k, v, gate, up)
    row parallel       their columns are cut: words of codes, scales        (o, down)

Codes are a bit stream along K, 32 of which fill whole words. So a cut along K at a multiple of 32
codes and of the group is a plain slice, and vLLM's own loaders, which slice, do the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from math import lcm
from typing import Any, NamedTuple

from flute.dense import ROUTER_NAMES
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import GROUP_SIZES, TENSOR_NAMES, WHOLE_ROW, CheckpointConfig, QuantSpec
from flute.methods import CALIBRATED
from flute.model import QuantizeOptions, matches

_WORD_CODES = 32
"""Codes of any width that fill whole words."""
_SIZES = (1, 2, 4, 8, 16)
"""Tensor-parallel sizes that a message may suggest."""
_ENVIRONMENT = {
    "FLUTE_BITS": "num_bits",
    "FLUTE_GROUP_SIZE": "group_size",
    "FLUTE_METHOD": "method",
    "FLUTE_TABLE": "table",
    "FLUTE_HEAD_BITS": "head_bits",
    "FLUTE_HEAD_GROUP_SIZE": "head_group_size",
}
"""Variable -> what it says of a dense model that is quantised while it loads."""
_REQUEST_KEYS = (*_ENVIRONMENT.values(), "scale_dtype", "modules_to_not_convert")
_NUMBERS = ("num_bits", "group_size", "head_bits", "head_group_size")
_HOW = (
    "set FLUTE_BITS=4 (and FLUTE_GROUP_SIZE, FLUTE_METHOD, FLUTE_TABLE), or pass --hf-overrides "
    '\'{"quantization_config": {"quant_method": "flute", "bits": 4, "group_size": 64}}\''
)


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


def is_quantized_head(name: str, config: CheckpointConfig) -> bool:
    """Tell whether an output head of vLLM is the one that is quantised in the checkpoint.

    Args:
        name: of vLLM's layer, which may stand below other components than transformers'. Drafts
            that predict several tokens have heads of other names, which are dense.
        config: of the checkpoint.
    """
    head = config.quantized_head
    return bool(head) and f".{name}".endswith(f".{head}")


def check_tensor_names(names: Iterable[str]) -> None:
    """Check that every layer with a tensor of this format in the files has all of them.

    Args:
        names: of all tensors of a checkpoint.

    Raises:
        CheckpointError: one is missing; the message names it.
    """
    found = {name for name in names if name.rpartition(".")[2] in TENSOR_NAMES}
    for layer in sorted({name.rpartition(".")[0] for name in found}):
        for key in TENSOR_NAMES:
            if f"{layer}.{key}" not in found:
                raise CheckpointError(
                    f"The checkpoint lacks `{layer}.{key}`, though it has other tensors of that "
                    "layer. Download it again."
                )


def _is_dense(name: str, config: CheckpointConfig) -> bool:
    """Tell whether a layer is dense: named so, or a router, which is never quantised."""
    return name in config.modules_to_not_convert or name.rpartition(".")[2] in ROUTER_NAMES


def environment_request() -> dict[str, Any]:
    """Return what the environment says of quantising a dense model while it loads.

    Raises:
        FormatError: a number of bits or a group size is no number; the message names it.
    """
    request: dict[str, Any] = {}
    for variable, key in _ENVIRONMENT.items():
        value = os.environ.get(variable)
        if value and key in _NUMBERS:
            try:
                request[key] = int(value)
            except ValueError as error:
                raise FormatError(f"{variable}={value!r}; expected a whole number.") from error
        elif value:
            request[key] = value
    return request


def request_of(config: Mapping[str, Any]) -> QuantizeOptions:
    """Return what a dense model is to be quantised to while vLLM loads it.

    Args:
        config: of the environment, or ``quantization_config`` of --hf-overrides; "bits" stands for
            "num_bits".

    Raises:
        UnsupportedProblemError: it does not say to how many bits.
        FormatError: an unknown key, a method that needs calibration, or a value out of range.
    """
    renamed = {"num_bits" if key == "bits" else key: value for key, value in config.items()}
    request = {k: v for k, v in renamed.items() if k != "quant_method" and v is not None}
    unknown = sorted(set(request) - set(_REQUEST_KEYS))
    if unknown:
        raise FormatError(
            "`quantization_config` has no `format_version`, as that of a quantised checkpoint has, "
            f"and the keys {unknown}; to quantise a dense model, expected {_REQUEST_KEYS}."
        )
    if "num_bits" not in request:
        raise UnsupportedProblemError(
            "The model is dense: its config.json has no `quantization_config` of FLUTE's. To "
            f"quantise it while it loads, {_HOW}; or run `flute quantize MODEL OUT` and serve OUT."
        )
    if request.get("method") in CALIBRATED:
        raise FormatError(
            f"method={request['method']!r} needs calibration text, which vLLM has not: run `flute "
            "quantize MODEL OUT --calibration TEXT` and serve OUT."
        )
    skip = request.pop("modules_to_not_convert", ())
    return QuantizeOptions(**request, skip=skip)


def stays_dense(parts: Sequence[str], skip: Sequence[str]) -> bool:
    """Tell whether a layer of a model that is quantised while it loads stays dense.

    Args:
        parts: names of what vLLM merges in it.
        skip: patterns of names to leave dense.

    Raises:
        UnsupportedProblemError: a pattern names some of the parts only.
    """
    named = [part for part in parts if any(matches(part, pattern) for pattern in skip)]
    if named and len(named) < len(parts):
        raise UnsupportedProblemError(
            f"vLLM merges {_listed(parts)} into one matrix, but `modules_to_not_convert` names "
            f"{_listed(named)} only. Name all of them, or none."
        )
    return bool(named) or parts[0].rpartition(".")[2] in ROUTER_NAMES


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
