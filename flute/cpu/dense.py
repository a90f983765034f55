"""Products with dense weights, for few tokens: `kernels/cpu/dense.c`.

torch's matmul reads a bf16 weight at less than half of the memory's speed when there is one token.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from flute.cpu import library
from flute.cpu.structures import TYPES, Result, Tokens

MAX_TOKENS = 8
"""Most tokens of a call."""


class _Dense(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


def most_tokens(dtype: torch.dtype) -> int:
    """Return for how many tokens the library is faster than torch; 0 if it is never to be asked.

    Where the CPU multiplies bf16 by instructions of its own, torch wins from two tokens on (Zen 4,
    32,000 x 2,048: 10 ms for 2 to 4 tokens; the library 4.9 for one, 12 for two); for fp16 and fp32
    the library still does at 8 (33 ms instead of 54, 41 instead of 54).

    Args:
        dtype: of the weight and of x.
    """
    if library.why_not() or library.variant() == "scalar" or dtype not in TYPES:
        return 0
    return 1 if dtype == torch.bfloat16 and _multiplies_bf16() else MAX_TOKENS


def _multiplies_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply 1 to `MAX_TOKENS` tokens by a dense weight, summed in fp32.

    Results are the same for all variants and numbers of threads.

    Args:
        x: fp16, bf16 or fp32, shape (M, K), on the CPU.
        weight: contiguous, shape (N, K), of one of these dtypes.
        bias: contiguous, shape (N,), of one of these dtypes; or None.

    Returns:
        Shape (M, N), dtype of ``x``.

    Raises:
        UnsupportedProblemError: there is no library; the message says why.
    """
    M, (N, K) = x.shape[0], weight.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((M, N), dtype=x.dtype)
    dense = _Dense(weight.data_ptr(), N, K, TYPES[weight.dtype])
    result = Result(None, out.data_ptr(), 0)
    if bias is not None:
        result.bias, result.bias_type = bias.data_ptr(), TYPES[bias.dtype]
    tokens = Tokens(x.data_ptr(), M, x.stride(0), TYPES[x.dtype])
    library.call("flute_dense", ctypes.byref(dense), ctypes.byref(result), ctypes.byref(tokens))
    return out
