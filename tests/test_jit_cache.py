"""The cache of compiled kernels: its contract, by processes that race, die and damage it."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings

import pytest
from helpers import python, run_python

from flute.jit.cache import default_folder, load_or_compile
from flute.jit.compiler import Cubin, KernelCompileError, Source, key_of

TEXT = 'extern "C" __global__ void f() {}'


@pytest.fixture
def source(tmp_path):
    """A kernel with one header."""
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "a.cuh").write_text("// one")
    return Source(TEXT, "f", headers)


class Compiler:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source, arch):
        self.calls += 1
        return Cubin(b"code of " + source.text.encode(), "symbol", "log")


def test_compiled_once_then_read(source, tmp_path):
    compiler, folder = Compiler(), tmp_path / "cache"
    first = load_or_compile(source, "sm_90a", folder, compiler)
    assert load_or_compile(source, "sm_90a", folder, compiler) == first
    assert compiler.calls == 1
    key = key_of(source, "sm_90a")
    assert (folder / f"{key}.cu").read_text() == TEXT
    assert (folder / f"{key}.cubin").read_bytes() == first.code
    entry = json.loads((folder / f"{key}.json").read_text())
    assert (entry["arch"], entry["symbol"]) == ("sm_90a", "symbol")
    assert not list(folder.glob(".*"))


def test_the_key_is_made_of_contents(source, tmp_path):
    key = key_of(source, "sm_90a")
    assert key_of(source, "sm_80") != key
    assert key_of(Source(TEXT + " ", "f", source.headers), "sm_90a") != key
    assert key_of(Source(TEXT, "g", source.headers), "sm_90a") != key
    header = source.headers / "a.cuh"
    os.utime(header, (1, 1))
    assert key_of(source, "sm_90a") == key
    header.write_text("// two")
    assert key_of(source, "sm_90a") != key
    header.write_text("// one")
    (source.headers / "b.cuh").write_text("")
    assert key_of(source, "sm_90a") != key


@pytest.mark.parametrize("damage", ["code", "entry", "no code", "not json", "binary", "no sha"])
def test_a_corrupt_entry_is_warned_about_and_rebuilt(source, tmp_path, damage):
    compiler, folder = Compiler(), tmp_path / "cache"
    first = load_or_compile(source, "sm_90a", folder, compiler)
    key = key_of(source, "sm_90a")
    code, entry = folder / f"{key}.cubin", folder / f"{key}.json"
    if damage == "code":
        code.write_bytes(b"x")
    elif damage == "no code":
        code.unlink()
    else:
        content = {"entry": b"{", "not json": b"[1]", "binary": b"\xff\xfe", "no sha": b"{}"}[
            damage
        ]
        entry.write_bytes(content)
    with pytest.warns(UserWarning, match=r"is corrupt; it is compiled again"):
        assert load_or_compile(source, "sm_90a", folder, compiler) == first
    assert compiler.calls == 2
    assert load_or_compile(source, "sm_90a", folder, compiler) == first
    assert compiler.calls == 2


def test_a_failure_is_kept_for_people_and_not_cached(source, tmp_path):
    folder = tmp_path / "cache"

    def refuse(source, arch):
        raise KernelCompileError("NVRTC failed")

    for _ in range(2):
        with pytest.raises(KernelCompileError, match=r"NVRTC failed\nSource kept at .*failed") as e:
            load_or_compile(source, "sm_90a", folder, refuse)
    assert str(folder) in str(e.value)
    key = key_of(source, "sm_90a")
    assert (folder / "failed" / f"{key}.cu").read_text() == TEXT
    assert not (folder / f"{key}.json").exists()
    compiler = Compiler()
    load_or_compile(source, "sm_90a", folder, compiler)
    assert compiler.calls == 1


def test_a_folder_that_cannot_be_written_warns_and_compiles(source, tmp_path):
    (tmp_path / "file").write_text("")  # also for root, whom no permission stops
    compiler = Compiler()
    with pytest.warns(UserWarning, match=r"cannot be written .* Set FLUTE_CACHE_DIR"):
        cubin = load_or_compile(source, "sm_90a", tmp_path / "file" / "cache", compiler)
    assert cubin.symbol == "symbol"


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("FLUTE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "flute" / "kernels"


CHILD = """
import sys, time, warnings
from pathlib import Path
from flute.jit.cache import load_or_compile
from flute.jit.compiler import Cubin, Source
warnings.simplefilter("error")
folder, headers, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
def compile_(source, arch):
    with open(log, "a") as file:
        file.write("compiling\\n")
    time.sleep(float(seconds))
    return Cubin(b"code" * 100000, "symbol", "log")
cubin = load_or_compile(Source("text", "f", headers), "sm_90a", folder, compile_)
assert cubin.code == b"code" * 100000 and cubin.symbol == "symbol"
"""


def test_racing_processes_compile_once(source, tmp_path):
    arguments = (tmp_path / "cache", source.headers, tmp_path / "log", 0.5)
    children = [python(CHILD, *arguments) for _ in range(4)]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
    assert (tmp_path / "log").read_text() == "compiling\n"


def test_a_killed_writer_leaves_nothing_that_counts(source, tmp_path):
    arguments = (tmp_path / "cache", source.headers, tmp_path / "log")
    child = python(CHILD, *arguments, 60)
    deadline = time.monotonic() + 100
    while not (tmp_path / "log").exists():
        assert time.monotonic() < deadline, "the child never compiled"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    run_python(CHILD, *arguments, 0)  # does not wait for the dead one's lock
    assert (tmp_path / "log").read_text() == "compiling\n" * 2


def test_import_loads_no_compiler():
    run_python(
        "import sys, flute; assert not [m for m in sys.modules if m.startswith('flute.jit')]"
    )


THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from flute.jit.cache import load_or_compile
from flute.jit.compiler import Source
sys.setswitchinterval(1e-5)
folder = Path(sys.argv[1])
text = 'extern "C" __global__ void f() {}'
sources = [Source(text + " " * i, "f", folder) for i in range(16)]
with ThreadPoolExecutor(16) as pool:
    futures = [pool.submit(load_or_compile, source, "sm_90a", folder) for source in sources]
assert all(future.result().symbol == "f" for future in futures)
"""


def test_threads_compile_in_a_fresh_process(tmp_path):
    run_python(THREADS, tmp_path)


def test_a_real_kernel_from_the_cache(source, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = load_or_compile(source, "sm_90a", tmp_path / "cache")
        assert load_or_compile(source, "sm_90a", tmp_path / "cache") == first
    assert first.symbol == "f"
    assert first.code.startswith(b"\x7fELF")
