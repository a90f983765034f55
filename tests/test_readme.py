"""The README's examples run as printed, in order, in an empty folder."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

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


def anchors(document: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]
DOCUMENTS += ["docs/measurements.md", "docs/methods.md", "docs/serving.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_the_documents_exist(document):
    text = (ROOT / document).read_text()
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text)
    for name, anchor in links:
        target = folder / name if name else ROOT / document
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"
    names = re.findall(r"`((?:flute|tests|benchmarks|examples)/[\w./-]+)`", text)
    assert names or links
    for name in names:
        assert (ROOT / name).exists(), name
