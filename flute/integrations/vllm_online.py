"""vLLM's linear layers of a dense checkpoint, quantised as soon as each is read, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from flute.blockwise import quantize_weight
from flute.format import CheckpointConfig, PackedWeight
from flute.groups import fit_groups
from flute.integrations.vllm_layers import Shard
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

    def _decide(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Take a group that divides the rows, and the dtype of scales that was asked for."""
        fitted = fit_groups({self.name: shape}, self.options.group_size)
        overrides = dict.fromkeys(self.parts, fitted.get(self.name, {}))
        scales = self.options.dtype_of_scales([dtype])
        self.config = replace(self.config, scale_dtype=scales, overrides=overrides)
        self.spec = self.config.spec_of(self.parts[0])

    def _register(
        self, layer: nn.Module, shard: Shard, K: int, loader: Callable[..., None]
    ) -> None:
        """Give a layer this rank's dense weight, without memory yet."""
        weight = torch.empty(sum(self.sizes), shard.K, dtype=self.dtype, device="meta")
        load = self._checked("weight", loader, K)
        axes = {"input_dim": 1, "output_dim": 0, "weight_loader": load}
        layer.register_parameter("weight", ModelWeightParameter(data=weight, **axes))
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
        parts = [
            quantize_packed(rows, name, self.config, self.options)
            for name, rows in zip(names, weight.split(list(self.sizes)), strict=True)
        ]
        del layer.weight
        self._finish(layer, parts)


def quantize_packed(
    weight: Tensor, name: str, config: CheckpointConfig, options: QuantizeOptions
) -> PackedWeight:
    """Return a dense weight quantised, in plain order.

    Args:
        weight: shape (N, K).
        name: for messages, and for its own entry in ``config``.
        config: bits, groups, dtype of scales, method.
        options: what was asked for, whose table the config only names.

    Raises:
        FormatError: NaN or Inf; the message names the weight.
    """
    done = quantize_weight(weight, name, config, options.table)
    codes = pack_codes(done.codes, done.spec.num_bits)
    return PackedWeight(codes, done.scales, done.table, done.spec, *done.shape)
