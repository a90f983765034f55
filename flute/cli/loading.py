"""Finding and loading models and tokenizers for the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flute.checkpoint import CheckpointReader
from flute.errors import CheckpointError, FluteError, reason_of
from flute.stream import find_source


def find_model(path: str) -> Path:
    """Return the folder of a model, after a look at its config.json and its files' headers.

    Raises:
        CheckpointError: it is missing or broken; it cannot be had from the Hub.
    """
    folder = find_source(path)
    CheckpointReader(folder)
    return folder


def load_model(path: str, device: str) -> Any:
    """Load a dense or quantised causal language model in its own dtype.

    Raises:
        CheckpointError: the folder is missing or broken, or transformers cannot load it; parameters
            are missing, which transformers would fill with random numbers.
    """
    from flute import from_pretrained

    folder = find_model(path)
    try:
        model, info = from_pretrained(folder, device_map=device, output_loading_info=True)
    except FluteError:
        raise
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"`{path}` cannot be loaded: {reason_of(error)}.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"`{path}` lacks {len(missing)} parameters of {type(model).__name__}, such as "
            f"`{missing[0]}`. The checkpoint is incomplete, its config.json is not its own, or it "
            "is no language model: download it again."
        )
    return model.eval()


def load_tokenizer(path: str) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        CheckpointError: there is no such checkpoint, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = find_model(path)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(
            f"`{Path(path)}` has no tokenizer that can be loaded ({type(error).__name__}). Copy "
            "the tokenizer's files of the dense model into the folder."
        ) from error
