"""The GPU path: products and dense weights by kernels.

Owns how the plans of `flute.plans` are carried out. Weights come in kernel order
(`flute.kernel_order`); `flute.op_arguments` checks them. Importing it loads neither CUDA nor the
compiler.

A product is one launch (`Ready` keeps a layer's), several, or dense by slices: `flute.plans`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flute import launchers
from flute.constant import Constant
from flute.device import why_not
from flute.format import TENSOR_NAMES, PackedWeight, table_per_row
from flute.kernel_order import TILE_N
from flute.launchers import TokensAt, takes_ranges
from flute.plans import DensePlan, SplitPlan

if TYPE_CHECKING:
    from flute.launchers import Product

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
    M, N = x.shape[0], weight.N
    if not M or not N:
        return x.new_empty(M, N)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    weight, device = _with_readable_table(weight), x.device
    if _current_device() != device.index:
        with torch.cuda.device(device):
            return multiply(x, weight, bias)
    x = _readable(x)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    product = launchers.product(weight, M, x.dtype, device)
    if isinstance(product.plan, DensePlan):
        return multiply_dense(x, weight, bias, product.plan.slice_bytes)
    out = _empty((M, N), (N, 1), x.dtype)
    step = product.plan.tokens if isinstance(product.plan, SplitPlan) else M
    for start in range(0, M, step):
        part = x[start : start + step]
        if step < M:
            product = launchers.product(weight, part.shape[0], x.dtype, device)
        if product.launcher is None:  # no kernel for these tokens
            out[start : start + step] = multiply_dense(part, weight, bias)
        else:
            _launch(product, part, weight, bias, out[start : start + step])
    return out


def _launch(
    product: Product, x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor
) -> None:
    """Launch a kernel on the current stream of the current device, which is that of ``x``."""
    parts = (weight.packed, weight.scales, weight.table, bias)
    weight_at = [0 if part is None else part.data_ptr() for part in parts]
    scratch = None
    if product.num_scratch:
        scratch = x.new_empty(product.num_scratch, dtype=torch.float32)
    scratch_at = 0 if scratch is None else scratch.data_ptr()
    tokens = TokensAt(x.data_ptr(), x.shape[0], x.shape[1], x.dtype)
    stream = _current_stream(x.device.index)
    product.launch(stream, tokens, weight_at, scratch_at, out.data_ptr())


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


def multiply_dense(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, slice_bytes: int = DensePlan.slice_bytes
) -> Tensor:
    """Multiply as `multiply` does, by dequantising slices of the weight.

    Args:
        x: fp16 or bf16, shape (M, K).
        weight: in kernel order.
        bias: shape (N,), or None.
        slice_bytes: most bytes of dequantised weight at a time.

    Returns:
        Shape (M, N).
    """
    (M, K), N = x.shape, weight.N
    rows = max(1, slice_bytes // (2 * K * TILE_N)) * TILE_N
    if rows >= N:
        return F.linear(x, dequantize(weight, x.dtype), bias)
    out = x.new_empty(M, N)
    dense = x.new_empty(rows, K)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        part = dense[: stop - start]
        _dequantize_into(part, weight, start // TILE_N)
        # Why not F.linear: its result would be copied, 0.9 GB at 16,384 x 28,672.
        if bias is None:
            torch.mm(x, part.t(), out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, part.t(), out=out[:, start:stop])
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
        product: its launcher takes x (an address, or a map), scratch if there is any, and out; the
            rest is bound.
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
        "_map_tokens",
        "_moves",
        "_others",
        "_scales",
        "_scratch",
        "_table",
    )

    def __init__(
        self,
        product: Product,
        device: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        parameters: dict[str, Any],
        bound: tuple[Tensor | None, ...],
    ) -> None:
        assert product.launcher is not None, "a plan of a kernel has a launcher"
        self._launcher, self._scratch = product.launcher, product.num_scratch
        self._map_tokens = product.map_tokens
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
        if self._map_tokens:
            K = x.shape[-1]
            tokens = TokensAt(at, x.numel() // K, K, x.dtype).map(self._map_tokens)
            self._launcher.launch(stream, out.data_ptr(), regions=((0, tokens),))
            return out
        if not self._scratch:
            self._launcher.launch_pair(stream, at, out.data_ptr())
            return out
        scratch = x.new_empty(self._scratch, dtype=torch.float32)
        self._launcher.launch(stream, at, scratch.data_ptr(), out.data_ptr())
        return out


def make_ready(x: Tensor, weight: PackedWeight, parameters: dict[str, Any]) -> Ready | None:
    """Return a product made ready, or None if `multiply` has to look at each call.

    Args:
        x: shape (..., K).
        weight: in kernel order.
        parameters: of the layer whose weight it is, by name.

    Raises:
        UnsupportedProblemError: a kernel had to be compiled while a CUDA graph is captured.
    """
    M, device = x.numel() // max(1, weight.K), x.device
    bias: Tensor | None = None if parameters["bias"] is None else parameters["bias"].data
    if not M or not weight.N or x.dtype not in (torch.float16, torch.bfloat16):
        return None
    if any(p is not None and p.device != device for p in parameters.values()) or why_not(device):
        return None
    if not takes_ranges(weight.table_ends) or not weight.table.is_contiguous():
        return None
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        return None
    with torch.cuda.device(device):
        product = launchers.product(weight, M, x.dtype, device)
    if product.launcher is None:
        return None
    bound = (weight.packed, weight.scales, weight.table, bias)
    first = 0 if product.map_tokens else 1  # slot of the codes
    pointers = {i: 0 if part is None else part.data_ptr() for i, part in enumerate(bound, first)}
    if not product.map_tokens and not product.num_scratch:
        pointers[5] = 0
    product = product._replace(launcher=product.launcher.bind(pointers))
    shape = (*x.shape[:-1], weight.N)
    return Ready(product, device.index, shape, x.dtype, parameters, bound)
