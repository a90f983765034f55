"""What a GPU is to the kernels: whether they run on it, and why not; what decides which.

Importing it loads neither CUDA nor the compiler.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from flute.config import Gpu
from flute.errors import UnsupportedProblemError

TESTED = ((9, 0),)
"""Compute capabilities that the GPU tests have passed on."""
UNTESTED_ENVIRONMENT = "FLUTE_UNTESTED_GPU"


@cache
def why_not(device: torch.device) -> str:
    """Return why a device runs no kernels of ours, or "" if it does."""
    if device.type != "cuda" or torch.version.hip:
        return f"{device.type} has none"
    return why_not_on(*torch.cuda.get_device_capability(device))


def why_not_on(major: int, minor: int) -> str:
    """Return why an NVIDIA GPU runs no kernels of ours, or "" if it does; opens no CUDA context.

    Args:
        major: first number of its compute capability.
        minor: the second.
    """
    if (major, minor) < (8, 0):
        return f"sm_{major}{minor} is older than sm_80"
    if (major, minor) not in TESTED and os.environ.get(UNTESTED_ENVIRONMENT) != "1":
        return (
            f"sm_{major}{minor}: the kernels compile for it but have not been run on it; "
            f"{UNTESTED_ENVIRONMENT}=1 runs them"
        )
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return "cuda-core is not installed: pip install 'cuda-core[cu13]'"
    from flute.jit.compiler import nvrtc_version

    try:
        nvrtc_version()
    except UnsupportedProblemError as error:
        return str(error)
    return ""


@cache
def warn_slow(device: torch.device) -> None:
    """Warn, once per device, that products there take PyTorch's path, and why."""
    warnings.warn(
        f"Products on {device} take the slow path (PyTorch, in float32): {why_not(device)}",
        stacklevel=4,
    )


@cache
def warn_unprepared(device: torch.device) -> None:
    """Warn, once per device, that a weight is not in the order that its kernels read."""
    warnings.warn(
        f"A product on {device} takes the slow path (PyTorch, in float32), since its weight is "
        "ordered as it is stored: it was not prepared, or is offloaded. Call "
        "`flute.prepare(model)` first, before `torch.compile` or `torch.export`.",
        stacklevel=4,
    )


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Return what of a device decides which kernels run on it."""
    properties: Any = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    return Gpu(
        arch + "a" if arch == "sm_90" else arch,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.name,
    )
