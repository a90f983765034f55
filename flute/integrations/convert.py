"""Conversion of foreign checkpoints on disk, layer by layer: tell the format, plan, write.

    detect_format -> BitsandbytesCheckpoint | OriginalCheckpoint -> units (one layer each) -> writer

Each of those classes has ``shapes``, ``config``, ``consumed`` and ``weight(layer)``; all else here
is common. Dense tensors are copied, so memory holds one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from flute.architecture import match_names, meta_model
from flute.checkpoint import CheckpointReader
from flute.dense import output_head
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import CheckpointConfig
from flute.integrations.bitsandbytes_checkpoint import BitsandbytesCheckpoint
from flute.integrations.original_checkpoint import OriginalCheckpoint
from flute.pack import pack_codes
from flute.shards import OutputTensor, Unit
from flute.stream import (
    check_apart,
    copy_rows,
    find_source,
    fingerprint,
    model_card,
    model_config_json,
    output_tensors,
)
from flute.writer import Progress, read_side_files, write_checkpoint

CONVERTIBLE = ("bitsandbytes", "original")
_ForeignCheckpoint = BitsandbytesCheckpoint | OriginalCheckpoint
_FOREIGN_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes 8-bit",
    ".weight_scale_inv": "block-scaled FP8",
    ".weight_scale": "compressed-tensors or FP8",
    ".codebooks": "AQLM",
}
"""Tensor names that give away a format whose config.json does not name it."""


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did.

    Args:
        format: "bitsandbytes" or "original".
        config: as written to config.json.
        shapes: layer name on disk -> (N, K), for the layers converted.
        directory: the folder written.
    """

    format: str
    config: CheckpointConfig
    shapes: Mapping[str, tuple[int, int]]
    directory: Path


def detect_format(directory: str | Path) -> str:
    """Tell what a checkpoint folder holds.

    Returns:
        "bitsandbytes" (4-bit), "original" (the original FLUTE's), "flute" (ours) or "dense".

    Raises:
        UnsupportedProblemError: another quantised format; the message names it.
        CheckpointError: the folder cannot be read.
    """
    directory = Path(directory)
    gguf = directory if directory.suffix == ".gguf" else next(directory.glob("*.gguf"), None)
    if gguf and not any(directory.glob("*.safetensors")):
        raise _refused(gguf, "GGUF")
    reader = CheckpointReader(directory)
    quantization = reader.config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method == "bitsandbytes" and quantization.get("load_in_8bit"):
        raise _refused(directory, "bitsandbytes 8-bit")
    if any(".weight.quant_state.bitsandbytes__" in name for name in reader.names):
        return "bitsandbytes"
    if any(name.endswith(".tables") for name in reader.names):
        return "original"
    if method == "flute":
        return "flute"
    if method:
        raise _refused(directory, str(method))
    for suffix, name in _FOREIGN_SUFFIXES.items():
        if any(tensor.endswith(suffix) for tensor in reader.names):
            raise _refused(directory, name)
    return "dense"


