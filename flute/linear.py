"""`LutLinear`: a linear layer whose weight is table-quantised. Drops in for `torch.nn.Linear`.

Owns when the weight (`flute.lut_weight`) takes which order: plain order as loaded, and wherever
there are no kernels; from the first call or `flute.prepare` on, in place of it, kernel order on a
GPU with kernels and CPU order on a CPU with kernels. Owns the products that are kept ready.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules import module

from flute.concat import concat_weights
from flute.cpu.ready import Ready as CpuReady
from flute.cpu.ready import make_ready as make_cpu_ready
from flute.cuda import Ready, make_ready
from flute.device import warn_slow, why_not
from flute.errors import FormatError
from flute.format import PackedWeight, QuantizedWeight, QuantSpec
from flute.lut_weight import LutWeight
from flute.ops import lut_gemm
from flute.pack import pack_codes
from flute.plain_call import is_plain_call, is_watched

_lock = threading.Lock()
"""Held while a layer changes order at its first call."""
_READY_M = 256
"""Most tokens of a product that is kept ready: with more, its host time doesn't matter."""
_MAX_READY = 64
"""Shapes and dtypes of x for which a layer keeps a product ready."""


class LutLinear(LutWeight):
    """Compute ``x @ (table[codes] * scales).T + bias``.

    The parameters carry the names, shapes and dtypes of the tensors on disk, so a state dict is a
    checkpoint: ``codes`` int32 (N, ceil(K * num_bits / 32)), ``scales`` (N, K / group length),
    ``table`` fp32 (1 | N, 2**num_bits), ``bias`` (N,). The first three never require a gradient.

    A layer fused of several (`concat`) may have a table per range of rows: ``table`` is then
    (R, 2**num_bits), and the state dict has ``table_ends``, int32 (R,), besides.

    Args:
        in_features: K.
        out_features: N.
        spec: bits and group size.
        bias: whether a bias is added.
        table_per_row: one table per output row instead of one per matrix.
        table_ends: where each of R ranges of rows with a table of its own ends, the last at N;
            empty if there is one table, or one per row.
        scale_dtype: dtype of the scales.
        dtype: dtype of the bias (default: torch's default dtype).
        device: where the (uninitialised) parameters live; "meta" to fill them from a checkpoint.

    Raises:
        FormatError: K is not a multiple of the group size, or ``table_ends`` does not ascend to N.
    """

    _ready: dict[tuple[object, ...], Ready | CpuReady]
    """Products kept ready, by shape, dtype and device of x."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = True,
        table_per_row: bool = False,
        table_ends: Sequence[int] = (),
        scale_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            spec,
            table_per_row=table_per_row,
            table_ends=table_ends,
            scale_dtype=scale_dtype,
            device=device,
        )
        added = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", None if added is None else nn.Parameter(added, requires_grad=False)
        )

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> LutLinear:
        """Return the layer of a quantised matrix, and of a bias of shape (N,), if there is one.

        It shares scales, table and bias with them.
        """
        packed = pack_codes(weight.codes, weight.spec.num_bits)
        rest = (weight.scales, weight.table, weight.spec, *weight.shape, weight.table_ends)
        return cls._from_packed(PackedWeight(packed, *rest), bias)

    @classmethod
    def concat(cls, layers: Sequence[LutLinear]) -> LutLinear:
        """Return one layer whose result is that of several side by side, as fused q/k/v.

        Its weight is new memory, in the order of storage. Where tables differ it has a table per
        range of rows if kernels take those ranges (at most 8, all but the last a multiple of 16
        rows long), else one per row. Layers without a bias get zeros if others have one.

        Args:
            layers: of the same K, spec, dtype of the scales, and device.

        Raises:
            FormatError: they differ in one of these, or there are none.
        """
        weight = concat_weights([layer._plain() for layer in layers])
        given = [layer.bias for layer in layers if layer.bias is not None]
        bias = None
        if given:
            bias = torch.cat(
                [
                    given[0].data.new_zeros(layer.out_features) if b is None else b.data
                    for layer, b in ((layer, layer.bias) for layer in layers)
                ]
            )
        return cls._from_packed(weight, bias)

    @classmethod
    def _from_packed(cls, weight: PackedWeight, bias: Tensor | None) -> LutLinear:
        packed, scales, table, spec, N, K, ends = weight
        layer = cls(K, N, spec, bias=bias is not None, table_ends=ends, device="meta")
        parts = {"codes": packed, "scales": scales, "table": table}
        if bias is not None:
            parts["bias"] = bias.detach()
        for name, tensor in parts.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        return layer

    def __call__(self, x: Tensor) -> Tensor:
        """Call `forward` as every module does, or, where nobody could tell, what it comes down to.

        `nn.Module.__call__` alone takes 2.7 us on an H200's host, the rest of a call 10.
        """
        if not is_dynamo_compiling() and is_plain_call(x):
            ready = self._ready.get((x.shape, x.dtype, x.device))
            if ready is not None and not (
                self._forward_hooks
                or self._forward_pre_hooks
                or module._global_forward_hooks
                or module._global_forward_pre_hooks
                or self._compiled_call_impl is not None
                or "forward" in self.__dict__  # replaced, as accelerate does
            ):
                out = ready(x, self._parameters)
                if out is not None:
                    return out
        result: Tensor = super().__call__(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` of shape (..., K); returns (..., N) in the dtype of ``x``."""
        if x.ndim and x.shape[-1] != self.in_features:
            raise FormatError(f"`x` has {x.shape[-1]} features; expected K={self.in_features}.")
        if not is_dynamo_compiling() and is_plain_call(x, self.bias):
            if not self._settled:
                self._settle(x)
            out = self._run_ready(x) if self.kernel_order or self.cpu_order else None
            if out is not None:
                return out
        elif not self._settled and is_dynamo_compiling():
            self._settle_traced()
        elif not self._settled and not is_compiling():
            self._settle(x)
        N = self.out_features if self.kernel_order or self.cpu_order else None
        weight = (self.codes, self.scales, self.table, self.spec)
        return lut_gemm(x, *weight, self.bias, N, self.table_ends)

    def _run_ready(self, x: Tensor) -> Tensor | None:
        """Run the product that is ready for the shape and dtype of x; make it if there is none."""
        parameters = self._parameters
        ready = self._ready.get((x.shape, x.dtype, x.device))
        out = None if ready is None else ready(x, parameters)
        if out is not None:
            return out
        weight = self.packed_weight()
        if self.cpu_order:
            ready = make_cpu_ready(x, weight, parameters)
        elif x.numel() > _READY_M * self.in_features:
            return None
        else:
            ready = make_ready(x, weight, parameters)
        if ready is None:
            return None
        if len(self._ready) >= _MAX_READY:
            self._ready.clear()
        self._ready[x.shape, x.dtype, x.device] = ready
        return ready(x, parameters)

    def _settle(self, x: Tensor) -> None:
        """Change to the order that suits the device, at the first call there.

        On a GPU not for an fp32 ``x``, which kernels don't take, and not while a CUDA graph is
        captured; on a CPU not within a transform or mode, where memory may not be changed.
        """
        device = self.codes.device
        if device.type == "cuda":
            sixteen = x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(
                "cuda"
            )
            if not sixteen or torch.cuda.is_current_stream_capturing():
                return
            if why_not(device):
                warn_slow(device)
            elif self.takes_kernels():
                with _lock:
                    self.to_kernel_order()
        elif device.type == "cpu":
            if is_watched():
                return
            if self.takes_cpu_kernels():
                with _lock:
                    self.to_cpu_order()
        self._settled = True

    def _settle_traced(self) -> bool:
        """Change to the order of a CPU's kernels while `torch.compile` looks at the layer.

        Dynamo calls it on the layer itself, before it has looked at codes and scales; what it
        compiles then has them in CPU order.
        """
        if self.codes.device.type == "cpu" and not self.cpu_order and self.takes_cpu_kernels():
            with _lock:
                self.to_cpu_order()
        return self.cpu_order

    # Why not `torch.compiler.assume_constant_result`, which does this: it imports torch._dynamo,
    # half of what `import flute` takes (2.1 of 4.7 s on two busy cores, torch 2.13).
    _settle_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, num_bits={self.spec.num_bits}, "
            f"group_size={self.spec.group_size}"
        )
