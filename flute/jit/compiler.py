"""NVRTC through cuda-core: CUDA C++ text -> cubin. Owns options, error text and the key's parts.

Source (text, name expression, headers) + arch --key--> cache.py --miss--> compile --> Cubin
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flute.errors import FluteError, UnsupportedProblemError

OPTIONS: Mapping[str, Any] = {
    "std": "c++17",
    "lineinfo": True,
    "device_as_default_execution_space": True,
}
"""What every kernel is compiled with, besides the architecture and the headers' folder."""
_importing = threading.Lock()
"""cuda-core fills its own modules while it is imported: a second thread would find them empty."""
_SCHEMA = 1
"""Raised when what a cache entry means changes."""


class KernelCompileError(FluteError, RuntimeError):
    """A compiler refused a kernel; the message holds its log and where the source was kept."""


@dataclass(frozen=True)
class Source:
    """A kernel's text.

    Args:
        text: CUDA C++ that includes headers of ``headers`` and instantiates one kernel.
        name: name expression of that kernel, such as "flute::decode<Config>".
        headers: folder of the headers; every file in it belongs to the key.
    """

    text: str
    name: str
    headers: Path


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: machine code, symbol of the name expression, assembler's report."""

    code: bytes
    symbol: str
    log: str


def key_of(source: Source, arch: str) -> str:
    """Return the SHA-256, in hex, of everything that the machine code depends on.

    Contents only, never dates or paths: schema, headers, text, name, options, architecture and the
    version of NVRTC.
    """
    headers = {path.name: path.read_text() for path in sorted(source.headers.glob("*.cuh"))}
    parts = [_SCHEMA, headers, source.text, source.name, dict(OPTIONS), arch, nvrtc_version()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def nvrtc_version() -> str:
    """Return NVRTC's version, such as "13.0".

    Raises:
        UnsupportedProblemError: cuda-core or NVRTC is not installed.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise UnsupportedProblemError(
            "Compiling kernels needs cuda-core and NVRTC: `pip install 'cuda-core[cu13]'`."
        ) from error
    try:
        error_code, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # its library is not found
        raise UnsupportedProblemError(f"NVRTC cannot be loaded: {error}") from error
    if int(error_code):
        raise UnsupportedProblemError(f"NVRTC cannot be used (error {int(error_code)}).")
    return f"{major}.{minor}"


def compile_cubin(source: Source, arch: str) -> Cubin:
    """Compile a kernel for one architecture, in about a second.

    Args:
        source: the kernel.
        arch: real architecture, such as "sm_90a".

    Raises:
        KernelCompileError: NVRTC's log, and the source.
    """
    with _importing:
        from cuda.core import Program, ProgramOptions

    nvrtc_version()
    log = io.StringIO()
    options = ProgramOptions(
        arch=arch, include_path=str(source.headers), ptxas_options=["-v"], **OPTIONS
    )
    try:
        program = Program(source.text, code_type="c++", options=options)
        compiled = program.compile("cubin", name_expressions=(source.name,), logs=log)
    except Exception as error:
        raise KernelCompileError(
            f"NVRTC failed for {source.name} on {arch}. Log:\n{log.getvalue() or error}"
        ) from error
    symbol = compiled.symbol_mapping[source.name]
    name = symbol.decode() if isinstance(symbol, bytes) else str(symbol)
    return Cubin(bytes(compiled.code), name, log.getvalue())
