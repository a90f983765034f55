"""Compiled kernels on disk, shared by processes. Knows nothing of what they compute.

    <folder>/<key>.cubin   machine code, readable by cuobjdump; of a CPU: .so, a shared library
             <key>.cu      the source it came from; of a CPU: .c
             <key>.json    symbol, SHA-256 of the machine code, compiler's report: written last
             <key>.lock    held while one process compiles

Concurrency contract: files are written under a temporary name and renamed, so a reader sees all of
one or none; one process compiles a key while others wait for it; a killed writer leaves nothing
that counts, and its lock dies with it. Failures are never cached. An entry that does not agree with
its checksum is deleted, warned about once, and rebuilt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from flute.jit.compiler import Cubin, KernelCompileError, Source, compile_cubin, key_of

ENVIRONMENT = "FLUTE_CACHE_DIR"


def default_folder() -> Path:
    """Return $FLUTE_CACHE_DIR, or flute/kernels in $XDG_CACHE_HOME (~/.cache)."""
    if os.environ.get(ENVIRONMENT):
        return Path(os.environ[ENVIRONMENT]).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "flute" / "kernels"


def load_or_compile(
    source: Source,
    arch: str,
    folder: Path | None = None,
    compile_: Callable[[Source, str], Cubin] = compile_cubin,
    key: str | None = None,
    endings: tuple[str, str] = (".cu", ".cubin"),
) -> Cubin:
    """Return a compiled kernel, from the cache if it is there.

    Args:
        source: the kernel.
        arch: real architecture, such as "sm_90a".
        folder: of the cache; `default_folder` if None. Where it cannot be written, the kernel is
            compiled anew each time, with one warning.
        compile_: compiles on a miss.
        key: of the entry, of everything the machine code depends on; `key_of` if None.
        endings: of the files of source and machine code.

    Raises:
        KernelCompileError: the compiler's log; the source is kept under ``failed/`` in the folder.
    """
    folder = default_folder() if folder is None else folder
    key = key or key_of(source, arch)
    found = _read(folder, key, endings[1])
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f"{key}.lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        warnings.warn(
            f"The kernel cache `{folder}` cannot be written ({error.strerror}); kernels are "
            f"compiled in every process. Set {ENVIRONMENT} to a folder that can.",
            stacklevel=2,
        )
        return compile_(source, arch)
    with lock, _exclusive(lock):
        found = _read(folder, key, endings[1])  # another process may have been faster
        if found is None:
            found = _compile_into(folder, key, source, arch, compile_, endings)
    return found


def _compile_into(
    folder: Path,
    key: str,
    source: Source,
    arch: str,
    compile_: Callable[[Source, str], Cubin],
    endings: tuple[str, str],
) -> Cubin:
    try:
        cubin = compile_(source, arch)
    except KernelCompileError as error:
        kept = folder / "failed" / f"{key}{endings[0]}"
        kept.parent.mkdir(exist_ok=True)
        _write(kept, source.text.encode())
        raise KernelCompileError(f"{error}\nSource kept at {kept}") from error
    _write(folder / f"{key}{endings[0]}", source.text.encode())
    _write(folder / f"{key}{endings[1]}", cubin.code)
    entry = {
        "name": source.name,
        "arch": arch,
        "symbol": cubin.symbol,
        "sha256": hashlib.sha256(cubin.code).hexdigest(),
        "log": cubin.log,
    }
    _write(folder / f"{key}.json", json.dumps(entry, indent=1).encode())
    return cubin


def _read(folder: Path, key: str, ending: str) -> Cubin | None:
    """Return a valid entry; remove an invalid one, with a warning."""
    entry_path, code_path = folder / f"{key}.json", folder / f"{key}{ending}"
    try:
        text = entry_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = _parse(text, code_path)
    if found is None:
        warnings.warn(
            f"The cached kernel `{code_path}` is corrupt; it is compiled again.", stacklevel=3
        )
        for path in (entry_path, code_path):
            with contextlib.suppress(OSError):
                path.unlink()
    return found


def _parse(text: bytes, code_path: Path) -> Cubin | None:
    try:
        entry = json.loads(text)
        code = code_path.read_bytes()
        valid = hashlib.sha256(code).hexdigest() == entry["sha256"]
        return Cubin(code, entry["symbol"], entry["log"]) if valid else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _exclusive(file: object) -> Iterator[None]:
    """Hold a file's lock; it is released when the file closes, also by a process that dies."""
    with contextlib.suppress(ImportError):  # Windows: processes may compile the same kernel twice
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)  # type: ignore[arg-type]
    yield
