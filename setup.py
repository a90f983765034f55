"""Builds the CPU library for all systems into the wheel, by the compiler in `ziglang` (PyPI).

Without ziglang the wheel holds the C sources only, which a C compiler on the user's machine
compiles at first use. FLUTE_PREBUILT=1 makes it an error, FLUTE_PREBUILT=0 skips the step.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def load_targets():
    """Return `flute.cpu.targets` without importing flute, which needs torch."""
    spec = importlib.util.spec_from_file_location("targets", ROOT / "flute/cpu/targets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithLibraries(build_py):
    """Copies the package, then cross-compiles."""

    def run(self):
        """Copy the package, and build the libraries if that is wanted and possible."""
        super().run()
        wanted = os.environ.get("FLUTE_PREBUILT", "")
        if wanted == "0" or self.editable_mode:
            return
        if importlib.util.find_spec("ziglang"):
            compile_all(Path(self.build_lib) / "flute" / "kernels" / "cpu" / "prebuilt")
        elif wanted == "1":
            raise SystemExit("FLUTE_PREBUILT=1 needs ziglang: pip install ziglang")


def compile_all(folder):
    """Compile the library for each target, two at a time, and write their checksums."""
    targets = load_targets()
    sources, units = targets.read_sources(), sorted(map(str, targets.KERNELS.glob("*.c")))
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(item):
        target, name = item
        out = folder / targets.file_name(target, sources)
        zig = [sys.executable, "-m", "ziglang", "cc", "-target", name]
        libraries = [] if target.startswith("windows") else ["-lm"]
        strip = ["-shared", "-s", "-fno-sanitize=all"]
        subprocess.run(
            [*zig, *targets.OPTIONS, *strip, *units, *libraries, "-o", str(out)], check=True
        )
        return f"{hashlib.sha256(out.read_bytes()).hexdigest()}  {out.name}\n"

    with ThreadPoolExecutor(2) as pool:
        sums = list(pool.map(compile_one, targets.TARGETS.items()))
    (folder / targets.SUMS).write_text("".join(sums))
    expected = {line.split()[1] for line in sums} | {targets.SUMS}
    for left in folder.iterdir():  # import libraries of Windows
        if left.name not in expected:
            left.unlink()


setup(cmdclass={"build_py": BuildWithLibraries})
