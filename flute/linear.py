"""`LutLinear`: a linear layer whose weight is table-quantised. Drops in for `torch.nn.Linear`.

Owns which order the codes and scales of a layer are in. As stored, and wherever there are no
kernels: plain order. From the first call or `flute.prepare` on, in place of it, kernel order on a
GPU with kernels and CPU order on a CPU with kernels. Whatever leaves the layer (state dict, pickle,
another device) is plain again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules import module

from flute.concat import concat_weights
from flute.constant import Constant
from flute.cpu import library as cpu
from flute.cpu.ready import Ready as CpuReady
from flute.cpu.ready import make_ready as make_cpu_ready
from flute.cuda import Ready, make_ready
from flute.device import warn_slow, why_not
from flute.errors import FormatError
from flute.format import (
    TENSOR_NAMES,
    PackedWeight,
    QuantizedWeight,
    QuantSpec,
    check_table,
)
from flute.kernel_order import to_kernel_order, to_plain_order
from flute.ops import lut_gemm
from flute.pack import pack_codes, unpack_codes
from flute.plain_call import is_plain_call, is_watched
from flute.reference import dequantize_packed

_lock = threading.Lock()
"""Held while a layer changes order at its first call."""
_READY_M = 256
"""Most tokens of a product that is kept ready: with more, its host time doesn't matter."""
_MAX_READY = 64
"""Shapes and dtypes of x for which a layer keeps a product ready."""


