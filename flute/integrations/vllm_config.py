"""vLLM's quantisation method `flute`. Importing it imports vLLM and registers the method.

    config.json -> FluteQuantizationConfig -> per linear layer a FluteLinearMethod

A dense checkpoint takes FluteOnlineLinearMethods, which quantise each layer once it is read. MoE
experts are in `flute.integrations.vllm_experts`, the output head, if it is quantised, in
`vllm_head`; embeddings are vLLM's own.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from flute.device import why_not_on
from flute.errors import UnsupportedProblemError
from flute.format import CheckpointConfig
from flute.integrations.vllm_head import FluteHeadMethod, FluteOnlineHeadMethod
from flute.integrations.vllm_launch import launch_dependently, take_one_pass
from flute.integrations.vllm_layers import (
    environment_request,
    is_quantized_head,
    parts_of,
    request_of,
    spec_of_parts,
    stays_dense,
)
from flute.integrations.vllm_linear import FluteLinearMethod
from flute.integrations.vllm_online import FluteOnlineLinearMethod
from flute.model import QuantizeOptions

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
        FormatError: the environment has a value out of range.
    """

    def __init__(
        self, checkpoint: CheckpointConfig | None = None, options: QuantizeOptions | None = None
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint or CheckpointConfig()
        self.options = options
        self.failure: UnsupportedProblemError | None = None
        """Why nothing can be served; raised once the folder is known, which may tell more."""
        if checkpoint is None and options is None:
            try:
                self.options = request_of(environment_request())
            except UnsupportedProblemError as failure:
                self.failure = failure

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

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Check all that can be known before vLLM starts its engine; let kernels start early.

        Args:
            model_name: a folder, or a name on the Hub, whose files are checked while they load.
            hf_config: transformers' config of the model.
            *args: not used.
            **kwargs: not used.

        Raises:
            UnsupportedProblemError: no kernels run on this GPU, the tensor parallel size cuts a
                group, or the model is dense and nothing says how many bits to take.
            CheckpointError: a file is broken, or lacks a tensor; the message names it.
            FormatError: a tensor has another dtype or shape than the config says.
        """
        # Why here: it imports transformers' quantizers, which workers need not.
        from flute.integrations.vllm_checks import (
            check_is_not_original,
            check_served,
            find_files,
        )

        folder = Path(model_name)
        check_is_not_original(folder)
        if self.failure is not None:
            raise self.failure
        check_platform()
        made = _vllm_config()
        files = [] if made and made.load_config.load_format == "dummy" else find_files(folder)
        parallel = made.parallel_config if made else None
        if hf_config is not None:
            check_served(
                hf_config,
                files,
                self.options or self.checkpoint,
                int(parallel.tensor_parallel_size) if parallel else 1,
                cuts_experts=parallel is None or not parallel.enable_expert_parallel,
            )
        launch_dependently(made, getattr(hf_config, "architectures", None))
        take_one_pass(made)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers that the config names as vLLM renames the model's."""
        config, rename = self.checkpoint, hf_to_vllm_mapper.apply_list
        overrides = {new: spec for name, spec in config.overrides.items() for new in rename([name])}
        names = tuple(rename(list(config.modules_to_not_convert)))
        head = next(iter(rename([config.quantized_head] if config.quantized_head else [])), "")
        self.checkpoint = replace(
            config, modules_to_not_convert=names, overrides=overrides, quantized_head=head
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return how a layer is computed, or None for what is neither linear nor an output head.

        Raises:
            UnsupportedProblemError: vLLM merges layers that are quantised differently.
        """
        if self.failure is not None:
            raise self.failure
        if type(layer).__name__ in ("RoutedExperts", "FusedMoE"):
            return self._experts_method(layer, prefix)
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix)
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

    def _head_method(self, prefix: str) -> LinearMethodBase | None:
        """Return how an output head is computed, or None if it is dense."""
        if self.options is None:
            if is_quantized_head(prefix, self.checkpoint):
                return FluteHeadMethod(prefix, self.checkpoint)
        elif self.options.head_bits is not None:
            return FluteOnlineHeadMethod(prefix, self.options)
        return None

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


def check_platform() -> None:
    """Check that products run kernels on vLLM's device, without opening a CUDA context.

    Raises:
        UnsupportedProblemError: they would take PyTorch's path, which is slow.
    """
    if current_platform.is_cpu() or current_platform.is_unspecified():
        return
    if not current_platform.is_cuda():
        raise UnsupportedProblemError(
            f"vLLM's device is {current_platform.device_name}; FLUTE's kernels run on NVIDIA GPUs "
            "and on CPUs."
        )
    found = current_platform.get_device_capability()
    reason = why_not_on(found.major, found.minor) if found else ""
    if reason:
        raise UnsupportedProblemError(f"No kernels run on this GPU. {reason}.")


def _vllm_config() -> Any:
    """Return the VllmConfig that is in force, or is being made, or None.

    Why the callers' frames: vLLM asks a quantisation method for its checks while it makes its
    VllmConfig, and tells it neither the tensor parallel size nor how weights are loaded. Layers,
    which know, are made when workers hold the GPUs.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        made = frame.f_locals.get("self")
        if isinstance(made, VllmConfig):
            return made
        frame = frame.f_back
    return get_current_vllm_config_or_none()
