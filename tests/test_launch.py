"""The launcher: what the driver would read, byte for byte, by a driver that notes it down."""

from __future__ import annotations

import ctypes
import struct
import threading
from array import array

import pytest

from flute.jit import launch
from flute.jit.launch import Launcher, LaunchError

FUNCTION = 0x1234


class Driver:
    """Stands for libcuda: its `cuLaunchKernelEx` is C, called as the real one is."""

    def __init__(self, size: int) -> None:
        self.size, self.calls, self.errors = size, [], []
        self.bound = 0
        self.wait = None
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
        self._kept = prototype(self._launch)
        self._at = ctypes.cast(self._kept, ctypes.c_void_p).value

    def __getitem__(self, name: str):
        assert name == "cuLaunchKernelEx"
        return _untyped(self._at)

    def _launch(self, config, function, params, extra):
        at = ctypes.c_void_p.from_address(params).value
        if self.wait is not None:
            self.wait()
        header = struct.unpack("=7I4xQQI4x", ctypes.string_at(config, 56))
        attributes = ctypes.string_at(header[8], 72 * header[9]) if header[9] else b""
        call = (header, attributes, function, at, ctypes.string_at(at, self.size), extra)
        self.calls.append(call)
        return self.errors.pop(0) if self.errors else 0

    def cuGetErrorName(self, error, name):
        name._obj.value = b"CUDA_ERROR_TEST"
        return 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = None
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 77 + device
        return 0

    def cuCtxSetCurrent(self, context):
        self.bound = context.value
        return 0


def _untyped(address: int):
    """A foreign function without argument types, as ``library["name"]`` is."""
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(address)
    del function.argtypes
    return function


@pytest.fixture
def driver(monkeypatch):
    fake = Driver(40)
    monkeypatch.setattr(launch, "_driver", lambda: fake)
    return fake


def launcher(**changes):
    arguments = {
        "grid": (5, 6, 7),
        "num_threads": 256,
        "smem_bytes": 1000,
        "params": struct.pack("4Q2i", 1, 2, 3, 4, -5, 6),
        "slots": (0, 24),
        "name": "test",
    }
    return Launcher(FUNCTION, **{**arguments, **changes})


def test_the_driver_reads_what_was_given(driver):
    kernel = launcher()
    for stream, first, last in ((9, 1 << 63, 11), (0, 0, 12)):
        kernel.launch(stream, first, last)
        header, attributes, function, _, params, extra = driver.calls.pop()
        assert header[:8] == (5, 6, 7, 256, 1, 1, 1000, stream)
        assert (header[9], attributes, function, extra) == (0, b"", FUNCTION, None)
        assert struct.unpack("4Q2i", params) == (first, 2, 3, last, -5, 6)


@pytest.mark.parametrize(
    ("cluster", "dependent", "expected"),
    [
        (1, True, [(6, 1, 0, 0)]),
        (4, False, [(4, 4, 1, 1)]),
        (2, True, [(6, 1, 0, 0), (4, 2, 1, 1)]),
    ],
)
def test_attributes(driver, cluster, dependent, expected):
    launcher(cluster=cluster, dependent=dependent).launch(0, 1, 2)
    header, attributes, *_ = driver.calls.pop()
    found = [
        struct.unpack("=i4x3I52x", attributes[i : i + 72]) for i in range(0, 72 * header[9], 72)
    ]
    assert found == expected


@pytest.mark.parametrize("alignment", [8, 64, 128])
def test_alignment_and_odd_sizes(driver, alignment):
    driver.size = 44
    for _ in range(5):
        kernel = launcher(params=struct.pack("4Q3i", 1, 2, 3, 4, 5, 6, 7), alignment=alignment)
        kernel.launch(3, 8, 9)
        _, _, _, at, params, _ = driver.calls.pop()
        assert at % alignment == 0
        assert struct.unpack("4Q3i", params) == (8, 2, 3, 9, 5, 6, 7)


def test_bound_pointers_stay(driver):
    kernel = launcher(cluster=2, dependent=True, alignment=64)
    bound = kernel.bind({0: 100})
    assert bound.slots == (24,)
    bound.launch(1, 200)
    kernel.launch(1, 7, 8)
    first, second = driver.calls
    assert struct.unpack("4Q2i", first[4]) == (100, 2, 3, 200, -5, 6)
    assert struct.unpack("4Q2i", second[4]) == (7, 2, 3, 8, -5, 6)
    assert (first[0][:8], first[1], first[3] % 64) == (second[0][:8], second[1], 0)


def test_regions_are_written(driver):
    launcher(alignment=64).launch(0, 7, 9, regions=[(8, array("Q", [21, 22]))])
    assert struct.unpack("4Q2i", driver.calls.pop()[4]) == (7, 21, 22, 9, -5, 6)