def _refused(path: Path, name: str) -> UnsupportedProblemError:
    return UnsupportedProblemError(
        f"`{path}` is a {name} checkpoint, which cannot be converted. Convertible are "
        "bitsandbytes 4-bit and original FLUTE checkpoints; otherwise quantise the dense model: "
        "`flute quantize`."
    )


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    tile: int | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    revision: str | None = None,
) -> Conversion:
    """Convert a bitsandbytes 4-bit or original FLUTE checkpoint into a new folder.

    The same codes, tables and scales in this package's format. Repeated after a kill, it goes on
    where it stopped.

    Args:
        source: a folder with config.json and safetensors, or the name of a model on the Hub.
        destination: the folder to create.
        tile: original FLUTE: 32 or 64, for layers whose data don't tell it.
        requantize: bitsandbytes: choose new codes for layers whose blocks no group can hold.
        overwrite: replace a folder that exists.
        progress: told about finished layers.
        revision: branch, tag or commit of a model on the Hub.

    Raises:
        UnsupportedProblemError: another format, or a layer that cannot be converted; it is named.
        FormatError: tensors that contradict each other or the model.
        CheckpointError: the source cannot be read, or the destination not written.
    """
    directory = find_source(source, revision)
    kind = detect_format(directory)
    if kind not in CONVERTIBLE:
        advice = {
            "flute": "is a FLUTE checkpoint already: load it as it is.",
            "dense": "is not quantised: quantise it with `flute quantize`.",
        }
        raise UnsupportedProblemError(f"`{directory}` {advice[kind]}")
    check_apart(directory, destination)
    reader = CheckpointReader(directory)
    foreign: _ForeignCheckpoint
    if kind == "bitsandbytes":
        foreign = BitsandbytesCheckpoint(reader, requantize=requantize)
    else:
        foreign = OriginalCheckpoint(reader, tile=tile)
    config = _name_modules(reader, foreign)
    job = {"config": config.to_dict(), "tile": tile, "requantize": requantize}
    card = model_card(str(source), config, foreign.shapes)
    written = write_checkpoint(
        destination,
        list(_units(reader, foreign)),
        read_side_files(directory)
        | {"config.json": model_config_json(reader.config, config), "README.md": card.encode()},
        {**fingerprint(reader), **job},
        overwrite=overwrite,
        progress=progress,
    )
    return Conversion(kind, config, foreign.shapes, written)


def _name_modules(reader: CheckpointReader, foreign: _ForeignCheckpoint) -> CheckpointConfig:
    """Return the config in the model's own module names, the linears left dense included.

    Raises:
        UnsupportedProblemError: a converted layer is no `nn.Linear` of the model.
        FormatError: it has another shape there.
        CheckpointError: a linear of the model is in no file.
    """
    model = meta_model(reader.directory, reader.config)
    kind = type(model).__name__
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = match_names(model, reader.names)
    for layer, shape in foreign.shapes.items():
        linear = linears.get(names.get(f"{layer}.weight", ""))
        if linear is None:
            raise UnsupportedProblemError(
                f"`{layer}` is no nn.Linear of {kind}; only such layers can be replaced."
            )
        if (linear.out_features, linear.in_features) != tuple(shape):
            raise FormatError(
                f"`{layer}.weight` is {tuple(shape)}; {kind} expects "
                f"{(linear.out_features, linear.in_features)}."
            )
    modules = {layer: names[f"{layer}.weight"] for layer in foreign.shapes}
    dense = [name for name in linears if name not in set(modules.values())]
    tied = {key.removesuffix(".weight") for key in getattr(model, "all_tied_weights_keys", {})}
    missing = sorted(set(dense) - set(names.values()) - tied)
    if missing:
        raise CheckpointError(
            f"{len(missing)} layers of {kind} have no weight in `{reader.directory}`, such as "
            f"`{missing[0]}.weight`. The checkpoint is incomplete, or of another architecture."
        )
    overrides = {modules[layer]: spec for layer, spec in foreign.config.overrides.items()}
    head = output_head(model)
    return replace(
        foreign.config,
        modules_to_not_convert=tuple(dense),
        overrides=overrides,
        quantized_head=head if head in modules.values() else "",
    )


def _units(reader: CheckpointReader, foreign: _ForeignCheckpoint) -> Iterator[Unit]:
    for name in reader.names:
        layer = name.removesuffix(".weight")
        if layer != name and layer in foreign.shapes:
            N, K = foreign.shapes[layer]
            outputs = output_tensors(layer, N, K, foreign.config.spec_of(layer), foreign.config)
            yield Unit(layer, outputs, partial(_produce, foreign, layer), N * K)
        elif name not in foreign.consumed:
            output = OutputTensor(name, reader.dtype(name), reader.shape(name))
            yield Unit(name, (output,), partial(copy_rows, reader, name), 0)


def _produce(foreign: _ForeignCheckpoint, layer: str) -> Iterator[tuple[str, Tensor]]:
    weight = foreign.weight(layer)
    yield f"{layer}.codes", pack_codes(weight.codes, weight.spec.num_bits)
    yield f"{layer}.scales", weight.scales
    yield f"{layer}.table", weight.table
