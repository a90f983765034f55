"""Checkpoints of the original FLUTE on disk; `flute.integrations.original` has the layout."""

from __future__ import annotations

from collections import Counter

import torch

from flute.checkpoint import CheckpointReader, read_json
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import SCALE_DTYPES, WHOLE_ROW, CheckpointConfig, QuantizedWeight, QuantSpec
from flute.integrations.original import from_original, layer_spec, possible_tiles
from flute.tables import TABLES, get_table

CONFIG_NAME = "flute_config.json"


class OriginalCheckpoint:
    """The linears of an original FLUTE checkpoint on disk, converted one at a time.

    Args:
        reader: the checkpoint.
        tile: as in `from_original`.

    Attributes:
        shapes: layer name on disk -> (N, K).
        config: what the converted checkpoint will say, but for the names of dense layers.
        consumed: names of the tensors that the converted layers replace.

    Raises:
        UnsupportedProblemError: no such layer.
        FormatError: shapes that contradict each other, the layout or flute_config.json.
        CheckpointError: a tensor is missing.
    """

    def __init__(self, reader: CheckpointReader, *, tile: int | None = None) -> None:
        self._reader, self._tile = reader, tile
        names = set(reader.names)
        layers = sorted(n.removesuffix(".tables") for n in names if n.endswith(".tables"))
        if not layers:
            raise UnsupportedProblemError(
                f"`{reader.directory}` has no tensor `<layer>.tables`: it holds no layer of the "
                "original FLUTE."
            )
        missing = [
            f"{n}.{k}" for n in layers for k in ("weight", "scales") if f"{n}.{k}" not in names
        ]
        if missing:
            raise CheckpointError(f"`{reader.directory}` lacks `{missing[0]}`. Download it again.")
        parts = ("weight", "scales", "tables", "tables2", "_extra_state")
        self.consumed = frozenset(f"{name}.{part}" for name in layers for part in parts) & names
        specs = {name: self._layer_spec(name) for name in layers}
        self.shapes = {
            name: (reader.shape(f"{name}.scales")[0], reader.shape(f"{name}.weight")[1])
            for name in layers
        }
        common = Counter(specs.values()).most_common(1)[0][0]
        self._check_config(common)
        self.config = CheckpointConfig(
            num_bits=common.num_bits,
            group_size=common.group_size,
            method="original",
            table=self._table_name(specs),
            scale_dtype=self._scale_dtype(layers),
            overrides={
                name: {"num_bits": spec.num_bits, "group_size": spec.group_size}
                for name, spec in specs.items()
                if spec != common
            },
        )

    def _layer_spec(self, name: str) -> QuantSpec:
        """The spec by shapes alone; no weight is read."""
        parts = [f"{name}.{part}" for part in ("weight", "scales", "tables")]
        empty = [
            torch.empty(self._reader.shape(part), dtype=self._reader.dtype(part), device="meta")
            for part in parts
        ]
        try:
            spec = layer_spec(*empty)
            possible_tiles(empty[0], spec.num_bits)
        except FormatError as error:
            raise FormatError(f"`{name}`: {error}") from error
        return spec

    def _check_config(self, common: QuantSpec) -> None:
        path = self._reader.directory / CONFIG_NAME
        if not path.exists():
            return
        config = read_json(path)
        for key, found in (("num_bits", common.num_bits), ("group_size", common.group_size)):
            if found != WHOLE_ROW and config.get(key, found) != found:
                raise FormatError(
                    f"`{path}` says {key}={config[key]}, but the tensors are of {key}={found}. "
                    "The folder mixes two models; download it again."
                )

    def _scale_dtype(self, layers: list[str]) -> str:
        dtypes = {self._reader.dtype(f"{name}.scales") for name in layers}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return next(name for name, known in SCALE_DTYPES.items() if known == dtype)

    def _table_name(self, specs: dict[str, QuantSpec]) -> str:
        """The family whose entries, rounded to the stored dtype, are those of every layer."""
        tables = [(self._reader.tensor(f"{n}.tables"), spec.num_bits) for n, spec in specs.items()]
        for family in TABLES:
            if all(torch.equal(t, get_table(family, b)[0].to(t.dtype)) for t, b in tables):
                return family
        return "custom"

    def weight(self, name: str) -> QuantizedWeight:
        """Read and convert the weight of a layer; memory holds that layer only."""
        weight, scales, tables = (
            self._reader.tensor(f"{name}.{part}") for part in ("weight", "scales", "tables")
        )
        scales = scales.to(SCALE_DTYPES[self.config.scale_dtype])
        return from_original(weight, scales, tables, tile=self._tile, name=name)
