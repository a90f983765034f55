"""Products by ggml, the library of llama.cpp, through ctypes: weights in its repacked CPU layout.

Needs a build of its shared libraries, of this machine's instructions: in a checkout of llama.cpp,

    cmake -B build -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON && cmake --build build --target ggml-cpu
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import torch

TYPES = {"IQ4_NL": 20, "Q4_0": 2}
_F32 = 0
_QUANTISED_ROWS = 64
"""Rows that are quantised and repeated: the search for IQ4_NL takes seconds for a whole matrix."""


class _Params(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """A CPU backend of ggml.

    Args:
        folder: with libggml-base.so and libggml-cpu.so.
    """

    def __init__(self, folder: Path) -> None:
        # One handle resolves the symbols of both.
        ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._lib = lib = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        base = ctypes.CDLL(str(folder / "libggml-base.so"))
        signatures = {
            "ggml_init": (c_void_p, [_Params]),
            "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
            "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
            "ggml_new_graph": (c_void_p, [c_void_p]),
            "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
            "ggml_nbytes": (c_size_t, [c_void_p]),
            "ggml_quantize_chunk": (
                c_size_t,
                [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
            ),
            "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
            "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
            "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
            "ggml_backend_buft_name": (c_char_p, [c_void_p]),
            "ggml_backend_cpu_buffer_type": (c_void_p, []),
            "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
            "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
            "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
            "ggml_backend_cpu_init": (c_void_p, []),
            "ggml_backend_cpu_reg": (c_void_p, []),
            "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
        }
        self._functions = {}
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, name, None) or getattr(base, name)
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        self._backend = self._call("cpu_init")
        self._weights = self._repacked()

    def _call(self, name: str, *args: object) -> int:
        full = name if name.startswith("ggml_") else f"ggml_backend_{name}"
        return self._functions[full](*args)

    def _repacked(self) -> int:
        """The buffer type whose weights are repacked when they are set; the plain one if none."""
        registry = self._call("cpu_reg")
        device = self._call("reg_dev_get", registry, 0)
        address = self._call("reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            get = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
            for found in get(device):
                if not found:
                    break
                if self._call("buft_name", found) == b"CPU_REPACK":
                    return found
        return self._call("cpu_buffer_type")

    def set_threads(self, count: int) -> None:
        """Use so many threads."""
        self._call("cpu_set_n_threads", self._backend, count)

    def weights(self, kind: str, dense: torch.Tensor, copies: int) -> list[int]:
        """Quantise some rows of a weight (N, K), repeated, into so many tensors."""
        N, K = dense.shape
        context = self._call("ggml_init", _Params(copies * 1024 + 4096, None, True))
        tensors = [
            self._call("ggml_new_tensor_2d", context, TYPES[kind], K, N) for _ in range(copies)
        ]
        self._call("alloc_ctx_tensors_from_buft", context, self._weights)
        rows = dense[:_QUANTISED_ROWS].float().contiguous()
        num_bytes = self._call("ggml_nbytes", tensors[0])
        part = np.empty(num_bytes * _QUANTISED_ROWS // N, dtype=np.uint8)
        self._call(
            "ggml_quantize_chunk", TYPES[kind], rows.data_ptr(), part.ctypes.data, 0, len(rows), K,
            None,
        )  # fmt: skip
        whole = np.tile(part, -(-N // _QUANTISED_ROWS))[:num_bytes]
        for tensor in tensors:
            self._call("tensor_set", tensor, whole.ctypes.data, 0, num_bytes)
        return tensors

    def products(self, weights: list[int], x: torch.Tensor, N: int) -> list[Product]:
        """A product per weight, with the same tokens (M, K)."""
        return [Product(self, weight, x, N) for weight in weights]


class Product:
    """A graph of one matrix product, ready to run."""

    def __init__(self, ggml: Ggml, weight: int, x: torch.Tensor, N: int) -> None:
        self._ggml, self._shape = ggml, (x.shape[0], N)
        context = ggml._call("ggml_init", _Params(1 << 20, None, True))
        tokens = ggml._call("ggml_new_tensor_2d", context, _F32, x.shape[1], x.shape[0])
        self._out = ggml._call("ggml_mul_mat", context, weight, tokens)
        self._graph = ggml._call("ggml_new_graph", context)
        ggml._call("ggml_build_forward_expand", self._graph, self._out)
        ggml._call("alloc_ctx_tensors_from_buft", context, ggml._call("cpu_buffer_type"))
        values = x.float().contiguous()
        ggml._call("tensor_set", tokens, values.data_ptr(), 0, 4 * values.numel())

    def __call__(self) -> None:
        """Run it."""
        status = self._ggml._call("graph_compute", self._ggml._backend, self._graph)
        assert status == 0, f"ggml failed: {status}"

    def result(self) -> torch.Tensor:
        """Return what the last run gave, fp32 (M, N)."""
        out = torch.empty(self._shape)
        self._ggml._call("tensor_get", self._out, out.data_ptr(), 0, 4 * out.numel())
        return out
