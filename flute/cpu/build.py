"""Get the library of `flute/kernels/cpu`: the prebuilt one of the wheel, else compiled, once.

One shared library holds the variants for all kinds of CPU of one architecture; which runs is
decided when it is loaded. It needs libc and libm, nothing of Python or torch.

    prebuilt/<key>-<system>-<machine>.lib, if it is of these sources and whole -> ctypes
    *.c, one compiler run each, in parallel -> *.o -> library -> flute.jit.cache -> ctypes
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flute.cpu.targets import KERNELS, OPTIONS, SUMS, file_name, read_sources, this_target
from flute.errors import UnsupportedProblemError
from flute.jit.cache import load_or_compile
from flute.jit.compiler import Cubin, KernelCompileError, Source

_SCHEMA = 1
"""Raised when what the library's functions take changes but their text does not."""
_TIMEOUT = 300
"""Seconds a compiler may take; it takes about 6 of one core."""


def compiler() -> list[str]:
    """Return the command of the C compiler: ``$CC``, else cc, gcc or clang of ``$PATH``.

    Raises:
        UnsupportedProblemError: there is none.
    """
    given = shlex.split(os.environ.get("CC", ""))
    if given and shutil.which(given[0]):
        return given
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    named = f"; CC={os.environ['CC']} is not to be found" if given else ""
    raise UnsupportedProblemError(
        f"no C compiler (cc, gcc or clang) is on PATH{named}; install one, or set CC"
    )


def load(folder: Path | None = None) -> tuple[ctypes.CDLL, str]:
    """Return the library, prebuilt or compiled, and, for people, where it comes from.

    What is loaded are the bytes whose checksum was verified, not a file that may change meanwhile.

    Args:
        folder: of the cache; that of `flute.jit.cache` if None.

    Raises:
        UnsupportedProblemError: no compiler, or a system that cannot load what it makes.
        KernelCompileError: the compiler's log; the source is kept under ``failed/`` in the folder.
    """
    files = read_sources(KERNELS)
    prebuilt, why = _prebuilt(files)
    if prebuilt is not None:
        return prebuilt, "prebuilt"
    try:
        command = compiler()
    except UnsupportedProblemError as error:
        raise UnsupportedProblemError(f"{why}, and {error}") from error
    text = "".join(f"/* ---- {name} */\n{content}\n" for name, content in files.items())
    version = _run([*command, "--version"])
    parts = [_SCHEMA, files, OPTIONS, command, version, platform.system(), platform.machine()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    source = Source(text, "flute_cpu", KERNELS)
    found = load_or_compile(
        source, platform.machine(), folder, lambda *_: _compile(command), key, (".c", ".so")
    )
    return _load_bytes(found.code), f"compiled by {shlex.join(command)}: {why}"


def _prebuilt(files: dict[str, str]) -> tuple[ctypes.CDLL | None, str]:
    """The library that came with the package, or why there is none; a broken one warns."""
    folder, target = KERNELS / "prebuilt", this_target()
    path = folder / file_name(target, files)
    if not path.exists():
        if next(folder.glob(f"*-{target}.lib"), None) is not None:
            return None, "the prebuilt library is of other sources"
        return None, f"this install has no prebuilt library for {target}"
    try:
        code, sums = path.read_bytes(), (folder / SUMS).read_text()
        if f"{hashlib.sha256(code).hexdigest()}  {path.name}\n" not in sums:
            raise UnsupportedProblemError(f"its checksum is not that in {SUMS}")
        return _load_bytes(code), ""
    except (OSError, UnsupportedProblemError) as error:
        reason = f"the prebuilt library `{path}` is broken ({error})"
        warnings.warn(f"T{reason[1:]}; reinstall flute. A C compiler is tried.", stacklevel=5)
        return None, reason


def _compile(command: list[str]) -> Cubin:
    """Compile each file, as many at a time as there are cores (at most 8), and link them."""
    with tempfile.TemporaryDirectory(prefix="flute-cc-") as scratch:
        out = Path(scratch) / "flute_cpu.so"

        def compile_one(path: Path) -> tuple[str, str]:
            unit = str(Path(scratch) / f"{path.stem}.o")
            return unit, _run([*command, *OPTIONS, "-c", str(path), "-o", unit])

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            units = list(pool.map(compile_one, sorted(KERNELS.glob("*.c"))))
        log = "".join(text for _, text in units)
        log += _run([*command, "-shared", *(unit for unit, _ in units), "-lm", "-o", str(out)])
        return Cubin(out.read_bytes(), "flute_multiply", log)


def _run(command: list[str]) -> str:
    """Run a compiler and return what it printed.

    Raises:
        KernelCompileError: it failed, could not be started or took too long.
    """
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelCompileError(f"`{shlex.join(command)}` did not run: {error}") from error
    if done.returncode:
        raise KernelCompileError(
            f"`{shlex.join(command)}` failed with exit code {done.returncode}. Log:\n{done.stdout}"
        )
    return done.stdout


def _load_bytes(code: bytes) -> ctypes.CDLL:
    """Load a library from memory, or from a file that only this process knows."""
    try:
        if sys.platform == "linux":
            # NOTE: never closed: the loader knows a library by its path, so by this number.
            handle = os.memfd_create("flute_cpu")
            with os.fdopen(handle, "wb", closefd=False) as file:
                file.write(code)
            return ctypes.CDLL(f"/proc/self/fd/{handle}")
        handle, name = tempfile.mkstemp(prefix="flute_cpu-", suffix=".so")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(code)
            return ctypes.CDLL(name)
        finally:
            with contextlib.suppress(PermissionError):  # Windows keeps what is loaded
                os.unlink(name)
    except OSError as error:
        raise UnsupportedProblemError(
            f"the library cannot be loaded: {error}; is the C compiler one for this CPU?"
        ) from error
