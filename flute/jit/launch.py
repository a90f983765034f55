"""Load compiled kernels and launch them with as little host time as possible.

Owns the driver calls; knows nothing of quantisation or torch. A `Launcher` fixes everything that
does not change between calls; a call then writes its pointers and asks the driver, about 4 us.

Thread safety: buffers are per thread, since the driver reads them after the call has released the
interpreter's lock. The device that the kernel was loaded on must be current.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache
from typing import Any

from flute.errors import FluteError

_ATTRIBUTE_CLUSTER = 4
_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_FUNC_LOCAL_SIZE_BYTES = 3
_FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_FUNC_PREFERRED_SHARED_MEMORY_CARVEOUT = 9


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class LaunchError(FluteError, RuntimeError):
    """The driver refused to load or launch a kernel; the message holds its error's name."""


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LaunchError(f"The CUDA driver cannot be loaded: {error}.") from error


def _check(error: int, what: str) -> None:
    if error:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(error, ctypes.byref(name))
        raise LaunchError(f"{what} failed: {name.value.decode() if name.value else error}.")


def load_function(code: bytes, symbol: str, smem_bytes: int) -> int:
    """Load machine code and return the CUfunction of a kernel in the current context.

    The code stays loaded for the life of the process.

    Args:
        code: a cubin for the current device.
        symbol: the kernel's mangled name.
        smem_bytes: dynamic shared memory that launches may ask for. Shared memory is preferred
            over L1, so that two blocks fit a multiprocessor.

    Raises:
        LaunchError: the driver does not take the code.
    """
    driver, library = _driver(), ctypes.c_void_p()
    kernel, function = ctypes.c_void_p(), ctypes.c_void_p()
    none = (None, None, 0, None, None, 0)
    _check(driver.cuLibraryLoadData(ctypes.byref(library), code, *none), "cuLibraryLoadData")
    _check(
        driver.cuLibraryGetKernel(ctypes.byref(kernel), library, symbol.encode()),
        f"cuLibraryGetKernel of {symbol}",
    )
    _check(driver.cuKernelGetFunction(ctypes.byref(function), kernel), "cuKernelGetFunction")
    for attribute, value in (
        (_FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes),
        (_FUNC_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        if smem_bytes:
            _check(driver.cuFuncSetAttribute(function, attribute, value), "cuFuncSetAttribute")
    assert function.value is not None, "cuKernelGetFunction returned no function and no error"
    return function.value


def local_bytes(function: int) -> int:
    """Return the local memory per thread of a kernel, in bytes: spills and stack.

    Args:
        function: CUfunction from `load_function`.

    Raises:
        LaunchError: the driver does not know the function.
    """
    value = ctypes.c_int()
    _check(
        _driver().cuFuncGetAttribute(
            ctypes.byref(value), _FUNC_LOCAL_SIZE_BYTES, ctypes.c_void_p(function)
        ),
        "cuFuncGetAttribute",
    )
    return value.value


class Launcher:
    """One kernel for one problem size; `launch` fills in the pointers and the stream.

    The kernel takes one structure by value: pointers first, then 32-bit integers.

    Args:
        function: CUfunction from `load_function`.
        grid: blocks in x and y.
        num_threads: threads per block.
        smem_bytes: dynamic shared memory per block.
        num_pointers: pointers that `launch` is given.
        integers: what follows the pointers.
        cluster: blocks per cluster; sm_90 and later if not 1.
        dependent: programmatic dependent launch (sm_90 and later): the kernel may start while the
            previous one of the stream runs, and waits for it itself.
        name: of the kernel, for messages.
    """

    def __init__(
        self,
        function: int,
        *,
        grid: tuple[int, int],
        num_threads: int,
        smem_bytes: int,
        num_pointers: int,
        integers: tuple[int, ...],
        cluster: int = 1,
        dependent: bool = False,
        name: str = "",
    ) -> None:
        self.name = name
        self._function = ctypes.c_void_p(function)
        self._shape = (grid, num_threads, smem_bytes, cluster, dependent)
        self._pointers = struct.Struct(f"{num_pointers}Q")
        self._integers = struct.Struct(f"{len(integers)}i").pack(*integers)
        self._local = threading.local()
        self._call: Any = _driver()["cuLaunchKernelEx"]  # a new object: its types are ours alone
        self._call.argtypes = [ctypes.c_void_p] * 4

    def _prepare(self) -> tuple[Any, ...]:
        grid, num_threads, smem_bytes, cluster, dependent = self._shape
        size = self._pointers.size + len(self._integers)
        params = ctypes.create_string_buffer(size + -size % 8)
        ctypes.memmove(
            ctypes.addressof(params) + self._pointers.size, self._integers, len(self._integers)
        )
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        attributes, count = (_LaunchAttribute * 2)(), 0
        if dependent:
            attributes[count].id = _ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[count].value[0] = 1
            count += 1
        if cluster > 1:
            attributes[count].id = _ATTRIBUTE_CLUSTER
            attributes[count].value[0:3] = [cluster, 1, 1]
            count += 1
        launch = _LaunchConfig(
            (ctypes.c_uint * 3)(*grid, 1),
            (ctypes.c_uint * 3)(num_threads, 1, 1),
            smem_bytes,
            None,
            attributes,
            count,
        )
        kept = (pointer, attributes)  # what the addresses point to must live
        buffers = (params, launch, ctypes.addressof(launch), ctypes.addressof(pointer), kept)
        self._local.buffers = buffers
        return buffers

    def launch(self, stream: int, *pointers: int) -> None:
        """Launch on a stream of the current device.

        Args:
            stream: CUstream; 0 is the default stream.
            *pointers: addresses, in the order of the kernel's structure; 0 is null.

        Raises:
            LaunchError: the driver refused.
        """
        try:
            params, launch, launch_at, params_at, _ = self._local.buffers
        except AttributeError:
            params, launch, launch_at, params_at, _ = self._prepare()
        self._pointers.pack_into(params, 0, *pointers)
        launch.stream = stream
        error = self._call(launch_at, self._function, params_at, None)
        if error:
            _check(error, f"cuLaunchKernelEx of {self.name}")
