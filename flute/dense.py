"""Layers that stay dense, and why; the output head, which is quantised only when asked for.

A head that is tied to the embedding becomes a weight of its own: the embedding is looked up, row
by row, and stays dense; the head multiplies. Such a model's config says that it is not tied.

    tied    embed_tokens.weight = lm_head.weight  ->  embed_tokens.weight, lm_head.codes ...
    untied  embed_tokens.weight, lm_head.weight   ->  embed_tokens.weight, lm_head.codes ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flute.errors import UnsupportedProblemError
from flute.format import GROUP_SIZES

ROUTER_NAMES = ("gate", "router", "shared_expert_gate", "wg")
"""Last components of the names of MoE routers: tiny, and every token's path hangs on them."""
_OUTPUT_HEAD = "output head"


def why_dense(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """Return the layers that are no ordinary linear layers: full name -> why.

    Args:
        model: on any device, "meta" suffices.
        prefix: put before each name, for a module that is part of a model.
    """
    dense: dict[str, str] = {}
    head = _output_embeddings(model)
    by_parameter: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, nn.Embedding)) and isinstance(weight, nn.Parameter):
            by_parameter.setdefault(id(weight), []).append(name)
        if not isinstance(module, nn.Linear):
            dense |= {
                prefix + f"{name}.{key}": "MoE experts fused into one tensor"
                for key, p in module.named_parameters(recurse=False)
                if p.ndim == 3 and "expert" in name
            }
        elif module is head:
            dense[prefix + name] = _OUTPUT_HEAD
        elif why := _why_linear(model, name, module):
            dense[prefix + name] = why
    tied = {name for names in by_parameter.values() if len(names) > 1 for name in names}
    tied |= {key.removesuffix(".weight") for key in _tied_keys(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and name in tied:
            dense.setdefault(prefix + name, "tied to another layer")
    return dense


def _why_linear(model: nn.Module, name: str, linear: nn.Linear) -> str:
    """Why a linear layer stays dense by itself, or an empty string."""
    if name.rpartition(".")[2] in ROUTER_NAMES:
        return "MoE router"
    if linear.in_features < min(GROUP_SIZES):
        return f"rows of {linear.in_features} weights are too short"
    if any(part in _kept_in_fp32(model) for part in name.split(".")):
        return "its model keeps it in float32"
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its parent reads the weight instead of calling it"
    if type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} is more than a linear layer"
    return ""


def _kept_in_fp32(model: nn.Module) -> set[str]:
    names: set[str] = set()
    for kind in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names |= set(getattr(model, kind, None) or ())
    return names


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def _tied_keys(model: nn.Module) -> dict[str, str]:
    """Parameter -> the one it is tied to, as transformers says."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return keys


def output_head(model: nn.Module) -> str:
    """Return the name of a language model's output head, or an empty string if it has none.

    Args:
        model: of transformers, on any device.
    """
    head = _output_embeddings(model)
    names = (name for name, module in model.named_modules() if module is head)
    return next(names, "") if head is not None else ""


def tied_embedding(model: nn.Module) -> str:
    """Return the name of the parameter that a model's output head is tied to, or "".

    Args:
        model: of transformers, on any device.
    """
    return _tied_keys(model).get(f"{output_head(model)}.weight", "")


def check_head(model: nn.Module) -> str:
    """Return the name of an output head that can be quantised.

    Args:
        model: on any device, "meta" suffices.

    Raises:
        UnsupportedProblemError: there is none, or one that is more than a linear layer, or a model
            that ties more than its head to the embedding.
    """
    kind, name = type(model).__name__, output_head(model)
    advice = "Leave `head_bits` (`--head-bits`) out."
    if not name:
        raise UnsupportedProblemError(f"{kind} has no output head to quantise. {advice}")
    head = model.get_submodule(name)
    why = f"it is a {type(head).__name__}"
    if isinstance(head, nn.Linear):
        why = _why_linear(model, name, head)
    others = sorted(set(_tied_keys(model)) - {f"{name}.weight"})
    if not why and others:
        why = f"its model ties `{others[0]}` too, and would not be what it is without that"
    if why:
        raise UnsupportedProblemError(
            f"The output head `{name}` of {kind} cannot be quantised: {why}. {advice}"
        )
    return name


def untie_head(model: Any, name: str) -> None:
    """Tell a transformers model that its head is not tied to its embedding any more.

    Args:
        model: whose head has, or is about to get, a weight of its own.
        name: of the head.
    """
    _tied_keys(model).pop(f"{name}.weight", None)
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that says that the head is not tied to the embedding."""
    content = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("tie_word_embeddings"):
        content["text_config"] = {**text, "tie_word_embeddings": False}
    return content
