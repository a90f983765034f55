"""Compiling the CPU kernels: finding a compiler, failures, the cache's contract."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, python, run_python

from flute.cpu import build, targets
from flute.errors import UnsupportedProblemError
from flute.jit.compiler import KernelCompileError

CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler")


@pytest.fixture
def one_file(tmp_path, monkeypatch):
    """A library of one function in place of the kernels: compiling those takes seconds."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.c").write_text("int flute_multiply(void) { return 7; }\n")
    monkeypatch.setattr(build, "KERNELS", folder)
    return folder


def fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "fakecc"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


@needs_compiler
def test_compiled_once_then_read(one_file, tmp_path, monkeypatch):
    assert build.load(tmp_path / "cache")[0].flute_multiply() == 7
    (library,) = (tmp_path / "cache").glob("*.so")
    assert (tmp_path / "cache" / f"{library.stem}.c").read_text().count("return 7") == 1
    monkeypatch.setattr(build, "_compile", None)
    assert build.load(tmp_path / "cache")[0].flute_multiply() == 7
    (one_file / "one.c").write_text("int flute_multiply(void) { return 8; }\n")
    with pytest.raises(TypeError):  # another text is another key
        build.load(tmp_path / "cache")


@needs_compiler
def test_a_corrupt_library_is_compiled_again(one_file, tmp_path):
    build.load(tmp_path / "cache")
    (library,) = (tmp_path / "cache").glob("*.so")
    library.write_bytes(library.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"\.so` is corrupt; it is compiled again"):
        assert build.load(tmp_path / "cache")[0].flute_multiply() == 7
    assert build.load(tmp_path / "cache")[0].flute_multiply() == 7


@needs_compiler
def test_a_folder_that_cannot_be_written(one_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cannot be written .* Set FLUTE_CACHE_DIR"):
        assert build.load(tmp_path / "file" / "cache")[0].flute_multiply() == 7


def test_the_users_compiler_counts_first(tmp_path, monkeypatch):
    path = fake_compiler(tmp_path, "exit 0\n")
    monkeypatch.setenv("CC", f"{path} -march=armv9-a")
    assert build.compiler() == [str(path), "-march=armv9-a"]
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedProblemError, match="CC=no-such-compiler is not to be found"):
        build.compiler()


def test_a_compiler_that_fails_is_quoted(one_file, tmp_path, monkeypatch):
    script = 'case "$*" in *--version*) echo 1;; *) echo "error: no"; exit 3;; esac\n'
    monkeypatch.setenv("CC", str(fake_compiler(tmp_path, script)))
    with pytest.raises(KernelCompileError, match=r"(?s)exit code 3\. Log:\nerror: no.*Source kept"):
        build.load(tmp_path / "cache")
    assert list((tmp_path / "cache" / "failed").glob("*.c"))
    assert not list((tmp_path / "cache").glob("*.json"))


def test_a_library_that_cannot_be_loaded_is_told():
    with pytest.raises(UnsupportedProblemError, match="is the C compiler one for this CPU"):
        build._load_bytes(b"not a library")


CHILD = """
import sys, time
from pathlib import Path
from flute.cpu import build, targets
build.KERNELS = Path(sys.argv[1])
compile_ = build._compile
def slow(command):
    with open(sys.argv[3], "a") as file:
        file.write("compiling\\n")
    time.sleep(float(sys.argv[4]))
    return compile_(command)
build._compile = slow
assert build.load(Path(sys.argv[2]))[0].flute_multiply() == 7
"""


@needs_compiler
def test_racing_processes_compile_once(one_file, tmp_path):
    arguments = (one_file, tmp_path / "cache", tmp_path / "log", 0.5)
    children = [python(CHILD, *arguments) for _ in range(3)]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
    assert (tmp_path / "log").read_text() == "compiling\n"


@needs_compiler
def test_a_killed_writer_leaves_nothing_that_counts(one_file, tmp_path):
    arguments = (one_file, tmp_path / "cache", tmp_path / "log")
    child = python(CHILD, *arguments, 60)
    deadline = time.monotonic() + 100
    while not (tmp_path / "log").exists():
        assert time.monotonic() < deadline, "the child never compiled"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    run_python(CHILD, *arguments, 0)
    assert (tmp_path / "log").read_text() == "compiling\n" * 2


def prebuild(folder, name=None, code=None):
    """Put what the compiler makes of the sources where a wheel has it."""
    files = targets.read_sources(folder)
    path = folder / "prebuilt" / (name or targets.file_name(targets.this_target(), files))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(code or build._compile(build.compiler()).code)
    entry = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    (path.parent / targets.SUMS).write_text(entry)
    return path


@needs_compiler
def test_a_prebuilt_library_needs_no_compiler(one_file, tmp_path, monkeypatch):
    prebuild(one_file)
    monkeypatch.setattr(build, "compiler", None)
    functions, origin = build.load(tmp_path / "cache")
    assert (functions.flute_multiply(), origin) == (7, "prebuilt")
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_a_prebuilt_library_of_other_sources_does_not_count(one_file, tmp_path):
    prebuild(one_file)
    (one_file / "one.c").write_text("int flute_multiply(void) { return 8; }\n")
    functions, origin = build.load(tmp_path / "cache")
    assert functions.flute_multiply() == 8
    assert origin.endswith(": the prebuilt library is of other sources")


