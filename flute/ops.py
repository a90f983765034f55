"""The ops `flute::lut_gemm` and `flute::dequantize`: check the arguments, pick a path, run it.

Registered with `torch.library`, so it works under `torch.compile(fullgraph=True)`, CUDA graphs,
autocast and autograd (for ``x`` and ``bias``; codes, scales and table are constants).

    lut_gemm (Python, any shape of x) -> flute::lut_gemm (x of shape (M, K)) -> a path
        plain order, as stored: PyTorch, on any device                       reference.py
        kernel order, on a GPU with kernels, x of 16 bits: kernels           cuda.py
        kernel order otherwise: back to plain order, then PyTorch
        CPU order: kernels in C                                              cpu/library.py

``out_features`` tells the orders apart: None means plain order; N means kernel order, or CPU order
if the codes are uint8.
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
from flute.cpu.structures import is_by_rows
from flute.device import gpu_of, warn_unprepared, why_not
from flute.errors import FormatError, UnsupportedProblemError
from flute.format import FLOAT_DTYPES, PackedWeight, QuantSpec, check_scales, check_table
from flute.kernel_order import CHUNK_K, TILE_N, num_tiles, padded_k, to_plain_order
from flute.pack import check_packed
from flute.plans import MAX_MMA_M

_SCHEMAS = (
    "lut_gemm(Tensor x, Tensor packed, Tensor scales, Tensor table, Tensor? bias, "
    "int num_bits, int group_size, int? out_features=None, int[]? table_ends=None) -> Tensor",
    "dequantize(Tensor packed, Tensor scales, Tensor table, "
    "int num_bits, int group_size, SymInt K, ScalarType dtype, int? out_features=None, "
    "int[]? table_ends=None) -> Tensor",
)
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_MAX_CHECKED = 4096
_checked: dict[tuple[object, ...], tuple[QuantSpec, int, tuple[int, ...]]] = {}
"""What a call's shapes, dtypes, devices and numbers were found to mean; see `_weight_of`."""


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
            `flute.cpu.library.order` (uint8), which is what CPU kernels read.
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


