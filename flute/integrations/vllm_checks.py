"""What vLLM is asked to serve, looked over before it starts an engine and takes a GPU's memory.

The model is made without weights, from its config alone; of the files only headers are read.

    every parameter        is in the files                              (or it would stay random)
    codes, scales, table   have the dtypes and shapes that the config says
    row-parallel layers    are cut at groups and whole words
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from flute.architecture import model_of
from flute.checkpoint import INDEX_NAME, read_json, tensor_names
from flute.errors import CheckpointError, UnsupportedProblemError
from flute.format import CheckpointConfig
from flute.integrations.huggingface_checks import check_headers, unfilled_parameters
from flute.integrations.huggingface_config import FluteConfig
from flute.integrations.huggingface_quantizer import FluteHfQuantizer
from flute.integrations.original_checkpoint import CONFIG_NAME
from flute.integrations.vllm_layers import check_tensor_names, cut_rows
from flute.linear import LutLinear
from flute.model import QuantizeOptions

_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2", "w2")
"""Last components of the names of layers whose input features vLLM cuts."""
_log = logging.getLogger(__name__)


def find_files(folder: Path) -> list[Path]:
    """Return the weight files of a local checkpoint, none where it is no folder.

    Raises:
        CheckpointError: the index names a file that is not there.
    """
    single, index = folder / "model.safetensors", folder / INDEX_NAME
    if single.exists():
        return [single]
    if not index.exists():
        return sorted(folder.glob("model-*-of-*.safetensors"))
    listed = read_json(index).get("weight_map") or {}
    files = sorted({folder / str(name) for name in listed.values()})
    absent = [file for file in files if not file.exists()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(files)} weight files are missing, such as `{absent[0]}`. "
            "Download the checkpoint again."
        )
    return files


def check_is_not_original(folder: Path) -> None:
    """Refuse a checkpoint of the original FLUTE, whose weights are packed for one kind of GPU.

    Raises:
        UnsupportedProblemError: it is one.
    """
    if (folder / CONFIG_NAME).exists():
        raise UnsupportedProblemError(
            f"`{folder}` was quantised by the original FLUTE. Run `flute convert {folder} OUT`, "
            "which keeps its codes, and serve OUT."
        )


def check_served(
    hf_config: Any,
    files: Sequence[Path],
    quantization: CheckpointConfig | QuantizeOptions,
    num_ranks: int = 1,
    *,
    cuts_experts: bool = True,
) -> None:
    """Check a model's files, and how its layers will be cut, against its config.

    What transformers has no class for is left to vLLM's loaders, which check each tensor.

    Args:
        hf_config: transformers' config of the model.
        files: that will be loaded; none are not checked.
        quantization: what the files say, or what a dense model is to be quantised to.
        num_ranks: the tensor parallel size.
        cuts_experts: whether each rank has a part of each MoE expert, not some experts whole.

    Raises:
        CheckpointError: a parameter is in no file, or a file cannot be read.
        FormatError: a tensor has another dtype or shape than the config says.
        UnsupportedProblemError: the ranks' parts of a layer cut a group or a word.
    """
    is_quantized = isinstance(quantization, CheckpointConfig)
    if is_quantized:
        check_tensor_names(name for file in files for name in tensor_names(file))
    # Why only these: a draft of Eagle's has a Llama's config and not a Llama's tensors.
    known = [n for n in getattr(hf_config, "architectures", None) or () if hasattr(transformers, n)]
    if not known:
        return
    try:
        model = model_of(deepcopy(hf_config), known)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        _log.info("The model is checked while it loads: %s", error)
        return
    config = _config_of(quantization)
    quantizer = FluteHfQuantizer(config, pre_quantized=is_quantized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers say it again where they are made
        quantizer.swap(model, [])
    if files and is_quantized:
        missing = unfilled_parameters(model, files)
        if missing:
            raise CheckpointError(
                f"The checkpoint lacks `{missing[0]}` ({len(missing)} tensors in all), which its "
                "config.json says the model has. Download it again."
            )
    if files:
        check_headers(model, files, quantizer.tied_head)
    for name, layer in _row_parallel(model) if num_ranks > 1 else ():
        if cuts_experts or "expert" not in name:
            cut_rows(name, layer.spec, layer.in_features, num_ranks)


def _config_of(quantization: CheckpointConfig | QuantizeOptions) -> FluteConfig:
    if isinstance(quantization, CheckpointConfig):
        config: FluteConfig = FluteConfig.from_dict(quantization.to_dict())
        return config
    asked = quantization
    rest = (asked.method, asked.table, asked.scale_dtype, asked.skip)
    head = (asked.head_bits, asked.head_group_size)
    return FluteConfig(asked.num_bits, asked.group_size, *rest, *head)


def _row_parallel(model: nn.Module) -> Iterator[tuple[str, LutLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LutLinear) and name.rpartition(".")[2] in _ROW_PARALLEL:
            yield name, module
