"""accelerate's hook on a layer to replace: fetch the weights it holds, and make its successor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def offload_hook(layer: nn.Module) -> Any:
    """Return the accelerate hook that holds a layer's weights, or None."""
    hook = getattr(layer, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((h for h in hooks if getattr(h, "weights_map", None) is not None), None)


def fetch(layer: nn.Module, key: str) -> Tensor | None:
    """Return a parameter's values; if accelerate offloaded it, on the device where it runs."""
    tensor: Any = getattr(layer, key)
    if tensor is None or tensor.device.type != "meta":
        return None if tensor is None else tensor.data
    hook = offload_hook(layer)
    values: Tensor = hook.weights_map[key]
    return values if hook.execution_device is None else values.to(hook.execution_device)


def renew_hook(layer: nn.Module, new: nn.Module) -> None:
    """Give a new layer the accelerate hook of the old one, holding its own tensors."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, _copy_hook(hook))


def _copy_hook(hook: Any) -> Any:
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    if isinstance(hook, SequentialHook):
        return SequentialHook(*(_copy_hook(part) for part in hook.hooks))
    if not isinstance(hook, AlignDevicesHook):
        return hook
    # NOTE: no weights_map (it holds the old tensors) and no tied_params_map (it is keyed by their
    # addresses, which new tensors may take over).
    return AlignDevicesHook(
        execution_device=hook.execution_device,
        offload=hook.offload,
        io_same_device=hook.io_same_device,
        offload_buffers=hook.offload_buffers,
        place_submodules=hook.place_submodules,
        skip_keys=hook.skip_keys,
    )
