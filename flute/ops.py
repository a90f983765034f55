"""The ops `flute::lut_gemm` and `flute::dequantize`: check the arguments, pick a path, run it.

Registered with `torch.library`, so it works under `torch.compile(fullgraph=True)`, CUDA graphs,
autocast and autograd (for ``x`` and ``bias``; codes, scales and table are constants).

    lut_gemm (Python, any shape of x) -> flute::lut_gemm (x of shape (M, K)) -> a path per device
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flute import reference
from flute.errors import FormatError
from flute.format import QuantSpec, check_scales, check_table
from flute.pack import check_packed

_SCHEMAS = (
    "lut_gemm(Tensor x, Tensor packed, Tensor scales, Tensor table, Tensor? bias, "
    "int num_bits, int group_size) -> Tensor",
    "dequantize(Tensor packed, Tensor scales, Tensor table, "
    "int num_bits, int group_size, SymInt K, ScalarType dtype) -> Tensor",
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_library = torch.library.Library("flute", "FRAGMENT")
"""Kept alive for the life of the process: the op is unregistered with it."""


def lut_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    spec: QuantSpec,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply activations by a table-quantised weight.

    ``out[m, n] = sum_k x[m, k] * table[codes[n, k]] * scales[n, k // group_size] + bias[n]``,
    summed in fp32. The table is rounded to the dtype of ``x`` first.

    Args:
        x: fp16, bf16 or fp32, shape (..., K); any leading shape, empty ones included.
        packed: int32 from `flute.pack_codes`, shape (N, ceil(K * num_bits / 32)), on the device of
            ``x``.
        scales: fp16, bf16 or fp32, shape (N, K // group_size).
        table: fp32, shape (1, 2**num_bits), or (N, 2**num_bits) for a table per row.
        spec: num_bits and group_size.
        bias: any floating dtype, shape (N,), or None.

    Returns:
        Shape (..., N), dtype of ``x``.

    Raises:
        FormatError: a shape or dtype disagrees with ``spec``; the message names the argument.

    Reference: Guo et al. 2024, arXiv 2407.10960.
    """
    if not x.ndim:
        raise FormatError("`x` is a scalar; expected shape (..., K).")
    flat = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    out: Tensor = torch.ops.flute.lut_gemm(
        flat, packed, scales, table, bias, spec.num_bits, spec.group_size
    )
    return out.view(*x.shape[:-1], out.shape[-1])


def path_of(device: torch.device, dtype: torch.dtype) -> str:
    """Return, for people, which implementation multiplies on a device for a dtype of ``x``.

    Args:
        device: where ``x`` and the weight are.
        dtype: dtype of ``x``.
    """
    if dtype not in _DTYPES:
        return "none: expected float16, bfloat16 or float32"
    return "reference (PyTorch): dequantise to float32, multiply in float32"


def _check(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
) -> QuantSpec:
    spec = QuantSpec(num_bits, group_size)
    if x.ndim != 2 or x.dtype not in _DTYPES:
        raise FormatError(
            f"`x` is {x.dtype} of shape {tuple(x.shape)}; expected fp16, bf16 or fp32 (M, K)."
        )
    _check_weight(packed, scales, table, spec, x.shape[1])
    N = packed.shape[0]
    if bias is not None and tuple(bias.shape) != (N,):
        raise FormatError(f"`bias` has shape {tuple(bias.shape)}; expected (N,) = ({N},).")
    if bias is not None and not bias.is_floating_point():
        raise FormatError(f"`bias` is {bias.dtype}; expected a floating-point dtype.")
    for name, tensor in (("packed", packed), ("scales", scales), ("table", table), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise FormatError(f"`{name}` is on {tensor.device}; expected {x.device}, where `x` is.")
    return spec


def _check_weight(packed: Tensor, scales: Tensor, table: Tensor, spec: QuantSpec, K: int) -> None:
    check_packed(packed, spec.num_bits, K)
    check_scales(scales, packed.shape[0], K, spec)
    check_table(table, packed.shape[0], spec)


def _lut_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
) -> Tensor:
    spec = _check(x, packed, scales, table, bias, num_bits, group_size)
    return reference.lut_gemm(x, packed, scales, table, bias, spec)


def _lut_gemm_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
) -> Tensor:
    _check(x, packed, scales, table, bias, num_bits, group_size)
    return x.new_empty(x.shape[0], packed.shape[0])


def _dequantize(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    num_bits: int,
    group_size: int,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    spec = QuantSpec(num_bits, group_size)
    _check_weight(packed, scales, table, spec, K)
    if dtype not in _DTYPES:
        raise FormatError(f"`dtype` is {dtype}; expected fp16, bf16 or fp32.")
    return reference.dequantize_packed(packed, scales, table, spec, K, dtype)


def _dequantize_fake(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    num_bits: int,
    group_size: int,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(packed.shape[0], K, dtype=dtype)


def _lut_gemm_autocast(device_type: str) -> Any:
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
    mask = torch._C.DispatchKeySet(key[device_type])

    def autocast(x: Tensor, *args: Any) -> Tensor:
        if x.dtype in _DTYPES:  # others are refused below, as without autocast
            x = x.to(torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(mask):
            out: Tensor = torch.ops.flute.lut_gemm(x, *args)
            return out

    return autocast


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, table, bias, num_bits, group_size = inputs
    ctx.save_for_backward(packed, scales, table)
    ctx.spec = QuantSpec(num_bits, group_size)
    ctx.K = x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scales, table = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        spec = ctx.spec
        grad_x = grad @ torch.ops.flute.dequantize(
            packed, scales, table, spec.num_bits, spec.group_size, ctx.K, grad.dtype
        )
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


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
