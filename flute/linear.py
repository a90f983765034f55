"""`LutLinear`: a linear layer whose weight is table-quantised. Drops in for `torch.nn.Linear`.

Owns which order the codes and scales of a layer are in. As stored, on the CPU, and wherever there
are no kernels: plain order. On a GPU with kernels: kernel order, from the first call or
`flute.prepare` on, in place of the other. Whatever leaves the layer (state dict, pickle, another
device) is plain again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flute import cuda
from flute.errors import FormatError
from flute.format import TENSOR_NAMES, QuantizedWeight, QuantSpec
from flute.kernel_order import to_kernel_order, to_plain_order
from flute.ops import is_plain_call, lut_gemm
from flute.pack import pack_codes, unpack_codes
from flute.reference import dequantize_packed

_lock = threading.Lock()
"""Held while a layer changes order at its first call."""


class LutLinear(nn.Module):
    """Compute ``x @ (table[codes] * scales).T + bias``.

    The parameters carry the names, shapes and dtypes of the tensors on disk, so a state dict is a
    checkpoint: ``codes`` int32 (N, ceil(K * num_bits / 32)), ``scales`` (N, K / group length),
    ``table`` fp32 (1 | N, 2**num_bits), ``bias`` (N,). None of them requires a gradient.

    Args:
        in_features: K.
        out_features: N.
        spec: bits and group size.
        bias: whether a bias is added.
        table_per_row: one table per output row instead of one per matrix.
        scale_dtype: dtype of the scales.
        dtype: dtype of the bias (default: torch's default dtype).
        device: where the (uninitialised) parameters live; "meta" to fill them from a checkpoint.

    Raises:
        FormatError: K is not a multiple of the group size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = True,
        table_per_row: bool = False,
        scale_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.kernel_order = False
        """Whether ``codes`` and ``scales`` are in the order of `flute.kernel_order`."""
        self._settled = False  # whether the order suits the device
        N, K = out_features, in_features

        def parameter(shape: tuple[int, ...], dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.codes = parameter((N, spec.num_words(K)), torch.int32)
        self.scales = parameter((N, spec.num_groups(K)), scale_dtype)
        self.table = parameter((N if table_per_row else 1, spec.num_entries), torch.float32)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", parameter((N,), dtype) if bias else None)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> LutLinear:
        """Return the layer of a quantised matrix; it shares scales, table and bias with it."""
        N, K = weight.shape
        layer = cls(K, N, weight.spec, bias=bias is not None, device="meta")
        parts = {"codes": pack_codes(weight.codes, weight.spec.num_bits)}
        parts |= {"scales": weight.scales, "table": weight.table}
        if bias is not None:
            parts["bias"] = bias.detach()
        for name, tensor in parts.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` of shape (..., K); returns (..., N) in the dtype of ``x``."""
        if x.ndim and x.shape[-1] != self.in_features:
            raise FormatError(f"`x` has {x.shape[-1]} features; expected K={self.in_features}.")
        if not torch.compiler.is_compiling():
            if not self._settled:
                self._settle(x)
            if (
                self.kernel_order
                and is_plain_call(x)
                and x.dtype in (torch.float16, torch.bfloat16)
            ):
                return self._multiply(x)
        N = self.out_features if self.kernel_order else None
        return lut_gemm(x, self.codes, self.scales, self.table, self.spec, self.bias, N)

    def _multiply(self, x: Tensor) -> Tensor:
        """Call the GPU path without the dispatcher."""
        p = self._parameters  # faster than attributes
        codes, scales, table, bias = p["codes"], p["scales"], p["table"], p["bias"]
        assert codes is not None, "every layer has codes"
        assert scales is not None, "every layer has scales"
        assert table is not None, "every layer has a table"
        N = self.out_features
        if not x.is_cuda or x.device != codes.device or (bias is not None and bias.requires_grad):
            return lut_gemm(x, codes, scales, table, self.spec, bias, N)
        if x.ndim == 2:
            return cuda.multiply(x, codes, scales, table, bias, self.spec, N)
        flat = x.reshape(-1, self.in_features)
        out = cuda.multiply(flat, codes, scales, table, bias, self.spec, N)
        return out.view(*x.shape[:-1], N)

    def _settle(self, x: Tensor) -> None:
        """Change to the order that suits the device, at the first call there.

        Not for an fp32 ``x``, which kernels don't take, and not while a CUDA graph is captured.
        """
        device = self.codes.device
        if device.type == "cuda":
            sixteen = x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(
                "cuda"
            )
            if not sixteen or torch.cuda.is_current_stream_capturing():
                return
            if cuda.why_not(device):
                cuda.warn_slow(device)
            elif self.takes_kernels():
                with _lock:
                    self.to_kernel_order()
        self._settled = True

    def takes_kernels(self) -> bool:
        """Tell whether kernels serve this layer where it is."""
        return (
            self.in_features % 32 == 0
            and self.codes.numel() > 0
            and not cuda.why_not(self.codes.device)
            and not _is_offloaded(self)
        )

    def to_kernel_order(self) -> None:
        """Put codes and scales into kernel order, in place; on any device, for any K % 32 == 0.

        Raises:
            FormatError: K is not a multiple of 32.
        """
        if self.kernel_order:
            return
        codes, scales = to_kernel_order(
            self.codes.data, self.scales.data, self.spec.num_bits, self.in_features
        )
        self.codes.data, self.scales.data = codes, scales
        self.kernel_order = True
        if codes.is_cuda:
            # NOTE: kernels read weights before the previous kernel has ended (dependent launch).
            torch.cuda.current_stream(codes.device).synchronize()

    def to_plain_order(self) -> None:
        """Put codes and scales back as they are stored, in place."""
        if self.kernel_order:
            self.codes.data, self.scales.data = self._plain()
            self.kernel_order = False
        self._settled = False

    def _plain(self) -> tuple[Tensor, Tensor]:
        """Return codes and scales as they are stored."""
        codes, scales, K = self.codes.data, self.scales.data, self.in_features
        if not self.kernel_order:
            return codes, scales
        groups = self.spec.num_groups(K)
        return to_plain_order(codes, scales, self.spec.num_bits, self.out_features, K, groups)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel_order:
            destination[prefix + "codes"], destination[prefix + "scales"] = self._plain()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.to_plain_order()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: the layer in plain order."""
        state = self.__dict__.copy()
        if self.kernel_order:
            parameters = dict(self._parameters)
            for name, tensor in zip(("codes", "scales"), self._plain(), strict=True):
                parameters[name] = nn.Parameter(tensor, requires_grad=False)
            state |= {"_parameters": parameters, "kernel_order": False, "_settled": False}
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LutLinear:
        """Move everything, but let casts (`half`, `to(dtype)`) reach only the bias."""
        if fn(self.codes.data[:0]).device != self.codes.device:
            self.to_plain_order()
        parameters = {name: self._parameters.get(name) for name in TENSOR_NAMES}
        kept = {name: p.data for name, p in parameters.items() if p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != tensor.dtype:
                parameter.data = tensor.to(parameter.device)
        return self

    def quantized_weight(self) -> QuantizedWeight:
        """Return the unpacked weight, checked against the format's invariants."""
        packed, scales = self._plain()
        codes = unpack_codes(packed, self.spec.num_bits, self.in_features)
        return QuantizedWeight(codes, scales, self.table.data, self.spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight, shape (N, K)."""
        codes, scales = self._plain()
        return dequantize_packed(codes, scales, self.table.data, self.spec, self.in_features, dtype)

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, num_bits={self.spec.num_bits}, "
            f"group_size={self.spec.group_size}"
        )


def _is_offloaded(layer: nn.Module) -> bool:
    """Tell whether accelerate brings the layer's weights from elsewhere for each call."""
    hook = getattr(layer, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))
