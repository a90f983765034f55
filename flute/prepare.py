"""`prepare`: make a model ready, so that no call compiles or converts anything."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch
from torch import nn

from flute.config import Problem
from flute.dense_linear import adopt
from flute.fused import FusedBlock, fuse
from flute.fused_model import fuse_model
from flute.linear import LutLinear
from flute.precompile import compile_kernels, prepared_problem
from flute.siblings import share


def prepare(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    exact: bool = False,
    together: bool = False,
    fused: bool = True,
    dense: bool = True,
) -> int:
    """Put the weights of a model's quantised layers into the order of kernels and compile those.

    Without it a layer does so at its first call. Call it before `torch.compile` and before a CUDA
    graph is captured, where that cannot happen. `flute.from_pretrained` calls it.

    Args:
        model: its layers on GPUs and CPUs with kernels are changed in place; others, and those that
            accelerate offloads, stay as they are.
        dtype: of the activations, fp16 or bf16; None is that of the model's parameters, or of the
            scales. CPU kernels take any.
        exact: whether products on a CPU are summed in fp32 instead of in fixed point, whose error
            is below 5e-4 (relative norm). It holds until the layer is loaded, moved or copied.
        together: on a CPU with several threads, multiply layers that a module gives the same x (q,
            k, v; gate, up) in one call. Worth a try with many threads; with two a token took 1.05
            times as long, since what watches the module costs more than a call. Fused blocks do so
            anyway.
        fused: on a CPU, let decoder blocks of Llama, Mistral, Qwen2 and Qwen3 take a token each of
            a few sequences in two calls of the library, and whole models in one where the cache is
            a `DynamicCache` of full attention, where nothing asks for anything else;
            `flute.fused` and `flute.fused_model` say what. False leaves them as they are.
        dense: on a CPU, let large linear layers that are not quantised, as the output head,
            multiply one token (of fp16 and fp32, and of bf16 where the CPU has no instructions for
            it, up to 8) by the library, which reads bf16 more than twice as fast as torch. False
            leaves them to torch.

    Returns:
        How many layers are ready.

    Raises:
        KernelCompileError: NVRTC refused a kernel.
    """
    problems: dict[torch.device, dict[tuple[Problem, tuple[int, ...]], None]] = {}
    layers = [m for m in model.modules() if isinstance(m, LutLinear) and m.takes_kernels()]
    for layer in layers:
        layer.to_kernel_order()
        of_x = dtype or _activation_dtype(model, layer)
        problem = prepared_problem(layer.packed_weight(), of_x)
        problems.setdefault(layer.codes.device, {})[problem] = None
        layer._settled = True
    on_cpu = [m for m in model.modules() if isinstance(m, LutLinear) and m.takes_cpu_kernels()]
    for layer in on_cpu:
        layer.to_cpu_order(exact)
    if on_cpu and fused:
        fuse(model)
        fuse_model(model)
    if on_cpu and dense:
        adopt(model)
    if on_cpu and together:  # blocks that are fused do so, and don't where a hook is in them
        blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
        share(model, {part for block in blocks for part in block.modules()})
    for device, wanted in problems.items():
        with _Progress() as progress:
            compile_kernels(wanted, device, progress.report)
    return len(layers) + len(on_cpu)


def _activation_dtype(model: nn.Module, layer: LutLinear) -> torch.dtype:
    bias = None if layer.bias is None else layer.bias.dtype
    for dtype in (getattr(model, "dtype", None), bias, layer.scales.dtype):
        if dtype in (torch.float16, torch.bfloat16):
            return dtype
    return torch.bfloat16


class _Progress(ExitStack):
    """A progress bar on standard error, shown if compiling takes more than a second."""

    def __enter__(self) -> _Progress:
        super().__enter__()
        self._start, self._done = time.monotonic(), 0
        return self

    def report(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` kernels are compiled."""
        if not hasattr(self, "_bar"):
            if time.monotonic() - self._start < 1 or done == total:
                return
            from flute.console import Bar

            self._bar = self.enter_context(Bar("Compiling kernels", "kernels", total))
        self._bar.advance(done - self._done)
        self._done = done
