"""The CPU path: products, dense weights and the order of weights, by the library of C kernels.

Owns which variant runs and why none does; knows nothing of layers. A weight in CPU order is a
`PackedWeight` with uint8 codes (`flute/kernels/cpu/lut.h` states the order), so the dtype of the
codes tells the orders apart: int32 as stored or for GPUs, uint8 for CPUs.

    M <= direct_m()    kernels; a decoded weight serves 8 tokens    fixed point, or exact
    more               rows dequantised by slices, then torch's matmul

Threads are those of torch: its ``torch_parallel_for`` is passed to the library.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flute.cpu.structures import TILE_N, TYPES, Result, Tokens, Weight, c_weight, is_by_rows
from flute.errors import FluteError, UnsupportedProblemError
from flute.format import PackedWeight, QuantSpec

UNIT_K = 32
"""K is padded to a multiple of this."""
HEADER = 192
"""Bytes before the codes."""
HEADER_EXACT = 128
"""Which of them says that products are to be exact."""
MAX_M = 32
"""Most tokens of one call of the library."""
_DIRECT_M = {"avx512": 192, "avx2": 32, "neon": 16, "scalar": 8}
_DIRECT_M_AMX = 24
"""Where torch's matmul has matrix units, which multiply several times as fast."""
SLICE_BYTES = 1 << 23
"""Most bytes of dequantised weight at a time: it should be in the cache when it is multiplied."""
EXACT_ENVIRONMENT = "FLUTE_CPU_EXACT"
VARIANT_ENVIRONMENT = "FLUTE_CPU_VARIANT"
_LARGE_PAGE = 2 << 20
Environment = tuple[str | None, str | None]
"""What `environment` returns."""


class _Library(NamedTuple):
    functions: Any  # ctypes.CDLL
    variants: tuple[str, ...]  # as compiled; a variant is its index
    usable: tuple[str, ...]  # on this CPU, fastest first
    run: ctypes.c_void_p  # a parallel loop
    is_parallel: bool
    origin: str  # prebuilt, or compiled by whom and why


@cache
def _library() -> _Library | str:
    """The library, or why there is none."""
    from flute.cpu.build import load  # NOTE: importing `flute` must not load the compiler

    try:
        functions, origin = load()
    except FluteError as error:
        return str(error)
    functions.flute_variant_name.restype = ctypes.c_char_p
    address = ctypes.c_void_p
    functions.flute_equal.argtypes = (address, address, ctypes.c_size_t)
    variants: list[str] = []
    while name := functions.flute_variant_name(len(variants)):
        variants.append(name.decode())
    usable = [name for i, name in enumerate(variants) if functions.flute_variant_usable(i)]
    parallel = _torch_parallel_for()
    run = parallel or functions.flute_serial
    found = (
        functions,
        tuple(variants),
        tuple(usable),
        ctypes.cast(run, address),
        parallel is not None,
        origin,
    )
    return _Library(*found)


