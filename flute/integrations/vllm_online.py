"""vLLM's linear layers of a dense checkpoint, quantised as soon as each is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from flute.blockwise import quantize_weight
from flute.format import CheckpointConfig, PackedWeight
from flute.groups import fit_groups
from flute.integrations.vllm_linear import FluteLinearMethod
from flute.model import QuantizeOptions
from flute.pack import pack_codes


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
        dtype = self.options.dtype_of_scales([params_dtype])
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
