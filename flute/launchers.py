"""From a problem to a kernel that can be launched: choose, compile, load, lay out its structure.

Owns the functions loaded so far and the launchers made of them. Weights come in kernel order
(`flute.kernel_order`). Importing it loads neither CUDA nor the compiler.

    problem -> plan (candidates) -> source -> cubin (jit.cache) -> function -> Launcher
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flute.candidates import candidates
from flute.config import (
    DTYPE_IDX,
    Gpu,
    KernelConfig,
    Plan,
    Problem,
    kernel_group_size,
    workspace_bytes,
)
from flute.device import gpu_of
from flute.errors import UnsupportedProblemError
from flute.format import PackedWeight
from flute.kernel_order import CHUNK_K, TILE_N, num_tiles, padded_k

if TYPE_CHECKING:
    from flute.jit.compiler import Cubin, Source
    from flute.jit.launch import Launcher

DECODE_M = 16
"""Tokens of one launch of the decode kernel."""
KERNELS = Path(__file__).parent / "kernels"
MAX_RANGES = 8
"""Tables of ranges of rows that kernels take; their parameters have room for them."""
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

_launchers: dict[tuple[object, ...], tuple[Launcher, int]] = {}
_functions: dict[tuple[str, int], int] = {}
_lock = threading.Lock()


def problem_of(weight: PackedWeight, M: int, dtype: torch.dtype) -> Problem:
    """Return what decides the kernel of a product.

    Args:
        weight: the matrix; its codes don't matter.
        M: tokens.
        dtype: of x, fp16 or bf16.
    """
    spec = weight.spec
    return Problem(
        spec.num_bits,
        kernel_group_size(spec.group_size, weight.K),
        _NAMES[dtype],
        _NAMES[weight.scales.dtype],
        weight.has_row_tables or not takes_ranges(weight.table_ends),
        M,
        weight.N,
        weight.K,
    )


def takes_ranges(table_ends: tuple[int, ...]) -> bool:
    """Tell whether kernels take these ranges of rows: at most 8, each of whole tiles but the last.

    Args:
        table_ends: where each range ends; empty if there is one table, or one per row.
    """
    return len(table_ends) <= MAX_RANGES and not any(end % TILE_N for end in table_ends[:-1])


def _ranges(table_ends: tuple[int, ...], N: int) -> bytes:
    """Return the last fields of a kernel's structure: num_ranges, range_end in tiles."""
    assert takes_ranges(table_ends), "callers expand what kernels don't take"
    ends = [num_tiles(end) for end in table_ends or (N,)]
    return struct.pack("9i", len(ends), *ends, *[num_tiles(N)] * (MAX_RANGES - len(ends)))


def decode_source(config: KernelConfig) -> Source:
    """Return the text of a decode kernel."""
    from flute.jit.compiler import Source

    return Source(config.source(), "flute::decode<Config>", KERNELS)


def dequantize_source(problem: Problem) -> Source:
    """Return the text of the dequantise kernel of a problem; M, N and K don't matter."""
    from flute.jit.compiler import Source

    text = (
        '#include "dequantize.cuh"\nstruct Config {\n'
        f"  static constexpr int num_bits = {problem.num_bits};\n"
        f"  static constexpr int group_size = {problem.group_size};\n"
        f"  static constexpr int dtype = {DTYPE_IDX[problem.dtype]};\n"
        f"  static constexpr int scale_dtype = {DTYPE_IDX[problem.scale_dtype]};\n"
        f"  static constexpr bool row_tables = {str(problem.row_tables).lower()};\n}};\n"
    )
    return Source(text, "flute::dequantize<Config>", KERNELS)


def compile_kernels(
    problems: Iterable[Problem], device: torch.device, done: Callable[[int, int], None]
) -> int:
    """Compile and load what problems need on a device, in parallel; return how many kernels.

    Args:
        problems: their ``m`` is ignored; kernels for any M are compiled.
        device: a GPU.
        done: called with (compiled, in all) after each kernel, and first with (0, in all).

    Raises:
        KernelCompileError: NVRTC refused one; the others are compiled.
    """
    from flute.jit.cache import load_or_compile

    gpu = gpu_of(device)
    sources: dict[Source, None] = {}
    for problem in problems:
        for m in range(1, DECODE_M + 1):
            plans = candidates(problem._replace(m=m), gpu)[:1]
            sources |= {decode_source(plan.config): None for plan in plans}
        sources[dequantize_source(problem)] = None
    sources = {s: None for s in sources if (s.text, device.index) not in _functions}
    done(0, len(sources))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        futures = [pool.submit(load_or_compile, source, gpu.arch) for source in sources]
        for i, (source, future) in enumerate(zip(sources, futures, strict=True)):
            _load(source, future.result(), device)
            done(i + 1, len(sources))
    return len(sources)


