"""From a problem to a kernel that can be launched: choose, compile, load, lay out its structure.

Owns the functions loaded so far and the launchers made of them. Weights come in kernel order
(`flute.kernel_order`). Importing it loads neither CUDA nor the compiler.

    problem -> plan (tuning, plans) -> source -> cubin (jit.cache) -> function -> Launcher
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from flute import mma, tuning
from flute.batch import BLOCK_N, BatchPlan, num_clusters
from flute.config import DTYPE_IDX, Gpu, Plan, Problem, kernel_group_size, workspace_bytes
from flute.device import gpu_of
from flute.errors import UnsupportedProblemError
from flute.format import PackedWeight
from flute.kernel_order import CHUNK_K, TILE_N, num_tiles, padded_k
from flute.mma import MmaPlan
from flute.plans import DECODE_M, AnyPlan, DensePlan, KernelPlan, SplitPlan, plans_of

if TYPE_CHECKING:
    from array import array

    from flute.jit.compiler import Cubin, Source
    from flute.jit.launch import Chain, Launcher

KERNELS = Path(__file__).parent / "kernels"
MAX_RANGES = 8
"""Tables of ranges of rows that kernels take; their parameters have room for them."""
EARLY_DEPENDENTS = "FLUTE_EARLY_DEPENDENTS"
"""Environment variable. Set to 0, a kernel lets the next one of the stream start early only when
all kernels before its own have ended. Kernels that inductor generates with ``triton.enable_pdl``
rely on that, so it is the default where ``TORCHINDUCTOR_ENABLE_PDL=1``. Else the next kernel may
start before, which suits ours (4096 x 4096, 4 bits, M = 1, H200: 4.12 us instead of 4.48) and
kernels that are launched without the attribute."""
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class TokensAt(NamedTuple):
    """Activations by address: shape (M, K), contiguous, at a multiple of 16 bytes.

    Args:
        address: of the first.
        M: tokens.
        K: features.
        dtype: fp16 or bf16.
    """

    address: int
    M: int
    K: int
    dtype: torch.dtype

    def map(self, box_tokens: int) -> array[int]:
        """Return the CUtensorMap of x whose boxes have so many tokens."""
        from flute.jit.launch import tensor_map

        return tensor_map(self.address, self.M, self.K, box_tokens, _NAMES[self.dtype])


class Product(NamedTuple):
    """How a product is computed.

    Args:
        plan: what was chosen.
        launcher: of a kernel's plan; else None.
        num_scratch: fp32 numbers that a launch needs besides.
        map_tokens: tokens of a box of x if the kernel takes x as a CUtensorMap, at the start of
            its structure; 0 if it takes x's address.
    """

    plan: AnyPlan
    launcher: Launcher | Chain | None
    num_scratch: int = 0
    map_tokens: int = 0

    def launch(
        self, stream: int, x: TokensAt, weight_at: Iterable[int], scratch_at: int, out_at: int
    ) -> None:
        """Launch the kernel, which there is, on a stream of the current device.

        Args:
            stream: CUstream.
            x: the activations.
            weight_at: addresses of packed, scales, table and bias, or 0.
            scratch_at: address of the scratch, or 0.
            out_at: address of the result.
        """
        assert self.launcher is not None, "a plan of a kernel has a launcher"
        if self.map_tokens:
            regions = ((0, x.map(self.map_tokens)),)
            self.launcher.launch(stream, *weight_at, out_at, regions=regions)
        else:
            self.launcher.launch(stream, x.address, *weight_at, scratch_at, out_at)


_products: dict[tuple[object, ...], Product] = {}
_launchers: dict[tuple[object, ...], Launcher] = {}
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


def early_dependents() -> bool:
    """Tell whether launchers made from now on let the next kernel start early in any case."""
    inductor = os.environ.get("TORCHINDUCTOR_ENABLE_PDL") == "1"
    return os.environ.get(EARLY_DEPENDENTS, "0" if inductor else "1") != "0"


def _tail(table_ends: tuple[int, ...], N: int) -> bytes:
    """Return the last fields of a product's structure: those of `_ranges`, early_dependents."""
    return _ranges(table_ends, N) + struct.pack("i", early_dependents())


