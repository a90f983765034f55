"""The order in which this device's products read a weight that vLLM has loaded."""

from __future__ import annotations

import torch

from flute.cpu import library as cpu
from flute.cpu import products
from flute.device import warn_slow, why_not
from flute.format import PackedWeight
from flute.kernel_order import to_kernel_order
from flute.precompile import compile_kernels, prepared_problem


def takes_kernels(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Tell whether products with a weight run kernels; warn once where a GPU has none.

    Args:
        weight: in plain order.
        dtype: of the activations.
    """
    device = weight.packed.device
    if device.type != "cuda" or dtype == torch.float32:
        return False
    if why_not(device):
        warn_slow(device)
        return False
    return weight.K % 32 == 0 and weight.packed.numel() > 0


def in_device_order(weight: PackedWeight, dtype: torch.dtype) -> tuple[PackedWeight, int | None]:
    """Return a weight as this device reads it, and its rows unless that is as it is stored.

    Args:
        weight: in plain order.
        dtype: of the activations.

    Raises:
        KernelCompileError: NVRTC refused a kernel.
    """
    if weight.packed.device.type != "cpu":
        return in_kernel_order(weight, dtype)
    if not weight.packed.numel():
        return weight, None
    if cpu.why_not():
        if not cpu.is_turned_off():
            cpu.warn_slow()
        return weight, None
    packed, scales = products.order(weight)
    return weight._replace(packed=packed, scales=scales), weight.N


def in_kernel_order(weight: PackedWeight, dtype: torch.dtype) -> tuple[PackedWeight, int | None]:
    """Return a weight as this GPU's kernels read it, and its rows; as it is, and None, without any.

    Kernels are compiled here, before a graph is captured.

    Args:
        weight: in plain order.
        dtype: of the activations.

    Raises:
        KernelCompileError: NVRTC refused a kernel.
    """
    if not takes_kernels(weight, dtype):
        return weight, None
    num_bits, device = weight.spec.num_bits, weight.packed.device
    packed, scales = to_kernel_order(weight.packed, weight.scales, num_bits, weight.K)
    weight = weight._replace(packed=packed, scales=scales)
    compile_kernels([prepared_problem(weight, dtype)], device, lambda *_: None)
    if device.type == "cuda":
        # NOTE: kernels read weights before the previous kernel of the stream has ended.
        torch.cuda.current_stream(device).synchronize()
    return weight, weight.N
