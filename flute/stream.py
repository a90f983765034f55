"""Quantising a checkpoint on disk: read, quantise and write tensor by tensor, in bounded memory.

    source folder --CheckpointReader--> plan_model on the meta model --units--> write_checkpoint

Dense tensors are copied in blocks; a linear weight is quantised in blocks of rows. So memory holds
a block, not a model, whatever the model's size.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flute.architecture import match_names, meta_model, missing_parameters, model_keys
from flute.blockwise import head_config, quantize_weight
from flute.checkpoint import CheckpointReader, is_hub_name, tensor_bytes
from flute.dense import tied_embedding, untied
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError, reason_of
from flute.experts import split_experts
from flute.format import FLOAT_DTYPES, SCALE_DTYPES, WHOLE_ROW, CheckpointConfig, QuantSpec
from flute.layerwise import CheckpointWalk
from flute.methods import CALIBRATED, check_finite, fits_table, table_for
from flute.methods.fit import sample_rows
from flute.model import ModelPlan, QuantizeOptions, check_calibration, plan_model
from flute.pack import pack_codes
from flute.rotation import RotatedReader
from flute.shards import OutputTensor, Unit
from flute.tables import get_table
from flute.version import __version__
from flute.writer import (
    Progress,
    read_side_files,
    staging_folder,
    write_checkpoint,
)

_BLOCK_WEIGHTS = 1 << 21
"""Weights quantised at a time: blocks below 32 MB are reused by the allocator, not returned."""
_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
"""Files that a model of the Hub is downloaded with."""


@dataclass(frozen=True)
class CheckpointPlan:
    """What `quantize_checkpoint` will do, known before it starts.

    Args:
        reader: the source.
        model_plan: which layers are quantised and which stay dense.
        layers: name of the weight tensor on disk -> full module name, for the layers quantised.
    """

    reader: CheckpointReader
    model_plan: ModelPlan
    layers: Mapping[str, str]


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    options: QuantizeOptions | None = None,
    *,
    calibration: Tensor | None = None,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    revision: str | None = None,
) -> CheckpointPlan:
    """Quantise a checkpoint on disk into a new folder.

    Peak memory is a few blocks of rows, on the CPU or the GPU; with calibration the embedding or
    one decoder block, its layers' Hessians and the windows' hidden states. A run that was killed
    goes on where it stopped when repeated, and ends byte for byte as if it had not been.

    Args:
        source: a folder with config.json and safetensors, or the name of a model on the Hub.
        destination: the folder to create.
        options: bits, groups, method, table; the defaults of `QuantizeOptions` if None.
        calibration: for "gptq" and "lnq": token ids of training text, int64, shape (samples,
            sequence), from `flute.calibration.sample_windows`.
        overwrite: replace a folder that exists.
        device: where to quantise: "cpu", "cuda", "cuda:1", ...
        progress: told about finished tensors.
        revision: branch, tag or commit of a model on the Hub.

    Returns:
        What was quantised and what was left dense.

    Raises:
        CheckpointError: the source cannot be read, or the destination not written.
        FormatError: NaN or Inf in a tensor, a dtype or shape that cannot be quantised; it is named.
        CalibrationError: calibration that is missing or does not fit the model, NaN or Inf in the
            inputs of a layer, out of memory; finished layers are kept.
        UnsupportedProblemError: an unknown architecture, or a checkpoint quantised already.
    """
    options = options or QuantizeOptions()
    check_calibration(options.method, calibration)
    plan = plan_checkpoint(find_source(source, revision), options)
    reader, config = plan.reader, plan.model_plan.config
    check_apart(reader.directory, destination)
    place, walk = torch.device(device), None
    job: dict[str, Any] = {"hadamard": True} if options.hadamard else {}
    if calibration is not None:
        staging = staging_folder(destination)
        layers, model_plan = plan.layers, plan.model_plan
        walk = CheckpointWalk(
            reader, model_plan, layers, options, calibration, place, staging, progress
        )
        job["calibration"] = f"{zlib.crc32(tensor_bytes(calibration)):08x}"
        if options.learn is not None:
            job["learn"] = str(options.learn)
        if options.guided:
            job["guided"] = True
    side_files = read_side_files(reader.directory) | {
        "config.json": model_config_json(reader.config, config),
        "README.md": model_card(str(source), config, plan.model_plan.shapes).encode(),
    }
    write_checkpoint(
        destination,
        [_unit(plan, name, options, place, walk) for name in _in_order(plan, walk)],
        side_files,
        {**fingerprint(reader), "config": config.to_dict(), "table": _table_values(options), **job},
        overwrite=overwrite,
        progress=progress,
    )
    return plan


def find_source(
    source: str | Path, revision: str | None = None, patterns: Sequence[str] = _DOWNLOADED
) -> Path:
    """Return the folder of a checkpoint, downloading a model of the Hub into its cache if need be.

    Args:
        source: a folder, or the name of a model on the Hub.
        revision: branch, tag or commit on the Hub.
        patterns: the files to download.

    Raises:
        CheckpointError: neither a folder nor a model that can be had.
    """
    if not str(source):
        raise CheckpointError("The model's name is empty; expected a folder, or a name on the Hub.")
    if not is_hub_name(source):
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(source), revision=revision, allow_patterns=list(patterns))
        )
    except Exception as error:
        raise CheckpointError(
            f"`{source}` is no folder here, and cannot be had from the Hub either: "
            f"{type(error).__name__}: {reason_of(error)}."
        ) from error


def plan_checkpoint(directory: Path, options: QuantizeOptions) -> CheckpointPlan:
    """Match a checkpoint's tensors to its architecture's layers and choose what to quantise.

    Raises:
        UnsupportedProblemError: quantised already, or an architecture transformers doesn't know.
        CheckpointError: a weight the architecture needs is not in the files.
        FormatError: a weight has a dtype or shape that does not fit its layer.
    """
    reader = (RotatedReader if options.hadamard else CheckpointReader)(directory)
    quantized = reader.config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "?"
        raise UnsupportedProblemError(
            f"`{directory}` is quantised already (quant_method {method!r}). Quantise the dense "
            "model, or use `flute convert` for bitsandbytes and original FLUTE checkpoints."
        )
    model = meta_model(directory, reader.config)
    if options.method not in CALIBRATED:
        split_experts(model)
    plan = plan_model(model, options)
    if plan.head:
        untie_reader(reader, model, plan.head)
    modules = match_names(model, reader.names)
    layers = {name: module for name, module in modules.items() if module in plan.shapes}
    missing = {f"{module}.weight" for module in set(plan.shapes) - set(layers.values())}
    missing |= missing_parameters(model, reader.names)
    if missing:
        raise CheckpointError(
            f"{len(missing)} parameters of {type(model).__name__} are not in `{directory}`, such "
            f"as `{min(missing)}`. The checkpoint is incomplete, or of another architecture."
        )
    for name, module in layers.items():
        if reader.dtype(name) not in FLOAT_DTYPES:
            raise FormatError(
                f"`{name}` is {reader.dtype(name)}; expected float16, bfloat16 or float32. "
                "Quantise a model that has not been quantised before."
            )
        if reader.shape(name) != plan.shapes[module]:
            raise FormatError(
                f"`{name}` has shape {reader.shape(name)}; {type(model).__name__} expects "
                f"{plan.shapes[module]}."
            )
    if options.scale_dtype is None:
        own = options.dtype_of_scales(reader.dtype(name) for name in layers)
        config = CheckpointConfig.from_dict({**plan.config.to_dict(), "scale_dtype": own})
        plan = replace(plan, config=config)
    return CheckpointPlan(reader, plan, layers)


def untie_reader(reader: CheckpointReader, model: nn.Module, head: str) -> None:
    """Let a head and the embedding that it is tied to be read as two tensors; say so in the config.

    Checkpoints hold one of them, mostly the embedding, or both.

    Args:
        reader: of a dense checkpoint.
        model: its architecture, from `flute.architecture.meta_model`.
        head: full name of the head.
    """
    embedding, weight = tied_embedding(model), f"{head}.weight"
    if not embedding:
        return
    on_disk = {key: name for name, key in model_keys(model, reader.names)[0].items()}
    if weight not in on_disk and embedding in on_disk:
        reader.alias(weight, on_disk[embedding])
    elif weight in on_disk and embedding not in on_disk:
        reader.alias(embedding, on_disk[weight])
    reader.config = untied(reader.config)


def _in_order(plan: CheckpointPlan, walk: CheckpointWalk | None) -> list[str]:
    """Return the tensors on disk; if layers are calibrated, these last, block by block."""
    if walk is None:
        return plan.reader.names
    blocks = walk.block_of
    return sorted(plan.reader.names, key=lambda name: blocks.get(plan.layers.get(name, ""), -1))


def _unit(
    plan: CheckpointPlan,
    name: str,
    options: QuantizeOptions,
    device: torch.device,
    walk: CheckpointWalk | None,
) -> Unit:
    reader, config = plan.reader, plan.model_plan.config
    if name not in plan.layers:
        output = OutputTensor(name, reader.dtype(name), reader.shape(name))
        return Unit(name, (output,), lambda: copy_rows(reader, name), 0)
    module = plan.layers[name]
    N, K = reader.shape(name)
    layer = name.removesuffix(".weight")
    is_head = module == plan.model_plan.head
    by_data = None if is_head and not plan.model_plan.head_has_hessian else walk
    return Unit(
        layer,
        output_tensors(layer, N, K, config.spec_of(module), config),
        lambda: (
            _quantize_rows(reader, name, module, head_config(config), options, device)
            if by_data is None
            else _calibrated_head(by_data, layer)
            if is_head
            else _calibrated(by_data, layer, module)
        ),
        N * K,
    )


def output_tensors(
    layer: str, N: int, K: int, spec: QuantSpec, config: CheckpointConfig
) -> tuple[OutputTensor, ...]:
    """Return name, dtype and shape of the tensors of a quantised layer on disk.

    Args:
        layer: name of the layer on disk; a weight's name without ``.weight``.
        N: rows of the weight.
        K: weights per row.
        spec: bits and group size of this layer.
        config: tells the scales' dtype and the table's scope.
    """
    rows = N if config.table_scope == "row" else 1
    return (
        OutputTensor(f"{layer}.codes", torch.int32, (N, spec.num_words(K))),
        OutputTensor(f"{layer}.scales", SCALE_DTYPES[config.scale_dtype], (N, spec.num_groups(K))),
        OutputTensor(f"{layer}.table", torch.float32, (rows, spec.num_entries)),
    )


def copy_rows(reader: CheckpointReader, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a dense tensor in blocks of rows, for a `flute.writer.Unit`.

    Raises:
        FormatError: NaN or Inf in it.
    """
    first_row = 0
    for block in reader.blocks(name):
        if block.is_floating_point() and block.dtype.itemsize > 1:
            check_finite(block, name, first_row)
        first_row += len(block) if block.ndim else 0
        yield name, block


