"""Load compiled kernels and launch them with as little host time as possible.

Owns the driver calls; knows nothing of quantisation or torch. A `Launcher` fixes everything that
does not change between calls; a call then writes its pointers and asks the driver.

    block of words   params (aligned) | address of params | CUlaunchConfig | its attributes
                       ^ launch writes its pointers          ^ and the stream

Thread safety: a block belongs to one call at a time, since the driver reads it after the call has
released the interpreter's lock; calls take blocks from a pool. The device that the kernel was
loaded on must be current.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

from flute.errors import FluteError

_ATTRIBUTE_CLUSTER = 4
_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_FUNC_LOCAL_SIZE_BYTES = 3
_FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_FUNC_PREFERRED_SHARED_MEMORY_CARVEOUT = 9
_INVALID_CONTEXT = 201
_CONFIG = struct.Struct("=7I4xQQI4x")
"""CUlaunchConfig: grid, block, shared memory, stream, address and number of attributes."""
_STREAM = 4
"""Word of a CUlaunchConfig that holds the stream."""
_ATTRIBUTE = struct.Struct("=i4x3I52x")
"""CUlaunchAttribute: id, and 64 bytes of which ours use three numbers at most."""

TENSOR_MAP_BYTES = 128
"""Of a CUtensorMap, which lies at a multiple of 64."""
_TENSOR_MAP_TYPES = {"float16": 6, "bfloat16": 9}
_SWIZZLE_128B, _PROMOTE_L2_256B = 3, 3

_Block = tuple["array[int]", int, int, tuple[int, ...], tuple[Any, ...]]
"""What the driver reads, as words; word of the structure, of the stream, of each slot; arguments
of the driver's call, which point into the words."""


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


def _bind_context(device: int) -> None:
    """Give this thread the device's context, where nothing in the thread has used CUDA yet."""
    driver, context = _driver(), ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        _check(retained, "cuDevicePrimaryCtxRetain")
        _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def load_function(code: bytes, symbol: str, smem_bytes: int, device: int = 0) -> int:
    """Load machine code and return the CUfunction of a kernel in the current context.

    The code stays loaded for the life of the process.

    Args:
        code: a cubin for the current device.
        symbol: the kernel's mangled name.
        smem_bytes: dynamic shared memory that launches may ask for. Shared memory is preferred
            over L1, so that two blocks fit a multiprocessor.
        device: ordinal of the current device.

    Raises:
        LaunchError: the driver does not take the code.
    """
    _bind_context(device)
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


@lru_cache(4096)
def tensor_map(address: int, rows: int, columns: int, box_rows: int, dtype: str) -> array[int]:
    """Return the CUtensorMap of a row-major matrix, as 64-bit words.

    A box is ``box_rows`` rows of 64 values, 128 bytes that are swizzled as wgmma reads them.

    Args:
        address: of the matrix, a multiple of 16.
        rows: of the matrix; a box gets zeros for those past them.
        columns: of the matrix, a multiple of 8.
        box_rows: at most 256.
        dtype: "float16" or "bfloat16".

    Raises:
        LaunchError: the driver refused.
    """
    raw = ctypes.create_string_buffer(TENSOR_MAP_BYTES + 64)
    at = ctypes.addressof(raw) + -ctypes.addressof(raw) % 64
    sizes = (ctypes.c_uint64 * 2)(columns, rows)
    strides = (ctypes.c_uint64 * 1)(columns * 2)
    box, steps = (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    error = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        _TENSOR_MAP_TYPES[dtype],
        2,
        ctypes.c_void_p(address),
        sizes,
        strides,
        box,
        steps,
        0,
        _SWIZZLE_128B,
        _PROMOTE_L2_256B,
        0,
    )
    _check(error, f"cuTensorMapEncodeTiled of {rows} x {columns}")
    return array("Q", ctypes.string_at(at, TENSOR_MAP_BYTES))


