"""Kernels compiled for the host and run by `tests/emulator/`, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT

from flute.jit.launch import Launcher
from flute.launchers import KERNELS

CXX = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
_libraries: dict[str, ctypes.CDLL] = {}


def compile_for_host(text: str, kernel: str, params: str, folder: Path) -> ctypes.CDLL:
    """Compile a kernel with the emulator, once.

    Args:
        text: the kernel's source, as NVRTC gets it.
        kernel: its name expression.
        params: the structure that it takes.
        folder: an empty one.
    """
    if text in _libraries:
        return _libraries[text]
    assert CXX is not None, "marked by needs_compiler"
    for header in KERNELS.glob("*.cuh"):
        shutil.copy(header, folder)
    shutil.copy(ROOT / "tests" / "emulator" / "ptx.cuh", folder)
    defines = f"#define EMULATED_KERNEL {kernel}\n#define EMULATED_PARAMS {params}\n"
    (folder / "kernel.h").write_text(text + defines)
    library = folder / "kernel.so"
    source = ROOT / "tests" / "emulator" / "emulator.cpp"
    command = [CXX, "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{folder}"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    _libraries[text] = ctypes.CDLL(str(library))
    return _libraries[text]


def run_on_host(
    library: ctypes.CDLL, launcher: Launcher, pointers: Sequence[int], *, early: bool = False
) -> list[int]:
    """Do what a launch would; returns wavefronts of reads, writes, ldmatrix, and the least."""
    params = bytearray(launcher.params + bytes(-len(launcher.params) % 8))  # as it is laid out
    for slot, pointer in zip(launcher.slots, pointers, strict=True):
        params[slot : slot + 8] = pointer.to_bytes(8, "little")
    x, y, _, num_threads, _, _, smem_bytes = launcher._launch_shape
    counts = (ctypes.c_longlong * 6)()
    raw = (ctypes.c_char * len(params)).from_buffer(params)
    shape = (x, y, num_threads, smem_bytes, int(early))
    library.run_grid(raw, len(params), *shape, ctypes.byref(counts))
    return list(counts)
