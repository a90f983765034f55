"""The original FLUTE's interface: `prepare_model_flute` in place, and its command line.

    python -m flute.integrations.base --pretrained_model_name_or_path ... --save_directory ...

Both quantise to NormalFloat with absmax scales, as the original did. bitsandbytes' layers are
recognised where a model has them; nothing here imports bitsandbytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flute.blockwise import quantize_weight
from flute.errors import FluteError, FormatError, UnsupportedProblemError
from flute.format import QuantizedWeight, QuantSpec, check_scales
from flute.integrations import bitsandbytes
from flute.integrations.accelerate import fetch, offload_hook, renew_hook
from flute.linear import LutLinear
from flute.methods import check_weight, quantize
from flute.methods.absmax import round_to_table
from flute.model import QuantizeOptions
from flute.reference import dequantize
from flute.shards import OutputTensor, Unit
from flute.stream import (
    CheckpointPlan,
    copy_rows,
    find_source,
    fingerprint,
    plan_checkpoint,
    quantize_checkpoint,
)
from flute.tables import get_table
from flute.writer import Progress, read_side_files, write_checkpoint

_TORCH_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BLOCK_WEIGHTS = 1 << 23
"""Weights fake-quantised at a time when a checkpoint is written."""


def prepare_model_flute(
    name: str = "",
    module: nn.Module | None = None,
    num_bits: int = 4,
    group_size: int = 64,
    fake: bool = False,
    handle_hooks: bool = False,
    prepare_bnb_layers: bool = True,
    default_bnb_dtype: torch.dtype | None = None,
    custom_scales_dict: Mapping[str, Tensor] | None = None,
    *,
    example_batch_size: int | None = None,
) -> None:
    """Replace every linear layer under a module by a quantised one, in place.

    An ``nn.Linear`` is quantised to NormalFloat with absmax scales, where it is (CPU, GPU, or
    accelerate's offload); a bitsandbytes ``Linear4bit`` is converted exactly. Everything under
    ``module`` is replaced, an output head or a MoE router too: pass the part to quantise, such as
    ``model.model.layers``. All layers are checked before the first one changes. The model's config
    does not learn of it; to save a model, use `quantize_hf_model` (the command line) instead.

    Args:
        name: put before the layers' names, in messages and in ``custom_scales_dict``.
        module: the parent of the layers.
        num_bits: 2, 3 or 4; bitsandbytes layers have 4.
        group_size: 32, 64, 128, 256, or -1 for the whole row; for a bitsandbytes layer it must
            divide the blocksize.
        fake: put dense ``nn.Linear`` layers there, which hold the dequantised values.
        handle_hooks: move accelerate's hooks to the new layers; weights it offloaded are fetched,
            quantised, and offloaded again, to the CPU. False drops the hooks (unless ``fake``).
        prepare_bnb_layers: convert bitsandbytes layers; False leaves them as they are.
        default_bnb_dtype: dtype of the scales (fake: of the weights) of bitsandbytes layers made
            from fp32 weights; None keeps the conversion exact.
        custom_scales_dict: full layer name -> scales (N, K / group_size), used instead of absmax.
        example_batch_size: ignored; later releases of the original tuned their kernels with it.

    Raises:
        FormatError: a bad argument, a row not divisible by the group, NaN or Inf; it is named.
        UnsupportedProblemError: nothing to replace, PyTorch hooks on a layer, an offloaded weight
            without ``handle_hooks=True``, or a bitsandbytes layer that the arguments do not fit.
    """
    spec = QuantSpec(num_bits, group_size)
    if not isinstance(module, nn.Module):
        raise FormatError(
            f"`module` is {type(module).__name__}; expected the nn.Module whose layers to replace, "
            "as in `prepare_model_flute(module=model.model.layers, ...)`."
        )
    prefix = f"{name}." if name else ""
    layers = {
        path: layer
        for path, layer in module.named_modules(remove_duplicate=False)
        if path and _is_replaceable(layer, prepare_bnb_layers)
    }
    if not layers:
        raise UnsupportedProblemError(
            f"`{name or type(module).__name__}` has no linear layer below it. Pass the module that "
            "contains the layers."
        )
    for path, layer in layers.items():
        _check_layer(prefix + path, layer, spec, handle_hooks, custom_scales_dict)
    replaced: dict[int, nn.Module] = {}
    for path, layer in layers.items():
        if id(layer) not in replaced:
            weight = _quantize_layer(
                prefix + path, layer, spec, custom_scales_dict, default_bnb_dtype
            )
            bias = fetch(layer, "bias")
            new: nn.Module = LutLinear.from_quantized(weight, bias)
            if fake:
                new = _dense_layer(weight, bias, _own_dtype(layer, default_bnb_dtype))
            new.train(layer.training)
            if handle_hooks or fake:
                renew_hook(layer, new)
            replaced[id(layer)] = new
        module.set_submodule(path, replaced[id(layer)])


def _is_replaceable(layer: nn.Module, with_bnb: bool) -> bool:
    if bitsandbytes.is_linear4bit(layer):
        return with_bnb
    # Why: nn.MultiheadAttention reads the weight of its out_proj instead of calling it.
    reads_weight = nn.modules.linear.NonDynamicallyQuantizableLinear
    return isinstance(layer, nn.Linear) and not isinstance(layer, reads_weight)


def _check_layer(
    name: str,
    layer: nn.Module,
    spec: QuantSpec,
    handle_hooks: bool,
    custom_scales: Mapping[str, Tensor] | None,
) -> None:
    """Refuse what would fail or be lost, before anything is changed."""
    if any(getattr(layer, kind) for kind in _TORCH_HOOKS):
        raise UnsupportedProblemError(
            f"`{name}` has PyTorch hooks, which a new layer would lose. Remove them, and register "
            "them again afterwards."
        )
    if bitsandbytes.is_linear4bit(layer):
        state = bitsandbytes.module_quant_state(layer, name)
        if spec.num_bits != 4:
            raise UnsupportedProblemError(
                f"`{name}` is a bitsandbytes layer of 4 bits, but num_bits={spec.num_bits}. "
                "Quantise the dense model for that."
            )
        bitsandbytes.check_group_size(spec.group_size, state.shape[1], state.blocksize, name)
        return
    weight: Any = layer.weight
    if not weight.is_floating_point():
        raise FormatError(f"`{name}.weight` is {weight.dtype}; expected a floating-point dtype.")
    if custom_scales is not None and name not in custom_scales:
        raise FormatError(
            f"`custom_scales_dict` has no `{name}`; it has {', '.join(list(custom_scales)[:4])}."
        )
    try:
        spec.group_length(weight.shape[1])
    except FormatError as error:
        raise FormatError(f"`{name}`: {error}") from error
    hook = offload_hook(layer)
    if weight.device.type == "meta" and not (hook and handle_hooks):
        raise UnsupportedProblemError(
            f"`{name}.weight` was offloaded by accelerate. Pass `handle_hooks=True`."
            if hook
            else f"`{name}.weight` is on the meta device, and no accelerate hook of this layer "
            "holds its values. Load the model with its weights, without `preload_module_classes`."
        )


def _own_dtype(layer: nn.Module, default_bnb_dtype: torch.dtype | None) -> torch.dtype:
    weight: Any = layer.weight
    if not bitsandbytes.is_linear4bit(layer):
        dtype: torch.dtype = weight.dtype
        return dtype
    made_from: torch.dtype = bitsandbytes.module_quant_state(layer, "weight").dtype
    return default_bnb_dtype or made_from if made_from == torch.float32 else made_from


def _quantize_layer(
    name: str,
    layer: nn.Module,
    spec: QuantSpec,
    custom_scales: Mapping[str, Tensor] | None,
    default_bnb_dtype: torch.dtype | None,
) -> QuantizedWeight:
    if bitsandbytes.is_linear4bit(layer):
        own = bitsandbytes.module_quant_state(layer, name).dtype
        dtype = default_bnb_dtype if own == torch.float32 else None
        return bitsandbytes.from_module(
            layer, group_size=spec.group_size, scale_dtype=dtype, name=name
        )
    weight = fetch(layer, "weight")
    assert weight is not None, f"{name} was checked to have a weight"
    if custom_scales is None:
        check_weight(weight, f"{name}.weight")
        return quantize(
            weight, spec.num_bits, spec.group_size, method="nf", scale_dtype=weight.dtype
        )
    N, K = weight.shape
    scales = custom_scales[name].to(weight)
    try:
        check_scales(scales, N, K, spec)
    except FormatError as error:
        raise FormatError(f"`custom_scales_dict`, `{name}`: {error}") from error
    table = get_table("nf", spec.num_bits).to(weight.device)
    groups = weight.float().unflatten(1, (-1, spec.group_length(K)))
    return QuantizedWeight(round_to_table(groups, scales, table), scales, table, spec)


def _dense_layer(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    N, K = weight.shape
    layer = nn.Linear(K, N, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(dequantize(weight, dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def quantize_hf_model(
    pretrained_model_name_or_path: str,
    save_directory: str,
    num_bits: int = 4,
    group_size: int = 64,
    *,
    fake: bool = False,
    progress: Progress | None = None,
) -> CheckpointPlan:
    """Quantise a checkpoint to NormalFloat with absmax scales, streamed from disk to disk.

    Args:
        pretrained_model_name_or_path: a folder, or the name of a model on the Hub.
        save_directory: the folder to create.
        num_bits: 2, 3 or 4.
        group_size: 32, 64, 128, 256, or -1 for the whole row.
        fake: write a dense checkpoint whose linear weights hold the dequantised values.
        progress: told about finished tensors.

    Returns:
        What was quantised and what was left dense.

    Raises:
        FluteError: as `flute.stream.quantize_checkpoint`.
    """
    source = pretrained_model_name_or_path
    options = QuantizeOptions(num_bits, group_size, method="nf")
    if not fake:
        return quantize_checkpoint(source, save_directory, options, progress=progress)
    plan = plan_checkpoint(find_source(source), options)
    directory = plan.reader.directory
    write_checkpoint(
        save_directory,
        [_fake_unit(plan, name) for name in plan.reader.names],
        read_side_files(directory) | {"config.json": (directory / "config.json").read_bytes()},
        {**fingerprint(plan.reader), "fake": plan.model_plan.config.to_dict()},
        progress=progress,
    )
    return plan


def _fake_unit(plan: CheckpointPlan, name: str) -> Unit:
    reader, config = plan.reader, plan.model_plan.config
    output = OutputTensor(name, reader.dtype(name), reader.shape(name))
    if name not in plan.layers:
        return Unit(name, (output,), lambda: copy_rows(reader, name), 0)

    def produce() -> Iterator[tuple[str, Tensor]]:
        N, K = output.shape
        step = max(1, _BLOCK_WEIGHTS // K)
        for start in range(0, N, step):
            rows = reader.rows(name, start, min(start + step, N))
            weight = quantize_weight(rows, plan.layers[name], config, None, first_row=start)
            yield name, dequantize(weight, output.dtype)

    return Unit(name, (output,), produce, output.shape[0] * output.shape[1])


_EXAMPLES = """examples:
  python -m flute.integrations.base \\
      --pretrained_model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \\
      --save_directory Meta-Llama-3-8B-Instruct-NF4 --num_bits 4 --group_size 128

`flute quantize` does the same with more methods, tables and options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 1 after an error of one line."""
    parser = argparse.ArgumentParser(
        prog="python -m flute.integrations.base",
        description="Quantise a model to NormalFloat with absmax scales, like the original FLUTE.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="a folder, or a model on the Hub")
    add("--save_directory", required=True, help="the folder to create")
    add("--num_bits", type=int, default=4, help="bits per weight: 2, 3 or 4 (default: 4)")
    add("--group_size", type=int, default=64, help="weights per scale; -1: the row (default: 64)")
    add("--fake", action="store_true", help="write a dense checkpoint of the dequantised values")
    add("--example_batch_size", type=int, help="ignored: nothing is tuned when a model is written")
    options = parser.parse_args(arguments)
    # Why here: the command line stands above this file and imports its neighbours.
    from flute.console import Bar, report_error, show_warnings_plainly

    show_warnings_plainly()
    try:
        with Bar("quantising", "weights") as bar:
            plan = quantize_hf_model(
                options.pretrained_model_name_or_path,
                options.save_directory,
                options.num_bits,
                options.group_size,
                fake=options.fake,
                progress=bar,
            )
    except FluteError as error:
        report_error(str(error))
        return 1
    sys.stdout.write(
        f"{Path(options.save_directory)}: {len(plan.layers)} layers at {options.num_bits} bits, "
        f"{len(plan.model_plan.config.modules_to_not_convert)} left dense.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
