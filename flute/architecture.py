"""Architectures: the model that a checkpoint's config.json describes, and its names for tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flute.errors import UnsupportedProblemError, reason_of


def meta_model(directory: Path, config: Mapping[str, Any]) -> nn.Module:
    """Return the checkpoint's model without weights, from transformers.

    Raises:
        UnsupportedProblemError: no such architecture there.
    """
    import transformers

    kind, names = config.get("model_type"), config.get("architectures") or []
    try:
        parsed = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        return model_of(parsed, names)
    except Exception as error:
        raise UnsupportedProblemError(
            f"transformers {transformers.__version__} cannot build model_type {kind!r}, "
            f"architectures {names}: {reason_of(error, 2)}. Upgrade transformers, or quantise the "
            "loaded model with `flute.quantize_model`."
        ) from error


def model_of(config: Any, architectures: Sequence[str]) -> nn.Module:
    """Return the model that a config describes, without weights.

    Args:
        config: of transformers.
        architectures: names of the model's class; the first that transformers knows is taken.

    Raises:
        ValueError: there is no model of such a config.
    """
    import transformers

    known = [getattr(transformers, name) for name in architectures if hasattr(transformers, name)]
    with torch.device("meta"):
        if known:
            model: nn.Module = known[0](config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def match_names(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Return weight tensor on disk -> linear layer, renamed as transformers does when it loads.

    Args:
        model: on any device, "meta" suffices.
        names: of all tensors on disk.
    """
    modules = dict(model.named_modules())
    keys, _ = model_keys(model, names)
    return {
        name: key.removesuffix(".weight")
        for name, key in keys.items()
        if key.endswith(".weight")
        and isinstance(modules.get(key.removesuffix(".weight")), nn.Linear)
    }


def model_keys(model: nn.Module, names: list[str]) -> tuple[dict[str, str], bool]:
    """Return tensor on disk -> key in the model's state, and whether some are merged or split.

    Args:
        model: on any device, "meta" suffices.
        names: of all tensors on disk.
    """
    from transformers import conversion_mapping, core_model_loading

    state = model.state_dict()
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    prefix = getattr(model, "base_model_prefix", None)
    keys = {name: name for name in names}
    for name in names:
        if name not in state:
            keys[name], _ = core_model_loading.rename_source_key(name, renamings, [], prefix, state)
    return keys, len(renamings) < len(transforms)


def missing_parameters(model: nn.Module, names: list[str]) -> set[str]:
    """Return parameters that no tensor on disk fills, by any name; none if some are merged."""
    keys, are_merged = model_keys(model, names)
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(name)
    loaded = set(keys.values())
    absent = {aliases[0] for aliases in by_parameter.values() if loaded.isdisjoint(aliases)}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    absent = {name for name in absent if not any(re.search(key, name) for key in optional)}
    return set() if are_merged else absent
