"""Checks that transformers leaves out: it fills what a checkpoint lacks with random numbers.

Reads only the headers of safetensors files, before the weights, and follows the renamings that
transformers' loader will apply to the names in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from flute.checkpoint import DTYPE_NAMES, open_safetensors
from flute.errors import CheckpointError, FormatError
from flute.experts import SplitExperts
from flute.linear import LutLinear

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (name of its dtype in the safetensors format, shape)."""
_DENSE_DTYPES = ("F16", "BF16", "F32")


def read_headers(files: Iterable[Path]) -> Header:
    """Return dtype and shape of all tensors in safetensors files.

    Raises:
        CheckpointError: a file is missing or truncated; the message names it.
    """
    header: Header = {}
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a method of the library, not a dict)
                part = file.get_slice(name)
                header[name] = (part.get_dtype(), tuple(part.get_shape()))
    return header


def check_headers(model: nn.Module, files: Sequence[Path], tied_head: str = "") -> None:
    """Check that every tensor of the model's `LutLinear` layers is in the files as it must be.

    Args:
        model: with its linear layers swapped, on the meta device. A layer that holds a ``weight``
            is to be quantised from it.
        files: the safetensors files that will be loaded.
        tied_head: name of an output head that is quantised from the embedding; the files have no
            tensor of it.

    Raises:
        CheckpointError: tensors are missing, or belong to a layer that the config calls dense.
        FormatError: a tensor has another dtype or shape than the config says.
    """
    header = read_headers(files)
    found: dict[str, tuple[str, bool]] = {}
    for name, target, is_converted in _loaded_names(model, header):
        found[target] = (name, is_converted)
    modules = dict(model.named_modules())
    layers = {name: m for name, m in modules.items() if isinstance(m, LutLinear)}
    for target, (name, _) in found.items():
        layer = target.removesuffix(".codes")
        if target.endswith(".codes") and isinstance(modules.get(layer), nn.Linear):
            raise CheckpointError(
                f"`{name}` is in the checkpoint, but its config.json leaves `{layer}` dense "
                "(`modules_to_not_convert`). Use the config.json written with these files."
            )
    layers.pop(tied_head, None)
    missing = []
    for layer, module in layers.items():
        for key, parameter in _tensors_to_read(module):
            target = f"{layer}.{key}"
            if target not in found:
                missing.append(target)
                continue
            name, is_converted = found[target]
            if not is_converted:
                _check_tensor(name, *header[name], module, key, parameter)
    if missing:
        raise _missing(missing)


def _loaded_names(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield (name on disk, name in the model, whether the tensor is merged or split on the way)."""
    transforms = get_model_conversion_mapping(model)
    if any(isinstance(module, SplitExperts) for module in model.modules()):
        transforms = without_expert_merges(transforms)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None:
            yield name, target, False
            continue
        converter = next(c for c in converters if pattern in c.source_patterns)
        first = converter.target_patterns[0]
        for other in converter.target_patterns:
            yield name, target.replace(first, other), True


def unfilled_parameters(model: nn.Module, files: Sequence[Path]) -> list[str]:
    """Return the parameters that no tensor in the files fills, tied ones under one name.

    Args:
        model: as of `check_headers`.
        files: the safetensors files that will be loaded.

    Raises:
        CheckpointError: a file is missing or truncated; the message names it.
    """
    filled = {target for _, target, _ in _loaded_names(model, read_headers(files))}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [aliases[0] for aliases in names.values() if filled.isdisjoint(aliases)]


def without_expert_merges(transforms: Iterable[Any]) -> list[Any]:
    """Return transformers' transforms but those that fuse experts, for a model with split ones."""
    return [
        t
        for t in transforms
        if not (isinstance(t, WeightConverter) and any("experts" in p for p in t.target_patterns))
    ]


def _tensors_to_read(layer: LutLinear) -> list[tuple[str, nn.Parameter]]:
    parameters = dict(layer.named_parameters(recurse=False))
    if "weight" in parameters:
        return [(key, p) for key, p in parameters.items() if key in ("weight", "bias")]
    return list(parameters.items())


def _check_tensor(
    name: str, dtype: str, shape: tuple[int, ...], layer: LutLinear, key: str, parameter: Tensor
) -> None:
    expected = _DENSE_DTYPES if key in ("weight", "bias") else (DTYPE_NAMES[parameter.dtype],)
    if dtype in expected and shape == tuple(parameter.shape):
        return
    quantised = "" if key in ("weight", "bias") else f", {layer.spec}"
    raise FormatError(
        f"`{name}` is {dtype} of shape {shape}; expected {' or '.join(expected)} of shape "
        f"{tuple(parameter.shape)} for N={layer.out_features}, K={layer.in_features}{quantised}. "
        "The files and their config.json do not belong together."
    )


def check_filled(model: nn.Module, *, headers_checked: bool) -> None:
    """Check that transformers has filled every parameter of every `LutLinear`.

    For what `check_headers` does not see: state dicts given in memory, and weights that are no
    safetensors. Offloaded parameters, on the meta device by now, are not checked.

    Args:
        model: loaded.
        headers_checked: `check_headers` found all tensors in the files; then only dense weights
            that were not quantised are looked for.

    Raises:
        CheckpointError: parameters were left as they were; the message names them.
    """
    missing = [
        f"{name}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, LutLinear)
        for key, parameter in layer.named_parameters(recurse=False)
        if key == "weight"
        or not (
            headers_checked
            or parameter.device.type == "meta"
            or getattr(parameter, "_is_hf_initialized", False)
        )
    ]
    if missing:
        raise _missing(missing)


def _missing(names: list[str]) -> CheckpointError:
    listed = ", ".join(f"`{name}`" for name in names[:6])
    return CheckpointError(
        f"The checkpoint lacks {listed}{', ...' if len(names) > 6 else ''} ({len(names)} in all), "
        "which transformers would fill with random numbers. Download the checkpoint again, or, if "
        "the layer is a new head, name it in `modules_to_not_convert`."
    )
