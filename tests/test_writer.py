"""Writing checkpoints: crashes at every step, full disks, damaged leftovers, rivals."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
from helpers import folder_bytes, generator
from safetensors.torch import load_file

from flute import writer
from flute.checkpoint import INDEX_NAME, CheckpointReader, verify_checksums
from flute.errors import CheckpointError, FormatError
from flute.shards import OutputTensor, Unit
from flute.writer import read_side_files, write_checkpoint

SIDE_FILES = {"config.json": b'{"model_type": "llama"}', "README.md": b"# model\n"}
INTERNAL = {".flute-journal", ".flute-lock"}


def contents() -> dict[str, dict[str, torch.Tensor]]:
    """Unit -> tensors, of all widths, in an order that would misalign them."""
    rng = generator(0)
    return {
        "flags": {"flags": torch.tensor([True, False, True])},
        "a": {
            "a.codes": torch.randint(-99, 99, (40, 6), generator=rng, dtype=torch.int32),
            "a.scales": torch.randn(40, 3, generator=rng).half(),
            "a.table": torch.randn(1, 16, generator=rng),
        },
        "norm": {"norm": torch.randn(7, generator=rng).bfloat16()},
        "count": {"count": torch.tensor(3)},
        "empty": {"empty": torch.zeros(0, 4)},
        "b": {"b": torch.randn(50, 11, generator=rng).bfloat16()},
        "bytes": {"bytes": torch.arange(5, dtype=torch.uint8)},
        "c": {"c": torch.randn(9, 3, generator=rng)},
    }


def units(calls: list[str] | None = None, before=lambda name: None) -> list[Unit]:
    """Units that write `contents` in blocks of rows; ``calls`` takes the names of those run."""

    def produce(name, tensors):
        if calls is not None:
            calls.append(name)
        for key, tensor in tensors.items():
            rows = [tensor] if tensor.ndim < 1 else tensor.split(16)
            for block in rows:
                before(name)
                yield key, block

    return [
        Unit(
            name,
            tuple(OutputTensor(k, t.dtype, tuple(t.shape)) for k, t in tensors.items()),
            lambda name=name, tensors=tensors: produce(name, tensors),
            sum(t.numel() for t in tensors.values()),
        )
        for name, tensors in contents().items()
    ]


def write(folder: Path, work=None, *, job="one", side_files=SIDE_FILES, **kwargs) -> Path:
    kwargs.setdefault("max_shard_bytes", 1200)
    return write_checkpoint(folder, work or units(), side_files, {"job": job}, **kwargs)


@pytest.fixture(autouse=True)
def _do_not_wait_for_the_disk(monkeypatch):
    """No test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def expected(tmp_path) -> dict[str, bytes]:
    """Every file of an uninterrupted run."""
    return folder_bytes(write(tmp_path / "expected"))


class StopError(Exception):
    """Raised by a unit to interrupt a run."""


def interrupt(folder: Path, at: str, **kwargs) -> Path:
    """Run until unit ``at``; returns the staging folder."""

    def before(name):
        if name == at:
            raise StopError

    with pytest.raises(StopError):
        write(folder, units(before=before), **kwargs)
    assert not folder.exists()
    return folder.with_name(folder.name + ".partial")


def raises(message: str):
    return pytest.raises(CheckpointError, match=re.escape(message))


# ---- what is written


@pytest.mark.parametrize("max_shard_bytes", [1, 1200, 10**9])
def test_the_files_hold_the_tensors(tmp_path, max_shard_bytes):
    out = write(tmp_path / "new" / "out", max_shard_bytes=max_shard_bytes)
    assert out == tmp_path / "new" / "out"
    tensors = {key: t for group in contents().values() for key, t in group.items()}
    files = sorted(out.glob("*.safetensors"))
    count = {1: 8, 1200: 4, 10**9: 1}[max_shard_bytes]
    assert len(files) == count
    if count > 1:
        assert files[0].name == f"model-00001-of-{count:05d}.safetensors"
    else:
        assert files[0].name == "model.safetensors"
    loaded = {key: t for path in files for key, t in load_file(path).items()}
    assert set(loaded) == set(tensors)
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)
    assert {p.name for p in out.iterdir()} == {
        *SIDE_FILES,
        INDEX_NAME,
        writer.JOB_NAME,
        *(p.name for p in files),
    }
    for name, content in SIDE_FILES.items():
        assert (out / name).read_bytes() == content
    assert list(tmp_path.glob("**/*.partial")) == []


