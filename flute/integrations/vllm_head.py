"""vLLM's output head, quantised: read from a checkpoint, or made of a dense one once it is read.

vLLM cuts the vocabulary, padded to multiples of 64, over the ranks. Its own loader slices rows of
codes and scales and fills the padding with zeros, whose logits are 0 and are cut off later.

    hidden states of each sequence's last token --LogitsProcessor--> `apply` --> logits
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flute.errors import UnsupportedProblemError
from flute.format import CheckpointConfig, PackedWeight
from flute.groups import head_group
from flute.integrations.vllm_layers import Shard
from flute.integrations.vllm_linear import FluteLinearMethod
from flute.integrations.vllm_online import quantize_packed
from flute.model import QuantizeOptions


class FluteHeadMethod(FluteLinearMethod):
    """Loads and multiplies an output head that is quantised in the checkpoint.

    Args:
        name: of vLLM's layer.
        config: of the checkpoint, which names the head.
    """

    def __init__(self, name: str, config: CheckpointConfig) -> None:
        part = config.quantized_head or name
        super().__init__(name, (part,), config.spec_of(part), config)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Refuse: a head that is read from the checkpoint is tied to nothing.

        Raises:
            UnsupportedProblemError: the model's config ties it all the same.
        """
        raise UnsupportedProblemError(
            f"`{self.parts[0]}` is quantised, but the model's config.json ties it to the "
            'embedding. Set "tie_word_embeddings" to false there, as `flute quantize` does.'
        )

    def _finish(self, layer: nn.Module, parts: list[PackedWeight]) -> None:
        super()._finish(layer, parts)
        # Why: vLLM looks by this name for dtype and device of LoRA adapters, and whether a draft
        # model has the same head; it has no rows, so it is like no other.
        device = layer.get_parameter("codes").device
        layer.__dict__["weight"] = torch.empty(0, self.K, dtype=self.dtype, device=device)


class FluteOnlineHeadMethod(FluteHeadMethod):
    """Quantises a dense output head, or the embedding that it is tied to, once it is read.

    Args:
        name: of vLLM's layer.
        options: what to quantise it to; has `head_bits`.
    """

    tensor_names = ("weight",)

    def __init__(self, name: str, options: QuantizeOptions) -> None:
        assert options.head_bits is not None, "else the head stays dense"
        self.options = options
        self.config = CheckpointConfig(
            options.head_bits, options.head_group, method=options.method, table=options.table_name
        )
        self.is_tied = False
        super().__init__(name, self.config)

    def _decide(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Take a group that divides the rows, and the dtype of scales that was asked for."""
        group = head_group(self.name, shape, self.options.head_group)
        scales = self.options.dtype_of_scales([dtype])
        self.config = replace(self.config, group_size=group, scale_dtype=scales)
        self.spec = self.config.spec_of(self.name)

    def _register(
        self, layer: nn.Module, shard: Shard, K: int, loader: Callable[..., None]
    ) -> None:
        """Give a layer this rank's dense weight."""
        data = torch.empty(sum(self.sizes), shard.K, dtype=self.dtype)
        weight = nn.Parameter(data, requires_grad=False)
        load = self._checked("weight", loader, K)
        axes = {"input_dim": 1, "output_dim": 0, "weight_loader": load}
        for key, value in axes.items():
            setattr(weight, key, value)
        layer.register_parameter("weight", weight)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let a layer share the embedding's weight until that has been read."""
        layer.register_parameter("weight", embed_tokens.get_parameter("weight"))
        self.is_tied = True
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantise the weight and drop it; an embedding that it is tied to stays.

        Args:
            layer: of vLLM.

        Raises:
            CheckpointError: the weight was not in the checkpoint; the message names it.
            FormatError: NaN or Inf; the message names the layer.
            KernelCompileError: NVRTC refused a kernel.
        """
        if hasattr(layer, "codes"):  # done before
            return
        if not self.is_tied:
            self._check_complete()
        weight: Tensor = layer.weight.data
        N, filled = len(weight), layer.shard_indices.num_org_elements
        done = quantize_packed(weight[:filled], self.parts[0], self.config, self.options)
        codes, scales = _padded(done.packed, N), _padded(done.scales, N)
        table = _padded(done.table, N) if len(done.table) > 1 else done.table
        del layer.weight
        self._finish(layer, [PackedWeight(codes, scales, table, done.spec, N, self.K)])


def _padded(rows: Tensor, count: int) -> Tensor:
    """Return rows with zeros below, up to a number of rows."""
    return nn.functional.pad(rows, (0, 0, 0, count - len(rows)))
