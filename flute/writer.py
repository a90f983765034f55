"""Writing checkpoints: streamed, atomic, resumable. Knows files, nothing of quantisation.

    OUT.partial/                              rename            OUT/
      *.safetensors  preallocated, filled    -------->           config.json  README.md  tokenizer
      .flute-journal  a line per finished unit                   *.safetensors
      (config.json and side files last)                          *.index.json with checksums

The layout of every file (`shards.py`) is fixed before the first byte.
Work is done in units (one source tensor each); a unit's line goes to the journal once its bytes are
written. After a crash the next run checks the recorded units by checksum and goes on; the result is
byte for byte that of an uninterrupted run. Nothing appears under the final name before everything
is in place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flute.checkpoint import INDEX_NAME, tensor_bytes
from flute.errors import CheckpointError, FormatError
from flute.shards import OutputTensor, Shard, Unit, is_intact, lay_out

MAX_SHARD_BYTES = 5 * 10**9
JOB_NAME = ".flute-job"
"""Holds the fingerprint of the job that wrote a folder, so that running it again is recognised."""
_JOURNAL, _LOCK = ".flute-journal", ".flute-lock"


class Progress(Protocol):
    """What reports how far the work has come."""

    def start(self, total: int, done: int) -> None:
        """Announce the number of weights in all, and how many an earlier run has done."""

    def advance(self, count: int, name: str) -> None:
        """Report that ``count`` more weights are done, those of unit ``name``."""


def write_checkpoint(
    destination: str | Path,
    units: Sequence[Unit],
    side_files: Mapping[str, bytes],
    fingerprint: Mapping[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a checkpoint folder, resuming an interrupted run of the same job; return the folder.

    Args:
        destination: the folder to create; it must not exist, or be empty, unless ``overwrite``.
        units: the work, in the order of the files.
        side_files: name -> content of all other files.
        fingerprint: JSON-serialisable description of the job: an interrupted run is resumed only if
            its fingerprint was the same, and a finished one is not done again.
        overwrite: replace the folder, if it is a checkpoint, and drop an interrupted run of another
            job; the old folder stays until the new one is complete.
        progress: told about finished units.
        max_shard_bytes: start a new file beyond this size.

    Raises:
        CheckpointError: the folder is occupied, another process writes it, the interrupted run was
            of another job, the disk is full, or a unit produced other bytes than it announced.
    """
    destination = Path(destination).resolve()
    shards = lay_out(units, max_shard_bytes)
    job = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    if _is_occupied(destination, overwrite) and not overwrite:
        marker = destination / JOB_NAME
        is_done = marker.is_file() and marker.read_text(errors="replace").strip() == job
        if not (is_done and all(is_intact(destination, shard) for shard in shards)):
            raise _occupied(destination)
        _tidy(destination)
        return destination
    partial = staging_folder(destination)
    with _locked(partial), _explain_full_disk(partial):
        finished = _resume(partial, job, units, shards, drop_others=overwrite)
        if not finished:
            _start(partial, job, shards)
        if progress:
            done = sum(unit.num_weights for unit in units if unit.name in finished)
            progress.start(sum(unit.num_weights for unit in units), done)
        try:
            _write_units(partial, units, shards, finished, progress)
        except FormatError:  # the source must change, and nothing done so far will fit it then
            shutil.rmtree(partial)
            raise
        _write_side_files(partial, side_files, shards, finished, job)
        _publish(partial, destination, overwrite)
    return destination


def staging_folder(destination: str | Path) -> Path:
    """Return the folder in which a checkpoint lies until it is complete."""
    folder = Path(destination).resolve()
    return folder.with_name(folder.name + ".partial")


def _start(partial: Path, job: str, shards: Sequence[Shard]) -> None:
    """Empty the staging folder and reserve the disk space of all files."""
    for path in partial.iterdir():
        if path.name != _LOCK:
            path.unlink()
    needed = sum(shard.num_bytes for shard in shards)
    free = shutil.disk_usage(partial).free
    if needed > free:
        shutil.rmtree(partial)
        raise CheckpointError(
            f"The disk of `{partial.parent}` has {free / 1e9:.2f} GB free; {needed / 1e9:.2f} GB "
            "are needed. Nothing was written."
        )
    for shard in shards:
        _allocate(partial, shard)
    (partial / _JOURNAL).write_text(json.dumps({"job": job}) + "\n")