class Launcher:
    """One kernel for one problem size; `launch` fills in the pointers and the stream.

    The kernel takes one structure by value.

    Args:
        function: CUfunction from `load_function`.
        grid: blocks in x, y and z.
        num_threads: threads per block.
        smem_bytes: dynamic shared memory per block.
        params: the structure; what `launch` writes may hold anything.
        slots: where in the structure the pointers go that `launch` is given, in bytes, multiples
            of 8.
        alignment: of the structure, in bytes, a multiple of 8: 64 where it holds a CUtensorMap.
        cluster: blocks per cluster, along x; sm_90 and later if not 1.
        dependent: programmatic dependent launch (sm_90 and later): the kernel may start while the
            previous one of the stream runs, and waits for it itself.
        device: ordinal of the device that the kernel was loaded on.
        name: of the kernel, for messages.
    """

    def __init__(
        self,
        function: int,
        *,
        grid: tuple[int, int, int],
        num_threads: int,
        smem_bytes: int,
        params: bytes,
        slots: Iterable[int],
        alignment: int = 8,
        cluster: int = 1,
        dependent: bool = False,
        device: int = 0,
        name: str = "",
    ) -> None:
        self.name = name
        self.params = params
        self.slots = tuple(slots)
        outside = [s for s in self.slots if s % 8 or not 0 <= s <= len(params) - 8]
        if outside or alignment % 8:
            raise ValueError(
                f"`slots` {outside} of `{name}`, alignment {alignment}: expected multiples of 8 "
                f"within the {len(params)} bytes of its structure."
            )
        self._launch_shape = (*grid, num_threads, 1, 1, smem_bytes)
        self._function, self._alignment, self._device = function, alignment, device
        self._cluster, self._dependent = cluster, dependent
        # A new object, without argument types: what it is given is ready to pass, which saves
        # 0.15 us over integers.
        self._call: Any = _driver()["cuLaunchKernelEx"]
        self._blocks: list[_Block] = []

    def bind(self, pointers: Mapping[int, int]) -> Launcher:
        """Return a launcher of the same kernel that has some of the pointers in its structure.

        Args:
            pointers: index into ``slots`` -> address; `launch` is given the others.
        """
        params = bytearray(self.params)
        for index, pointer in pointers.items():
            struct.pack_into("=Q", params, self.slots[index], pointer)
        x, y, z, num_threads, _, _, smem_bytes = self._launch_shape
        return Launcher(
            self._function,
            grid=(x, y, z),
            num_threads=num_threads,
            smem_bytes=smem_bytes,
            params=bytes(params),
            slots=(slot for i, slot in enumerate(self.slots) if i not in pointers),
            alignment=self._alignment,
            cluster=self._cluster,
            dependent=self._dependent,
            device=self._device,
            name=self.name,
        )

    def launch(
        self, stream: int, *pointers: int, regions: Iterable[tuple[int, array[int]]] = ()
    ) -> None:
        """Launch on a stream of the current device.

        Args:
            stream: CUstream; 0 is the default stream.
            *pointers: addresses, one for each of the slots; 0 is null.
            regions: (offset in bytes, 64-bit words) to write into the structure first, such as a
                CUtensorMap that depends on x.

        Raises:
            LaunchError: the driver refused.
        """
        block = self._take_block()
        words, start, stream_at, slots, arguments = block
        if len(pointers) != len(slots):
            raise ValueError(f"{len(pointers)} pointers for the {len(slots)} slots of {self.name}.")
        for offset, region in regions:
            at = start + offset // 8
            words[at : at + len(region)] = region
        words[stream_at] = stream
        for at, pointer in zip(slots, pointers):  # noqa: B905 (checked above; strict takes 0.2 us)
            words[at] = pointer
        error = self._call(*arguments)
        if error:
            self._failed(error, arguments)
        self._blocks.append(block)

    def launch_pair(self, stream: int, first: int, second: int) -> None:
        """Do as `launch` does where two slots are left, in 0.6 us besides the driver's time."""
        try:
            block = self._blocks.pop()
        except IndexError:
            block = self._new_block()
        words, _, stream_at, (first_at, second_at), arguments = block
        words[stream_at] = stream
        words[first_at] = first
        words[second_at] = second
        error = self._call(*arguments)
        if error:
            self._failed(error, arguments)
        self._blocks.append(block)

    def _failed(self, error: int, arguments: tuple[Any, ...]) -> None:
        if error == _INVALID_CONTEXT:  # the first use of CUDA in this thread
            _bind_context(self._device)
            error = self._call(*arguments)
        _check(error, f"cuLaunchKernelEx of {self.name}")

    def _take_block(self) -> _Block:
        try:
            return self._blocks.pop()
        except IndexError:
            return self._new_block()

    def _new_block(self) -> _Block:
        """Lay out what the driver reads in a launch."""
        attributes = b""
        if self._dependent:
            number = _ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes += _ATTRIBUTE.pack(number, 1, 0, 0)
        if self._cluster > 1:
            attributes += _ATTRIBUTE.pack(_ATTRIBUTE_CLUSTER, self._cluster, 1, 1)
        params = self.params + bytes(-len(self.params) % 8)
        size = self._alignment + len(params) + 8 + _CONFIG.size + len(attributes)
        words = array("Q", bytes(size))
        base = words.buffer_info()[0]
        params_at = -base % self._alignment
        pointer_at = params_at + len(params)
        config_at = pointer_at + 8
        attributes_at = config_at + _CONFIG.size
        count = len(attributes) // _ATTRIBUTE.size
        config = _CONFIG.pack(*self._launch_shape, 0, base + attributes_at, count)
        content = params + struct.pack("=Q", base + params_at) + config + attributes
        memoryview(words).cast("B")[params_at : params_at + len(content)] = content

        def at(address: int) -> Any:
            return ctypes.byref(ctypes.c_char.from_address(address))

        arguments = (at(base + config_at), at(self._function), at(base + pointer_at), None)
        slots = tuple((params_at + slot) // 8 for slot in self.slots)
        return words, params_at // 8, config_at // 8 + _STREAM, slots, arguments


class Chain:
    """Kernels that take the same structure, one after the other on the stream.

    Args:
        launchers: each is given all pointers; their slots are the same.
    """

    def __init__(self, launchers: Iterable[Launcher]) -> None:
        self.launchers = tuple(launchers)

    def bind(self, pointers: Mapping[int, int]) -> Chain:
        """Return a chain that has some of the pointers; see `Launcher.bind`."""
        return Chain(launcher.bind(pointers) for launcher in self.launchers)

    def launch(
        self, stream: int, *pointers: int, regions: Iterable[tuple[int, array[int]]] = ()
    ) -> None:
        """Launch all on a stream of the current device; see `Launcher.launch`."""
        for launcher in self.launchers:
            launcher.launch(stream, *pointers, regions=regions)

    def launch_pair(self, stream: int, first: int, second: int) -> None:
        """Do as `launch` does where two slots are left."""
        for launcher in self.launchers:
            launcher.launch_pair(stream, first, second)
