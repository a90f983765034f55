"""The GPU path: products and dense weights by kernels.

Owns which products are decoded and which dequantised. Weights come in kernel order
(`flute.kernel_order`); `flute.ops` checks arguments. Importing it loads neither CUDA nor the
compiler.

    M <= 16          decode kernel; a layer keeps it ready (`Ready`)
    M <= 96          launches of 16 tokens each: faster than one of 32, or than dequantising
    more             dequantise at most 64 MB of weight, multiply with torch, next rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flute import launchers
from flute.constant import Constant
from flute.format import TENSOR_NAMES, PackedWeight, table_per_row
from flute.kernel_order import TILE_N
from flute.launchers import DECODE_M, takes_ranges

if TYPE_CHECKING:
    from flute.jit.launch import Launcher

MAX_DECODE_M = 96
"""Beyond it, dequantising the weight and multiplying densely is faster: on 57344 x 8192 a launch of
16 tokens takes 107 us, the other way 746 us at M = 64 (4 bits, fp16, H200, 2026-11-22)."""
_DENSE_BYTES = 64 << 20
"""Most bytes of dequantised weight at a time."""
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", int)
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", int)
"""As ``torch.cuda``'s, without a Stream object. Builds without CUDA have neither."""
_empty: Callable[..., Tensor] = getattr(torch._C._dynamo.guards, "_empty_strided_cuda")  # noqa: B009
"""`torch.empty_strided` of shape, strides and dtype on the current GPU, as compiled models call it:
2.5 us where ``new_empty`` takes 4.9 (torch 2.11, H200, 2026-11-22). Its stubs lack it."""


def multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Multiply by a weight in kernel order; see `flute.lut_gemm`.

    Args:
        x: fp16 or bf16, shape (M, K), on a GPU for which `flute.device.why_not` is "".
        weight: in kernel order.
        bias: shape (N,), or None.

    Returns:
        Shape (M, N), dtype of ``x``.

    Raises:
        UnsupportedProblemError: a kernel had to be compiled while a CUDA graph is captured.
    """
    (M, K), N = x.shape, weight.N
    if not M or not N:
        return x.new_empty(M, N)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    weight = _with_readable_table(weight)
    if M > MAX_DECODE_M:
        return _multiply_dense(x, weight, bias)
    device = x.device
    if _current_device() != device.index:
        with torch.cuda.device(device):
            return multiply(x, weight, bias)
    x = _readable(x)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    out, stream = _empty((M, N), (N, 1), x.dtype), _current_stream(device.index)
    x_at, out_at = x.data_ptr(), out.data_ptr()
    parts = (weight.packed, weight.scales, weight.table, bias)
    pointers = [0 if part is None else part.data_ptr() for part in parts]
    for start in range(0, M, DECODE_M):
        found = launchers.decode(weight, min(DECODE_M, M - start), x.dtype, device)
        if found is None:
            return _multiply_dense(x, weight, bias)
        launcher, num_scratch = found
        scratch = x.new_empty(num_scratch, dtype=torch.float32) if num_scratch else None
        scratch_at = 0 if scratch is None else scratch.data_ptr()
        at = (x_at + start * K * 2, *pointers, scratch_at, out_at + start * N * 2)
        launcher.launch(stream, *at)
    return out


def _readable(x: Tensor) -> Tensor:
    """Return x as kernels read it: contiguous, at a multiple of 16 bytes."""
    if x.is_contiguous() and not x.data_ptr() & 15:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _with_readable_table(weight: PackedWeight) -> PackedWeight:
    """Return the weight with a contiguous table, one per row if kernels don't take its ranges."""
    table, ends = weight.table, weight.table_ends
    if ends and not takes_ranges(ends):
        return weight._replace(table=table_per_row(table, ends), table_ends=())
    return weight if table.is_contiguous() else weight._replace(table=table.contiguous())