@needs_compiler
@pytest.mark.parametrize("harm", ["bytes", "sums", "kind"])
def test_a_broken_prebuilt_library_warns_and_is_compiled(one_file, tmp_path, harm):
    path = prebuild(one_file, code=b"not a library" if harm == "kind" else None)
    if harm == "bytes":
        path.write_bytes(path.read_bytes()[:-100])
    elif harm == "sums":
        (path.parent / targets.SUMS).unlink()
    with pytest.warns(UserWarning, match=r"The prebuilt library .* is broken .*; reinstall flute"):
        functions, origin = build.load(tmp_path / "cache")
    assert functions.flute_multiply() == 7
    assert origin.startswith("compiled by ")


def test_without_both_the_error_names_both(one_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    expected = rf"no prebuilt library for {targets.this_target()}, and no C compiler"
    with pytest.raises(UnsupportedProblemError, match=expected):
        build.load(tmp_path / "cache")


def test_machines_have_one_name(monkeypatch):
    for system, machine in (("Windows", "AMD64"), ("Windows", "ARM64"), ("Darwin", "arm64")):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert targets.this_target() in targets.TARGETS
    assert {f"{s}-{m}" for s in ("linux", "darwin", "windows") for m in ("x86_64", "aarch64")} == {
        *targets.TARGETS
    }


MAGIC = {"linux": b"\x7fELF", "darwin": b"\xcf\xfa\xed\xfe", "windows": b"MZ"}


def test_the_wheel_build_compiles_for_all_systems(tmp_path):
    """Cross-compiling six libraries takes minutes: one file, which all compilers take."""
    pytest.importorskip("ziglang")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.c").write_text("int flute_multiply(void) { return 7; }\n")
    code = """
import importlib.util, pathlib, setuptools, sys
setuptools.setup = lambda **_: None
spec = importlib.util.spec_from_file_location("setup", sys.argv[1])
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)
targets = setup.load_targets()
targets.KERNELS = pathlib.Path(sys.argv[2])
targets.read_sources.__defaults__ = (targets.KERNELS,)
setup.load_targets = lambda: targets
setup.compile_all(pathlib.Path(sys.argv[3]))
"""
    run_python(code, ROOT / "setup.py", tmp_path / "kernels", tmp_path / "out")
    sums = (tmp_path / "out" / targets.SUMS).read_text()
    for target in targets.TARGETS:
        (path,) = (tmp_path / "out").glob(f"*-{target}.lib")
        content = path.read_bytes()
        assert content.startswith(MAGIC[target.partition("-")[0]])
        assert f"{hashlib.sha256(content).hexdigest()}  {path.name}\n" in sums


def test_the_instructions_found_are_those_the_system_tells():
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        pytest.skip("tells no flags of an x86-64")
    flags = set(info.read_text().partition("flags")[2].partition("\n")[0].split())
    library = build.load()[0]
    library.flute_variant_name.restype = ctypes.c_char_p
    needs = {
        b"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
        b"avx2": {"avx2", "fma", "f16c"},
        b"scalar": set(),
    }
    for i in range(3):
        usable = needs[library.flute_variant_name(i)] <= flags
        assert bool(library.flute_variant_usable(i)) == usable


@needs_compiler
def test_the_library_needs_nothing_of_python_or_torch(tmp_path):
    library, nothing = build.load()[0], ctypes.c_int64(0)
    assert library.flute_serial(nothing, nothing, nothing, None, None) == 0
    headers = {
        line.split()[1]
        for path in build.KERNELS.glob("*.[ch]")
        for line in path.read_text().splitlines()
        if line.startswith("#include")
    }
    assert headers <= {
        f"{mark[0]}{name}.h{mark[1]}"
        for mark, names in {
            "<>": (
                "stddef",
                "stdint",
                "string",
                "stdlib",
                "math",
                "stdatomic",
                "immintrin",
                "cpuid",
            ),
            '""': ("lut", "variant", "block", "steps", "rows"),
        }.items()
        for name in (*names, "arm_neon")
    }


def run_variants(command: list[str], run: list[str], folder: Path) -> str:
    """Compile `cpu_variants.c` with the kernels, run it, and return what it prints."""
    program = folder / "variants"
    sources = [str(ROOT / "tests" / "cpu_variants.c"), *map(str, build.KERNELS.glob("*.c"))]
    include = ["-I", str(build.KERNELS), "-lm", "-o", str(program)]
    subprocess.run([*command, *targets.OPTIONS, *sources, *include], check=True)
    done = subprocess.run([*run, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiler
def test_random_problems_by_all_variants_in_c(tmp_path):
    out = run_variants(build.compiler(), [], tmp_path)
    assert out.endswith(" problems, 0 failures\n")
    assert "scalar" in out


def test_random_problems_on_an_emulated_arm(tmp_path):
    """By NEON, where zig can compile for it and qemu run it: no ARM is needed."""
    pytest.importorskip("ziglang")
    emulator = next(filter(None, map(shutil.which, ("qemu-aarch64-static", "qemu-aarch64"))), None)
    if emulator is None:
        pytest.skip("no qemu-aarch64 on PATH")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    assert run_variants(zig, [emulator], tmp_path).startswith("neon scalar ")


def test_importing_the_layer_loads_no_compiler():
    code = "import sys, flute; assert 'flute.cpu.build' not in sys.modules; print('fine')"
    assert run_python(code) == "fine\n"
