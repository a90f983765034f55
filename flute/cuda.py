"""The GPU path: pick a plan, compile and load its kernel once, launch it.

Owns the launchers, which problems are decoded and which dequantised, and the reasons why a GPU has
no kernels. Weights come in kernel order (`flute.kernel_order`); `flute.ops` checks arguments.
Importing it loads neither CUDA nor the compiler.

    M <= 16          decode kernel
    M <= 96          launches of 16 tokens each: faster than one of 32, or than dequantising
    more             dequantise at most 64 MB of weight, multiply with torch, next rows
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flute import tuning
from flute.config import (
    DTYPE_IDX,
    Gpu,
    KernelConfig,
    Plan,
    Problem,
    kernel_group_size,
    workspace_bytes,
)
from flute.errors import UnsupportedProblemError
from flute.format import QuantSpec
from flute.kernel_order import CHUNK_K, TILE_N, num_tiles, padded_k

if TYPE_CHECKING:
    from flute.jit.compiler import Cubin, Source
    from flute.jit.launch import Launcher

DECODE_M = 16
"""Tokens of one launch of the decode kernel."""
MAX_DECODE_M = 96
"""Beyond it, dequantising the weight and multiplying densely is faster: on 57344 x 8192 a launch of
16 tokens takes 107 us, the other way 746 us at M = 64 (4 bits, fp16, H200, 2026-11-22)."""
KERNELS = Path(__file__).parent / "kernels"
TESTED = ((9, 0),)
"""Compute capabilities that the GPU tests have passed on."""
UNTESTED_ENVIRONMENT = "FLUTE_UNTESTED_GPU"
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_DENSE_BYTES = 64 << 20
"""Most bytes of dequantised weight at a time."""
_MAX_RANGES = 8
"""Tables of ranges of rows that the decode kernel takes; its parameters have room for them."""

_launchers: dict[tuple[object, ...], tuple[Launcher, int]] = {}
_functions: dict[tuple[str, int], int] = {}
_lock = threading.Lock()


@cache
def why_not(device: torch.device) -> str:
    """Return why a device runs no kernels of ours, or "" if it does."""
    if device.type != "cuda" or torch.version.hip:
        return f"{device.type} has none"
    major, minor = torch.cuda.get_device_capability(device)
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


def problem_of(
    M: int, N: int, K: int, spec: QuantSpec, dtype: torch.dtype, scales: Tensor, table: Tensor
) -> Problem:
    """Return what decides the kernel of a product.

    Args:
        M: tokens.
        N: output features.
        K: input features.
        spec: bits and group size.
        dtype: of x, fp16 or bf16.
        scales: for their dtype.
        table: for its number of rows.
    """
    group = kernel_group_size(spec.group_size, K)
    rows = table.shape[0] > 1
    return Problem(spec.num_bits, group, _NAMES[dtype], _NAMES[scales.dtype], rows, M, N, K)


def multiply(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    spec: QuantSpec,
    N: int,
) -> Tensor:
    """Multiply by a weight in kernel order; see `flute.lut_gemm`.

    Args:
        x: fp16 or bf16, shape (M, K), on a GPU for which `why_not` is "".
        packed: int32, shape (tiles, chunks, words of a chunk).
        scales: in kernel order.
        table: fp32, shape (1 | N, 2**num_bits).
        bias: shape (N,), or None.
        spec: bits and group size.
        N: output features.

    Returns:
        Shape (M, N), dtype of ``x``.

    Raises:
        UnsupportedProblemError: a kernel had to be compiled while a CUDA graph is captured.
    """
    M, K = x.shape
    if not M or not N:
        return x.new_empty(M, N)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    table = table if table.is_contiguous() else table.contiguous()
    if M > MAX_DECODE_M:
        return _multiply_dense(x, packed, scales, table, bias, spec, N)
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    out = x.new_empty(M, N)
    device, dtype, bits, group = x.device, x.dtype, spec.num_bits, spec.group_size
    index, rows_differ = device.index, table.shape[0] > 1
    weight = (packed.data_ptr(), scales.data_ptr(), table.data_ptr())
    bias_at = 0 if bias is None else bias.data_ptr()
    with _HERE if index == torch._C._cuda_getDevice() else torch.cuda.device(device):
        stream = torch._C._cuda_getCurrentRawStream(index)
        for start in range(0, M, DECODE_M):
            count = min(DECODE_M, M - start)
            key = (count, N, K, bits, group, dtype, scales.dtype, rows_differ, index)
            found = _launchers.get(key)
            if found is None:
                problem = problem_of(count, N, K, spec, dtype, scales, table)
                found = _decode_launcher(key, problem, device)
                if found is None:
                    return _multiply_dense(x, packed, scales, table, bias, spec, N)
            launcher, num_scratch = found
            scratch = x.new_empty(num_scratch, dtype=torch.float32) if num_scratch else None
            launcher.launch(
                stream,
                x.data_ptr() + start * K * 2,
                *weight,
                bias_at,
                0 if scratch is None else scratch.data_ptr(),
                out.data_ptr() + start * N * 2,
            )
    return out


class _Here:
    """Stands for a device guard where the device is current; `nullcontext` takes longer."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_HERE = _Here()