def test_the_index_tells_files_sizes_and_checksums(tmp_path):
    out = write(tmp_path / "out")
    index = json.loads((out / INDEX_NAME).read_text())
    tensors = {key: t for group in contents().values() for key, t in group.items()}
    assert set(index["weight_map"]) == set(tensors)
    for key, file in index["weight_map"].items():
        assert key in load_file(out / file)
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )
    assert index["metadata"]["checksums"]["algorithm"] == "crc32"
    assert verify_checksums(out) == len(tensors)
    reader = CheckpointReader(out)
    assert {name: reader.crc32(name) for name in tensors} == reader.checksums()


def test_tensors_are_aligned(tmp_path):
    for path in write(tmp_path / "out").glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        ends = [entry["data_offsets"][1] for entry in header.values()]
        assert max(ends) == len(content) - 8 - length
        for name, entry in header.items():
            width = next(
                u for group in contents().values() for k, u in group.items() if k == name
            ).element_size()
            assert (8 + length + entry["data_offsets"][0]) % width == 0


def test_two_runs_give_the_same_bytes(tmp_path, expected):
    assert folder_bytes(write(tmp_path / "again")) == expected


class Recorder:
    """A progress bar that only remembers."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def start(self, total: int, done: int) -> None:
        self.events.append(("start", total, done))

    def advance(self, count: int, name: str) -> None:
        self.events.append((name, count))


def test_progress_adds_up(tmp_path):
    sizes = {name: sum(t.numel() for t in group.values()) for name, group in contents().items()}
    recorder = Recorder()
    write(tmp_path / "out", progress=recorder)
    assert recorder.events == [("start", sum(sizes.values()), 0), *sizes.items()]


def test_progress_of_a_resumed_run(tmp_path):
    sizes = {name: sum(t.numel() for t in group.values()) for name, group in contents().items()}
    interrupt(tmp_path / "out", "count")
    recorder = Recorder()
    write(tmp_path / "out", progress=recorder)
    done = sizes["flags"] + sizes["a"] + sizes["norm"]
    names = ["count", "empty", "b", "bytes", "c"]
    assert recorder.events == [
        ("start", sum(sizes.values()), done),
        *((n, sizes[n]) for n in names),
    ]


# ---- crashes


class Faults:
    """Do something at the n-th step that touches the disk: before it, or half way through it."""

    def __init__(self, at: int, action) -> None:
        self.left, self.action = at, action

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def step(self, function):
        def stepped(*args, **kwargs):
            if self.due():
                self.action()
            return function(*args, **kwargs)

        return stepped

    def file(self, file):
        faults = self

        class Half:
            """Writes half of a block when its time has come."""

            def write(self, block):
                if faults.due():
                    file.write(block[: len(block) // 2])
                    file.flush()
                    faults.action()
                return file.write(block)

            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *args):
                file.close()

        return Half()

    def open(self, path, mode="r", **kwargs):
        if self.due():
            self.action()
        file = open(path, mode, **kwargs)  # noqa: SIM115 (the caller closes it)
        return file if mode in ("r", "rb") or "lock" in str(path) else self.file(file)

    def install(self, monkeypatch) -> None:
        """Patch all that `flute.writer` does to files."""
        monkeypatch.setattr(writer, "open", self.open, raising=False)
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (os, "posix_fallocate"),
            (shutil, "rmtree"),
            (Path, "mkdir"),
            (Path, "unlink"),
            (Path, "rmdir"),
            (Path, "write_text"),
        ):
            monkeypatch.setattr(owner, name, self.step(getattr(owner, name)))


def in_child(function) -> int:
    """Run a function in a forked process; returns its exit code."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:  # noqa: BLE001 (told by the exit code, whatever it is)
            traceback.print_exc()
            os._exit(1)
    killer = threading.Timer(60, os.kill, (pid, 9))
    killer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    killer.cancel()
    return code


