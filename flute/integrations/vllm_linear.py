"""vLLM's linear layers, quantised; `flute.integrations.vllm_config` says which.

    create_weights    parameters as on disk, cut for this rank:  codes, scales, table
    (loading)         vLLM's loaders slice each tensor of the checkpoint into them
    process_weights   merged parts keep their tables, by range of rows; in this device's order
    apply             one `flute::lut_gemm`, opaque to torch.compile, recorded by CUDA graphs

Those of a dense checkpoint are in `flute.integrations.vllm_online`, MoE experts in `vllm_experts`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from flute.concat import concat_weights
from flute.errors import CheckpointError, FormatError
from flute.format import (
    SCALE_DTYPES,
    TENSOR_NAMES,
    WHOLE_ROW,
    CheckpointConfig,
    PackedWeight,
    QuantSpec,
)
from flute.integrations.vllm_layers import Shard, cut_rows
from flute.integrations.vllm_order import in_device_order
from flute.ops import lut_gemm


@register_weight_loader_v2_supported_method
class FluteLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads and multiplies one linear layer, merged or not.

    Args:
        name: of vLLM's layer.
        parts: names in the checkpoint of what it merges.
        spec: bits and group size.
        config: of the checkpoint.

    Attributes:
        out_features: rows of this rank, once its weight is in kernel order; None in plain order.
        table_ends: where ranges of rows with tables of their own end.
        tensor_names: what is read from the checkpoint.
    """

    tensor_names: tuple[str, ...] = TENSOR_NAMES

    def __init__(
        self, name: str, parts: Sequence[str], spec: QuantSpec, config: CheckpointConfig
    ) -> None:
        self.name, self.parts, self.spec = name, tuple(parts), spec
        self.scale_dtype = SCALE_DTYPES[config.scale_dtype]
        self.has_row_tables = config.table_scope == "row"
        self.out_features: int | None = None
        self.table_ends: tuple[int, ...] = ()
        self._loaded: dict[str, set[object]] = {name: set() for name in self.tensor_names}

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give a layer the parameters that this rank's part of its tensors is loaded into.

        Args:
            layer: of vLLM.
            input_size_per_partition: input features of this rank.
            output_partition_sizes: output features of this rank, of each merged part.
            input_size: input features of all ranks.
            output_size: output features of all ranks and parts.
            params_dtype: dtype of the activations.
            **extra_weight_attrs: has the `weight_loader`.

        Raises:
            FormatError: a dense layer is to be quantised, and no group divides its rows.
            UnsupportedProblemError: the ranks' parts cut a group or a word.
        """
        K, own_K = input_size, input_size_per_partition
        self._decide((output_size, K), params_dtype)
        shard = cut_rows(self.name, self.spec, K, K // own_K)
        self.K, self.sizes, self.dtype = shard.K, tuple(output_partition_sizes), params_dtype
        self._ids = (
            ("q", "k", "v") if isinstance(layer, QKVParallelLinear) else range(len(self.sizes))
        )
        self._is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        self._register(layer, shard, K, extra_weight_attrs["weight_loader"])

    def _decide(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Decide what a dense layer of all ranks' shape is quantised to; here the files say it."""

    def _register(
        self, layer: nn.Module, shard: Shard, K: int, loader: Callable[..., None]
    ) -> None:
        """Give a layer what is read: of rows of K weights on disk, this rank's shard."""
        spec, N = self.spec, sum(self.sizes)

        def add(
            kind: type,
            name: str,
            shape: tuple[int, int],
            width: int,
            dtype: torch.dtype,
            **axes: int,
        ) -> None:
            data = torch.empty(shape, dtype=dtype)
            load = self._checked(name, loader, width)
            layer.register_parameter(name, kind(data=data, weight_loader=load, **axes))

        both = {"input_dim": 1, "output_dim": 0}
        add(ModelWeightParameter, "codes", (N, shard.words), spec.num_words(K), torch.int32, **both)
        groups, shape = spec.num_groups(K), (N, shard.groups)
        if spec.group_size == WHOLE_ROW:
            add(ChannelQuantScaleParameter, "scales", shape, groups, self.scale_dtype, output_dim=0)
        else:
            add(GroupQuantScaleParameter, "scales", shape, groups, self.scale_dtype, **both)
        entries = spec.num_entries
        if self.has_row_tables:
            rows = (N, entries)
            add(ChannelQuantScaleParameter, "table", rows, entries, torch.float32, output_dim=0)
        else:
            tables = (len(self.sizes), entries)
            add(PerTensorScaleParameter, "table", tables, entries, torch.float32)

    def _checked(self, key: str, loader: Callable[..., None], width: int) -> Callable[..., None]:
        """Return vLLM's loader of a tensor, which checks it first and remembers that it came.

        vLLM casts what has another dtype, slices what is too wide, and leaves what is missing.
        """

        @functools.wraps(loader)
        def load(parameter: Tensor, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
            given = (*args, *kwargs.values(), None)[0]
            ids = given if isinstance(given, (tuple, list)) else (given,)
            wrong = loaded.dtype != parameter.dtype and key in TENSOR_NAMES
            if wrong or loaded.ndim != 2 or loaded.shape[1] != width:
                raise FormatError(
                    f"`{self._part(ids[0])}.{key}` is {loaded.dtype} of shape "
                    f"{tuple(loaded.shape)}; expected {parameter.dtype} with {width} columns for "
                    f"{self.spec}. The files and their config.json do not belong together."
                )
            loader(parameter, loaded, *args, **kwargs)
            self._loaded[key].update(ids)

        return load

    def _part(self, shard_id: object) -> str:
        """Return the name in the checkpoint of a merged part, by vLLM's id of it."""
        if len(self.parts) == len(self.sizes):
            for known, part in zip(self._ids, self.parts, strict=True):
                if shard_id == known:
                    return part
        return self.parts[0] if len(self.parts) == 1 else self.name

    def _check_complete(self) -> None:
        if self._is_dummy:
            return
        for key, ids in self._loaded.items():
            missing = [known for known in self._ids if known not in ids] if None not in ids else []
            if missing:
                raise CheckpointError(
                    f"The checkpoint lacks `{self._part(missing[0])}.{key}` of a layer that its "
                    "config.json does not leave dense. Download it again."
                )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the loaded tensors one matrix, in the order that this device's products read.

        Args:
            layer: of vLLM, whose parameters are replaced by plain ones.

        Raises:
            CheckpointError: a tensor was not in the checkpoint; the message names it.
            KernelCompileError: NVRTC refused a kernel.
        """
        if not isinstance(layer.codes, ModelWeightParameter):  # done before
            return
        self._check_complete()
        self._finish(layer, self._parts_of(layer))

    def _finish(self, layer: nn.Module, parts: list[PackedWeight]) -> None:
        """Give a layer its merged parts as plain parameters, in this device's order."""
        weight, self.out_features = in_device_order(concat_weights(parts), self.dtype)
        self.table_ends = weight.table_ends
        tensors = (weight.packed, weight.scales, weight.table)
        for name, tensor in zip(TENSOR_NAMES, tensors, strict=True):
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        # Why: vLLM looks by this name for the device to put a layer's LoRA adapters on.
        layer.__dict__["qweight"] = layer.codes

    def _parts_of(self, layer: nn.Module) -> list[PackedWeight]:
        """Return the merged weights, as views of what was loaded."""
        codes, scales, table = (layer.get_parameter(name).data for name in TENSOR_NAMES)
        sizes = list(self.sizes)
        tables = table.split(sizes) if self.has_row_tables else table.split(1)
        parts = zip(codes.split(sizes), scales.split(sizes), tables, sizes, strict=True)
        return [PackedWeight(c, s, t, self.spec, N, self.K) for c, s, t, N in parts]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the layer's weight.

        Args:
            layer: of vLLM.
            x: shape (..., K of this rank).
            bias: shape (N of this rank,), or None.

        Returns:
            Shape (..., N of this rank), dtype of ``x``.
        """
        rest = (self.spec, bias, self.out_features, self.table_ends)
        return lut_gemm(x, layer.codes, layer.scales, layer.table, *rest)