def _function(source: Source, device: torch.device) -> int:
    """Return a loaded kernel; the device is current."""
    found = _functions.get((source.text, device.index))
    if found is not None:
        return found
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedProblemError(
            f"{source.name} is not compiled yet, and a CUDA graph is being captured. Call "
            "`flute.prepare(model)`, or the layer with as many tokens, before the capture."
        )
    from flute.jit.cache import load_or_compile

    return _load(source, load_or_compile(source, gpu_of(device).arch), device)


def _load(source: Source, cubin: Cubin, device: torch.device) -> int:
    from flute.jit.launch import load_function

    smem_bytes = gpu_of(device).smem_bytes if "decode" in source.name else 0
    with _lock, torch.cuda.device(device):
        function = _functions.get((source.text, device.index))
        if function is None:
            function = load_function(cubin.code, cubin.symbol, smem_bytes, device.index)
            _functions[source.text, device.index] = function
    return function


def decode(
    weight: PackedWeight, M: int, dtype: torch.dtype, device: torch.device
) -> tuple[Launcher, int] | None:
    """Return the launcher of a product and its fp32 scratch, or None if no kernel serves it.

    Args:
        weight: in kernel order, with ranges that `takes_ranges`.
        M: tokens, at most `DECODE_M`.
        dtype: of x, fp16 or bf16.
        device: a GPU, which is current.

    Raises:
        UnsupportedProblemError: the kernel had to be compiled while a CUDA graph is captured.
    """
    _, scales, table, spec, N, K, ends = weight
    rows = table.shape[0]
    key = (M, N, K, spec.num_bits, spec.group_size, dtype, scales.dtype, rows, ends, device.index)
    found = _launchers.get(key)
    if found is None:
        problem, gpu = problem_of(weight, M, dtype), gpu_of(device)
        plans = candidates(problem, gpu)
        if not plans:
            return None
        plan = plans[0]
        function = _function(decode_source(plan.config), device)
        launcher = decode_launcher(function, plan, problem, gpu, ends, device.index)
        found = _launchers[key] = (launcher, workspace_bytes(plan, M, N) // 4)
    return found


def decode_launcher(
    function: int,
    plan: Plan,
    problem: Problem,
    gpu: Gpu,
    table_ends: tuple[int, ...] = (),
    device: int = 0,
) -> Launcher:
    """Return the launcher of a loaded decode kernel; it takes the pointers of `DecodeParams`.

    Args:
        function: CUfunction of ``plan.config``'s kernel.
        plan: the kernel and how to launch it.
        problem: what it multiplies.
        gpu: where it runs.
        table_ends: where each range of rows ends; empty if there is one table, or one per row.
        device: ordinal of the GPU.
    """
    from flute.jit.launch import Launcher

    config, (m, n, k) = plan.config, problem[-3:]
    clusters = max(1, min(num_tiles(n), gpu.num_sms * plan.blocks_per_sm // config.cluster))
    sizes = (m, n, k, padded_k(k) // CHUNK_K, config.x_stride(k), plan.phases)
    return Launcher(
        function,
        grid=(clusters * config.cluster, 1, 1),
        num_threads=config.num_threads,
        smem_bytes=config.smem_bytes(m, k),
        params=bytes(7 * 8) + struct.pack("6i", *sizes) + _ranges(table_ends, n),
        slots=range(0, 7 * 8, 8),
        cluster=config.cluster,
        dependent=config.bulk,
        device=device,
        name=f"{config}",
    )


def dequantize(
    weight: PackedWeight, rows: int, first_tile: int, dtype: torch.dtype, device: torch.device
) -> Launcher:
    """Return the launcher that dequantises some rows; it takes packed, scales, table and out.

    Args:
        weight: in kernel order, with ranges that `takes_ranges`.
        rows: how many.
        first_tile: where they begin, in tiles.
        dtype: of the dense rows, fp16 or bf16.
        device: a GPU, which is current.

    Raises:
        UnsupportedProblemError: the kernel had to be compiled while a CUDA graph is captured.
    """
    from flute.jit.launch import Launcher

    _, scales, table, spec, N, K, ends = weight
    key = (rows, first_tile, N, K, spec, dtype, scales.dtype, table.shape[0], ends, device.index)
    found = _launchers.get(key)
    if found is None:
        problem, chunks = problem_of(weight, 1, dtype), padded_k(K) // CHUNK_K
        launcher = Launcher(
            _function(dequantize_source(problem), device),
            grid=(num_tiles(rows), -(-chunks // 32), 1),  # a warp takes about 4 chunks
            num_threads=256,
            smem_bytes=0,
            params=bytes(4 * 8) + struct.pack("4i", N, K, chunks, first_tile) + _ranges(ends, N),
            slots=range(0, 4 * 8, 8),
            device=device.index,
            name=f"dequantize of {problem}",
        )
        found = _launchers[key] = (launcher, 0)
    return found[0]
