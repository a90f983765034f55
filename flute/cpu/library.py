"""The library of C kernels: which variant runs, why none does, what the environment asks for.

Knows nothing of weights or layers; `flute.cpu.products` calls it for those in CPU order. Threads
are those of torch: its ``torch_parallel_for`` is passed to the library.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flute.errors import FluteError, UnsupportedProblemError

MAX_M = 32
"""Most tokens of one call of the library."""
_DIRECT_M = {"avx512": 192, "avx2": 32, "neon": 16, "scalar": 8}
_DIRECT_M_AMX = 24
"""Where torch's matmul has matrix units, which multiply several times as fast."""
EXACT_ENVIRONMENT = "FLUTE_CPU_EXACT"
VARIANT_ENVIRONMENT = "FLUTE_CPU_VARIANT"
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
            "The CPU kernels could not allocate their scratch. Free memory, and try again."
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


def call(name: str, *args: Any, has_variants: bool = True) -> None:
    """Call a function of the library; the variant that runs and the parallel loop are added.

    Args:
        name: of the function.
        args: before these; ctypes' or what it converts.
        has_variants: whether it takes a variant.

    Raises:
        UnsupportedProblemError: there is no library; the message says why.
        MemoryError: no memory for its scratch.
    """
    library = _found()
    variants = (_variant_of(library),) if has_variants else ()
    check(getattr(library.functions, name)(*args, *variants, library.run))


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
