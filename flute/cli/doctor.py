"""`flute doctor`: what this machine has, and which path each call takes on it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from typing import Any

from flute.console import add_json, megabytes, print_json, print_table
from flute.errors import FluteError, UnsupportedProblemError

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "matplotlib",
    "cuda-core",
    "bitsandbytes",
    "vllm",
)


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="show what this machine has and which path each call takes",
        description="Show what this machine has, which path each call takes, and what is wrong.",
        epilog="examples:\n  flute doctor\n  flute doctor --json > report.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is 1 if something is wrong."""
    report = examine()
    if args.json:
        print_json(report)
        return 1 if report["problems"] else 0
    print_table("Machine", ["", ""], [[key, value] for key, value in report["machine"].items()])
    print_table("Packages", ["", ""], [[key, value] for key, value in report["packages"].items()])
    print_table(
        "Path of a multiplication",
        ["device", "activations", "path"],
        [[row["device"], row["dtype"], row["path"]] for row in report["paths"]],
    )
    print_table("Problems", [""], [[problem] for problem in report["problems"] or ["none"]])
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Return the machine, the packages, the path of each call, and the problems found."""
    import torch

    from flute import __version__
    from flute.cpu import library
    from flute.ops import path_of

    problems = _problems()

    def told(look: Callable[..., str], *args: Any) -> str:
        """Return what a look at this machine tells; a failure is a problem, told once."""
        try:
            return look(*args)
        except FluteError as error:
            if str(error) not in problems:
                problems.append(str(error))
            return "see the problems"

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    machine = {
        "flute": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} used by torch, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "cpu kernels": told(library.describe),
        "memory": megabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if hasattr(os, "sysconf")
        else "unknown",
        "disk free here": megabytes(shutil.disk_usage(".").free),
    }
    for i, gpu in enumerate(gpus):
        machine[f"cuda:{i}"] = (
            f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {megabytes(gpu.total_memory)}, "
            f"{gpu.multi_processor_count} multiprocessors"
        )
    if not gpus:
        built = (
            f"torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else ("this torch is built for the CPU")
        )
        machine["gpu"] = f"none seen ({built})"
    machine["kernel cache"] = told(_cache)
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(len(gpus)))]
    dtypes = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}
    paths = [
        {"device": str(device), "dtype": name, "path": told(path_of, device, dtype)}
        for device in devices
        for name, dtype in dtypes.items()
    ]
    packages = {name: _version(name) or "not installed" for name in _PACKAGES}
    packages["torch"] = torch.__version__  # says which build it is
    return {"machine": machine, "packages": packages, "paths": paths, "problems": problems}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cache() -> str:
    """Return the folder of compiled kernels and tuned plans.

    Raises:
        UnsupportedProblemError: nothing can be written there.
    """
    from flute.jit.cache import ENVIRONMENT, default_folder

    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError as error:
        raise UnsupportedProblemError(
            f"`{folder}`, where compiled kernels are kept, cannot be written ({error.strerror}): "
            f"they are compiled in every process. Set {ENVIRONMENT} to a folder that can."
        ) from error


def _problems() -> list[str]:
    problems = []
    if _version("flute-kernel"):
        problems.append(
            "flute-kernel (the original FLUTE) is installed too, under the same import name "
            "`flute`. Remove it: pip uninstall flute-kernel, then install this package again."
        )
    return problems
