"""Compile all kernels that a weight may need, before they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from flute.config import Problem
from flute.device import gpu_of
from flute.format import PackedWeight
from flute.launchers import (
    choose,
    dequantize_source,
    is_loaded,
    load_kernel,
    problem_of,
    source_of,
    takes_ranges,
)
from flute.plans import KernelPlan

if TYPE_CHECKING:
    from flute.jit.compiler import Source

PREPARED_M = (*range(1, 17), *range(24, 513, 8), *range(640, 2049, 128), *range(2304, 5121, 256))
"""Numbers of tokens whose kernels are compiled ahead; others take one of theirs, or launches
of fewer."""


def prepared_problem(weight: PackedWeight, dtype: torch.dtype) -> tuple[Problem, tuple[int, ...]]:
    """Return what `compile_kernels` takes for a weight: its problem, where its ranges of rows end.

    Args:
        weight: the matrix; its codes don't matter.
        dtype: of x, fp16 or bf16.
    """
    ends = weight.table_ends
    return problem_of(weight, 1, dtype), ends if takes_ranges(ends) else ()


def compile_kernels(
    problems: Iterable[tuple[Problem, tuple[int, ...]]],
    device: torch.device,
    done: Callable[[int, int], None],
) -> int:
    """Compile and load what problems need on a device, in parallel; return how many kernels.

    Args:
        problems: see `prepared_problem`; kernels for any M are compiled.
        device: a GPU.
        done: called with (compiled, in all) after each kernel, and first with (0, in all).

    Raises:
        KernelCompileError: NVRTC refused one; the others are compiled.
    """
    from flute.jit.cache import load_or_compile

    gpu = gpu_of(device)
    sources: dict[Source, None] = {}
    for problem, table_ends in problems:
        for m in PREPARED_M:
            plan = choose(problem._replace(m=m), table_ends, gpu)
            if isinstance(plan, KernelPlan):
                sources[source_of(plan)] = None
        sources[dequantize_source(problem)] = None
    sources = {s: None for s in sources if not is_loaded(s, device)}
    done(0, len(sources))
    with ThreadPoolExecutor(_num_cores()) as pool:
        futures = [pool.submit(load_or_compile, source, gpu.arch) for source in sources]
        for i, (source, future) in enumerate(zip(sources, futures, strict=True)):
            load_kernel(source, future.result(), device)
            done(i + 1, len(sources))
    return len(sources)


def _num_cores() -> int:
    """Return how many cores this process may use.

    Why not torch's threads: vLLM gives a worker of several ranks one, and so do many launchers.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
