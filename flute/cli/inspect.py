"""`flute inspect`: what a checkpoint holds, layer by layer."""

from __future__ import annotations

import argparse
from typing import Any

from flute.checkpoint import CheckpointReader
from flute.console import add_json, megabytes, print_json, print_table
from flute.errors import FormatError
from flute.format import TENSOR_NAMES, WHOLE_ROW, CheckpointConfig, PackedWeight, QuantSpec

_EPILOG = """\
bits/weight counts codes, scales and table. The error is ||dense - quantised||^2 / ||dense||^2, and
needs the dense model beside it. Every tensor is checked against its checksum.

examples:
  flute inspect OUT
  flute inspect OUT --dense MODEL        with the error of each layer
  flute inspect MODEL                    what `flute quantize MODEL` would quantise
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show bits, groups, tables, sizes and errors of a checkpoint",
        description="Show what a checkpoint holds, layer by layer, and verify its checksums.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="folder of a dense or quantised checkpoint, or a name on the Hub"
    )
    parser.add_argument("--dense", metavar="MODEL", help="the model it was quantised from")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the layers."""
    from flute.checkpoint import verify_checksums
    from flute.stream import find_source

    reader = CheckpointReader(find_source(args.model))
    if "quantization_config" not in reader.config:
        if args.dense:
            raise FormatError(f"`{args.model}` is not quantised: `--dense` has nothing to compare.")
        return _inspect_dense(args, reader)
    config = CheckpointConfig.from_dict(reader.config["quantization_config"])
    verified = verify_checksums(reader.directory)
    dense = _open_dense(args.dense, config) if args.dense else None
    layers = [
        _describe(reader, name.removesuffix(".codes"), config, dense)
        for name in reader.names
        if name.endswith(".codes")
    ]
    total = sum(map(reader.num_bytes, reader.names))
    if args.json:
        content = {"config": config.to_dict(), "layers": layers, "bytes": total}
        print_json({**content, "checksums_verified": verified})
        return 0
    columns = ["layer", "N x K", "bits", "group", "table", "bits/weight", "size"]
    columns += ["error"] if dense else []
    print_table(
        f"{args.model}: {len(layers)} quantised layers, method {config.method}, "
        f"{megabytes(total)} in all",
        columns,
        [_row(layer) for layer in layers],
        f"{verified} tensors agree with their checksums"
        if verified
        else "no checksums are recorded in this checkpoint",
    )
    return 0


def _open_dense(source: str, config: CheckpointConfig) -> CheckpointReader:
    """Open the dense model; a head that it ties to its embedding is read as a tensor of its own."""
    from flute.architecture import meta_model
    from flute.stream import find_source, untie_reader

    reader = CheckpointReader(find_source(source))
    if config.quantized_head:
        untie_reader(reader, meta_model(reader.directory, reader.config), config.quantized_head)
    return reader


def _describe(
    reader: CheckpointReader, layer: str, config: CheckpointConfig, dense: CheckpointReader | None
) -> dict[str, Any]:
    # Why: config.json has transformers' names, and Mixtral's files call a block otherwise.
    spec = config.spec_of(layer.replace(".block_sparse_moe.", ".mlp."))
    N, num_groups = reader.shape(f"{layer}.scales")
    K = _num_columns(reader, layer, spec, num_groups, dense)
    codes = reader.shape(f"{layer}.codes")
    if codes != (N, spec.num_words(K)):
        raise FormatError(
            f"`{layer}.codes` has shape {codes}; expected {(N, spec.num_words(K))} for scales of "
            f"shape {(N, num_groups)} and {spec}. The files and their config.json do not belong "
            "together."
        )
    num_bytes = sum(reader.num_bytes(f"{layer}.{part}") for part in TENSOR_NAMES)
    rows = reader.shape(f"{layer}.table")[0]
    info = {
        "layer": layer,
        "shape": [N, K],
        "num_bits": spec.num_bits,
        "group_size": spec.group_size,
        "table": config.table + (f" x {rows} rows" if rows > 1 else ""),
        "scale_dtype": str(reader.dtype(f"{layer}.scales")).removeprefix("torch."),
        "bits_per_weight": 8 * num_bytes / (N * K),
        "bytes": num_bytes,
    }
    if dense:
        info["error"] = _error(reader, layer, spec, K, dense)
    return info


def _num_columns(
    reader: CheckpointReader,
    layer: str,
    spec: QuantSpec,
    num_groups: int,
    dense: CheckpointReader | None,
) -> int:
    """K of a layer; with one scale per row, only the dense weight tells a ragged K."""
    if spec.group_size != WHOLE_ROW:
        return num_groups * spec.group_size
    if dense:
        return dense.shape(f"{layer}.weight")[1]
    return reader.shape(f"{layer}.codes")[1] * 32 // spec.num_bits


def _error(
    reader: CheckpointReader, layer: str, spec: QuantSpec, K: int, dense: CheckpointReader
) -> float:
    import torch

    from flute.evaluate import relative_error
    from flute.reference import dequantize_packed

    name = f"{layer}.weight"
    if name not in dense.names:
        raise FormatError(f"`{dense.directory}` has no `{name}`: it is another model.")
    shape = reader.shape(f"{layer}.codes")[0], K
    if dense.shape(name) != shape:
        raise FormatError(
            f"`{name}` has shape {dense.shape(name)} in `{dense.directory}`, and {shape} in "
            f"`{reader.directory}`: it is another model."
        )
    codes, scales, table = (reader.tensor(f"{layer}.{part}") for part in TENSOR_NAMES)
    packed = PackedWeight(codes, scales, table, spec, codes.shape[0], K)
    return relative_error(dense.tensor(name), dequantize_packed(packed, torch.float32))


def _row(layer: dict[str, Any]) -> list[str]:
    group = "row" if layer["group_size"] == WHOLE_ROW else str(layer["group_size"])
    cells = [
        layer["layer"],
        f"{layer['shape'][0]} x {layer['shape'][1]}",
        str(layer["num_bits"]),
        group,
        layer["table"],
        f"{layer['bits_per_weight']:.3f}",
        megabytes(layer["bytes"]),
    ]
    return cells + ([f"{layer['error']:.5f}"] if "error" in layer else [])


def _inspect_dense(args: argparse.Namespace, reader: CheckpointReader) -> int:
    from flute.model import QuantizeOptions
    from flute.stream import plan_checkpoint

    plan = plan_checkpoint(reader.directory, QuantizeOptions())
    shapes, dense = plan.model_plan.shapes, plan.model_plan.dense
    total = sum(map(reader.num_bytes, reader.names))
    if args.json:
        layers = [{"layer": name, "shape": list(shape)} for name, shape in shapes.items()]
        print_json({"config": None, "layers": layers, "dense": dict(dense), "bytes": total})
        return 0
    rows = [[name, f"{N} x {K}", "would be quantised"] for name, (N, K) in shapes.items()]
    rows += [[name, "", f"stays dense: {why}"] for name, why in dense.items()]
    print_table(f"{args.model}: dense, {megabytes(total)}", ["layer", "N x K", ""], rows)
    return 0
