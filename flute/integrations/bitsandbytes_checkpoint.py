"""bitsandbytes 4-bit checkpoints on disk: their tensors, parsed without bitsandbytes.

    <layer>.weight                                        packed codes
    <layer>.weight.absmax                                 fp32, or uint8 if double quantised
    <layer>.weight.quant_map                              the table
    <layer>.weight.nested_absmax, .nested_quant_map       if double quantised
    <layer>.weight.quant_state.bitsandbytes__nf4 (__fp4)  JSON as uint8: shape, blocksize, dtype

`flute.integrations.bitsandbytes` says how they make up a weight.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flute.checkpoint import CheckpointReader
from flute.errors import CheckpointError, UnsupportedProblemError
from flute.format import SCALE_DTYPES, CheckpointConfig, QuantizedWeight
from flute.integrations.bitsandbytes import (
    check_group_size,
    exact_group_size,
    finest_group_size,
    from_quant_state,
    storable_dtype,
    unnest_absmax,
)
from flute.tables import TABLES, get_table

QUANT_TYPES = ("nf4", "fp4")
_STATE_KEY = ".weight.quant_state.bitsandbytes__"
_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
"""Tensors of a layer after `<layer>.weight`; the last two only where absmax is quantised too."""


@dataclass(frozen=True)
class QuantState:
    """What bitsandbytes stores beside the tensors of one weight.

    Args:
        shape: (N, K).
        blocksize: consecutive elements per absmax.
        dtype: of the weight before quantisation, and of bitsandbytes' result.
        nested_blocksize: absmax values per nested_absmax; 0 if absmax is not quantised.
        nested_offset: added to the un-nested absmax.
    """

    shape: tuple[int, int]
    blocksize: int
    dtype: torch.dtype
    nested_blocksize: int = 0
    nested_offset: float = 0.0


class BitsandbytesCheckpoint:
    """The 4-bit layers of a bitsandbytes checkpoint on disk, converted one at a time.

    Args:
        reader: the checkpoint.
        requantize: as in `from_quant_state`, for layers that no group fits.

    Attributes:
        shapes: layer name on disk -> (N, K).
        config: what the converted checkpoint will say, but for the names of dense layers.
        consumed: names of the tensors that the converted layers replace.

    Raises:
        UnsupportedProblemError: no 4-bit layer, a weight that is no matrix, or layers that no group
            fits (named).
        CheckpointError: a tensor is missing or its quantisation state is not readable.
    """

    def __init__(self, reader: CheckpointReader, *, requantize: bool = False) -> None:
        self._reader, self._requantize = reader, requantize
        self._states: dict[str, QuantState] = {}
        names = set(reader.names)
        keys = sorted(name for name in names if _STATE_KEY in name)
        for key in keys:
            layer, _, quant_type = key.rpartition(_STATE_KEY)
            state = _read_quant_state(reader, key, layer, quant_type)
            needed = [
                f"{layer}.weight{part}" for part in _PARTS[: 5 if state.nested_blocksize else 3]
            ]
            missing = [name for name in needed if name not in names]
            if missing:
                raise CheckpointError(
                    f"`{reader.directory}` lacks `{missing[0]}`, which `{key}` needs."
                )
            self._states[layer] = state
        if not self._states:
            raise UnsupportedProblemError(
                f"`{reader.directory}` has no tensor `<layer>{_STATE_KEY}nf4` (or fp4): it holds "
                "no 4-bit layer of bitsandbytes."
            )
        self.shapes = {layer: state.shape for layer, state in self._states.items()}
        self.consumed = frozenset(keys) | {f"{n}.weight{p}" for n in self._states for p in _PARTS}
        self.config = self._plan()

    def _plan(self) -> CheckpointConfig:
        sizes, refused = {}, []
        for name, state in self._states.items():
            K, exact = state.shape[1], exact_group_size(state.shape[1], state.blocksize)
            sizes[name] = exact or finest_group_size(K)
            refused += [name] if exact is None else []
        if refused and not self._requantize:
            self._refuse(refused)
        group_size = Counter(sizes.values()).most_common(1)[0][0]
        return CheckpointConfig(
            num_bits=4,
            group_size=group_size,
            method="bitsandbytes",
            table=self._table_name(),
            scale_dtype=self._scale_dtype(),
            overrides={n: {"group_size": g} for n, g in sizes.items() if g != group_size},
        )

    def _refuse(self, layers: list[str]) -> None:
        state = self._states[layers[0]]
        group = finest_group_size(state.shape[1])
        try:
            check_group_size(group, state.shape[1], state.blocksize, f"{layers[0]}.weight")
        except UnsupportedProblemError as error:
            others = f" {len(layers) - 1} more layers: {', '.join(layers[1:8])}."
            raise UnsupportedProblemError(f"{error}{others if layers[1:] else ''}") from None

    def _scale_dtype(self) -> str:
        """The layers' own dtype if it holds every absmax of every layer, else fp32."""
        own = {
            torch.float32
            if state.nested_blocksize
            else storable_dtype(self._reader.tensor(f"{name}.weight.absmax"), state.dtype)
            for name, state in self._states.items()
        }
        dtype = own.pop() if len(own) == 1 else torch.float32
        return next(name for name, known in SCALE_DTYPES.items() if known == dtype)

    def _table_name(self) -> str:
        maps = [self._reader.tensor(f"{name}.weight.quant_map").float() for name in self._states]
        for family in TABLES:
            if all(torch.equal(entries, get_table(family, 4)[0]) for entries in maps):
                return family
        return "custom"

    def weight(self, name: str) -> QuantizedWeight:
        """Read and convert the weight of a layer; memory holds that layer only."""
        state, prefix = self._states[name], f"{name}.weight"
        absmax = self._reader.tensor(f"{prefix}.absmax")
        if state.nested_blocksize:
            absmax = unnest_absmax(
                absmax,
                self._reader.tensor(f"{prefix}.nested_absmax"),
                self._reader.tensor(f"{prefix}.nested_quant_map"),
                state.nested_blocksize,
                state.nested_offset,
                name=prefix,
            )
        return from_quant_state(
            self._reader.tensor(prefix),
            absmax,
            self._reader.tensor(f"{prefix}.quant_map"),
            state.shape,
            state.blocksize,
            group_size=self.config.spec_of(name).group_size,
            scale_dtype=SCALE_DTYPES[self.config.scale_dtype],
            requantize=self._requantize,
            name=prefix,
        )


def _read_quant_state(
    reader: CheckpointReader, key: str, layer: str, quant_type: str
) -> QuantState:
    if quant_type not in QUANT_TYPES:
        raise UnsupportedProblemError(
            f"`{key}`: quantisation type {quant_type!r}; expected one of {QUANT_TYPES}."
        )
    try:
        content: Mapping[str, Any] = json.loads(bytes(reader.tensor(key).tolist()))
        state = QuantState(
            tuple(content["shape"]),
            int(content["blocksize"]),
            SCALE_DTYPES[content["dtype"]],
            int(content.get("nested_blocksize", 0)),
            float(content.get("nested_offset", 0.0)),
        )
        if state.blocksize < 1:
            raise ValueError(f"blocksize {state.blocksize}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"`{key}` in `{reader.directory}` is no quantisation state of bitsandbytes "
            f"({type(error).__name__}: {error}). Download the checkpoint again."
        ) from error
    if len(state.shape) != 2:
        raise UnsupportedProblemError(
            f"`{layer}.weight` has shape {state.shape}; only matrices are converted."
        )
    return state