def _ranges(table_ends: tuple[int, ...], N: int) -> bytes:
    """Return the fields num_ranges and range_end, in tiles."""
    assert takes_ranges(table_ends), "callers expand what kernels don't take"
    ends = [num_tiles(end) for end in table_ends or (N,)]
    return struct.pack("9i", len(ends), *ends, *[num_tiles(N)] * (MAX_RANGES - len(ends)))


def source_of(plan: KernelPlan) -> Source:
    """Return the text of a plan's kernel."""
    from flute.jit.compiler import Source

    names: dict[type[KernelPlan], str] = {Plan: "decode", BatchPlan: "batch", MmaPlan: "mma"}
    name = names[type(plan)]
    return Source(plan.config.source(), f"flute::{name}<Config>", KERNELS)


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

    return load_kernel(source, load_or_compile(source, gpu_of(device).arch), device)


def is_loaded(source: Source, device: torch.device) -> bool:
    """Tell whether a device has a kernel."""
    return (source.text, device.index) in _functions


def load_kernel(source: Source, cubin: Cubin, device: torch.device) -> int:
    """Load a compiled kernel on a device, unless it is there; return its CUfunction."""
    from flute.jit.launch import load_function

    smem_bytes = 0 if "dequantize" in source.name else gpu_of(device).smem_bytes
    with _lock, torch.cuda.device(device):
        function = _functions.get((source.text, device.index))
        if function is None:
            function = load_function(cubin.code, cubin.symbol, smem_bytes, device.index)
            _functions[source.text, device.index] = function
    return function


def product(weight: PackedWeight, M: int, dtype: torch.dtype, device: torch.device) -> Product:
    """Return how a product is computed.

    Args:
        weight: in kernel order, with ranges that `takes_ranges`.
        M: tokens.
        dtype: of x, fp16 or bf16.
        device: a GPU, which is current.

    Raises:
        UnsupportedProblemError: the kernel had to be compiled while a CUDA graph is captured.
    """
    _, scales, table, spec, N, K, ends = weight
    rows = table.shape[0]
    key = (M, N, K, spec.num_bits, spec.group_size, dtype, scales.dtype, rows, ends, device.index)
    found = _products.get(key)
    if found is None:
        problem, gpu = problem_of(weight, M, dtype), gpu_of(device)
        plan = choose(problem, ends, gpu)
        if isinstance(plan, KernelPlan):
            function = _function(source_of(plan), device)
            found = product_of(function, plan, problem, gpu, ends, device.index)
        else:
            found = Product(plan, None)
        _products[key] = found
    return found


def choose(problem: Problem, table_ends: tuple[int, ...], gpu: Gpu) -> AnyPlan:
    """Return the plan for a product whose table may differ between ranges of rows.

    Args:
        problem: what is multiplied.
        table_ends: where each range of rows ends; empty if there is one table, or one per row.
        gpu: where.
    """
    plan = tuning.choose(problem, gpu)
    if isinstance(plan, BatchPlan) and any(end % BLOCK_N for end in table_ends[:-1]):
        # A batch kernel's blocks of rows have one table each.
        others = [p for p in plans_of(problem, gpu) if isinstance(p, Plan)]
        return others[0] if others and problem.m <= DECODE_M else _split_or_dense(problem)
    return plan


def _split_or_dense(problem: Problem) -> AnyPlan:
    return SplitPlan() if DECODE_M < problem.m <= 64 else DensePlan()