def _multiply_dense(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    (M, K), N = x.shape, weight.N
    rows = max(1, _DENSE_BYTES // (2 * K * TILE_N)) * TILE_N
    if rows >= N:
        return F.linear(x, dequantize(weight, x.dtype), bias)
    out = x.new_empty(M, N)
    dense = x.new_empty(rows, K)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        part = dense[: stop - start]
        _dequantize_into(part, weight, start // TILE_N)
        out[:, start:stop] = F.linear(x, part, None if bias is None else bias[start:stop])
    return out


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the dense weight (N, K) in fp16 or bf16, bit for bit `flute.reference`'s.

    Args:
        weight: in kernel order.
        dtype: fp16 or bf16.

    Raises:
        UnsupportedProblemError: a kernel had to be compiled while a CUDA graph is captured.
    """
    out = torch.empty(weight.N, weight.K, dtype=dtype, device=weight.packed.device)
    if out.numel():
        _dequantize_into(out, _with_readable_table(weight), 0)
    return out


def _dequantize_into(out: Tensor, weight: PackedWeight, first_tile: int) -> None:
    device = out.device
    with torch.cuda.device(device):
        launcher = launchers.dequantize(weight, out.shape[0], first_tile, out.dtype, device)
        stream = _current_stream(device.index)
        parts = (weight.packed, weight.scales, weight.table, out)
        launcher.launch(stream, *(part.data_ptr() for part in parts))


class Ready:
    """A layer's product made ready for one shape and dtype of x: a call writes x, out and stream.

    It keeps the weight's memory alive, so that an address which it knows cannot have become
    another tensor's.

    Args:
        launcher: takes x, scratch if there is any, and out; the rest is bound.
        num_scratch: fp32 numbers that a launch needs besides.
        device: index of the GPU.
        shape: of the result.
        dtype: of the result.
        parameters: of the layer, by name: codes, scales and table are constants.
        bound: the tensors whose addresses are bound: codes, scales, table, bias.
    """

    __slots__ = (
        "_bias_at",
        "_codes",
        "_device",
        "_kept",
        "_launcher",
        "_like",
        "_moves",
        "_others",
        "_scales",
        "_scratch",
        "_table",
    )

    def __init__(
        self,
        launcher: Launcher,
        num_scratch: int,
        device: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        parameters: dict[str, Any],
        bound: tuple[Tensor | None, ...],
    ) -> None:
        self._launcher, self._scratch = launcher, num_scratch
        self._device = device
        strides = torch.empty(shape, device="meta").stride()
        self._like = (shape, strides, dtype)
        self._others = torch.cuda.device_count() > 1
        self._codes, self._scales, self._table = (parameters[name] for name in TENSOR_NAMES)
        self._kept = [tensor for tensor in bound if tensor is not None]
        self._bias_at = 0 if bound[3] is None else bound[3].data_ptr()
        self._moves = -1

    def _still_bound(self) -> bool:
        """Tell whether the constants lie where they lay; `Constant.moves` says some may not."""
        moves, constants = Constant.moves, (self._codes, self._scales, self._table)
        for now, then in zip(constants, self._kept[:3], strict=True):
            if now.data_ptr() != then.data_ptr():
                return False
        self._moves = moves
        return True

    def __call__(self, x: Tensor, parameters: dict[str, Any]) -> Tensor | None:
        """Multiply, or return None where the layer's parameters are no longer those bound.

        Args:
            x: of the shape, dtype and device it was made for.
            parameters: of the layer, by name.
        """
        bias = parameters["bias"]
        if (
            parameters["codes"] is not self._codes
            or parameters["scales"] is not self._scales
            or parameters["table"] is not self._table
            or (0 if bias is None else bias.data_ptr()) != self._bias_at
            or (bias is not None and bias.requires_grad and torch.is_grad_enabled())
            or (Constant.moves != self._moves and not self._still_bound())
        ):
            return None
        device, at = self._device, x.data_ptr()
        if at & 15 or not x.is_contiguous():
            x = x.clone(memory_format=torch.contiguous_format)
            at = x.data_ptr()
        if self._others and _current_device() != device:
            with torch.cuda.device(device):
                return self(x, parameters)
        out, stream = _empty(*self._like), _current_stream(device)
        if not self._scratch:
            self._launcher.launch_pair(stream, at, out.data_ptr())
            return out
        scratch = x.new_empty(self._scratch, dtype=torch.float32)
        self._launcher.launch(stream, at, scratch.data_ptr(), out.data_ptr())
        return out


def make_ready(x: Tensor, weight: PackedWeight, parameters: dict[str, Any]) -> Ready | None:
    """Return a product made ready, or None if `multiply` has to look at each call.

    Args:
        x: fp16 or bf16, shape (..., K), on a GPU for which `flute.device.why_not` is "".
        weight: in kernel order, on the same device.
        parameters: of the layer whose weight it is, by name; ``bias`` is on the same device.

    Raises:
        UnsupportedProblemError: a kernel had to be compiled while a CUDA graph is captured.
    """
    M, device = x.numel() // max(1, weight.K), x.device
    bias: Tensor | None = None if parameters["bias"] is None else parameters["bias"].data
    if not 1 <= M <= DECODE_M or not weight.N or _with_readable_table(weight) is not weight:
        return None
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        return None
    with torch.cuda.device(device):
        found = launchers.decode(weight, M, x.dtype, device)
    if found is None:
        return None
    launcher, num_scratch = found
    bound = (weight.packed, weight.scales, weight.table, bias)
    pointers = {i: 0 if part is None else part.data_ptr() for i, part in enumerate(bound, 1)}
    if not num_scratch:
        pointers[5] = 0
    shape = (*x.shape[:-1], weight.N)
    bound_launcher = launcher.bind(pointers)
    return Ready(bound_launcher, num_scratch, device.index, shape, x.dtype, parameters, bound)