def _quantize_rows(
    reader: CheckpointReader,
    name: str,
    module: str,
    config: CheckpointConfig,
    options: QuantizeOptions,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    layer = name.removesuffix(".weight")
    N, K = reader.shape(name)
    rows = max(1, _BLOCK_WEIGHTS // K)
    num_bits = config.spec_of(module).num_bits
    table = options.table
    if fits_table(config.method, table):
        picked = sample_rows(N, K)
        parts = [(0, N)] if len(picked) == N else [(row, row + 1) for row in picked]
        sample = torch.cat([reader.rows(name, *part) for part in parts]).to(device)
        table = table_for(config.method, sample, config.spec_of(module), table)
    whole = table
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        if config.table_scope == "row" and whole is not None:
            values = get_table(whole, num_bits, config.spec_of(module).group_size)
            table = values[start:stop] if len(values) > 1 else values
        block = reader.rows(name, start, stop).to(device)
        weight = quantize_weight(block, module, config, table, first_row=start)
        yield f"{layer}.codes", pack_codes(weight.codes, num_bits)
        yield f"{layer}.scales", weight.scales
        if start == 0 or config.table_scope == "row":
            yield f"{layer}.table", weight.table


def _calibrated(walk: CheckpointWalk, layer: str, module: str) -> Iterator[tuple[str, Tensor]]:
    weight = walk.quantized(module)
    yield f"{layer}.codes", pack_codes(weight.codes, weight.spec.num_bits)
    yield f"{layer}.scales", weight.scales
    yield f"{layer}.table", weight.table


def _calibrated_head(walk: CheckpointWalk, layer: str) -> Iterator[tuple[str, Tensor]]:
    for i, rows in enumerate(walk.quantized_head()):
        yield f"{layer}.codes", pack_codes(rows.codes, rows.spec.num_bits)
        yield f"{layer}.scales", rows.scales
        if i == 0 or len(rows.table) > 1:
            yield f"{layer}.table", rows.table


def check_apart(source: Path, destination: str | Path) -> None:
    """Check that overwriting the destination would not delete the source.

    Raises:
        CheckpointError: they are one folder, or the source lies in the destination.
    """
    folder = Path(destination).resolve()
    if folder == source.resolve() or folder in source.resolve().parents:
        raise CheckpointError(
            f"`{destination}` is or holds the source `{source}`. Choose another folder."
        )


def fingerprint(reader: CheckpointReader) -> dict[str, Any]:
    """Return what tells one state of a source from another, short of reading its weights."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in reader.files]
    return {
        "version": __version__,
        "files": files,
        "tensors": [(n, str(reader.dtype(n)), reader.shape(n)) for n in reader.names],
        "source_config": reader.config,
    }


def _table_values(options: QuantizeOptions) -> Any:
    if options.table is None:
        return None
    return get_table(options.table, options.num_bits, options.group_size).tolist()


def model_config_json(source: Mapping[str, Any], config: CheckpointConfig) -> bytes:
    """Return the config.json of a quantised checkpoint."""
    content = {**source, "quantization_config": config.to_dict()}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(source: str, config: CheckpointConfig, layers: Collection[str]) -> str:
    """Return the README.md of a quantised checkpoint: what it is and how to load it."""
    head = config.quantized_head
    widths = Counter(config.spec_of(name).num_bits for name in layers if name != head)
    bits = " and ".join(f"{count} linear layers at {b} bits" for b, count in sorted(widths.items()))
    what = f"{bits}, {_group(config.group_size)}"
    if head:
        spec = config.spec_of(head)
        what += f", output head at {spec.num_bits} bits and {_group(spec.group_size)}"
    base = f"base_model: {source}\n" if is_hub_name(source) else ""
    return f"""---
library_name: transformers
tags:
- flute
{base}---

# {Path(source).name}, quantised by FLUTE

{what}, table `{config.table}`, method
`{config.method}`. Each weight is `table[code] * scale`.

```python
import flute  # must come first: without it, transformers loads random weights and only warns
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""


def _group(group_size: int) -> str:
    return "a scale per row" if group_size == WHOLE_ROW else f"groups of {group_size}"
