"""Join matrices along N: one weight of several, and the fewest tables that say the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flute.errors import FormatError
from flute.format import PackedWeight, table_per_row
from flute.launchers import takes_ranges


def concat_weights(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Return one weight whose rows are those of several, one after the other.

    Args:
        weights: as stored, of the same K, spec, dtype of the scales, and device.

    Raises:
        FormatError: they differ in one of these, or there are none.
    """
    if not weights:
        raise FormatError("There are no layers to join; expected at least one.")
    first = _traits(weights[0])
    for i, weight in enumerate(weights):
        for (name, value), expected in zip(_traits(weight).items(), first.values(), strict=True):
            if value != expected:
                raise FormatError(
                    f"Layer {i} has {name} {value}, layer 0 {expected}; expected the same to join "
                    "them."
                )
    table, ends = _join_tables([weight for weight in weights if weight.N] or weights[:1])
    return PackedWeight(
        torch.cat([weight.packed for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        table,
        weights[0].spec,
        sum(weight.N for weight in weights),
        weights[0].K,
        ends,
    )


def _traits(weight: PackedWeight) -> dict[str, object]:
    return {
        "K": weight.K,
        "spec": weight.spec,
        "scales of": weight.scales.dtype,
        "codes on": weight.packed.device,
    }


def _join_tables(weights: Sequence[PackedWeight]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the table, and where its ranges of rows end, if there are any."""
    tables: list[Tensor] = []
    ends: list[int] = []
    start = 0
    for weight in weights:
        for table, end in zip(weight.table, weight.table_ends or (weight.N,), strict=False):
            # Equal bit for bit: a table with -0.0 gives other bits than one with 0.0.
            if tables and torch.equal(tables[-1].view(torch.int32), table.view(torch.int32)):
                ends[-1] = start + end
            else:
                tables.append(table)
                ends.append(start + end)
        start += weight.N
    if not any(weight.has_row_tables for weight in weights):
        if len(tables) == 1:
            return tables[0][None].clone(), ()
        if takes_ranges(tuple(ends)):
            return torch.stack(tables), tuple(ends)
    per_row = [
        w.table if w.has_row_tables else table_per_row(w.table, w.table_ends or (w.N,))
        for w in weights
    ]
    return torch.cat(per_row), ()
