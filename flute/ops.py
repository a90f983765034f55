"""The ops `flute::lut_gemm` and `flute::dequantize`: pick a path, run it.

Registered with `torch.library`, so it works under `torch.compile(fullgraph=True)`, CUDA graphs,
autocast and autograd (for ``x`` and ``bias``; codes, scales and table are constants).

    lut_gemm (Python, any shape of x) -> flute::lut_gemm (x of shape (M, K)) -> a path
        plain order, as stored: PyTorch, on any device                       reference.py
        kernel order, on a GPU with kernels, x of 16 bits: kernels           cuda.py
        kernel order otherwise: back to plain order, then PyTorch
        CPU order: kernels in C                                              cpu/products.py

``out_features`` tells the orders apart: None means plain order; N means kernel order, or CPU order
if the codes are uint8. `flute.op_arguments` checks what the ops are given, `flute.plain_call` says
where the dispatcher may be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from flute import cuda, reference
from flute.cpu import library as cpu
from flute.cpu import products
from flute.device import gpu_of, warn_unprepared, why_not
from flute.errors import FormatError, UnsupportedProblemError
from flute.format import FLOAT_DTYPES, PackedWeight, QuantSpec
from flute.kernel_order import to_plain_order
from flute.op_arguments import check_product, check_weight, checked_product
from flute.plain_call import is_plain_call
from flute.plans import MAX_MMA_M

_SCHEMAS = (
    "lut_gemm(Tensor x, Tensor packed, Tensor scales, Tensor table, Tensor? bias, "
    "int num_bits, int group_size, int? out_features=None, int[]? table_ends=None) -> Tensor",
    "dequantize(Tensor packed, Tensor scales, Tensor table, "
    "int num_bits, int group_size, SymInt K, ScalarType dtype, int? out_features=None, "
    "int[]? table_ends=None) -> Tensor",
)
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def lut_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    bias: Tensor | None = None,
    out_features: int | None = None,
    table_ends: Sequence[int] = (),
) -> Tensor:
    """Multiply activations by a table-quantised weight.

    ``out[m, n] = sum_k x[m, k] * table[codes[n, k]] * scales[n, k // group_size] + bias[n]``,
    summed in fp32. The table is rounded to the dtype of ``x`` first.

    Args:
        x: fp16, bf16 or fp32, shape (..., K); any leading shape, empty ones included.
        packed: int32 from `flute.pack_codes`, shape (N, ceil(K * num_bits / 32)), on the device of
            ``x``.
        scales: fp16, bf16 or fp32, shape (N, K // group_size).
        table: fp32, shape (1, 2**num_bits); (N, 2**num_bits) for a table per row; or
            (R, 2**num_bits) for R ranges of rows.
        spec: num_bits and group_size.
        bias: any floating dtype, shape (N,), or None.
        out_features: None if ``packed`` and ``scales`` are as stored; N if they are in the order of
            `flute.kernel_order.to_kernel_order`, which is what GPU kernels read, or of
            `flute.cpu.products.order` (uint8), which is what CPU kernels read.
        table_ends: where each of R ranges of rows ends, ascending, the last N; empty if there is
            one table, or one per row. Kernels read up to 8 ranges that end at multiples of 16; of
            others they are given a table per row, made anew in each call.

    Returns:
        Shape (..., N), dtype of ``x``.

    Raises:
        FormatError: a shape or dtype disagrees with ``spec``; the message names the argument.

    Reference: Guo et al. 2024, arXiv 2407.10960.
    """
    if not x.ndim:
        raise FormatError("`x` is a scalar; expected shape (..., K).")
    flat = x if x.ndim == 2 else x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    ends = tuple(table_ends) or None
    args = (packed, scales, table, bias, spec.num_bits, spec.group_size, out_features, ends)
    if not is_dynamo_compiling() and not x.is_meta and is_plain_call(x, bias):
        out = _lut_gemm(flat, *args)
    else:
        out = torch.ops.flute.lut_gemm.default(flat, *args)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], out.shape[-1])


_REFERENCE = "reference (PyTorch): dequantise to float32, multiply in float32"


def path_of(device: torch.device, dtype: torch.dtype) -> str:
    """Return, for people, which implementation multiplies on a device for a dtype of ``x``.

    Args:
        device: where ``x`` and the weight are.
        dtype: dtype of ``x``.
    """
    if dtype not in FLOAT_DTYPES:
        return "none: expected float16, bfloat16 or float32"
    if device.type == "cpu":
        reason = cpu.why_not()
        if reason:
            return f"{_REFERENCE} (slow; no kernels: {reason})"
        kind = "exact" if cpu.is_exact() else "fixed point"
        return (
            f"M <= {cpu.direct_m()}: {cpu.variant()} kernels, {kind}; more: dequantise, then "
            "torch's matmul; codes in the order of storage: reference"
        )
    if device.type != "cuda":
        return _REFERENCE
    reason = why_not(device)
    if dtype == torch.float32:
        reason = reason or "kernels take 16-bit activations"
    if reason:
        return f"{_REFERENCE} (slow; no kernels: {reason})"
    arch = gpu_of(device).arch
    more = "more: batch kernels"
    if arch != "sm_90a":
        more = f"M <= {MAX_MMA_M}: mma kernels; more: dequantise kernel, then torch's matmul"
    return f"M <= 8: decode kernels for {arch}; {more}; K not a multiple of 32: {_REFERENCE}"


def _plain_weight(weight: PackedWeight) -> PackedWeight:
    """Put a weight in kernel order back as it is stored."""
    packed, scales, _, spec, N, K, _ = weight
    groups = spec.num_groups(K)
    packed, scales = to_plain_order(packed, scales, spec.num_bits, N, K, groups)
    return weight._replace(packed=packed, scales=scales)


def _lut_gemm(x: Tensor, *args: Any) -> Tensor:
    weight, bias = checked_product(x, *args), args[3]
    if weight.packed.dtype == torch.uint8:
        return products.multiply(x, weight, bias)
    has_kernels = x.dtype in _KERNEL_DTYPES and not why_not(x.device)
    if len(args) > 6 and args[6] is not None:  # in kernel order
        if has_kernels:
            return cuda.multiply(x, weight, bias)
        weight = _plain_weight(weight)
    elif has_kernels and weight.N and not weight.K % 32:
        warn_unprepared(x.device)
    return reference.lut_gemm(x, weight, bias)


def _lut_gemm_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], check_product(x, *args).N)


def _dequantize(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    num_bits: int,
    group_size: int,
    K: int,
    dtype: torch.dtype,
    out_features: int | None = None,
    table_ends: Sequence[int] | None = None,
) -> Tensor:
    spec = QuantSpec(num_bits, group_size)
    weight = check_weight(packed, scales, table, spec, K, out_features, table_ends)
    if dtype not in FLOAT_DTYPES:
        raise FormatError(f"`dtype` is {dtype}; expected fp16, bf16 or fp32.")
    if packed.dtype == torch.uint8:
        return products.dequantize(weight, dtype)
    if out_features is not None:
        if dtype in _KERNEL_DTYPES and not why_not(packed.device):
            return cuda.dequantize(weight, dtype)
        weight = _plain_weight(weight)
    return reference.dequantize_packed(weight, dtype)


def _dequantize_fake(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    num_bits: int,
    group_size: int,
    K: int,
    dtype: torch.dtype,
    out_features: int | None = None,
    table_ends: Sequence[int] | None = None,
) -> Tensor:
    N = packed.shape[0] if out_features is None else out_features
    return packed.new_empty(N, K, dtype=dtype)


def _lut_gemm_autocast(device_type: str) -> Any:
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
    mask = torch._C.DispatchKeySet(key[device_type])

    def autocast(x: Tensor, *args: Any) -> Tensor:
        if x.dtype in FLOAT_DTYPES:  # others are refused below, as without autocast
            x = x.to(torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(mask):
            out: Tensor = torch.ops.flute.lut_gemm.default(x, *args)
            return out

    return autocast


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, table, bias, *numbers = inputs
    ctx.save_for_backward(packed, scales, table)
    ctx.spec, ctx.rest = numbers[:2], numbers[2:]
    ctx.K = x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.flute.dequantize.default(
            *ctx.saved_tensors, *ctx.spec, ctx.K, grad.dtype, *ctx.rest
        )
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, *[None] * (len(ctx.spec) + len(ctx.rest))


class _Library(torch.library.Library):
    """Puts a shortcut before the autograd kernel of the op."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **kwargs: Any) -> None:
        """Register ``fn``, as the library does; see `_shortcut`."""
        if dispatch_key == "Autograd" and kwargs.get("with_keyset"):
            fn = _shortcut(fn)
        super().impl(op_name, fn, dispatch_key, **kwargs)  # type: ignore[no-untyped-call]


def _shortcut(generated: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an autograd kernel that multiplies at once where there is nothing to differentiate.

    Otherwise it would dispatch anew, to a second Python function: 14 of 23 us (torch 2.13, CPU).
    """

    def autograd(keyset: Any, x: Tensor, *args: Any) -> Tensor:
        if not x.is_meta and is_plain_call(x, args[3]):
            return _lut_gemm(x, *args)
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedProblemError(
                "flute::lut_gemm has no forward-mode derivative; use reverse mode (backward, vjp)."
            )
        return generated(keyset, x, *args)

    return autograd


_library: torch.library.Library = _Library("flute", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Kept alive for the life of the process: the op is unregistered with it."""


def _register() -> None:
    """Define the ops once per process; a second import of this module (a reload) is harmless."""
    if hasattr(torch.ops.flute, "lut_gemm"):
        return
    for schema in _SCHEMAS:
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl("lut_gemm", _lut_gemm, "CompositeExplicitAutograd")
    _library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl("lut_gemm", _lut_gemm_autocast(device_type), key)
    torch.library.register_fake("flute::lut_gemm", _lut_gemm_fake, lib=_library)
    torch.library.register_fake("flute::dequantize", _dequantize_fake, lib=_library)
    torch.library.register_autograd(
        "flute::lut_gemm", _backward, setup_context=_setup_context, lib=_library
    )


_register()