class LutLinear(nn.Module):
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
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.kernel_order = False
        """Whether ``codes`` and ``scales`` are in the order of `flute.kernel_order`."""
        self.table_ends = tuple(table_ends)
        """Where each range of rows with a table of its own ends; else empty."""
        self._settled = False  # whether the order suits the device
        self._ready: dict[tuple[object, ...], Ready | CpuReady] = {}
        N, K, num_tables = out_features, in_features, len(self.table_ends)
        if table_per_row and num_tables:
            raise FormatError("`table_per_row` and `table_ends` were given; expected one of them.")

        def parameter(shape: tuple[int, ...], dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.codes = parameter((N, spec.num_words(K)), torch.int32)
        self.scales = parameter((N, spec.num_groups(K)), scale_dtype)
        num_tables = num_tables or (N if table_per_row else 1)
        self.table = parameter((num_tables, spec.num_entries), torch.float32)
        check_table(self.table, N, spec, self.table_ends)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", parameter((N,), dtype) if bias else None)

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

    def __setattr__(self, name: str, value: Any) -> None:
        """Set as `nn.Module` does; a parameter of the weight becomes a constant.

        Before accelerate hooks the layer, which sets ``_old_forward`` first, its weight is put as
        it is stored: the hooks bring tensors of the state dict.
        """
        if name == "_old_forward":
            self.to_plain_order()
        if name in TENSOR_NAMES and isinstance(value, nn.Parameter):
            Constant.of(value)
            self._ready.clear()
            self._settled = False
        super().__setattr__(name, value)

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

    def packed_weight(self) -> PackedWeight:
        """Return the tensors as they are, in the order they are in."""
        tensors = (self.codes.data, self.scales.data, self.table.data)
        sizes = (self.out_features, self.in_features)
        return PackedWeight(*tensors, self.spec, *sizes, self.table_ends)

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

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _settle_traced(self) -> bool:
        """Change to the order of a CPU's kernels while `torch.compile` looks at the layer.

        Dynamo calls it on the layer itself, before it has looked at codes and scales; what it
        compiles then has them in CPU order.
        """
        if self.codes.device.type == "cpu" and not self.cpu_order and self.takes_cpu_kernels():
            with _lock:
                self.to_cpu_order()
        return self.cpu_order

    def takes_kernels(self) -> bool:
        """Tell whether kernels serve this layer where it is."""
        return (
            self.in_features % 32 == 0
            and self.codes.numel() > 0
            and not why_not(self.codes.device)
            and not _is_offloaded(self)
        )

    @property
    def cpu_order(self) -> bool:
        """Whether ``codes`` and ``scales`` are in the order of `flute.cpu.library`."""
        return self.codes.dtype == torch.uint8

    def takes_cpu_kernels(self) -> bool:
        """Tell whether the CPU's kernels serve this layer; warn once if there are none."""
        if self.codes.device.type != "cpu" or not self.codes.numel() or _is_offloaded(self):
            return False
        if type(self.codes.data) is not Tensor:  # traced: memory is not real
            return False
        if cpu.why_not():
            if not cpu.is_turned_off():
                cpu.warn_slow()
            return False
        return True

    def to_cpu_order(self, exact: bool = False) -> None:
        """Put codes and scales into the order of the CPU's kernels, in place, in parallel.

        Args:
            exact: sum in fp32, whatever ``$FLUTE_CPU_EXACT`` says; else in fixed point, whose error
                is below 5e-4 (relative norm).

        Raises:
            UnsupportedProblemError: there are no kernels; the message says why.
        """
        if self.cpu_order and not exact:
            return
        self._ready.clear()
        self.codes.data, self.scales.data = cpu.order(self._plain(), exact)
        self.kernel_order, self._settled = False, True

    def to_kernel_order(self) -> None:
        """Put codes and scales into kernel order, in place; on any device, for any K % 32 == 0.

        Raises:
            FormatError: K is not a multiple of 32.
        """
        if self.kernel_order:
            return
        plain = self._plain()
        codes, scales = to_kernel_order(
            plain.packed, plain.scales, self.spec.num_bits, self.in_features
        )
        self._ready.clear()
        self.codes.data, self.scales.data = codes, scales
        self.kernel_order = True
        if codes.is_cuda:
            # NOTE: kernels read weights before the previous kernel has ended (dependent launch).
            torch.cuda.current_stream(codes.device).synchronize()

    def to_plain_order(self) -> None:
        """Put codes and scales back as they are stored, in place."""
        self._ready.clear()
        if self.kernel_order or self.cpu_order:
            self.codes.data, self.scales.data = self._plain()[:2]
            self.kernel_order = False
        self._settled = False

    def _plain(self) -> PackedWeight:
        """Return the weight as it is stored."""
        weight = self.packed_weight()
        if self.cpu_order:
            return cpu.restore(weight)
        if not self.kernel_order:
            return weight
        packed, scales, _, spec, N, K, _ = weight
        packed, scales = to_plain_order(packed, scales, spec.num_bits, N, K, spec.num_groups(K))
        return weight._replace(packed=packed, scales=scales)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel_order or self.cpu_order:
            destination[prefix + "codes"], destination[prefix + "scales"] = self._plain()[:2]
        if self.table_ends:
            ends = torch.tensor(self.table_ends, dtype=torch.int32)
            destination[prefix + "table_ends"] = ends

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.to_plain_order()
        key = prefix + "table_ends"
        if self.table_ends and key in state_dict:
            ends = tuple(state_dict[key].tolist())
            state_dict = {name: value for name, value in state_dict.items() if name != key}
            try:
                check_table(self.table, self.out_features, self.spec, ends)
                self.table_ends = ends
            except FormatError as error:
                error_msgs.append(f"{key}: {error}")
        elif self.table_ends:
            missing_keys.append(key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: the layer in plain order."""
        state = self.__dict__.copy()
        state["_ready"] = {}
        if self.kernel_order or self.cpu_order:
            plain, parameters = self._plain(), dict(self._parameters)
            parameters["codes"], parameters["scales"] = map(Constant, plain[:2])
            state |= {"_parameters": parameters, "kernel_order": False, "_settled": False}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state; parameters are pickled without their class."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_constants()

    def _make_constants(self) -> None:
        for name in TENSOR_NAMES:
            parameter = self._parameters.get(name)
            if parameter is not None:
                Constant.of(parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LutLinear:
        """Move everything, but let casts (`half`, `to(dtype)`) reach only the bias."""
        self._ready.clear()
        if fn(self.codes.data[:0]).device != self.codes.device:
            self.to_plain_order()
        parameters = {name: self._parameters.get(name) for name in TENSOR_NAMES}
        kept = {name: p.data for name, p in parameters.items() if p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != tensor.dtype:
                parameter.data = tensor.to(parameter.device)
        self._make_constants()
        return self

    def quantized_weight(self) -> QuantizedWeight:
        """Return the unpacked weight, checked against the format's invariants."""
        weight = self._plain()
        codes = unpack_codes(weight.packed, self.spec.num_bits, self.in_features)
        return QuantizedWeight(codes, weight.scales, weight.table, self.spec, self.table_ends)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight, shape (N, K)."""
        return dequantize_packed(self._plain(), dtype)

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
