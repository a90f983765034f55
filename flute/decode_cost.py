"""How long a decode kernel takes, roughly: what candidates are ordered by where nothing was tuned.

A sum of terms (`terms`), each with a coefficient that is fitted per family of kernels to what
`flute tune` timed on an H200, fp16, groups of 128, 2 to 4 bits, 1 to 8 tokens
(`benchmarks/fit_decode.py`, from `benchmarks/results/rule_h200.json`). The width of codes enters by
the bytes alone: a lookup costs the same at each.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from flute.config import Plan
from flute.kernel_order import CHUNK_K, TILE_N, padded_k

COEFFICIENTS = Path(__file__).parent / "data" / "decode_cost.json"
TERMS = (
    "start",
    "longest warp",
    "memory",
    "tokens",
    "x",
    "tile blocks",
    "narrow table",
    "phases",
    "rounds of 1 tile",
    "rounds of 2 tiles",
    "rounds of 4 tiles or more",
    "tiles",
)
"""What coefficients belong to, in the order of `terms`; the file names them too."""


def _up(a: int, b: int) -> int:
    return -(-a // b)


def terms(plan: Plan, m: int, n: int, k: int, num_sms: int) -> tuple[float, ...]:
    """Return the size of each of `TERMS`, such that coefficients are about microseconds.

    Args:
        plan: a kernel and how it is launched.
        m: tokens.
        n: output features.
        k: input features.
        num_sms: multiprocessors.
    """
    c = plan.config
    chunks = padded_k(k) // CHUNK_K
    clusters = num_sms * plan.blocks_per_sm // c.cluster
    tiles = _up(_up(n, TILE_N), clusters)  # of the cluster that has most
    tile_blocks = _up(tiles, c.tiles)
    rounds = _up(_up(chunks, c.panel * c.cluster), c.num_warps)
    work = tiles * chunks / c.cluster * plan.blocks_per_sm / 64  # of a multiprocessor
    scale_bits = 16 / c.group_size if c.group_size else 0.0
    return (
        1.0,
        tiles * rounds * c.panel / 4,
        n * k * (c.num_bits + scale_bits) / 8 / 4.8e6,  # us at 4.8 TB/s
        (m - 1) / 7 * work,
        m * k / 1e4 / c.cluster,
        float(tile_blocks),
        0.0 if c.wide_table else work,
        float(plan.phases - 1),
        rounds * tile_blocks if c.tiles == 1 else 0.0,
        rounds * tile_blocks if c.tiles == 2 else 0.0,
        rounds * tile_blocks if c.tiles >= 4 else 0.0,
        float(tiles),
    )


def family(plan: Plan) -> str:
    """Return the family that a kernel's coefficients are looked up by."""
    c = plan.config
    return (
        f"{c.num_warps} warps, {c.min_blocks} blocks fit, {plan.blocks_per_sm} of a launch, "
        f"x {c.x_source}, panel {c.panel}, cluster {c.cluster}"
    )


@lru_cache(1)
def coefficients() -> dict[str, tuple[float, ...]]:
    """Return family -> a coefficient per term."""
    families = json.loads(COEFFICIENTS.read_text())["families"]
    return {name: tuple(one.get(term, 0.0) for term in TERMS) for name, one in families.items()}


def predicted_us(plan: Plan, m: int, n: int, k: int, num_sms: int) -> float:
    """Return roughly how long a plan takes; infinity if its family was not timed.

    Args:
        plan: a kernel and how it is launched.
        m: tokens, 1 to 8.
        n: output features.
        k: input features.
        num_sms: multiprocessors.
    """
    found = coefficients().get(family(plan))
    if found is None:
        return float("inf")
    return sum(c * t for c, t in zip(found, terms(plan, m, n, k, num_sms), strict=True))
