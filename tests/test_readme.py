"""The README's examples run as printed, in order, in an empty folder."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from flute.cli import main

BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_examples_run(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    assert [kind for kind, _ in BLOCKS].count("bash") >= 2
    assert [kind for kind, _ in BLOCKS].count("python") >= 4
    for kind, block in BLOCKS:
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, "README.md", "exec"), namespace)
            continue
        for line in block.strip().splitlines():
            words = shlex.split(line)
            if words[0] == "flute":
                assert main(words[1:]) == 0, line
            else:
                assert words[0] == "python", line
                subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    for folder in ("out-4bit", "out-3bit", "out-nf", "out-saved", "out-nf4"):
        assert (tmp_path / folder / "config.json").exists(), folder
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert namespace["out"].shape == (5, 128)  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_named_in_the_documents_exist(document):
    text = (ROOT / document).read_text()
    names = re.findall(r"\]\(([\w./-]+)\)", text)
    names += re.findall(r"`((?:flute|tests|benchmarks|examples)/[\w./-]+)`", text)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name