def _multiply_dense(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    spec: QuantSpec,
    N: int,
) -> Tensor:
    M, K = x.shape
    rows = max(1, _DENSE_BYTES // (2 * K * TILE_N)) * TILE_N
    if rows >= N:
        return F.linear(x, dequantize(packed, scales, table, spec, N, K, x.dtype), bias)
    out = x.new_empty(M, N)
    dense = x.new_empty(rows, K)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        part = dense[: stop - start]
        _dequantize_into(part, packed, scales, table, spec, N, start // TILE_N)
        out[:, start:stop] = F.linear(x, part, None if bias is None else bias[start:stop])
    return out


def dequantize(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    N: int,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the dense weight (N, K) in fp16 or bf16, bit for bit `flute.reference`'s.

    Args:
        packed: int32, shape (tiles, chunks, words of a chunk).
        scales: in kernel order.
        table: fp32, shape (1 | N, 2**num_bits).
        spec: bits and group size.
        N: output features.
        K: input features.
        dtype: fp16 or bf16.
    """
    out = torch.empty(N, K, dtype=dtype, device=packed.device)
    table = table if table.is_contiguous() else table.contiguous()
    if out.numel():
        _dequantize_into(out, packed, scales, table, spec, N, 0)
    return out


def _dequantize_into(
    out: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    N: int,
    first_tile: int,
) -> None:
    rows, K = out.shape
    device = out.device
    with torch.cuda.device(device):
        rows_differ = table.shape[0] > 1
        key = (rows, first_tile, N, K, spec, out.dtype, scales.dtype, rows_differ, device.index)
        found = _launchers.get(key)
        if found is None:
            problem = problem_of(1, N, K, spec, out.dtype, scales, table)
            found = _dequantize_launcher(key, problem, rows, first_tile, device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        pointers = (packed.data_ptr(), scales.data_ptr(), table.data_ptr(), out.data_ptr())
        found[0].launch(stream, *pointers)


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
            plan = tuning.choose(problem._replace(m=m), gpu)
            if isinstance(plan, Plan):
                sources[decode_source(plan.config)] = None
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
            function = load_function(cubin.code, cubin.symbol, smem_bytes)
            _functions[source.text, device.index] = function
    return function


def _decode_launcher(
    key: tuple[object, ...], problem: Problem, device: torch.device
) -> tuple[Launcher, int] | None:
    """Return the launcher of a problem and its fp32 scratch, or None: dequantise it."""
    plan = tuning.choose(problem, gpu_of(device))
    if not isinstance(plan, Plan):
        return None
    function = _function(decode_source(plan.config), device)
    launcher = decode_launcher(function, plan, problem, gpu_of(device))
    found = _launchers[key] = (launcher, workspace_bytes(plan, problem.m, problem.n) // 4)
    return found


def decode_launcher(function: int, plan: Plan, problem: Problem, gpu: Gpu) -> Launcher:
    """Return the launcher of a loaded decode kernel; it takes the pointers of `DecodeParams`.

    Args:
        function: CUfunction of ``plan.config``'s kernel.
        plan: the kernel and how to launch it.
        problem: what it multiplies.
        gpu: where it runs.
    """
    from flute.jit.launch import Launcher

    config, (m, n, k) = plan.config, problem[-3:]
    tiles = num_tiles(n)
    clusters = max(1, min(tiles, gpu.num_sms * plan.blocks_per_sm // config.cluster))
    range_ends = (tiles,) * _MAX_RANGES  # one table, or one per row
    sizes = (m, n, k, padded_k(k) // CHUNK_K, config.x_stride(k), plan.phases, 1, *range_ends)
    return Launcher(
        function,
        grid=(clusters * config.cluster, 1),
        num_threads=config.num_threads,
        smem_bytes=config.smem_bytes(m, k),
        num_pointers=7,
        integers=sizes,
        cluster=config.cluster,
        dependent=config.bulk,
        name=f"{config}",
    )


def _dequantize_launcher(
    key: tuple[object, ...], problem: Problem, rows: int, first_tile: int, device: torch.device
) -> tuple[Launcher, int]:
    from flute.jit.launch import Launcher

    chunks = padded_k(problem.k) // CHUNK_K
    launcher = Launcher(
        _function(dequantize_source(problem), device),
        grid=(num_tiles(rows), -(-chunks // 32)),  # a warp takes about 4 chunks
        num_threads=256,
        smem_bytes=0,
        num_pointers=4,
        integers=(problem.n, problem.k, chunks, first_tile),
        name=f"dequantize of {problem}",
    )
    found = _launchers[key] = (launcher, 0)
    return found