def product_of(
    function: int,
    plan: KernelPlan,
    problem: Problem,
    gpu: Gpu,
    table_ends: tuple[int, ...] = (),
    device: int = 0,
) -> Product:
    """Return the product by a plan's loaded kernel.

    Args:
        function: CUfunction of ``plan.config``'s kernel.
        plan: the kernel and how to launch it.
        problem: what it multiplies.
        gpu: where it runs.
        table_ends: where each range of rows ends; empty if there is one table, or one per row.
        device: ordinal of the GPU.
    """
    rest = (problem, gpu, table_ends, device)
    if isinstance(plan, BatchPlan):
        launcher = _batch_launcher(function, plan, *rest)
        return Product(plan, launcher, map_tokens=plan.config.tokens)
    if isinstance(plan, MmaPlan):
        return _mma_product(function, plan, *rest)
    launcher = _decode_launcher(function, plan, *rest)
    return Product(plan, launcher, workspace_bytes(plan, problem.m, problem.n) // 4)


def _batch_launcher(
    function: int,
    plan: BatchPlan,
    problem: Problem,
    gpu: Gpu,
    table_ends: tuple[int, ...],
    device: int,
) -> Launcher:
    """Return a launcher that takes packed, scales, table, bias and out, after a map of x."""
    from flute.jit.launch import TENSOR_MAP_BYTES, Launcher

    config, (m, n, k) = plan.config, problem[-3:]
    clusters = num_clusters(config, m, n, gpu.num_sms)
    token_tiles = -(-m // config.tokens)
    split = divmod(-(-n // BLOCK_N) * token_tiles, clusters)
    sizes = (m, n, padded_k(k) // CHUNK_K, token_tiles, *split)
    at = TENSOR_MAP_BYTES
    return Launcher(
        function,
        grid=(clusters * config.cluster, 1, 1),
        num_threads=config.num_threads,
        smem_bytes=config.smem_bytes,
        params=bytes(at + 5 * 8) + struct.pack("6i", *sizes) + _tail(table_ends, n),
        slots=range(at, at + 5 * 8, 8),
        alignment=64,
        cluster=config.cluster,
        dependent=True,
        device=device,
        name=f"{config}",
    )


def _mma_product(
    function: int,
    plan: MmaPlan,
    problem: Problem,
    gpu: Gpu,
    table_ends: tuple[int, ...],
    device: int,
) -> Product:
    """Return the product by the launches of an mma kernel: one, and one more if units are parted.

    They take the pointers of `MmaParams`.
    """
    from flute.jit.launch import Chain, Launcher

    config, (m, n, k) = plan.config, problem[-3:]
    work = mma.work_of(plan, m, n, k, gpu, table_ends)
    sizes = (m, n, k, padded_k(k) // CHUNK_K, work.token_tiles, work.row_blocks, work.pieces)

    def launcher(sums: int, grid: tuple[int, int, int], smem_bytes: int) -> Launcher:
        params = struct.pack("9i", *sizes, work.grain, sums)
        return Launcher(
            function,
            grid=grid,
            num_threads=config.num_threads,
            smem_bytes=smem_bytes,
            params=bytes(7 * 8) + params + _tail(table_ends, n),
            slots=range(0, 7 * 8, 8),
            dependent=gpu.has_bulk_copies,
            device=device,
            name=f"{config}",
        )

    multiply = launcher(0, (work.pieces, 1, 1), config.smem_bytes)
    if not work.parted:
        return Product(plan, multiply)
    add = launcher(1, (work.pieces - 1, mma.sum_blocks(plan, work, gpu), 1), 0)
    return Product(plan, Chain((multiply, add)), mma.scratch_floats(plan, work))


def _decode_launcher(
    function: int,
    plan: Plan,
    problem: Problem,
    gpu: Gpu,
    table_ends: tuple[int, ...],
    device: int,
) -> Launcher:
    """Return a launcher that takes the pointers of `DecodeParams`."""
    from flute.jit.launch import Launcher

    config, (m, n, k) = plan.config, problem[-3:]
    clusters = max(1, min(num_tiles(n), gpu.num_sms * plan.blocks_per_sm // config.cluster))
    chunks = padded_k(k) // CHUNK_K
    split = divmod(num_tiles(n), clusters)
    sizes = (m, n, k, chunks, config.x_stride(k), config.x_stage(m), *split, plan.phases)
    return Launcher(
        function,
        grid=(clusters * config.cluster, 1, 1),
        num_threads=config.num_threads,
        smem_bytes=config.smem_bytes(m, k),
        params=bytes(7 * 8) + struct.pack("9i", *sizes) + _tail(table_ends, n),
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
        found = _launchers[key] = launcher
    return found
