"""`LutLinear`: a linear layer whose weight is table-quantised. Drops in for `torch.nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flute.errors import FormatError
from flute.format import TENSOR_NAMES, QuantizedWeight, QuantSpec
from flute.ops import lut_gemm
from flute.pack import pack_codes, unpack_codes
from flute.reference import dequantize_packed


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
        return lut_gemm(x, self.codes, self.scales, self.table, self.spec, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LutLinear:
        """Move everything, but let casts (`half`, `to(dtype)`) reach only the bias."""
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
        codes = unpack_codes(self.codes.data, self.spec.num_bits, self.in_features)
        return QuantizedWeight(codes, self.scales.data, self.table.data, self.spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight, shape (N, K)."""
        return dequantize_packed(
            self.codes.data, self.scales.data, self.table.data, self.spec, self.in_features, dtype
        )

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, num_bits={self.spec.num_bits}, "
            f"group_size={self.spec.group_size}"
        )
