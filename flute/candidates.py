"""Choose a decode kernel for a problem: the plans worth timing, and the one to use untimed.

Owns the candidates and the heuristic, which is their order; `flute.config.supports` is the only
filter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flute.config import Gpu, KernelConfig, Plan, Problem, supports
from flute.decode_cost import predicted_us
from flute.errors import UnsupportedProblemError
from flute.kernel_order import CHUNK_K, TILE_N, padded_k

TIMED = 12
"""So many of the first candidates are put in order by the model of their time, which was fitted to
as many: further down it would choose kernels of sizes that nobody has timed."""
GAIN, GAIN_TIGHT = 0.96, 0.92
"""The rule's own choice stays first unless the model finds one that takes less than this of its
time: its error is 4 % in the mean; groups of 32 and 64 were not timed for it."""
Changes = tuple[int, dict[str, Any]]
"""Blocks per SM, and the fields of `KernelConfig` that differ from its defaults."""


def candidates(problem: Problem, gpu: Gpu) -> list[Plan]:
    """Return the plans worth timing for a problem, the likeliest first; all satisfy `supports`.

    Args:
        problem: of 1 to 32 tokens.
        gpu: where it will run.
    """
    num_bits, group_size, dtype, scale_dtype, row_tables, m, n, k = problem
    base = KernelConfig(
        num_bits=num_bits,
        group_size=group_size,
        dtype=dtype,
        scale_dtype=scale_dtype,
        row_tables=row_tables,
        block_tokens=-(-m // 8) * 8,
        bulk=gpu.has_bulk_copies,
    )
    plans: list[Plan] = []
    for blocks_per_sm, changes in (
        *_preferred(problem, gpu),
        *_variations(num_bits, group_size, m, gpu),
    ):
        config = replace(base, **changes)
        if num_bits != 3 and m <= 8 and not row_tables and "register_steps" not in changes:
            # M = 1, 57344 x 8192, 2 bits: 48.1 us without, 42.9; all in registers 55.7. 4096 x
            # 14336, 4 bits: 10.8 us without, 10.4.
            narrow = replace(config, register_steps=2 if num_bits == 2 else 0)
            wide = replace(narrow, wide_table=True)
            limit = (gpu.smem_bytes // 2 - 1024) if config.min_blocks == 2 else gpu.smem_bytes
            config = wide if wide.smem_bytes(m, k) <= limit else narrow
        if row_tables and config.register_steps:
            continue
        if (
            config.tiles > 1
            and n / TILE_N / gpu.num_sms < 0.6 * config.tiles * blocks_per_sm / config.cluster
        ):
            continue
        if row_tables and num_bits == 4 and config.tiles > 1:  # a tile's tables take 64 KB
            continue
        if config.min_blocks == 2 and config.smem_bytes(m, k) > gpu.smem_bytes // 2 - 1024:
            config, blocks_per_sm = replace(config, min_blocks=1), 1
        panels = -(-padded_k(k) // (CHUNK_K * config.panel) // config.cluster)
        phases = (
            -(-panels // (config.num_warps * config.x_rounds))
            if config.x_source == "registers"
            else 1
        )
        plan = Plan(replace(config, phased=phases > 1), phases, blocks_per_sm)
        if plan not in plans and not supports(plan, m, n, k, gpu):
            plans.append(plan)
    modelled = m <= 8 and not row_tables and gpu.arch == "sm_90a"
    return _by_model(plans, problem, gpu) if modelled else plans


def _by_model(plans: list[Plan], problem: Problem, gpu: Gpu) -> list[Plan]:
    """Return plans with the first dozen in the order of the model's times, but for close calls."""
    first = [plan for plan in plans[:TIMED] if not _spills(plan.config)]
    if not first:
        return plans
    m, n, k = problem[-3:]
    us = {plan: predicted_us(plan, m, n, k, gpu.num_sms) for plan in first}
    own = first[0]
    first.sort(key=lambda plan: us[plan])  # stable
    gain = GAIN_TIGHT if 0 < problem.group_size < 128 else GAIN
    if us[first[0]] > us[own] * gain:
        first.remove(own)
        first.insert(0, own)
    return first + [plan for plan in plans if plan not in first]