def crash(at: int, function) -> bool:
    """Run in a process that dies, as by kill -9, at the n-th step; False if it ended before."""

    def child():
        with pytest.MonkeyPatch.context() as monkeypatch:
            Faults(at, lambda: os._exit(9)).install(monkeypatch)
            function()

    code = in_child(child)
    assert code in (0, 9)
    return code == 9


def visible(folder: Path) -> dict[str, bytes]:
    """What a folder holds but for the two files that are removed after the last rename."""
    return {name: data for name, data in folder_bytes(folder).items() if name not in INTERNAL}


def test_killed_at_any_step(tmp_path, expected):
    out = tmp_path / "out"
    for at in itertools.count(1):
        crashed = crash(at, lambda: write(out))
        if out.exists():
            assert visible(out) == expected
        assert folder_bytes(write(out)) == expected
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["expected", "out"]
        shutil.rmtree(out)
        if not crashed:
            break
    assert at > 60


@pytest.mark.parametrize("lives", [12, 17, 25, 40])
def test_killed_again_and_again(tmp_path, expected, lives):
    """Each run gets a little further, wherever the one before it died."""
    out = tmp_path / "out"
    for run in itertools.count():
        if not crash(lives + 3 * run, lambda: write(out)):
            break
    assert run >= 2
    assert folder_bytes(out) == expected


def test_killed_while_replacing_a_folder(tmp_path, expected):
    """At any moment the old folder, or the new one, is whole."""
    out, aside = tmp_path / "out", tmp_path / "out.flute-old"
    old = folder_bytes(write(tmp_path / "old", job="old"))
    for at in itertools.count(1):
        shutil.copytree(tmp_path / "old", out)
        crashed = crash(at, lambda: write(out, overwrite=True))
        if out.exists():
            assert visible(out) in (old, expected)
        else:
            assert folder_bytes(aside) == old
        if out.exists() and visible(out) == old:
            with raises("exists and is not empty"):
                write(out)
        assert folder_bytes(write(out, overwrite=True)) == expected
        assert {p.name for p in tmp_path.iterdir()} == {"expected", "old", "out"}
        shutil.rmtree(out)
        if not crashed:
            break


def test_a_finished_folder_is_recognised(tmp_path, expected):
    out = write(tmp_path / "out")
    calls: list[str] = []
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert write(out, units(calls)) == out
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps


@pytest.mark.parametrize("damage", ["missing", "short", "header"])
def test_a_finished_folder_that_was_damaged_is_not_called_finished(tmp_path, damage):
    out = write(tmp_path / "out")
    path = sorted(out.glob("*.safetensors"))[1]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:20] + b"x" + content[21:])
    with raises(f"`{out}` exists and is not empty. Choose another folder, or overwrite it"):
        write(out)


# ---- what an interrupted run leaves


def test_finished_units_are_not_done_again(tmp_path, expected):
    out = tmp_path / "out"
    interrupt(out, "b")
    calls: list[str] = []
    write(out, units(calls))
    assert calls == ["b", "bytes", "c"]
    assert folder_bytes(out) == expected


def test_nothing_is_under_the_final_name_before_the_end(tmp_path):
    out, seen = tmp_path / "out", []
    write(out, units(before=lambda name: seen.append(out.exists())))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_job_is_refused_or_replaces(tmp_path, expected, overwrite):
    out = tmp_path / "out"
    partial = interrupt(out, "b", job="another")
    left = folder_bytes(partial)
    if overwrite:
        assert folder_bytes(write(out, overwrite=True)) == expected
        return
    message = f"`{partial}` holds an interrupted run of another job (other options, or the source"
    with raises(message):
        write(out)
    assert folder_bytes(partial) == left
    write(out, job="another")
    assert out.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_job_goes_on(tmp_path, expected, overwrite):
    interrupt(tmp_path / "out", "b")
    calls: list[str] = []
    write(tmp_path / "out", units(calls), overwrite=overwrite)
    assert calls == ["b", "bytes", "c"]
    assert folder_bytes(tmp_path / "out") == expected


