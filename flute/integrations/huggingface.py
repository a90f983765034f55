"""Hugging Face transformers: load FLUTE checkpoints, and quantise dense ones as they load.

Owns `from_pretrained`, and is where users find `FluteConfig` and `register`; the quantizer that
transformers calls is in `flute.integrations.huggingface_quantizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from flute.checkpoint import CheckpointReader, is_hub_name
from flute.errors import CheckpointError, UnsupportedProblemError
from flute.integrations.huggingface_config import FluteConfig
from flute.integrations.huggingface_quantizer import FluteHfQuantizer, register

__all__ = ["FluteConfig", "FluteHfQuantizer", "from_pretrained", "register"]


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Load a causal language model: a FLUTE checkpoint, or any other that transformers can load.

    The same as ``AutoModelForCausalLM.from_pretrained``, but FLUTE is certain to be registered, and
    what is wrong with a folder is said before any weight is read.

    Args:
        path: a checkpoint folder, or the name of a model on the Hub.
        **kwargs: passed on; ``dtype`` is "auto" unless given.

    Returns:
        The model.

    Raises:
        CheckpointError: no such folder, no config.json, or a weight file missing or truncated, or
            quantised layers that config.json does not speak of.
        ChecksumError: a tensor differs from its recorded checksum (FLUTE_VERIFY=0 skips the check).
        FormatError: a quantisation config of a newer version, or tensors that disagree with it.
        UnsupportedProblemError: an architecture that transformers does not know, or one that is no
            language model.
    """
    register()
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", "auto"))
    if not is_hub_name(path):
        path = local = Path(path).expanduser()
        if not {"gguf_file", "subfolder", "variant"} & set(kwargs):
            reader = CheckpointReader(local)
            _check_model_type(local, reader.config)
            _check_not_lost(reader)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be loaded: {error}") from error


def _check_not_lost(reader: CheckpointReader) -> None:
    """Refuse codes that config.json says nothing of: random weights would stand in for them."""
    if "quantization_config" in reader.config:
        return
    codes = {name.removesuffix(".codes") for name in reader.names if name.endswith(".codes")}
    lost = sorted(layer for layer in codes if f"{layer}.table" in reader.names)
    if lost:
        raise CheckpointError(
            f"`{reader.directory}` holds `{lost[0]}.codes` ({len(lost)} quantised layers), and its "
            "config.json no `quantization_config`: it is another model's. Restore the checkpoint's "
            "own."
        )


def _check_model_type(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that transformers has a language model of this type, or the folder has its own."""
    model_type = config.get("model_type")
    if "auto_map" in config:
        return
    if model_type not in transformers.CONFIG_MAPPING:
        raise UnsupportedProblemError(
            f"`{folder / 'config.json'}` has model_type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know. Upgrade transformers, or correct the file."
        )
    if transformers.CONFIG_MAPPING[model_type] not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedProblemError(
            f"`{folder}` is a {model_type} model; expected a causal language model. After "
            "`import flute`, transformers' own class for it loads it."
        )