def _spills(config: KernelConfig) -> bool:
    """Whether NVRTC 13 leaves registers of a kernel for up to 8 tokens in memory (sm_90a)."""
    c = config
    if c.num_warps == 16 and c.min_blocks == 2:  # 64 registers
        return c.x_source == "streamed" or c.tiles == 4
    if c.panel == 8:
        many = 0 < c.group_size < 128 and (c.num_bits == 4 or c.phased)
        return many or (c.num_bits == 4 and c.tiles == 4)
    kept = c.x_source == "registers" and c.tiles == 4 and c.x_rounds == 2
    return kept and (c.num_bits, c.group_size) == (4, 64) and (c.phased or c.num_warps == 8)


def heuristic(problem: Problem, gpu: Gpu) -> Plan:
    """Return the plan to use where nothing was tuned: the first candidate.

    Raises:
        UnsupportedProblemError: no kernel serves the problem on this GPU.
    """
    plans = candidates(problem, gpu)
    if not plans:
        raise UnsupportedProblemError(
            f"No decode kernel for {problem} on {gpu}. `flute.lut_gemm` dequantises instead."
        )
    return plans[0]


def _preferred(problem: Problem, gpu: Gpu) -> list[Changes]:
    """What won on an H200 (fp16, group 128, 2026-11-22), by the problem's shape."""
    num_bits, group_size, _, _, row_tables, m, n, k = problem
    tiles_per_sm = n / TILE_N / gpu.num_sms
    wide = {"num_warps": 16, "min_blocks": 1}
    kept = {"x_source": "registers"}
    tiles = 4 if tiles_per_sm > 2 else 2 if tiles_per_sm > 1 else 1
    # Why tight: with more scales some kernels of 4 tiles spill (`_spills` knows which on sm_90a).
    # NVRTC 13.5 spills 4 to 60 bytes on other architectures with two tiles or x of two rounds, or
    # within 128 registers with x streamed.
    tested = gpu.arch == "sm_90a"
    tight = 0 < group_size < 128 or not tested
    kept_tiles = (min(tiles, 2) if tight else tiles) if tested else 1
    kept_rounds = 2 if k > 4096 and tested and not (num_bits == 4 and tight) else 1
    if m <= 8 and row_tables:
        return [
            *_with_row_tables(1 if num_bits == 4 else kept_tiles, tight, kept_rounds),
            *_preferred(problem._replace(row_tables=False), gpu),
        ]
    if m > 16:
        return [
            (
                1,
                {
                    "num_warps": 8,
                    "min_blocks": 1,
                    "panel": 4,
                    "part": 1 if 0 < group_size < 128 else 2,
                    "tiles": 1 if gpu.arch != "sm_90a" else min(tiles, 2),
                    "stages": 2,
                    **kept,
                },
            )
        ]
    if m > 8:
        narrow = {
            "num_warps": 8,
            "min_blocks": 1,
            "panel": 4,
            "x_rounds": 2,
            "part": 2,
            "tiles": tiles,
            "stages": 2,
            **kept,
        }
        pairs = {**wide, "panel": 4, "part": 1, "tiles": min(tiles, 2), "stages": 2, **kept}
        if 0 < group_size < 128:  # 16 warps have 128 registers: too few for that many scales
            return [(1, narrow)]
        return (
            [(1, narrow), (1, pairs)]
            if num_bits == 4 and tiles_per_sm < 8
            else [(1, pairs), (1, narrow)]
        )
    if tested and not tight and k <= 4096:
        found = _short_rows(num_bits, tiles_per_sm, m)
        if found:
            return found
    mixed = {"register_steps": 1, "wide_table": True} if num_bits == 3 and m <= 4 else {}
    if m > 1 and 1 < tiles_per_sm < 2.5 and k > 8192 and tested and not tight:
        # 4096 x 14336, 3 bits, M = 2 / 4 / 8: 10.4 / 11.5 / 13.3 us, as below 11.7 / 12.3 / 13.6.
        long = {**wide, "panel": 4, "tiles": 2, "stages": 2}
        ahead = (1, {**long, "part": 2, "x_source": "streamed"})
        whole = (1, {**long, "part": 4, **(mixed if m <= 2 else {})})
        return [whole, ahead] if m <= {4: 1, 3: 4, 2: 2}[num_bits] else [ahead]
    if m > 1 and tiles_per_sm < 2.5:
        # One tile block: x comes a round ahead of its use, and is never read again.
        return [
            (
                1,
                {
                    "num_warps": 8,
                    "min_blocks": 2 if tested else 1,
                    "panel": 4,
                    "part": 1 if tight else 2,
                    "tiles": 1 if group_size == 64 and num_bits == 4 else min(kept_tiles, 2),
                    "stages": 2,
                    "x_source": "streamed",
                },
            )
        ]
    if tiles_per_sm < 2.5 and k <= 8192:
        # Short: two blocks per SM, so that the next kernel starts under this one.
        return [
            (
                1,
                {
                    "num_warps": 8,
                    "panel": 4,
                    "part": 2 if 0 < group_size < 128 else 4,
                    "tiles": min(tiles, 2),
                    "stages": 4,
                },
            )
        ]
    long_kept = {
        **wide,
        "panel": 4,
        "x_rounds": kept_rounds,
        "part": 1 if tight else 2,
        "tiles": kept_tiles,
        "stages": 2,
        **kept,
    }
    narrow_rows = tiles_per_sm > 4.5 and num_bits == 3 and m <= 2
    if 4096 < k <= 8192 and not tight and (tiles_per_sm > 20 or num_bits == 2 or narrow_rows):
        eight = {**wide, "panel": 8, "part": 2, "stages": 2, **kept, **mixed}
        return [(1, {**eight, "tiles": 2 if num_bits == 4 else 4}), (1, long_kept)]
    mixes = mixed and tested and not tight and k > 4096 and tiles_per_sm < 4.5
    if m == 1 or (mixes and k <= 8192):
        shared = {
            **wide,
            "panel": 4,
            "part": 2 if 0 < group_size < 128 else 4,
            "tiles": 7 if tiles_per_sm > 8 else tiles,
            "stages": 2,
        }
        # 8192 x 8192, M = 1 / 2 / 4: 10.3 / 10.5 / 11.1 us, not mixed 10.4 / 10.8 / 11.6.
        return [(1, {**shared, **mixed}), (1, shared)] if mixes else [(1, shared)]
    if tiles_per_sm < 4.5 and k > 4096:
        streamed = {**long_kept, "x_rounds": 1, "x_source": "streamed"}
        if group_size == 64 and num_bits == 4:  # two tiles spill 8 bytes
            streamed["tiles"] = 1
        return [(1, streamed)]
    return [(1, long_kept)]


