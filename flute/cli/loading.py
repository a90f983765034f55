"""Loading models and tokenizers for the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flute.errors import CheckpointError
from flute.stream import find_source


def load_model(path: str, device: str) -> Any:
    """Load a dense or quantised causal language model in its own dtype.

    Raises:
        CheckpointError: the folder is missing or broken.
    """
    from flute import from_pretrained

    return from_pretrained(find_source(path), device_map=device).eval()


def load_tokenizer(path: str) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        CheckpointError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(find_source(path))
    except Exception as error:
        raise CheckpointError(
            f"`{Path(path)}` has no tokenizer that can be loaded ({type(error).__name__}). Copy "
            "the tokenizer's files of the dense model into the folder."
        ) from error
