"""A wheel built from the tree works away from it, data files included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

from helpers import DEMO_MODEL, ROOT

SMOKE = """
import sys
import flute, flute.evaluate
from pathlib import Path
assert Path(flute.__file__).is_relative_to(sys.argv[1]), flute.__file__
assert (Path(flute.__file__).parent / "py.typed").exists()
assert all(len(flute.evaluate.read_text(name)) > 200_000 for name in flute.evaluate.TEXTS)
from flute.cli import main
sys.exit(main(["quantize", sys.argv[2], sys.argv[3], "--method", "nf"])
         or main(["generate", sys.argv[3], "The king", "--max-new-tokens", "2"]))
"""


def test_wheel_smoke(tmp_path):
    tree = tmp_path / "tree"
    tracked = subprocess.run(
        ["git", "ls-files", "--", "flute", "pyproject.toml", "setup.py", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tree]
    environment = {**os.environ, "FLUTE_PREBUILT": "0"}  # compiling takes minutes
    subprocess.run(build, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("flute-*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "examples/", "benchmarks/"))]
    assert {"flute/kernels/cpu/lut.c", "flute/kernels/cpu/lut.h"} <= set(names)
    assert not [name for name in names if "prebuilt" in name]
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        site,
        wheel,
    ]
    subprocess.run(install, check=True, capture_output=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n" + SMOKE
    run = subprocess.run(
        [sys.executable, "-c", code, site, DEMO_MODEL, tmp_path / "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "The king" in run.stdout