def _short_rows(num_bits: int, tiles_per_sm: float, m: int) -> list[Changes]:
    """What `flute tune` found for K of at most 4,096, by how many tiles each multiprocessor has."""
    shared = {"panel": 4, "part": 4, "stages": 2}
    if tiles_per_sm <= 0.5:
        return [(1, {**shared, "num_warps": 16, "min_blocks": 1, "tiles": 1})]
    if m == 1 and 1 < tiles_per_sm <= 2.5:
        # Two blocks of 64 registers: the next kernel waits, with its weights, under this one.
        twins = {"num_warps": 16, "min_blocks": 2, "tiles": 2, "part": 2}
        return [(1, {**shared, **twins, "register_steps": 2 if num_bits == 2 else 0})]
    if tiles_per_sm <= 1 and m <= 4:  # two blocks have half of K each
        return [(1, {**shared, "stages": 3, "num_warps": 8, "tiles": 2, "cluster": 2})]
    if 2.5 < tiles_per_sm < 4.5:
        kept = {"x_source": "registers", "x_rounds": 2, "part": 2}
        return [(1, {**shared, "num_warps": 8, "tiles": 4, **(kept if m > 1 else {})})]
    return []


def _with_row_tables(tiles: int, tight: bool, kept_rounds: int) -> list[Changes]:
    """Two buffers of tables, in as much shared memory as there is."""
    changes = {
        "num_warps": 16,
        "min_blocks": 1,
        "row_buffers": 2,
        "part": 1 if tight else 2,
        "stages": 2,
        "x_source": "registers",
    }
    return [
        (
            1,
            {
                **changes,
                "tiles": min(tiles, most),
                "panel": panel,
                "x_rounds": kept_rounds,
            },
        )
        for most, panel in ((4, 4), (2, 4), (1, 4), (1, 2))
    ]


