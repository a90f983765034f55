"""`LutWeight`: codes, scales and table of a matrix, parameters of a module, in one of three orders.

    plain order   as stored, on any device; what leaves the module (state dict, pickle, another
                  device) is in it, and what comes in
    kernel order  `flute.kernel_order`, what GPU kernels read
    CPU order     uint8 codes, `flute.cpu.products`, what the C kernels read

Owns that the parameters are constants, which order they are in, and what is forgotten when they
change. Knows nothing of products: `flute.linear` says when which order is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from flute.constant import Constant
from flute.cpu import library as cpu
from flute.cpu import products
from flute.device import why_not
from flute.errors import FormatError
from flute.format import TENSOR_NAMES, PackedWeight, QuantizedWeight, QuantSpec, check_table
from flute.kernel_order import to_kernel_order, to_plain_order
from flute.pack import unpack_codes
from flute.reference import dequantize_packed


class LutWeight(nn.Module):
    """Hold ``codes``, ``scales`` and ``table`` of a matrix (N, K), named and shaped as on disk.

    Args:
        in_features: K.
        out_features: N.
        spec: bits and group size.
        table_per_row: one table per output row instead of one per matrix.
        table_ends: where each of R ranges of rows with a table of its own ends, the last at N;
            empty if there is one table, or one per row.
        scale_dtype: dtype of the scales.
        device: where the (uninitialised) parameters live.

    Raises:
        FormatError: K is not a multiple of the group size, ``table_ends`` does not ascend to N, or
            both kinds of tables were asked for.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    table: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        table_per_row: bool = False,
        table_ends: Sequence[int] = (),
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.kernel_order = False
        """Whether ``codes`` and ``scales`` are in the order of `flute.kernel_order`."""
        self.table_ends = tuple(table_ends)
        """Where each range of rows with a table of its own ends; else empty."""
        self._settled = False
        """Whether the order suits the device; False again when the tensors change."""
        self._ready: dict[tuple[object, ...], Any] = {}
        """What was made for the tensors as they are; emptied when these change."""
        N, K, num_tables = out_features, in_features, len(self.table_ends)
        if table_per_row and num_tables:
            raise FormatError("`table_per_row` and `table_ends` were given; expected one of them.")
        num_tables = num_tables or (N if table_per_row else 1)
        shapes = {
            "codes": ((N, spec.num_words(K)), torch.int32),
            "scales": ((N, spec.num_groups(K)), scale_dtype),
            "table": ((num_tables, spec.num_entries), torch.float32),
        }
        for name, (shape, dtype) in shapes.items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        check_table(self.table, N, spec, self.table_ends)

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

    def packed_weight(self) -> PackedWeight:
        """Return the tensors as they are, in the order they are in."""
        tensors = (self.codes.data, self.scales.data, self.table.data)
        sizes = (self.out_features, self.in_features)
        return PackedWeight(*tensors, self.spec, *sizes, self.table_ends)

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
        """Whether ``codes`` and ``scales`` are in the order of `flute.cpu.products`."""
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
        self.codes.data, self.scales.data = products.order(self._plain(), exact)
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
            return products.restore(weight)
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move everything, but let casts (`half`, `to(dtype)`) pass codes, scales and table by."""
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


def _is_offloaded(layer: nn.Module) -> bool:
    """Tell whether accelerate brings the layer's weights from elsewhere for each call."""
    hook = getattr(layer, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))
