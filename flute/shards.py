"""Where each tensor of a checkpoint lies: files, their headers, offsets. Writes nothing.

    units (tensors, and what produces them) -> shards (file, header, offset of each tensor)

The layout follows from the list of tensors, so it is known before the first byte is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute.checkpoint import DTYPE_NAMES


@dataclass(frozen=True)
class OutputTensor:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that is resumed: some tensors and what produces them.

    Args:
        name: unique among the units.
        outputs: the tensors it writes.
        produce: yields (output name, consecutive rows of it) until all outputs are complete; must
            yield the same bytes each time.
        num_weights: counted by the progress bar.
    """

    name: str
    outputs: tuple[OutputTensor, ...]
    produce: Callable[[], Iterator[tuple[str, Tensor]]]
    num_weights: int


@dataclass(frozen=True)
class Shard:
    """One file.

    Args:
        file: its name.
        header: the bytes before the first tensor.
        offsets: tensor's name -> where it starts, bytes from the beginning of the file.
        num_bytes: of the whole file.
    """

    file: str
    header: bytes
    offsets: Mapping[str, int]
    num_bytes: int


def lay_out(units: Sequence[Unit], max_shard_bytes: int) -> list[Shard]:
    """Return the files of a checkpoint, units in order, of which none is parted.

    Args:
        units: the work.
        max_shard_bytes: start a new file beyond this size.
    """
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for unit in units:
        num_bytes = sum(tensor.num_bytes for tensor in unit.outputs)
        if groups[-1] and size + num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].extend(unit.outputs)
        size += num_bytes
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = ["model.safetensors"] if count == 1 else names
    return [_lay_out_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _lay_out_shard(file: str, tensors: Sequence[OutputTensor]) -> Shard:
    """Wide dtypes first, so that every tensor is aligned to its item size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    position = 0
    for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):
        end = position + tensor.num_bytes
        starts[tensor.name] = position
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(file, header, offsets, len(header) + position)


def is_intact(folder: Path, shard: Shard) -> bool:
    """Tell whether a file has its size and header; its tensors are another matter."""
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    with open(path, "rb") as file:
        return file.read(len(shard.header)) == shard.header