def _variations(num_bits: int, group_size: int, m: int, gpu: Gpu) -> list[Changes]:
    """Everything else worth a try, for tuning; the last ones fit any GPU."""
    kept = {"x_source": "registers"}
    out: list[Changes] = []
    if m <= 8:
        part = 2 if 0 < group_size < 128 else 4
        for tiles in (4, 2, 1):
            for stages in (2, 3, 4):
                wide = {"num_warps": 16, "min_blocks": 1, "tiles": tiles, "stages": stages}
                pair = {"num_warps": 8, "tiles": tiles, "stages": stages}
                out += [
                    (1, {**wide, "panel": 8, "part": 2, **kept}),
                    (1, {**wide, "panel": 4, "x_rounds": 2, "part": 2, **kept}),
                    (1, {**wide, "panel": 4, "part": part}),
                    (1, {**pair, "panel": 4, "part": part}),
                    (2, {**pair, "panel": 4, "part": part}),
                    (1, {**pair, "panel": 4, "x_rounds": 2, "part": 2, **kept}),
                    (1, {**wide, "panel": 4, "part": 2, "x_source": "streamed"}),
                    (1, {**pair, "panel": 4, "part": 2, "x_source": "streamed"}),
                ]
                if num_bits == 2:
                    out.append((1, {**wide, "panel": 4, "part": part, "register_steps": 0}))
                if num_bits == 3:
                    mixed = {**wide, "register_steps": 1, "wide_table": True}
                    out.append((1, {**mixed, "panel": 4, "part": part}))
                    out.append((1, {**mixed, "panel": 8, "part": 2, **kept}))
                twins = {**wide, "min_blocks": 2, "panel": 4, "part": min(part, 2)}
                out += [(1, twins), (1, {**twins, "x_source": "streamed"})]
            if gpu.has_bulk_copies:
                out.append(
                    (
                        1,
                        {
                            "num_warps": 8,
                            "panel": 4,
                            "part": part,
                            "tiles": tiles,
                            "stages": 3,
                            "cluster": 2,
                        },
                    )
                )
        out.append(
            (
                1,
                {
                    "num_warps": 16,
                    "min_blocks": 1,
                    "panel": 4,
                    "part": part,
                    "tiles": 7,
                    "stages": 2,
                },
            )
        )
    elif m <= 16:
        for tiles in (4, 2, 1):
            for stages in (2, 4):
                if tiles < 4 and not 0 < group_size < 128:
                    out.append(
                        (
                            1,
                            {
                                "num_warps": 16,
                                "min_blocks": 1,
                                "panel": 4,
                                "part": 1,
                                "tiles": tiles,
                                "stages": stages,
                                **kept,
                            },
                        )
                    )
                out.append(
                    (
                        1,
                        {
                            "num_warps": 8,
                            "min_blocks": 1,
                            "panel": 4,
                            "x_rounds": 2,
                            "part": 2,
                            "tiles": tiles,
                            "stages": stages,
                            **kept,
                        },
                    )
                )
    else:
        for tiles in (2, 1):
            for stages in (2, 4):
                narrow = {
                    "num_warps": 8,
                    "min_blocks": 1,
                    "part": 1 if 0 < group_size < 128 else 2,
                    "tiles": tiles,
                    "stages": stages,
                    **kept,
                }
                out += [(1, {**narrow, "panel": 2, "x_rounds": 2}), (1, {**narrow, "panel": 4})]
    for num_warps in (8, 4, 2):
        out.append(
            (
                1,
                {
                    "num_warps": num_warps,
                    "min_blocks": 1,
                    "panel": 1,
                    "part": 1,
                    "tiles": 1,
                    "stages": 3,
                    **kept,
                },
            )
        )
    return out
