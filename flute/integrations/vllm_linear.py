"""vLLM's linear layers, quantised. Importing it imports vLLM and registers the method `flute`.

    config.json -> FluteQuantizationConfig -> per linear layer a FluteLinearMethod

    create_weights    parameters as on disk, cut for this rank:  codes, scales, table
    (loading)         vLLM's loaders slice each tensor of the checkpoint into them
    process_weights   merged parts keep their tables, by range of rows; on a GPU: kernel order
    apply             one `flute::lut_gemm`, opaque to torch.compile, recorded by CUDA graphs

A dense checkpoint takes FluteOnlineLinearMethods, which quantise each layer once it is read.

MoE experts are in `flute.integrations.vllm_experts`; embeddings and the output head are vLLM's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from flute.blockwise import quantize_weight
from flute.checkpoint import tensor_names
from flute.concat import concat_weights
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import (
    SCALE_DTYPES,
    TENSOR_NAMES,
    WHOLE_ROW,
    CheckpointConfig,
    PackedWeight,
    QuantSpec,
)
from flute.integrations.vllm_layers import (
    Shard,
    check_tensor_names,
    cut_rows,
    environment_request,
    parts_of,
    request_of,
    spec_of_parts,
    stays_dense,
)
from flute.integrations.vllm_order import in_device_order
from flute.model import QuantizeOptions, fit_groups
from flute.ops import lut_gemm
from flute.pack import pack_codes

# Why: vLLM renames its MoE classes often, and dense models do not need them.
try:
    from flute.integrations import vllm_experts
except ImportError:
    vllm_experts = None  # type: ignore[assignment]


@register_quantization_config("flute")
class FluteQuantizationConfig(QuantizationConfig):  # type: ignore[misc]
    """What config.json says under ``quantization_config``; vLLM makes one per model.

    Args:
        checkpoint: what it says. vLLM gives none if it says nothing, so that the model is dense;
            then the environment says what to quantise it to.
        options: what a dense model is quantised to while it loads; None for a quantised one.

    Raises:
        UnsupportedProblemError: the model is dense, and nothing says how many bits to take.
        FormatError: the environment has a value out of range.
    """

    def __init__(
        self, checkpoint: CheckpointConfig | None = None, options: QuantizeOptions | None = None
    ) -> None:
        super().__init__()
        if checkpoint is None and options is None:
            options = request_of(environment_request())
        self.checkpoint = checkpoint or CheckpointConfig()
        self.options = options

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FluteQuantizationConfig:
        """Read ``quantization_config``: of a quantised checkpoint, or a request to quantise.

        Raises:
            FormatError: a newer format version, an unknown key, or a value out of range.
            UnsupportedProblemError: it asks to quantise a dense model and does not say to how many
                bits.
        """
        if "format_version" in config:
            return cls(CheckpointConfig.from_dict(config))
        return cls(options=request_of(config))

    def get_name(self) -> str:
        """Return the name of the method."""
        return "flute"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations; float32 takes no kernels."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability that the kernels compile for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: config.json says it all."""
        return []

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Look through a local checkpoint's tensors, before vLLM starts its engine.

        Raises:
            CheckpointError: a file is broken, or a layer lacks a tensor; the message names it.
        """
        files = sorted(Path(model_name).glob("*.safetensors"))
        if self.options is None and files:
            check_tensor_names(name for file in files for name in tensor_names(file))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers that the config names as vLLM renames the model's."""
        config, rename = self.checkpoint, hf_to_vllm_mapper.apply_list
        overrides = {new: spec for name, spec in config.overrides.items() for new in rename([name])}
        names = tuple(rename(list(config.modules_to_not_convert)))
        self.checkpoint = replace(config, modules_to_not_convert=names, overrides=overrides)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return how a layer is computed, or None for what is no linear layer.

        Raises:
            UnsupportedProblemError: vLLM merges layers that are quantised differently.
        """
        if type(layer).__name__ in ("RoutedExperts", "FusedMoE"):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        parts = parts_of(prefix, self.checkpoint, self.packed_modules_mapping)
        if self.options is not None:
            if stays_dense(parts, self.options.skip):
                return UnquantizedLinearMethod()
            return FluteOnlineLinearMethod(prefix, parts, self.options)
        spec = spec_of_parts(parts, self.checkpoint)
        if spec is None:
            return UnquantizedLinearMethod()
        return FluteLinearMethod(prefix, parts, spec, self.checkpoint)

    def _experts_method(self, layer: Any, prefix: str) -> Any:
        """Return how a block's experts are computed, or None if they are dense."""
        names = [f"{prefix}.0.{projection}" for projection in ("gate_proj", "down_proj")]
        if self.options is None:
            is_dense = not self.checkpoint.quantized_experts
        else:
            is_dense = stays_dense(names, self.options.skip)
        if is_dense:
            return None
        if vllm_experts is None:
            raise UnsupportedProblemError(
                f"`{prefix}`: the experts are quantised, and this vLLM has other classes for MoE "
                "than FLUTE knows. FLUTE is tested with vLLM 0.32. Use that, or skip the experts "
                "when quantising (--skip '*.experts.*')."
            )
        if self.options is None:
            return vllm_experts.FluteExpertsMethod(prefix, self.checkpoint, layer.moe_config)
        return vllm_experts.FluteOnlineExpertsMethod(prefix, self.options, layer.moe_config)


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
            UnsupportedProblemError: the ranks' parts cut a group or a word.
        """
        spec, sizes, K = self.spec, output_partition_sizes, input_size
        shard = self._cut(layer, K, input_size_per_partition, sizes, params_dtype)
        N, loader = sum(sizes), extra_weight_attrs["weight_loader"]

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
            add(PerTensorScaleParameter, "table", (len(sizes), entries), entries, torch.float32)

    def _cut(
        self, layer: nn.Module, K: int, own_K: int, sizes: list[int], dtype: torch.dtype
    ) -> Shard:
        """Remember what this rank holds of a layer of K input features; return its rows' sizes."""
        shard = cut_rows(self.name, self.spec, K, K // own_K)
        self.K, self.sizes, self.dtype = shard.K, tuple(sizes), dtype
        self._ids = ("q", "k", "v") if isinstance(layer, QKVParallelLinear) else range(len(sizes))
        self._is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        return shard

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


@register_weight_loader_v2_supported_method
class FluteOnlineLinearMethod(FluteLinearMethod):
    """Quantises one dense linear layer, merged or not, as soon as vLLM has read its weight.

    The weight lives on the meta device until then, so a layer at a time is dense.

    Args:
        name: of vLLM's layer.
        parts: names in the checkpoint of what it merges.
        options: what to quantise it to.
    """

    uses_meta_device = True
    tensor_names = ("weight",)

    def __init__(self, name: str, parts: Sequence[str], options: QuantizeOptions) -> None:
        self.options = options
        self.config = CheckpointConfig(
            options.num_bits, options.group_size, method=options.method, table=options.table_name
        )
        super().__init__(name, parts, self.config.spec_of(name), self.config)

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
        """Give a layer the dense weight of this rank, without memory yet; see the base class.

        Raises:
            FormatError: no group divides its rows.
            UnsupportedProblemError: the ranks' parts cut a group or a word.
        """
        shape = (output_size, input_size)
        fitted = fit_groups({self.name: shape}, self.options.group_size)
        own = "float16" if params_dtype == torch.float16 else "bfloat16"
        dtype = self.options.scale_dtype or own
        overrides = dict.fromkeys(self.parts, fitted.get(self.name, {}))
        self.config = replace(self.config, scale_dtype=dtype, overrides=overrides)
        self.spec = self.config.spec_of(self.parts[0])
        sizes, K = output_partition_sizes, input_size_per_partition
        self._cut(layer, input_size, K, sizes, params_dtype)
        load = self._checked("weight", extra_weight_attrs["weight_loader"], input_size)
        weight = torch.empty(sum(sizes), K, dtype=params_dtype, device="meta")
        axes = {"input_dim": 1, "output_dim": 0}
        parameter = ModelWeightParameter(data=weight, weight_loader=load, **axes)
        layer.register_parameter("weight", parameter)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantise the weight, each merged part by itself, and drop it.

        Args:
            layer: of vLLM.

        Raises:
            CheckpointError: a weight was not in the checkpoint; the message names it.
            FormatError: NaN or Inf; the message names the layer.
            KernelCompileError: NVRTC refused a kernel.
        """
        if hasattr(layer, "codes"):  # done before
            return
        self._check_complete()
        weight = layer.get_parameter("weight").data
        names = self.parts if len(self.parts) == len(self.sizes) else (self.name,) * len(self.sizes)
        parts = []
        for name, rows in zip(names, weight.split(list(self.sizes)), strict=True):
            done = quantize_weight(rows, name, self.config, self.options.table)
            codes = pack_codes(done.codes, done.spec.num_bits)
            rest = (done.scales, done.table, done.spec, *done.shape)
            parts.append(PackedWeight(codes, *rest))
        del layer.weight
        self._finish(layer, parts)