def test_a_journal_cut_anywhere(tmp_path, expected):
    out = tmp_path / "out"
    partial = interrupt(out, "bytes")
    shutil.copytree(partial, tmp_path / "kept")
    size = (partial / ".flute-journal").stat().st_size
    for length in range(0, size, 7):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", partial)
        os.truncate(partial / ".flute-journal", length)
        assert folder_bytes(write(out)) == expected
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\x00\x80",
        b"\x00" * 300,
        b"[]",
        b"3",
        b"null",
        b'"job"',
        b"{}",
        b'{"unit": "b"}',
        b'{"unit": ["b"], "crc32": {}}',
        b'{"unit": "b", "crc32": 5}',
        b'{"unit": "b", "crc32": {}}',
        b'{"unit": "b", "crc32": {"b": "00000000"}}',
        b'{"unit": "gone", "crc32": {"b": "00000000"}}',
    ],
)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_garbled_journal(tmp_path, expected, line, where):
    out = tmp_path / "out"
    journal = interrupt(out, "b") / ".flute-journal"
    content = journal.read_bytes()
    journal.write_bytes(line + b"\n" + content if where == "first" else content + b"\n" + line)
    calls: list[str] = []
    assert folder_bytes(write(out, units(calls))) == expected
    assert calls == ["b", "bytes", "c"]


def damage_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["last byte", "header", "short", "long", "empty", "missing"])
@pytest.mark.parametrize("shard", [0, 1, 2, 3])
def test_damaged_leftovers_are_done_again(tmp_path, expected, shard, damage):
    out = tmp_path / "out"
    partial = interrupt(out, "c")
    path = sorted(partial.glob("*.safetensors"))[shard]
    content = path.read_bytes()
    if damage == "last byte":
        damage_a_bit(path, -1)
    elif damage == "header":
        damage_a_bit(path, 30)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"short": content[:-3], "long": content + b"123", "empty": b""}[damage])
    calls: list[str] = []
    assert folder_bytes(write(out, units(calls))) == expected
    assert 1 <= len(calls) < len(contents())
    assert verify_checksums(out) == 10


def test_every_bit_of_finished_units_is_checked(tmp_path, expected):
    out = tmp_path / "out"
    partial = interrupt(out, "c")
    kept = folder_bytes(partial)
    for file in (f for f in kept if f.endswith(".safetensors")):
        for at in range(0, len(kept[file]), 101):
            for name, data in kept.items():
                partial.mkdir(exist_ok=True)
                (partial / name).write_bytes(data)
            damage_a_bit(partial / file, at)
            assert folder_bytes(write(out)) == expected
            shutil.rmtree(out)


def test_bad_input_leaves_nothing_behind(tmp_path):
    """The source must change then, and what is done would not fit it any more."""

    def before(name):
        if name == "b":
            raise FormatError("NaN in `b`")

    with pytest.raises(FormatError, match="NaN in `b`"):
        write(tmp_path / "out", units(before=before))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", job="repaired")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (torch.ones(9, 3).half(), "`c` came as torch.float16; announced was torch.float32."),
        (torch.ones(8, 3), "`c` came as 96 bytes; announced were 108."),
        (torch.ones(10, 3), "`c` came as 120 bytes; announced were 108."),
    ],
)
def test_a_unit_must_keep_its_word(tmp_path, block, message):
    broken = units()
    broken[-1] = Unit("c", broken[-1].outputs, lambda: iter([("c", block)]), 0)
    with raises(message):
        write(tmp_path / "out", broken)
    assert not (tmp_path / "out").exists()


# ---- full disks


def failure(function) -> CheckpointError | None:
    """The error a call ends in, if any; another kind passes through."""
    try:
        function()
    except CheckpointError as error:
        return error
    return None


