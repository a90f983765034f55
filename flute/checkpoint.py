"""Reading checkpoints on disk: names, shapes, rows, checksums. Knows nothing of quantisation.

    folder/ config.json  model.safetensors | model-0000i-of-0000n.safetensors + index  side files

Tensors are read in blocks of rows and each file is opened per read, so that memory stays bounded by
the block, not by what has been mapped so far.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flute.errors import CheckpointError, ChecksumError

INDEX_NAME = "model.safetensors.index.json"
CHECKSUM_METADATA = "flute_crc32"
"""Key under which `save_pretrained` keeps checksums in a file's header (it writes no index)."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""torch dtype -> its name in the safetensors format."""


def is_hub_name(source: str | Path) -> bool:
    """Tell whether a model's name is one on the Hub, "team/model", and no path on this machine."""
    name = str(source)
    is_path = name.startswith((".", "~", "/")) or name.endswith("/") or Path(source).exists()
    return name.count("/") == 1 and not is_path


class CheckpointReader:
    """A folder of safetensors files with a config.json.

    Args:
        directory: the folder.
        files: the weight files to read; None finds them as transformers does: `model.safetensors`,
            or those that the index names.

    Raises:
        CheckpointError: the folder, its config.json, a shard or a tensor is missing, a file is
            truncated or not safetensors, or the weights are pickled; the message names the file.
    """

    def __init__(self, directory: str | Path, files: Sequence[Path] | None = None) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(
                f"`{directory}` is not a folder; expected a model checkpoint, or the name of a "
                "model on the Hub, `team/model`."
            )
        self.config: dict[str, Any] = read_json(self.directory / "config.json")
        index = self.directory / INDEX_NAME
        self.index: dict[str, Any] = read_json(index) if index.exists() else {}
        single = self.directory / "model.safetensors"
        if files is None and single.exists():
            files = [single]
        self._files = self._find_files() if files is None else _tensors_of(files)
        self._info: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._aliases: dict[str, str] = {}
        for path in dict.fromkeys(self._files.values()):
            self._read_header(path)
        missing = sorted(set(self._files) - set(self._info))
        if missing:
            raise CheckpointError(
                f"`{INDEX_NAME}` lists {len(missing)} tensors that are not in their files, such as "
                f"`{missing[0]}`. Download the checkpoint again."
            )

    def _find_files(self) -> dict[str, Path]:
        index = self.directory / INDEX_NAME
        if index.exists():
            weight_map = self.index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"`{index}` has no `weight_map`. Download it again.")
            nameless = [name for name, file in weight_map.items() if not isinstance(file, str)]
            if nameless:
                raise CheckpointError(
                    f"`{index}` names no file for `{nameless[0]}`. Download it again."
                )
            files = {name: self.directory / file for name, file in weight_map.items()}
            absent = sorted({str(path) for path in files.values() if not path.exists()})
            if absent:
                raise CheckpointError(
                    f"{len(absent)} of {len(set(files.values()))} weight files are missing, such "
                    f"as `{absent[0]}`. Download the checkpoint again."
                )
            return files
        pickled = sorted(self.directory.glob("*.bin")) + sorted(self.directory.glob("*.pt*"))
        if pickled:
            raise CheckpointError(
                f"`{pickled[0]}` holds pickled weights, which are not read here. Save the model as "
                "safetensors first: `model.save_pretrained(folder)`."
            )
        raise CheckpointError(
            f"`{self.directory}` has neither `model.safetensors` nor `{INDEX_NAME}`."
        )

    def _read_header(self, path: Path) -> None:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a method of the library, not a dict)
                if self._files.get(name) != path:
                    continue
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"`{name}` in `{path}` is {part.get_dtype()}: unknown.")
                self._info[name] = (dtype, tuple(part.get_shape()))

    @property
    def names(self) -> list[str]:
        """All tensor names, file by file, sorted within a file."""
        order = {path: i for i, path in enumerate(dict.fromkeys(sorted(self._files.values())))}
        return sorted(self._info, key=lambda name: (order[self._files[name]], name))

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return sorted(set(self._files.values()))

    def alias(self, name: str, of: str) -> None:
        """Let a tensor be read under another name too, as a head that is tied to an embedding.

        Args:
            name: that no tensor has.
            of: the tensor's own.
        """
        self._info[name], self._files[name] = self._info[of], self._files[of]
        self._aliases[name] = of

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._info[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._info[name][1]

    def num_bytes(self, name: str) -> int:
        """Return the bytes a tensor takes in its file."""
        dtype, shape = self._info[name]
        return math.prod(shape) * dtype.itemsize

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor."""
        with open_safetensors(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(self._aliases.get(name, name))
            return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` (excluded) of a tensor's first dimension."""
        with open_safetensors(self._files[name]) as file:
            part: Tensor = file.get_slice(self._aliases.get(name, name))[start:stop]
            return part

    def blocks(self, name: str, max_bytes: int = 1 << 24) -> Iterator[Tensor]:
        """Yield a tensor in blocks of whole rows of about ``max_bytes``; a scalar in one piece."""
        shape = self.shape(name)
        if not shape or self.num_bytes(name) <= max_bytes:
            yield self.tensor(name)
            return
        rows = max(1, max_bytes * shape[0] // self.num_bytes(name))
        for start in range(0, shape[0], rows):
            yield self.rows(name, start, min(start + rows, shape[0]))

    def checksums(self) -> dict[str, str]:
        """Return tensor name -> recorded crc32 (8 hex digits); empty where none were recorded.

        What a file says of its own tensors counts before the index, which may be older.
        """
        recorded: dict[str, str] = {}
        for path in self.files:
            with open_safetensors(path) as file:
                recorded |= json.loads((file.metadata() or {}).get(CHECKSUM_METADATA, "{}"))
        if recorded:
            return {name: crc for name, crc in recorded.items() if name in self._info}
        in_index = (self.index.get("metadata") or {}).get("checksums") or {}
        return dict(in_index.get("tensors", {}))

    def crc32(self, name: str) -> str:
        """Return the crc32 of a tensor's bytes as they are on disk, 8 hex digits."""
        crc = 0
        for block in self.blocks(name):
            crc = zlib.crc32(tensor_bytes(block), crc)
        return f"{crc:08x}"


def verify_checksums(directory: str | Path, files: Sequence[Path] | None = None) -> int:
    """Compare every tensor of a checkpoint with the checksum recorded when it was written.

    Args:
        directory: a checkpoint folder.
        files: its weight files; None finds them.

    Returns:
        The number of tensors verified: 0 if the checkpoint records no checksums.

    Raises:
        ChecksumError: a tensor differs; the message names it and its file.
        CheckpointError: the folder cannot be read.
    """
    reader = CheckpointReader(directory, files)
    recorded = reader.checksums()
    missing = [name for name in recorded if name not in reader._info]
    if missing:
        raise ChecksumError(f"`{missing[0]}` has a checksum but is missing from `{directory}`.")
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # zlib lets other threads run
        for (name, expected), found in zip(
            recorded.items(), pool.map(reader.crc32, recorded), strict=True
        ):
            if found != expected:
                pool.shutdown(cancel_futures=True)
                raise ChecksumError(
                    f"`{name}` in `{reader._files[name]}` is corrupted: crc32 {found}, expected "
                    f"{expected}. Copy or download the file again."
                )
    return len(recorded)


def _tensors_of(files: Sequence[Path]) -> dict[str, Path]:
    return {name: path for path in files for name in tensor_names(path)}


def tensor_names(path: Path) -> list[str]:
    """Return the names of a safetensors file's tensors; only its header is read.

    Raises:
        CheckpointError: missing, truncated or not safetensors; the message names the file.
    """
    with open_safetensors(path) as file:
        return list(file.keys())


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        CheckpointError: missing, truncated or not safetensors; the message names the file.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"`{path}` cannot be read as safetensors ({error}); it may be truncated. "
            "Copy or download it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or not a JSON object; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"`{path}` does not exist; expected a model checkpoint there."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"`{path}` holds {type(content).__name__}; expected a JSON object.")
    return content


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row-major, as a file holds them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
