"""Calibration text: documents, and the windows of tokens that are cut from them.

    text file or folder -> documents -> windows (samples, sequence), which fit a model

Knows nothing of blocks: `flute.block_walk` takes the windows through a model.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flute.errors import FluteError

SAMPLES, SEQUENCE = 128, 512
"""Windows, and tokens in each, unless told otherwise."""
_CHARACTERS = 8
"""A piece of text holds this many characters per token of a window; English has about four."""
_SUFFIXES = (".txt", ".text", ".md", ".utf8", ".xz", ".jsonl", ".json")


class CalibrationError(FluteError, ValueError):
    """A text, tokenizer or model that calibration cannot work with."""


def read_documents(source: str | Path) -> list[str]:
    """Return the documents of a text file, or of all text files in a folder.

    A file is one document; .jsonl is one per line and .json a list of them, each a string or an
    object with a "text". Any of them may be compressed (.xz).

    Args:
        source: the file, of any name unless it is JSON, or a folder: its files of known suffixes.

    Raises:
        CalibrationError: nothing there, or it cannot be read as UTF-8 text or JSON.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
        if not files:
            raise CalibrationError(f"`{source}` holds no text: expected {', '.join(_SUFFIXES)}.")
        return [text for file in files for text in read_documents(file)]
    if not path.is_file():
        raise CalibrationError(f"`{source}` does not exist; expected a text file or a folder.")
    try:
        content = path.read_bytes()
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
        kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
        if kind == ".jsonl":
            return [_text_of(json.loads(line)) for line in text.splitlines() if line.strip()]
        if kind == ".json":
            return [_text_of(entry) for entry in json.loads(text)]
    except (OSError, ValueError, TypeError, KeyError, lzma.LZMAError) as error:
        raise CalibrationError(
            f"`{source}` cannot be read ({type(error).__name__}: {error}); expected UTF-8 text, or "
            'JSON of strings or objects with a "text".'
        ) from error
    return [text]


def _text_of(entry: Any) -> str:
    text = entry if isinstance(entry, str) else entry["text"]
    if not isinstance(text, str):
        raise TypeError(f'"text" is {type(text).__name__}')
    return text


def sample_windows(
    documents: Collection[str],
    tokenizer: Any,
    samples: int = SAMPLES,
    sequence: int = SEQUENCE,
    seed: int = 0,
) -> Tensor:
    """Tokenise random pieces of text and pack them into windows, each opened by the BOS token.

    Documents are cut into pieces, the pieces shuffled, tokenised one after the other without
    special tokens and joined, until there are enough. So only as much is tokenised as is used.

    Args:
        documents: from `read_documents`.
        tokenizer: a transformers tokenizer; without a BOS token windows have none.
        samples: windows wanted.
        sequence: tokens per window, the BOS token included.
        seed: of the shuffle.

    Returns:
        int64, shape (samples, sequence), on the CPU.

    Raises:
        CalibrationError: too little text, or it tokenises to nothing.
    """
    if samples < 1 or sequence < 2:
        raise CalibrationError(
            f"`samples` is {samples} and `sequence` is {sequence}; expected at least 1 and 2."
        )
    length = _CHARACTERS * sequence
    pieces = [text[i : i + length] for text in documents for i in range(0, len(text), length)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    needed = samples * (sequence - len(bos))
    ids: list[int] = []
    for i in order:
        ids += tokenizer(pieces[i], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed:
            break
    if not ids:
        raise CalibrationError(
            f"The calibration text ({sum(map(len, documents))} characters) tokenises to nothing. "
            "Give another text."
        )
    if len(ids) < needed:
        raise CalibrationError(
            f"The calibration text has {len(ids)} tokens; {samples} samples of {sequence} take "
            f"{needed}. Give more text, or fewer or shorter samples (`--samples`, `--sequence`)."
        )
    body = torch.tensor(ids[:needed], dtype=torch.int64, device="cpu").view(samples, -1)
    start = torch.tensor(bos, dtype=torch.int64, device="cpu").expand(samples, -1)
    return torch.cat((start, body), 1)


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Check that windows of tokens fit a model.

    Args:
        model: a transformers model; what its config does not say is not checked.
        windows: int64, shape (samples, sequence), from `sample_windows`.

    Raises:
        CalibrationError: not int64 (samples, sequence), longer than the model's context, or a token
            beyond its vocabulary.
    """
    if windows.ndim != 2 or windows.dtype != torch.int64 or not windows.numel():
        raise CalibrationError(
            f"`calibration` is {windows.dtype} of shape {tuple(windows.shape)}; expected int64 "
            "token ids (samples, sequence), from `flute.calibration.sample_windows`."
        )
    config: Any = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    if context and windows.shape[1] > context:
        raise CalibrationError(
            f"Calibration windows have {windows.shape[1]} tokens; the model's context is "
            f"{context}. Use shorter ones (`--sequence`)."
        )
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary and int(windows.max()) >= vocabulary:
        raise CalibrationError(
            f"The tokenizer gives id {int(windows.max())}; the model knows {vocabulary} tokens."
        )