def full(code: int):
    def action():
        raise OSError(code, os.strerror(code))

    return action


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_full_at_any_step(tmp_path, expected, code):
    """Steps that need no space (renames, removals) fail here too, which is more than fair."""
    out = tmp_path / "out"
    why = re.escape(os.strerror(code))
    message = f"The disk of `{out}.partial` is full \\({why}\\). What is finished is kept|cannot be"
    for at in itertools.count(1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(at, full(code))
            faults.install(monkeypatch)
            error = failure(lambda: write(out))
        assert error is None or re.search(message, str(error))
        assert error is not None or out.exists()
        if faults.left <= 0:
            assert not out.exists() or visible(out) == expected
        assert folder_bytes(write(out)) == expected
        shutil.rmtree(out)
        if faults.left > 0:
            break
    assert at > 60


def test_other_failures_of_the_disk_are_not_called_full(tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        Faults(20, full(errno.EIO)).install(monkeypatch)
        with pytest.raises(OSError, match="Input/output error"):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    calls: list[str] = []
    message = f"The disk of `{tmp_path}` has 0.00 GB free; 0.00 GB are needed. Nothing was written."
    with raises(message):
        write(tmp_path / "out", units(calls))
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_real_limit_on_file_sizes(tmp_path):
    """The kernel refuses the bytes, not a mock."""
    out, told = tmp_path / "out", tmp_path / "told"

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write(out)
        except CheckpointError as error:
            told.write_text(str(error))

    assert in_child(child) == 0
    assert told.read_text().startswith(f"The disk of `{out}.partial` is full (File too large).")
    assert not out.exists()
    write(out)


def test_short_writes_are_completed(tmp_path, expected, monkeypatch):
    """The system may take fewer bytes than it is offered."""

    class Short(io.FileIO):
        def write(self, block):
            return super().write(block[: max(1, len(block) // 3)])

    def short(path, mode="r", **kwargs):
        return Short(path, mode) if mode == "r+b" else open(path, mode, **kwargs)

    monkeypatch.setattr(writer, "open", short, raising=False)
    assert folder_bytes(write(tmp_path / "out")) == expected


def test_without_posix_fallocate(tmp_path, expected, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    assert folder_bytes(write(tmp_path / "out")) == expected


# ---- folders in the way


def test_an_occupied_folder_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    message = f"`{out}` exists and is not empty. Choose another folder, or overwrite it (`--overw"
    with raises(message):
        write(out)
    assert folder_bytes(tmp_path) == {"out/thesis.txt": b"years of work"}


def test_an_empty_folder_is_used(tmp_path, expected):
    (tmp_path / "out").mkdir()
    assert folder_bytes(write(tmp_path / "out")) == expected


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_place_of_the_folder(tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    with raises(f"`{tmp_path / 'out'}` is a file; expected a folder to create."):
        write(tmp_path / "out", overwrite=overwrite)
    assert folder_bytes(tmp_path) == {"out": b"mine"}


def test_a_file_in_place_of_the_parent(tmp_path):
    (tmp_path / "parent").write_text("mine")
    with raises("cannot be created: Not a directory."):
        write(tmp_path / "parent" / "out")


def test_overwrite_keeps_the_old_folder_until_the_end(tmp_path, expected):
    out, seen = tmp_path / "out", []
    out.mkdir()
    (out / "config.json").write_text("old")
    before = folder_bytes(out)
    write(out, units(before=lambda name: seen.append(folder_bytes(out) == before)), overwrite=True)
    assert seen
    assert all(seen)
    assert folder_bytes(out) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"expected", "out"}


def test_overwrite_that_fails_keeps_the_old_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")

    def before(name):
        if name == "c":
            raise StopError

    with pytest.raises(StopError):
        write(out, units(before=before), overwrite=True)
    assert folder_bytes(out) == {"config.json": b"old"}


def test_what_is_no_checkpoint_is_never_overwritten(tmp_path):
    """A home folder, say."""
    out = tmp_path / "out"
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "cat.png").write_text("cat")
    before, calls = folder_bytes(out), []
    with raises(f"`{out}` holds files, and no config.json: it is no checkpoint, and is not overw"):
        write(out, units(calls), overwrite=True)
    assert folder_bytes(out) == before
    assert calls == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("suffix", [".old", ".bak", ".tmp", ".partial2"])
def test_neighbours_are_left_alone(tmp_path, suffix, overwrite):
    """Folders that people keep beside a model, whatever names they like."""
    out, neighbour = tmp_path / "out", tmp_path / f"out{suffix}"
    neighbour.mkdir()
    (neighbour / "precious").write_text("data")
    if overwrite:
        write(out, job="before")
    write(out, overwrite=overwrite)
    assert folder_bytes(neighbour) == {"precious": b"data"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_partial_folder_is_left_alone(tmp_path, overwrite):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "download.zip").write_text("half of it")
    with raises(f"`{partial}` is in the way: it holds files that flute did not write. Move it."):
        write(tmp_path / "out", overwrite=overwrite)
    assert folder_bytes(tmp_path) == {"out.partial/download.zip": b"half of it"}


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"

    def before(name):
        if name == "c":
            out.mkdir(exist_ok=True)
            (out / "other").write_text("of someone else")

    with raises(f"`{out}` exists and is not empty"):
        write(out, units(before=before))
    assert folder_bytes(out) == {"other": b"of someone else"}


def test_a_rename_that_fails_is_explained(tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    out = tmp_path / "out"
    monkeypatch.setattr(os, "replace", replace)
    with raises(f"`{out}.partial` is complete, but cannot be renamed to `{out}` (Device or reso"):
        write(out)
    monkeypatch.undo()
    calls: list[str] = []
    write(out, units(calls))
    assert calls == []


@pytest.mark.parametrize("given", [".", "out/", "../here/out", "link", "sub/../out"])
def test_any_spelling_of_a_folder(tmp_path, monkeypatch, expected, given):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    (here / "link").symlink_to(tmp_path / "target")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty if given == "." else here)
    real = {".": empty, "link": tmp_path / "target"}.get(given, here / "out")
    assert write(given) == real
    assert folder_bytes(real) == expected
    assert (here / "link").is_symlink()


# ---- rivals


def test_a_second_process_is_locked_out(tmp_path, expected):
    out = tmp_path / "out"
    ready, go = os.pipe(), os.pipe()

    def before(name):
        if name == "b":
            os.write(ready[1], b"x")
            os.read(go[0], 1)

    pid = os.fork()
    if pid == 0:
        try:
            write(out, units(before=before))
        finally:
            os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"x"
        left = folder_bytes(tmp_path / "out.partial")
        for overwrite in (False, True):
            with raises(f"Another process is writing `{out}.partial`. Wait for it, or stop it."):
                write(out, overwrite=overwrite)
        assert folder_bytes(tmp_path / "out.partial") == left
    finally:
        os.write(go[1], b"xxxxxxxx")
        os.waitpid(pid, 0)
        for end in (*ready, *go):
            os.close(end)
    assert folder_bytes(out) == expected


def test_the_lock_dies_with_its_owner(tmp_path, expected):
    out = tmp_path / "out"

    def before(name):
        if name == "b":
            os.kill(os.getpid(), 9)

    assert in_child(lambda: write(out, units(before=before))) == -9
    calls: list[str] = []
    assert folder_bytes(write(out, units(calls))) == expected
    assert calls == ["b", "bytes", "c"], "finished units were journalled before the kill"


def test_a_lock_whose_folder_was_just_renamed_is_not_ours(tmp_path, monkeypatch):
    import fcntl

    out, flock = tmp_path / "out", fcntl.flock

    def late(file, flags):
        os.rename(tmp_path / "out.partial", out)
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with raises("Another process is writing"):
        write(out)


# ---- side files


def test_side_files_of_a_source(tmp_path):
    kept = {
        "tokenizer.json": b"{}",
        "tokenizer.model": b"\x00\x01",
        "LICENSE": b"MIT",
        "generation_config.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "merges.txt": b"a b",
    }
    left_out = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.gguf",
        "model.onnx",
        "last.ckpt",
        "config.json",
        "flute_config.json",
        "README.md",
        "modeling_custom.py",
        ".gitattributes",
        ".flute-job",
        ".flute-journal",
    ]
    for name in left_out:
        (tmp_path / name).write_bytes(b"x")
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("{}")
    assert read_side_files(tmp_path) == kept


def test_a_job_may_have_no_units_of_weight(tmp_path):
    empty = [u for u in units() if u.name == "empty"]
    out = write(tmp_path / "out", empty)
    assert load_file(out / "model.safetensors")["empty"].shape == (0, 4)