def _torch_parallel_for() -> Any:
    """Torch's loop over its own threads, a C function; None if this torch does not export it."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).exists():
            return getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
    return None


def variant() -> str:
    """Return the variant that runs: the fastest this CPU has, or ``$FLUTE_CPU_VARIANT``; else "".

    Raises:
        UnsupportedProblemError: the environment names one that this CPU or library lacks.
    """
    asked = os.environ.get(VARIANT_ENVIRONMENT, "")
    if asked == "none":
        return ""
    library = _library()
    if isinstance(library, str):
        return ""
    if asked and asked not in library.usable:
        raise UnsupportedProblemError(
            f"{VARIANT_ENVIRONMENT}={asked!r}; expected one of {('none', *library.usable)}."
        )
    return asked or library.usable[0]


def why_not() -> str:
    """Return why no kernels run on this CPU, or "" if they do; compiles them at the first call."""
    if is_turned_off():
        return f"{VARIANT_ENVIRONMENT} is 'none'"
    library = _library()
    if isinstance(library, str):
        return library
    variant()
    return ""


def direct_m() -> int:
    """Return the most tokens that kernels multiply; torch multiplies more by dequantised rows.

    Why 192: kernels and torch's matmul with rows dequantised for it take the same time then (Zen 4,
    14336 x 4096, one thread); with two threads, which slices make wait, kernels win longer.
    """
    name = variant()
    return _DIRECT_M_AMX if name == "avx512" and _has_amx() else _DIRECT_M[name]


@cache
def _has_amx() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def is_turned_off() -> bool:
    """Tell whether ``$FLUTE_CPU_VARIANT`` is "none"."""
    return os.environ.get(VARIANT_ENVIRONMENT) == "none"


def describe() -> str:
    """Return, for people, which variant runs, what else could, and on which threads."""
    reason = why_not()
    if reason:
        return f"none: {reason}"
    library = _found()
    threads = "torch's threads" if library.is_parallel else "one thread (torch exports no loop)"
    usable = ", ".join(library.usable)
    return f"{variant()} (of {usable}), {threads}; {library.origin}"


@cache
def warn_slow() -> None:
    """Warn, once, that products on the CPU take PyTorch's path, and why."""
    warnings.warn(
        f"Products on the CPU take the slow path (PyTorch, in float32): {why_not()}", stacklevel=4
    )


def is_exact() -> bool:
    """Tell whether ``$FLUTE_CPU_EXACT`` asks for sums in fp32 of weights in fp32."""
    return os.environ.get(EXACT_ENVIRONMENT, "") not in ("", "0")


