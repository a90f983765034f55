"""Group sizes that divide the rows of layers, where the one that was asked for does not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from flute.errors import FormatError
from flute.format import GROUP_SIZES, WHOLE_ROW


def fit_groups(shapes: Mapping[str, tuple[int, int]], group_size: int) -> dict[str, dict[str, int]]:
    """Return overrides, name -> {"group_size": ...}, of layers that take a smaller group; warn.

    Args:
        shapes: full name of each layer -> (N, K).
        group_size: asked for.

    Raises:
        FormatError: a layer that no group fits; the message names every such layer.
    """
    if group_size == WHOLE_ROW:
        return {}
    ragged = {name: K for name, (_, K) in shapes.items() if K % group_size}
    fits = {
        name: max((g for g in GROUP_SIZES if g < group_size and K % g == 0), default=0)
        for name, K in ragged.items()
    }
    refused = [f"`{name}` (K={ragged[name]})" for name, group in fits.items() if not group]
    if refused:
        raise FormatError(
            f"No group of 32 .. {group_size} weights divides the rows of {len(refused)} layers: "
            f"{', '.join(refused[:8])}{', ...' if len(refused) > 8 else ''}. Use one scale per row "
            f"(group size {WHOLE_ROW}), or skip these layers."
        )
    if fits:
        named = [f"`{name}` (K={ragged[name]}: {group})" for name, group in fits.items()]
        warnings.warn(
            f"group_size={group_size} does not divide the rows of {len(fits)} layers; they take "
            f"smaller groups: {', '.join(named[:4])}{', ...' if len(named) > 4 else ''}",
            stacklevel=4,
        )
    return {name: {"group_size": group} for name, group in fits.items()}


def head_group(name: str, shape: tuple[int, int], group_size: int) -> int:
    """Return the group size of an output head: that asked for, or a smaller one with a warning.

    Args:
        name: of the head.
        shape: (N, K): vocabulary, hidden size.
        group_size: asked for.

    Raises:
        FormatError: no group divides its rows.
    """
    try:
        fitted = fit_groups({name: shape}, group_size)
    except FormatError as error:
        raise FormatError(
            f"No group of 32 .. {group_size} weights divides the K={shape[1]} input features of "
            f"the output head `{name}`. Use one scale per row for it (`head_group_size` "
            f"{WHOLE_ROW}, `--head-group-size row`), or leave it dense (no `--head-bits`)."
        ) from error
    return fitted.get(name, {}).get("group_size", group_size)