def _allocate(partial: Path, shard: Shard) -> None:
    with open(partial / shard.file, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, shard.num_bytes)
        file.truncate(shard.num_bytes)
        file.write(shard.header)


def _resume(
    partial: Path, job: str, units: Sequence[Unit], shards: Sequence[Shard], *, drop_others: bool
) -> dict[str, dict[str, str]]:
    """Return unit -> checksums of the units an interrupted run finished, having verified them."""
    interrupted_job, recorded = _read_journal(partial / _JOURNAL)
    if interrupted_job is None or (interrupted_job != job and drop_others):
        return {}
    if interrupted_job != job:
        raise CheckpointError(
            f"`{partial}` holds an interrupted run of another job (other options, or the source "
            "has changed). Repeat that one, delete the folder, or discard it (`--overwrite`)."
        )
    for shard in shards:
        if not is_intact(partial, shard):
            _allocate(partial, shard)
    return {
        unit.name: recorded[unit.name]
        for unit in units
        if unit.name in recorded
        and all(
            _crc32_of(partial, tensor, shards) == recorded[unit.name].get(tensor.name)
            for tensor in unit.outputs
        )
    }


def _read_journal(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the job and unit -> checksums; lines that a crash cut short or garbled are skipped."""
    job: str | None = None
    units: dict[str, Any] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            if "job" in entry:
                job = job or str(entry["job"])
            else:
                units[entry["unit"]] = dict(entry["crc32"])
    return job, units


def _crc32_of(partial: Path, tensor: OutputTensor, shards: Sequence[Shard]) -> str:
    shard = next(shard for shard in shards if tensor.name in shard.offsets)
    crc, left = 0, tensor.num_bytes
    with open(partial / shard.file, "rb") as file:
        file.seek(shard.offsets[tensor.name])
        while left and (block := file.read(min(left, 1 << 24))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    return f"{crc:08x}"


def _write_units(
    partial: Path,
    units: Sequence[Unit],
    shards: Sequence[Shard],
    finished: dict[str, dict[str, str]],
    progress: Progress | None,
) -> None:
    """Write what is missing, a unit at a time, and record each; ``finished`` grows."""
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        place: dict[str, tuple[Any, int]] = {}
        for shard in shards:
            files[shard.file] = stack.enter_context(open(partial / shard.file, "r+b", buffering=0))
            place |= {name: (files[shard.file], at) for name, at in shard.offsets.items()}
        journal = stack.enter_context(open(partial / _JOURNAL, "a"))
        for unit in units:
            if unit.name in finished:
                continue
            finished[unit.name] = _write_unit(unit, place)
            journal.write("\n" + json.dumps({"unit": unit.name, "crc32": finished[unit.name]}))
            journal.flush()
            if progress:
                progress.advance(unit.num_weights, unit.name)
        for file in files.values():
            os.fsync(file.fileno())


def _write_unit(unit: Unit, place: Mapping[str, tuple[Any, int]]) -> dict[str, str]:
    crcs = {tensor.name: 0 for tensor in unit.outputs}
    written = {tensor.name: 0 for tensor in unit.outputs}
    dtypes = {tensor.name: tensor.dtype for tensor in unit.outputs}
    for name, rows in unit.produce():
        if rows.dtype != dtypes[name]:
            raise CheckpointError(f"`{name}` came as {rows.dtype}; announced was {dtypes[name]}.")
        block = tensor_bytes(rows)
        file, start = place[name]
        file.seek(start + written[name])
        sent = 0
        while sent < len(block):
            sent += file.write(block[sent:])
        crcs[name] = zlib.crc32(block, crcs[name])
        written[name] += len(block)
    for tensor in unit.outputs:
        if written[tensor.name] != tensor.num_bytes:
            raise CheckpointError(
                f"`{tensor.name}` came as {written[tensor.name]} bytes; announced were "
                f"{tensor.num_bytes}."
            )
    return {name: f"{crc:08x}" for name, crc in crcs.items()}


def _write_side_files(
    partial: Path,
    side_files: Mapping[str, bytes],
    shards: Sequence[Shard],
    finished: Mapping[str, Mapping[str, str]],
    job: str,
) -> None:
    checksums = {name: crc for crcs in finished.values() for name, crc in crcs.items()}
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    index = {
        "metadata": {
            "total_size": sum(shard.num_bytes - len(shard.header) for shard in shards),
            "checksums": {"algorithm": "crc32", "tensors": dict(sorted(checksums.items()))},
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    files = {**side_files, INDEX_NAME: (json.dumps(index, indent=2) + "\n").encode()}
    for name, content in {**files, JOB_NAME: job.encode() + b"\n"}.items():
        with open(partial / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _publish(partial: Path, destination: Path, overwrite: bool) -> None:
    """Give the finished folder its final name; an old one is removed only after that."""
    replaced = _is_occupied(destination, overwrite)
    if replaced and not overwrite:  # by someone else, while this ran
        raise _occupied(destination)
    try:
        if replaced:
            shutil.rmtree(_old(destination), ignore_errors=True)
            os.replace(destination, _old(destination))
        elif destination.exists():
            destination.rmdir()
        os.replace(partial, destination)
    except OSError as error:
        raise CheckpointError(
            f"`{partial}` is complete, but cannot be renamed to `{destination}` "
            f"({error.strerror}). Rename it yourself, or repeat the command for another folder."
        ) from error
    _tidy(destination)


def _tidy(destination: Path) -> None:
    """Remove what only mattered while the folder was being written."""
    for name in (_JOURNAL, _LOCK):
        (destination / name).unlink(missing_ok=True)
    shutil.rmtree(_old(destination), ignore_errors=True)


def _old(destination: Path) -> Path:
    return destination.with_name(destination.name + ".flute-old")


def _is_occupied(folder: Path, overwrite: bool) -> bool:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"`{folder}` is a file; expected a folder to create.")
    names = os.listdir(folder) if folder.is_dir() else []
    if overwrite and names and "config.json" not in names:
        why = "holds files, and no config.json: it is no checkpoint, and is not overwritten"
        raise CheckpointError(f"`{folder}` {why}. Choose another folder.")
    return bool(names)


def _occupied(destination: Path) -> CheckpointError:
    advice = "Choose another folder, or overwrite it (`--overwrite`)."
    return CheckpointError(f"`{destination}` exists and is not empty. {advice}")


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the staging folder against a second process; the lock dies with its owner."""
    lock = partial / _LOCK
    with contextlib.ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            if any(partial.iterdir()) and not lock.exists():
                raise CheckpointError(
                    f"`{partial}` is in the way: it holds files that flute did not write. Move it."
                )
            file = stack.enter_context(open(lock, "w"))
        except OSError as error:
            raise CheckpointError(f"`{partial}` cannot be created: {error.strerror}.") from error
        with contextlib.suppress(ImportError):  # Windows: no such lock
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except (BlockingIOError, FileNotFoundError):  # the latter: it has just finished
                is_ours = False
            if not is_ours:
                message = f"Another process is writing `{partial}`. Wait for it, or stop it."
                raise CheckpointError(message)
        yield


@contextlib.contextmanager
def _explain_full_disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(
            f"The disk of `{partial}` is full ({error.strerror}). What is finished is kept there: "
            "free some space and repeat the command to go on, or delete the folder."
        ) from error


def read_side_files(source: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint that hold no weights: tokenizer, licence, ...

    Left out: weights in any format, indices, the model card, code, hidden files and folders.
    """
    weights = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
    left_out = {"config.json", "README.md", INDEX_NAME, "flute_config.json"}
    return {
        path.name: path.read_bytes()
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix not in weights | {".py"}
        and path.name not in left_out
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    }