def is_plain_call(x: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether nothing watches this call: no tracing, mode, autocast, transform or gradient.

    Then the op's implementation may be called without the dispatcher, which takes 10 us.
    """
    return (
        type(x) is Tensor
        and not (
            (x.requires_grad or (bias is not None and bias.requires_grad))
            and torch.is_grad_enabled()
        )
        and not _autocasts()
        and not _num_dispatch_modes()
        and not _has_function_mode()
        and _transform() is None
        and _trace() is None
        and forward_ad._current_level < 0
    )


def is_watched() -> bool:
    """Tell whether a transform or mode runs calls: then tensors may not be what they seem."""
    return _transform() is not None or bool(_num_dispatch_modes())


# Why: names of this module are found sooner, 0.15 us in all for `is_plain_call`.
_autocasts = torch._C._is_any_autocast_enabled
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_function_mode = torch._C._is_torch_function_mode_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state


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


def _weight_of(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
    out_features: int | None = None,
    table_ends: Sequence[int] | None = None,
) -> PackedWeight:
    """Check the arguments of a product, by what depends on shapes, dtypes, devices and numbers."""
    spec = QuantSpec(num_bits, group_size)
    if x.ndim != 2 or x.dtype not in FLOAT_DTYPES:
        raise FormatError(
            f"`x` is {x.dtype} of shape {tuple(x.shape)}; expected fp16, bf16 or fp32 (M, K)."
        )
    K, N = x.shape[1], out_features
    weight = _packed_weight(packed, scales, table, spec, K, N, table_ends)
    if bias is not None and tuple(bias.shape) != (weight.N,):
        raise FormatError(f"`bias` has shape {tuple(bias.shape)}; expected (N,) = ({weight.N},).")
    if bias is not None and not bias.is_floating_point():
        raise FormatError(f"`bias` is {bias.dtype}; expected a floating-point dtype.")
    for name, tensor in (("packed", packed), ("scales", scales), ("table", table), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise FormatError(f"`{name}` is on {tensor.device}; expected {x.device}, where `x` is.")
    return weight


def _packed_weight(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    K: int,
    out_features: int | None,
    table_ends: Sequence[int] | None,
) -> PackedWeight:
    """Check a weight's tensors, in kernel order if ``out_features`` is a number."""
    ends = tuple(table_ends or ())
    if out_features is None:
        check_packed(packed, spec.num_bits, K)
        N = packed.shape[0]
        check_scales(scales, N, K, spec)
        check_table(table, N, spec, ends)
        return PackedWeight(packed, scales, table, spec, N, K, ends)
    if packed.dtype == torch.uint8:
        return _cpu_weight(packed, scales, table, spec, K, out_features, ends)
    N, groups = out_features, spec.num_groups(K)
    tiles = num_tiles(N)
    shape = (tiles, padded_k(K) // CHUNK_K, TILE_N * CHUNK_K * spec.num_bits // 32)
    if tuple(packed.shape) != shape or packed.dtype != torch.int32 or not packed.is_contiguous():
        raise FormatError(
            f"`packed` is {packed.dtype} of shape {tuple(packed.shape)}; expected contiguous int32 "
            f"{shape} in kernel order for N={N}, K={K}, num_bits={spec.num_bits}."
        )
    one = groups == 1
    expected = (tiles * TILE_N,) if one else (tiles, padded_k(K) * groups // K, 8, 2)
    if tuple(scales.shape) != expected or not scales.is_contiguous():
        raise FormatError(
            f"`scales` has shape {tuple(scales.shape)}; expected contiguous {expected} in kernel "
            f"order for N={N}, K={K}, group_size={spec.group_size}."
        )
    if scales.dtype not in FLOAT_DTYPES:
        raise FormatError(f"`scales` is {scales.dtype}; expected float16, bfloat16 or float32.")
    check_table(table, N, spec, ends)
    return PackedWeight(packed, scales, table, spec, N, K, ends)


def _cpu_weight(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    K: int,
    N: int,
    ends: tuple[int, ...],
) -> PackedWeight:
    """Check a weight's tensors in CPU order."""
    check_table(table, N, spec, ends)
    shapes = cpu.order_shapes(N, K, spec, is_by_rows(table.shape[0], ends))
    if (tuple(packed.shape), tuple(scales.shape)) != shapes:
        raise FormatError(
            f"`packed` and `scales` have shapes {tuple(packed.shape)} and {tuple(scales.shape)}; "
            f"expected {shapes[0]} and {shapes[1]} in CPU order for N={N}, K={K}, {spec}."
        )
    if scales.dtype not in FLOAT_DTYPES:
        raise FormatError(f"`scales` is {scales.dtype}; expected float16, bfloat16 or float32.")
    if packed.device.type == "cuda":
        raise FormatError(f"`packed` is in CPU order, on {packed.device}; expected the CPU.")
    return PackedWeight(packed, scales, table, spec, N, K, ends)


def _checked_weight(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
    out_features: int | None = None,
    table_ends: Sequence[int] | None = None,
) -> PackedWeight:
    """Do as `_weight_of`, looking up what was checked before: 2 us instead of 7."""
    ends = None if table_ends is None else tuple(table_ends)
    device = x.device
    key = (
        *(x.shape[1:], x.dtype, device, num_bits, group_size, out_features, ends),
        *(packed.shape, packed.dtype, packed.is_contiguous(), packed.device == device),
        *(scales.shape, scales.dtype, scales.is_contiguous(), scales.device == device),
        *(table.shape, table.dtype, table.device == device),
        None if bias is None else (bias.shape, bias.dtype, bias.device == device),
    )
    found = _checked.get(key)
    if found is None:
        weight = _weight_of(
            x, packed, scales, table, bias, num_bits, group_size, out_features, ends
        )
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        found = _checked[key] = (weight.spec, weight.N, weight.table_ends)
    spec, N, ends = found
    return PackedWeight(packed, scales, table, spec, N, x.shape[1], ends)


def _plain_weight(weight: PackedWeight) -> PackedWeight:
    """Put a weight in kernel order back as it is stored."""
    packed, scales, _, spec, N, K, _ = weight
    groups = spec.num_groups(K)
    packed, scales = to_plain_order(packed, scales, spec.num_bits, N, K, groups)
    return weight._replace(packed=packed, scales=scales)


def _lut_gemm(x: Tensor, *args: Any) -> Tensor:
    weight, bias = _checked_weight(x, *args), args[3]
    if weight.packed.dtype == torch.uint8:
        return cpu.multiply(x, weight, bias)
    has_kernels = x.dtype in _KERNEL_DTYPES and not why_not(x.device)
    if len(args) > 6 and args[6] is not None:  # in kernel order
        if has_kernels:
            return cuda.multiply(x, weight, bias)
        weight = _plain_weight(weight)
    elif has_kernels and weight.N and not weight.K % 32:
        warn_unprepared(x.device)
    return reference.lut_gemm(x, weight, bias)


def _lut_gemm_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], _weight_of(x, *args).N)


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
    weight = _packed_weight(packed, scales, table, spec, K, out_features, table_ends)
    if dtype not in FLOAT_DTYPES:
        raise FormatError(f"`dtype` is {dtype}; expected fp16, bf16 or fp32.")
    if packed.dtype == torch.uint8:
        return cpu.dequantize(weight, dtype)
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
