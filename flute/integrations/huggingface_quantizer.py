"""The quantizer: what transformers calls while it loads a model, and its registration.

The choice of layers, the quantisation and the layer itself are the package's own, so a model
quantised on load is bit for bit that of `flute.quantize_model`.

    checkpoint   meta model: each nn.Linear becomes                  tensors read, by name
    quantised    LutLinear(codes, scales, table)                     codes, scales, table
    dense        LutLinear(codes, scales, table) + a meta `weight`   weight -> quantised -> those
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, revert_weight_conversion
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from flute.architecture import model_keys
from flute.blockwise import quantize_weight
from flute.checkpoint import CHECKSUM_METADATA, tensor_bytes, verify_checksums
from flute.dense import output_head, tied_embedding, untie_head
from flute.errors import FluteError, FormatError, UnsupportedProblemError
from flute.experts import PROJECTIONS, split_experts
from flute.format import CheckpointConfig
from flute.integrations.huggingface_checks import (
    check_filled,
    check_headers,
    read_headers,
    without_expert_merges,
)
from flute.integrations.huggingface_config import FluteConfig
from flute.linear import LutLinear
from flute.model import empty_lut_linear, matches, plan_model
from flute.pack import pack_codes
from flute.prepare import prepare


class FluteHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swap linear layers before transformers loads a model, and check that it filled them.

    Args:
        quantization_config: copied, so that one config may quantise several models.
        pre_quantized: whether the checkpoint is quantised, or its weights are to be quantised now.

    Raises:
        FormatError: the config does not fit the checkpoint.
    """

    def __init__(self, quantization_config: FluteConfig, **kwargs: Any) -> None:
        super().__init__(copy(quantization_config), **kwargs)
        config: FluteConfig = self.quantization_config
        if self.pre_quantized and config.checkpoint is None:
            raise FormatError("`quantization_config` has no `format_version`; expected 1.")
        if not self.pre_quantized and config.options is None:
            raise FormatError(
                "This FluteConfig describes a quantised checkpoint, but the model is dense. Pass "
                "FluteConfig(num_bits=..., group_size=..., ...) to quantise it."
            )
        self.headers_checked = False
        self.has_split_experts = False
        self.tied_head = self.embedding = ""
        """Of a dense model whose head is quantised from the embedding that it is tied to: the
        head's name, and that of the embedding's parameter."""
        self.failure: FluteError | None = None
        """Of the first weight that could not be quantised; raised when transformers lets it."""

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        files = [p for p in map(Path, checkpoint_files or ()) if p.suffix == ".safetensors"]
        # transformers calls this under `torch.device("meta")`, where no number can be looked at.
        with torch.device("cpu"):
            self.swap(model, files)
            if files and self.pre_quantized and os.environ.get("FLUTE_VERIFY") != "0":
                verify_checksums(files[0].parent, files)

    def swap(self, model: nn.Module, files: Sequence[Path]) -> None:
        """Replace the linear layers that are quantised, or to be; check the files' headers.

        Args:
            model: on the meta device.
            files: the safetensors files that will be loaded; none are not checked.

        Raises:
            CheckpointError: tensors are missing, or belong to a layer that the config calls dense.
            FormatError: a tensor has another dtype or shape than the config says.
            UnsupportedProblemError: quantised experts of an unknown kind.
        """
        if self.pre_quantized:
            names = self._checkpoint_names(model, files)
        else:
            names = self._plan(model, files)
        self._swap_layers(model, names)
        if files:
            check_headers(model, files, self.tied_head)
            self.headers_checked = True

    def _swap_layers(self, model: nn.Module, names: Mapping[str, str]) -> None:
        config: CheckpointConfig = self.quantization_config.checkpoint
        for name, name_in_config in names.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), "only linear layers are planned"
            layer = empty_lut_linear(linear, name_in_config, config)
            if self.pre_quantized or name == self.tied_head:
                _show_weight(layer)
            else:
                placeholder = torch.empty_like(linear.weight, device="meta")
                layer.register_parameter("weight", nn.Parameter(placeholder, requires_grad=False))
            model.set_submodule(name, layer.train(linear.training))

    def _plan(self, model: nn.Module, files: Sequence[Path]) -> dict[str, str]:
        """Plan the quantisation of a dense model; return its layers' names.

        Raises:
            UnsupportedProblemError: as `plan_model`, or the head is tied to an embedding that the
                files hold by the head's name only.
        """
        config: FluteConfig = self.quantization_config
        assert config.options is not None, "checked on construction"
        skips_experts = any(
            matches(f"model.layers.0.mlp.experts.0.{projection}", pattern)
            for pattern in config.options.skip
            for projection in ("w1", "gate_proj")
        )
        self.has_split_experts = not skips_experts and bool(split_experts(model))
        plan = plan_model(model, config.options)
        config.checkpoint = plan.config
        if plan.head:
            self._plan_head(model, plan.head, files)
        experts = [name for name, reason in plan.dense.items() if "experts" in reason]
        if experts:
            share = sum(model.get_parameter(name).numel() for name in experts) / sum(
                parameter.numel() for parameter in model.parameters()
            )
            warnings.warn(
                f"{len(experts)} tensors of MoE experts stay dense, {share:.0%} of the model's "
                f"weights: `{experts[0]}`{', ...' if len(experts) > 1 else ''}. Those of "
                f"{', '.join(PROJECTIONS)} are quantised; others are not yet.",
                stacklevel=2,
            )
        return {name: name for name in plan.shapes}

    def _plan_head(self, model: nn.Module, head: str, files: Sequence[Path]) -> None:
        """Find out which tensor a head is quantised from; it is tied to none from now on."""
        embedding = tied_embedding(model)
        keys = set(model_keys(model, list(read_headers(files)))[0].values())
        if embedding and f"{head}.weight" not in keys:
            self.tied_head, self.embedding = head, embedding
        elif embedding and embedding not in keys:
            raise UnsupportedProblemError(
                f"The checkpoint holds the embedding `{embedding}` as `{head}.weight`, which "
                "cannot be taken apart while it loads. Quantise it first: `flute quantize MODEL "
                "OUT --head-bits ...`."
            )
        untie_head(model, head)

    def _checkpoint_names(self, model: nn.Module, files: Sequence[Path]) -> dict[str, str]:
        """Return the quantised layers of a checkpoint: name in ``model`` -> name in its config.

        The names differ by the base model's prefix when a checkpoint is loaded into another class
        than that which wrote it. A head that is new there has no codes and stays dense; one that
        the config calls quantised must have some.
        """
        config: CheckpointConfig = self.quantization_config.checkpoint
        self.has_split_experts = config.quantized_experts and bool(split_experts(model))
        if config.quantized_experts and not self.has_split_experts:
            raise UnsupportedProblemError(
                f"The checkpoint's MoE experts are quantised, which {type(model).__name__} of "
                f"transformers {transformers.__version__} cannot take: experts of "
                f"{', '.join(PROJECTIONS)} can."
            )
        recorded = {*config.modules_to_not_convert, *config.overrides}
        prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
        has_heads = getattr(model, "base_model", model) is not model
        on_disk = read_headers(files) if has_heads else {}
        head = output_head(model) if config.quantized_head else ""
        if head:
            untie_head(model, head)
        names = {}
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            is_head = has_heads and not name.startswith(prefix)
            if is_head and files and name != head and f"{name}.codes" not in on_disk:
                continue
            aliases = (name, prefix + name, name.removeprefix(prefix))
            names[name] = next((alias for alias in aliases if alias in recorded), name)
        return {
            n: alias for n, alias in names.items() if alias not in config.modules_to_not_convert
        }

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Tell whether a tensor of the checkpoint is the dense weight of a layer to quantise."""
        return param_name == self.embedding != "" or _is_replaced(model, param_name)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Return the bytes per element; a dense weight, gone once quantised, takes none."""
        if _is_replaced(model, param_name):
            return 0.0
        return param.element_size()

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Return transformers' conversions, but none that fuses experts that were split."""
        kept: list[Any] = super().update_weight_conversions(weight_conversions, *args)
        return without_expert_merges(kept) if self.has_split_experts else kept

    def get_quantize_ops(self) -> ConversionOps:
        """Return what turns a dense weight into codes, scales and table."""
        return _Quantize(self)

    def quantize(self, weight: Tensor, name: str, layer: LutLinear) -> dict[str, Tensor]:
        """Return the tensors of a layer, by parameter name.

        transformers turns any exception here into a report, so a failure is kept for later and the
        layer gets placeholders.
        """
        config: FluteConfig = self.quantization_config
        assert config.options is not None, "checked on construction"
        assert config.checkpoint is not None, "planned before weights are read"
        if self.failure is None:
            try:
                _check_shape(weight, name, layer)
                done = quantize_weight(weight, name, config.checkpoint, config.options.table)
                codes = pack_codes(done.codes, done.spec.num_bits)
                return {"codes": codes, "scales": done.scales, "table": done.table}
            except FluteError as failure:
                self.failure = failure
        parts = {"codes": layer.codes, "scales": layer.scales, "table": layer.table}
        return {key: torch.zeros_like(part, device=weight.device) for key, part in parts.items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self.failure is not None:
            raise self.failure
        check_filled(model, headers_checked=self.headers_checked)
        layers = [module for module in model.modules() if isinstance(module, LutLinear)]
        for layer in layers:
            layer.requires_grad_(False)
            del layer.__dict__["weight"]
        if model.dtype != torch.float32 or not any(layer.codes.is_cuda for layer in layers):
            prepare(model)  # of fp32 a GPU's kernels take nothing
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Return the safetensors metadata for `save_pretrained`: the checksums of its tensors.

        Left out are tensors that are offloaded, tied to another, or converted when saved (experts).
        """
        state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        not_saved = getattr(model, "_keys_to_ignore_on_save", None) or ()
        for name in (*getattr(model, "all_tied_weights_keys", {}), *not_saved):
            state.pop(name, None)
        meta = {name: tensor.to("meta", copy=True) for name, tensor in state.items()}
        names = {id(tensor): name for name, tensor in revert_weight_conversion(model, meta).items()}
        checksums = {
            names[id(meta[name])]: f"{zlib.crc32(tensor_bytes(tensor)):08x}"
            for name, tensor in state.items()
            if id(meta[name]) in names and tensor.device.type != "meta"
        }
        return None, {CHECKSUM_METADATA: json.dumps(checksums)}

    def is_serializable(self, **_: Any) -> bool:
        """Tell that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that codes, scales and tables take no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Tell that `torch.compile` works."""
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    """The step between reading a dense weight and setting the parameters of its layer."""

    def __init__(self, quantizer: FluteHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: Mapping[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Replace each dense weight by the tensors of its layer, under their full names."""
        converted: dict[str, Any] = {}
        for key, value in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, key):
                converted[key] = value
                continue
            weight = value[0] if isinstance(value, list) else value
            is_tied = key == self.quantizer.embedding
            name = self.quantizer.tied_head if is_tied else key.rpartition(".")[0]
            layer = model.get_submodule(name)
            assert isinstance(layer, LutLinear), "param_needs_quantization said so"
            for part, tensor in self.quantizer.quantize(weight, name, layer).items():
                converted[f"{name}.{part}"] = nn.Parameter(tensor, requires_grad=False)
            if is_tied:  # the embedding stays as it is
                converted[key] = weight.to(model.get_parameter(key).dtype)
                continue
            del layer.weight
            _show_weight(layer)
            if missing_keys is not None:
                missing_keys.discard(key)
        return converted


