"""What the CPU library is built of and for. Imports nothing of flute: `setup.py` reads it too.

    flute/kernels/cpu/prebuilt/<key of the sources>-<system>-<machine>.lib
                               SHA256SUMS

A library counts only for the sources it was made of, and if its checksum agrees.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels" / "cpu"
OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off")
"""No fused multiplications but where they are written: results must not depend on the compiler."""
TARGETS = {
    "linux-x86_64": "x86_64-linux-gnu.2.17",
    "linux-aarch64": "aarch64-linux-gnu.2.17",
    "darwin-x86_64": "x86_64-macos",
    "darwin-aarch64": "aarch64-macos",
    "windows-x86_64": "x86_64-windows-gnu",
    "windows-aarch64": "aarch64-windows-gnu",
}
"""System and machine -> the target's name for zig. glibc 2.17 is that of manylinux2014."""
SUMS = "SHA256SUMS"
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def this_target() -> str:
    """Return the system and machine of this process, as in `TARGETS`."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()}-{_MACHINES.get(machine, machine)}"


def read_sources(folder: Path = KERNELS) -> dict[str, str]:
    """Return the C files by name."""
    paths = sorted(folder.glob("*.[ch]"))
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def file_name(target: str, sources: dict[str, str]) -> str:
    """Return the name of the library that was built of these sources for a target."""
    text = "".join(f"{name}\n{content}" for name, content in sources.items())
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{target}.lib"