def order_shapes(
    N: int, K: int, spec: QuantSpec, by_rows: bool
) -> tuple[tuple[int], tuple[int, ...]]:
    """Return the shapes of codes and scales in CPU order.

    Args:
        N: output features.
        K: input features.
        spec: bits and group size.
        by_rows: see `is_by_rows`.
    """
    rows = N if by_rows else -(-N // TILE_N) * TILE_N
    num_bytes = HEADER + rows * -(-K // UNIT_K) * 4 * spec.num_bits
    groups = spec.num_groups(K)
    return (num_bytes,), (N, groups) if by_rows else (rows // TILE_N, groups, TILE_N)


def _found() -> _Library:
    library = _library()
    if isinstance(library, str):
        raise UnsupportedProblemError(f"The CPU kernels are needed and cannot be had: {library}.")
    return library


def _variant_of(library: _Library) -> int:
    return library.variants.index(variant() or library.usable[0])


def check(error: int) -> None:
    """Raise what a function of the library returned, if it is not 0.

    Raises:
        MemoryError: no memory for its scratch.
        RuntimeError: torch's threads did not run it.
    """
    if error == 1:
        raise MemoryError(
            "The CPU kernels could not allocate their scratch. Free memory, or use fewer threads "
            "(OMP_NUM_THREADS)."
        )
    if error:
        raise RuntimeError(
            "torch's thread pool failed to run a CPU kernel. Start the process again; "
            f"{VARIANT_ENVIRONMENT}=none does without the kernels."
        )


def function(name: str) -> Any:
    """Return a function of the library, which returns what `check` takes.

    Raises:
        UnsupportedProblemError: there is no library; the message says why.
    """
    return getattr(_found().functions, name)


def call(name: str, *args: Any) -> None:
    """Call a function of the library; the variant that runs and the parallel loop are added.

    Args:
        name: of the function.
        args: before these; ctypes' or what it converts.

    Raises:
        UnsupportedProblemError: there is no library; the message says why.
        MemoryError: no memory for its scratch.
    """
    library = _found()
    check(getattr(library.functions, name)(*args, _variant_of(library), library.run))


def order(weight: PackedWeight, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Put a stored weight into CPU order, in parallel.

    Args:
        weight: as stored; N and K at least 1.
        exact: whether its products are to be exact, whatever ``$FLUTE_CPU_EXACT`` says.

    Returns:
        Codes, uint8, and scales; see `order_shapes`.
    """
    library, scales = _found(), weight.scales.contiguous()
    by_rows = is_by_rows(weight.table.shape[0], weight.table_ends)
    code_shape, scale_shape = order_shapes(weight.N, weight.K, weight.spec, by_rows)
    codes = large_pages(code_shape[0])
    # Filling is a step of torch's threads: 112 of them took 0.5 s where other work has the cores.
    is_filled = by_rows or weight.N % TILE_N == 0
    make = torch.empty if is_filled else torch.zeros  # rows that pad a tile
    ordered = make(scale_shape, dtype=scales.dtype)
    stored, _kept = c_weight(weight, scales)
    out = (ctypes.c_void_p(codes.data_ptr()), ctypes.c_void_p(ordered.data_ptr()))
    place = (*out, ctypes.c_int64(codes.numel()))
    check(library.functions.flute_order(ctypes.byref(stored), *place, int(exact), library.run))
    return codes, ordered


def large_pages(num_bytes: int) -> Tensor:
    """Memory of its own, in pages of 2 MB where Linux has them: reading it misses the TLB less.

    Why not torch's: what it hands out again is in small pages already, and stays there.
    """
    if sys.platform != "linux" or num_bytes < _LARGE_PAGE:
        return torch.empty(num_bytes, dtype=torch.uint8)
    # The address space of one page more lets it begin at one; untouched, that takes no memory.
    memory = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
    pages = (num_bytes + _LARGE_PAGE // 2) // _LARGE_PAGE  # the last, if half of it is used
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, pages * _LARGE_PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)


def restore(weight: PackedWeight) -> PackedWeight:
    """Undo `order`: return the weight as it is stored."""
    library, spec = _found(), weight.spec
    codes = torch.empty(weight.N, spec.num_words(weight.K), dtype=torch.int32)
    scales = torch.empty(weight.N, spec.num_groups(weight.K), dtype=weight.scales.dtype)
    stored = weight._replace(packed=codes, scales=scales)
    structure, _kept = c_weight(stored, scales)
    ordered = (weight.packed.contiguous(), weight.scales.contiguous())
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in ordered]
    check(library.functions.flute_restore(ctypes.byref(structure), *addresses, library.run))
    return stored


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the dense weight (N, K) of one in CPU order, bit for bit `flute.reference`'s.

    Args:
        weight: in CPU order.
        dtype: fp16, bf16 or fp32.
    """
    out = torch.empty(weight.N, weight.K, dtype=dtype)
    _dequantize_into(out, weight, 0)
    return out


def _dequantize_into(out: Tensor, weight: PackedWeight, first: int) -> None:
    """Fill ``out`` (rows, K) with the rows from ``first`` on."""
    library = _found()
    structure, _kept = c_weight(weight, weight.scales.contiguous())
    bounds = (ctypes.c_int64(first), ctypes.c_int64(first + out.shape[0]))
    at = ctypes.c_void_p(out.data_ptr())
    dequantise = library.functions.flute_dequantise
    check(
        dequantise(
            ctypes.byref(structure),
            *bounds,
            TYPES[out.dtype],
            at,
            _variant_of(library),
            library.run,
        )
    )


def multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Multiply by a weight in CPU order; see `flute.lut_gemm`.

    In fixed point the relative norm of the error is below 5e-4, besides that of rounding the table
    and the result to the dtype of ``x``; what that cannot hold is summed in fp32 (`lut.h`).

    Args:
        x: fp16, bf16 or fp32, shape (M, K), on the CPU.
        weight: in CPU order.
        bias: shape (N,), or None.

    Returns:
        Shape (M, N), dtype of ``x``.
    """
    return multiply_all(x, [weight], [bias])[0]


def multiply_all(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Multiply the same tokens by several weights; see `multiply`.

    Up to `direct_m` tokens go to the library together: tokens are converted and threads are woken
    once for all weights. Results are those of `multiply`, bit for bit.

    Args:
        x: fp16, bf16 or fp32, shape (M, K), on the CPU.
        weights: in CPU order, of the same K and spec, all by rows or none; at most 16.
        biases: shape (N,) each, or None.

    Returns:
        Shapes (M, N), dtype of ``x``.
    """
    exact = is_exact()
    if x.shape[0] > direct_m():
        return [
            _multiply_dense(x, weight, bias, exact or bool(weight.packed[HEADER_EXACT]))
            for weight, bias in zip(weights, biases, strict=True)
        ]
    M = x.shape[0]
    outs = [x.new_empty(M, weight.N) for weight in weights]
    if not M:
        return outs
    if x.stride(1) != 1:
        x = x.contiguous()
    filled = [c_weight(weight, weight.scales.contiguous()) for weight in weights]
    c_weights = (Weight * len(filled))(*(structure for structure, _ in filled))
    dense_biases = [
        None if b is None else (b if b.dtype in TYPES else b.float()).contiguous() for b in biases
    ]
    results = (Result * len(filled))()
    for result, bias in zip(results, dense_biases, strict=True):
        if bias is not None:
            result.bias, result.bias_type = bias.data_ptr(), TYPES[bias.dtype]
    row_bytes, x_at, stride, call = x.dtype.itemsize, x.data_ptr(), x.stride(0), entry()
    for first in range(0, M, MAX_M):
        for result, out in zip(results, outs, strict=True):
            result.out = out.data_ptr() + first * out.shape[1] * row_bytes
        at = x_at + first * stride * row_bytes
        tokens = Tokens(at, min(MAX_M, M - first), stride, TYPES[x.dtype])
        call(c_weights, results, len(filled), ctypes.byref(tokens))
    return outs


class Entry(NamedTuple):
    """The library's product as the environment wants it now: which variant, whether exact."""

    multiply: Any
    variant: int
    exact: int
    run: ctypes.c_void_p

    def __call__(self, weights: Any, results: Any, count: int, tokens: Any) -> None:
        """Multiply 1 to `MAX_M` tokens by several weights: C structures, by reference."""
        numbers = (self.variant, self.exact, self.run)
        check(self.multiply(weights, results, count, tokens, *numbers))


def entry() -> Entry:
    """Return the library's product.

    Raises:
        UnsupportedProblemError: there is no library; the message says why.
    """
    library = _found()
    multiply = library.functions.flute_multiply
    return Entry(multiply, _variant_of(library), int(is_exact()), library.run)


def environment() -> Environment:
    """Return what the environment says: which variant, whether exact."""
    get = os.environ.get
    return get(VARIANT_ENVIRONMENT), get(EXACT_ENVIRONMENT)


def equal_bytes(a: Tensor, b: Tensor) -> bool:
    """Tell whether two contiguous tensors of one size hold the same bytes."""
    equal: int = _found().functions.flute_equal(a.data_ptr(), b.data_ptr(), a.nbytes)
    return equal != 0


def _multiply_dense(x: Tensor, weight: PackedWeight, bias: Tensor | None, exact: bool) -> Tensor:
    """Multiply by slices of the dense weight: in fp32 if exact or fp16, else in the dtype of x."""
    dtype, out_dtype, N = x.dtype, x.dtype, weight.N
    if exact or dtype == torch.float16:
        weight, dtype = weight._replace(table=weight.table.to(dtype).float()), torch.float32
    x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    rows = max(TILE_N, SLICE_BYTES // (dtype.itemsize * weight.K) // TILE_N * TILE_N)
    out = torch.empty(x.shape[0], N, dtype=out_dtype)
    dense = torch.empty(min(rows, N), weight.K, dtype=dtype)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        part = dense[: stop - start]
        _dequantize_into(part, weight, start)
        out[:, start:stop] = F.linear(x, part, None if bias is None else bias[start:stop])
    return out