@pytest.mark.parametrize("way", ["launch", "launch_pair"])
def test_calls_of_several_threads_do_not_share_a_block(driver, way):
    """Both are inside the driver at once; each finds its own pointers there."""
    kernel, barrier = launcher(), threading.Barrier(2, timeout=30)
    getattr(kernel, way)(0, 0, 0)
    driver.calls.clear()
    driver.wait = barrier.wait
    threads = [threading.Thread(target=getattr(kernel, way), args=(i, i, i)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    driver.wait = None
    seen = sorted((call[0][7], *struct.unpack_from("4Q", call[4])) for call in driver.calls)
    assert seen == [(1, 1, 2, 3, 1), (2, 2, 2, 3, 2)]
    assert len(kernel._blocks) == 2
    kernel.launch(3, 3, 3)
    assert len(kernel._blocks) == 2


def test_refusals_name_the_kernel(driver):
    driver.errors = [1]
    with pytest.raises(LaunchError, match=r"cuLaunchKernelEx of test failed: CUDA_ERROR_TEST\."):
        launcher().launch(0, 1, 2)


def test_a_thread_without_a_context_gets_the_devices(driver):
    driver.errors = [201]
    launcher(device=3).launch(0, 1, 2)
    assert driver.bound == 80
    assert len(driver.calls) == 2
    assert driver.calls[0][4] == driver.calls[1][4]


@pytest.mark.parametrize("slots", [(4,), (40,), (-8,)])
def test_slots_outside_are_refused(driver, slots):
    with pytest.raises(ValueError, match="expected multiples of 8 within the 40 bytes"):
        launcher(slots=slots)


def test_a_wrong_number_of_pointers_is_refused(driver):
    with pytest.raises(ValueError, match="1 pointers for the 2 slots of test"):
        launcher().launch(0, 1)


def test_two_pointers_by_the_short_way(driver):
    kernel = launcher(dependent=True)
    kernel.launch(5, 6, 7)
    kernel.launch_pair(5, 6, 7)
    assert driver.calls[0] == driver.calls[1]
    driver.errors = [201, 1]
    with pytest.raises(LaunchError, match="of test failed"):
        kernel.launch_pair(0, 1, 2)
    kernel.bind({0: 9}).launch(0, 1)
    with pytest.raises(ValueError, match="not enough values"):
        kernel.bind({0: 9}).launch_pair(0, 1, 2)


def test_a_tensor_map_is_asked_for_as_the_driver_declares_it(monkeypatch):
    """Types and order of arguments as in cuda.h: 12, of which 32-bit numbers are by value."""
    seen = {}
    pointer, u32 = ctypes.c_void_p, ctypes.c_uint
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, *(pointer, u32, u32, pointer, pointer, pointer, pointer, pointer, *[u32] * 4)
    )

    def encode(out, dtype, rank, address, dims, strides, box, steps, *modes):
        numbers = ctypes.c_uint64 * 2
        words = ctypes.c_uint32 * 2
        seen.update(dtype=dtype, rank=rank, address=address, modes=modes, aligned=out % 64 == 0)
        seen["dims"] = list(numbers.from_address(dims))
        seen["strides"] = ctypes.c_uint64.from_address(strides).value
        seen["box"], seen["steps"] = list(words.from_address(box)), list(words.from_address(steps))
        ctypes.memset(out, 7, 128)
        return seen.get("error", 0)

    function = prototype(encode)

    class Library:
        def __init__(self):
            self.cuTensorMapEncodeTiled = _untyped(ctypes.cast(function, pointer).value)

        def cuGetErrorName(self, error, name):
            name._obj.value = b"CUDA_ERROR_TEST"

    monkeypatch.setattr(launch, "_driver", Library)
    launch.tensor_map.cache_clear()
    words = launch.tensor_map(0x7F00_0000_1230, 5, 4096, 16, "bfloat16")
    assert words.tobytes() == bytes([7]) * 128
    assert seen == {
        **{"dtype": 9, "rank": 2, "address": 0x7F00_0000_1230, "aligned": True},
        **{"dims": [4096, 5], "strides": 8192, "box": [64, 16], "steps": [1, 1]},
        "modes": (0, 3, 3, 0),
    }
    assert launch.tensor_map(0x7F00_0000_1230, 5, 4096, 16, "bfloat16") is words
    seen["error"] = 1
    with pytest.raises(LaunchError, match="cuTensorMapEncodeTiled of 6 x 4096 failed"):
        launch.tensor_map(16, 6, 4096, 16, "float16")
    launch.tensor_map.cache_clear()