def _is_replaced(model: nn.Module, param_name: str) -> bool:
    """Tell whether a parameter is the dense weight of a layer that gets codes instead."""
    module, _dot, tensor = param_name.rpartition(".")
    return tensor == "weight" and isinstance(model.get_submodule(module), LutLinear)


def _show_weight(layer: LutLinear) -> None:
    """Give a layer a ``weight`` that is no parameter, for as long as transformers loads the model.

    Some models initialise `child.weight` from the parent (GPT-BigCode, ModernBERT, nanochat); they
    leave alone what carries the mark of a loaded tensor.
    """
    shape = (layer.out_features, layer.in_features)
    weight = torch.empty(shape, dtype=layer.scales.dtype, device="meta")
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    layer.__dict__["weight"] = weight


def _check_shape(weight: Tensor, name: str, layer: LutLinear) -> None:
    expected = (layer.out_features, layer.in_features)
    if tuple(weight.shape) != expected:
        raise FormatError(
            f"`{name}.weight` has shape {tuple(weight.shape)}; the model's config says {expected}."
        )


def register() -> None:
    """Make transformers recognise ``quant_method: "flute"``; calling it again changes nothing."""
    if "flute" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("flute")(FluteConfig)
    if "flute" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("flute")(FluteHfQuantizer)


# On import, whoever imports it: `autoload` does in the middle of transformers' own import, which
# may be in the middle of this module's.
register()
