"""Lookups in registers, compiled for the host, against the layout that `kernel_order` states."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest
from emulated import CXX, needs_compiler
from helpers import ROOT


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registers")
    emulator, kernels = ROOT / "tests" / "emulator", ROOT / "flute" / "kernels"
    for header in ("element.cuh", "lookup.cuh", "register_lookup.cuh"):
        (folder / header).write_text((kernels / header).read_text())
    (folder / "ptx.cuh").write_text((emulator / "ptx.cuh").read_text())
    built = folder / "registers.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{folder}"]
    source = emulator / "registers.cpp"
    subprocess.run([CXX, *options, "-o", str(built), str(source)], check=True)
    return ctypes.CDLL(str(built))


def first_bit(num_bits: int, step: int, i: int, e: int) -> int:
    """Where the code of a word's step is: of pair i (bit 0: row g + 8, bit 1: k + 8), k + e."""
    if num_bits == 2:
        return 16 * step + 8 * (i >> 1) + 4 * e + 2 * (i & 1)
    return 8 * (i if num_bits == 4 else (i & 1) << 1 | i >> 1) + 4 * e


@needs_compiler
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_each_code_becomes_its_entry(library, num_bits):
    generator = np.random.default_rng(num_bits)
    entries = 2**num_bits
    # All bytes of an entry differ from all others', so that none can stand in for another.
    table = np.arange(2 * entries, dtype=np.uint16).reshape(entries, 2) * 7 + 3
    values = (table[:, 0] | table[:, 1] << 8).astype(np.uint32)
    pairs = np.ascontiguousarray(values[0::2] | values[1::2] << 16)
    words = generator.integers(0, 2**32, 4096, dtype=np.uint32)
    steps = 2 if num_bits == 2 else 1
    out = np.zeros((len(words), steps, 4), dtype=np.uint32)
    to = [a.ctypes.data_as(ctypes.c_void_p) for a in (pairs, words, out)]
    library.look_up(num_bits, to[0], to[1], len(words), to[2])
    for step in range(steps):
        for i in range(4):
            codes = [words >> first_bit(num_bits, step, i, e) & (entries - 1) for e in (0, 1)]
            assert (out[:, step, i] == (values[codes[0]] | values[codes[1]] << 16)).all()
