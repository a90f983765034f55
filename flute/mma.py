"""Describe the mma kernels (flute/kernels/mma.cuh), say what they can serve, choose one.

Owns their compile-time constants, the one statement of their constraints (`supports`) and a model
of their cost, which orders the candidates. Knows nothing of torch, compilation or launching.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from flute.config import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    TABLE_BYTES,
    Gpu,
    Problem,
    constants_of,
    group_rule,
)
from flute.kernel_order import CHUNK_K, TILE_N, num_tiles, padded_k

TOKENS = (16, 32, 48, 64, 96, 128)
"""Sizes of a token tile that are compiled."""


@dataclass(frozen=True)
class MmaConfig:
    """Compile-time shape of an mma kernel; the fields become constants of a generated struct."""

    num_bits: int = 4
    group_size: int = 128  # 0: the whole row
    dtype: str = "float16"
    scale_dtype: str = "float16"
    row_tables: bool = False
    tokens: int = 16  # of a token tile
    warps_n: int = 8  # side by side along N
    warps_k: int = 1  # that share rows and split the chunks of a stage
    tiles: int = 2  # of a warp, 16 rows each
    chunks: int = 1  # of a stage, 64 k each
    stages: int = 4  # of x and weights: one in use, the others in flight
    ahead: bool = False  # look up a chunk ahead of its use; needs 3 stages
    min_blocks: int = 1  # blocks per SM that registers must allow
    scale_sums: bool = True  # scales multiply sums, in fp32; else weights, which are rounded

    def source(self) -> str:
        """Return the CUDA C++ text whose only instantiation is this kernel."""
        smem = f"  static constexpr int smem_bytes = {self.smem_bytes};\n"  # checked there
        return f'#include "mma.cuh"\nstruct Config {{\n{constants_of(self)}{smem}}};\n'

    @property
    def unit_tiles(self) -> int:
        """Tiles of 16 rows of a unit."""
        return self.warps_n * self.tiles

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage: x, weights and scales of CHUNKS chunks."""
        groups = 0 if self.group_size == 0 else max(1, self.chunks * CHUNK_K // self.group_size)
        scales = groups * TILE_N * DTYPE_BYTES[self.scale_dtype]
        weights = self.chunks * CHUNK_BYTES[self.num_bits]
        return self.chunks * self.tokens * 128 + self.unit_tiles * (weights + scales)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes; the same sum as mma_traits.cuh's."""
        row_tables = self.unit_tiles * (128 << self.num_bits)
        table = row_tables if self.row_tables else TABLE_BYTES[self.num_bits]
        partials = self.warps_k * 8 * (self.unit_tiles * TILE_N + 4) * 4
        return table + self.stages * self.stage_bytes + partials

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.warps_n * self.warps_k * 32


@dataclass(frozen=True)
class MmaPlan:
    """An mma kernel, and whether its pieces part units.

    Args:
        config: the kernel.
        parts: pieces of equal length, and a second launch that sums the parts of units; else
            pieces of whole units.
    """

    config: MmaConfig
    parts: bool = True


def supports(plan: MmaPlan, m: int, n: int, k: int, gpu: Gpu) -> str:
    """Return "" if a plan can serve a problem on a GPU, else the rule it breaks.

    The only such statement.

    Args:
        plan: a kernel.
        m: tokens, any number.
        n: output features.
        k: input features.
        gpu: where it will run.
    """
    c = plan.config
    if m < 1:
        return "no tokens"
    if c.tokens not in TOKENS:
        return f"tokens={c.tokens} must be one of {TOKENS}"
    if broken := group_rule(c.group_size, k):
        return broken
    if c.chunks not in (1, 2, 4) or c.chunks % c.warps_k:
        return f"chunks={c.chunks} must be 1, 2 or 4, and a multiple of warps_k={c.warps_k}"
    if c.warps_n * c.warps_k > 16:
        return f"warps_n={c.warps_n} * warps_k={c.warps_k} exceed 16 warps"
    if c.stages < 2 + c.ahead:
        return f"stages={c.stages}: one is filled while {1 + c.ahead} are used"
    if c.smem_bytes * c.min_blocks > gpu.smem_bytes - 1024 * (c.min_blocks - 1):
        return f"{c.min_blocks} * {c.smem_bytes} bytes of shared memory exceed {gpu.smem_bytes}"
    return ""


class Work(NamedTuple):
    """How a launch's work is cut; see mma.cuh.

    Args:
        row_blocks: of all ranges of rows.
        token_tiles: of all tokens.
        grain: steps that are not parted: 1, or those of a unit.
        pieces: blocks of the first launch.
        parted: units that borders between pieces part; a second launch sums their parts.
    """

    row_blocks: int
    token_tiles: int
    grain: int
    pieces: int
    parted: int


def work_of(plan: MmaPlan, m: int, n: int, k: int, gpu: Gpu, ends: tuple[int, ...] = ()) -> Work:
    """Return how a launch's work is cut.

    Args:
        plan: a kernel.
        m: tokens.
        n: output features.
        k: input features.
        gpu: where it runs.
        ends: where each range of rows with a table of its own ends; empty if there is one.
    """
    c = plan.config
    tile_ends = [0, *(num_tiles(end) for end in ends or (n,))]
    row_blocks = sum(
        -(-(end - begin) // c.unit_tiles) for begin, end in itertools.pairwise(tile_ends)
    )
    token_tiles = -(-m // c.tokens)
    steps = padded_k(k) // CHUNK_K // c.chunks
    grain = 1 if plan.parts else steps
    grains = row_blocks * token_tiles * (steps // grain)
    pieces = min(grains, gpu.num_sms * c.min_blocks)
    borders = (grains * i // pieces * grain for i in range(1, pieces))
    parted = len({b // steps for b in borders if b % steps})
    return Work(row_blocks, token_tiles, grain, pieces, parted)


def scratch_floats(plan: MmaPlan, work: Work) -> int:
    """Return the fp32 numbers that the parts of units take: two slots for each piece.

    Args:
        plan: a kernel.
        work: how its work is cut.
    """
    c = plan.config
    return 2 * work.pieces * c.tokens * c.unit_tiles * TILE_N if work.parted else 0


def sum_blocks(plan: MmaPlan, work: Work, gpu: Gpu) -> int:
    """Return how many blocks of the second launch share a unit.

    Args:
        plan: a kernel.
        work: how its work is cut, with units parted.
        gpu: where it runs.
    """
    c = plan.config
    rounds = -(-c.tokens * c.unit_tiles * TILE_N // 8 // (4 * c.num_threads))
    return max(1, min(rounds, gpu.num_sms // work.parted))


class _Rates(NamedTuple):
    """Of a multiprocessor.

    Args:
        mma: clocks of an mma.m16n8k16.
        dram: bytes of memory per clock.
        ghz: clocks per nanosecond.
    """

    mma: float
    dram: float
    ghz: float


# From the vendors' data sheets (A100, RTX 3090, RTX 4090, H200, B200, RTX 5090), but for mma on
# Hopper, where the model was fitted to 134 times (7 % off at the root of the mean square, H200).
_RATES = {
    "80": _Rates(2.0, 13.4, 1.41),
    "86": _Rates(8.0, 6.7, 1.7),
    "89": _Rates(8.0, 3.1, 2.5),
    "90": _Rates(2.0, 17.0, 1.9),
    "100": _Rates(2.0, 28.0, 1.9),
    "120": _Rates(8.0, 4.4, 2.4),
}
_LAUNCH_US, _SUM_US = 2.6, 5.0
"""Start and end of a launch, with its tables; the second launch, with nothing to sum."""
_STEP_CLOCKS = 170
"""Barrier, and reads that wait for it, of a step; half of it where 16 warps hide each other's, or a
warp has two chunks."""


def predicted_us(plan: MmaPlan, m: int, n: int, k: int, gpu: Gpu) -> float:
    """Return roughly how long a plan takes, to order candidates by.

    A step of a warp's tile (16 x 16 weights for all tokens of the tile) takes clocks of the tensor
    cores, of shared memory (lookups, words, x), of instruction slots and of memory; the busiest
    counts, and a quarter of the others.

    Args:
        plan: a kernel.
        m: tokens.
        n: output features.
        k: input features.
        gpu: where it runs.
    """
    c = plan.config
    rates = _RATES.get("".join(filter(str.isdigit, gpu.arch)), _RATES["80"])
    columns = c.tokens / 8
    lookups = 9.0 if c.row_tables else 4.0
    tensor = columns * rates.mma
    shared = lookups + c.num_bits / 4 + 2 * columns / c.tiles
    scaling = columns if c.scale_sums else 4.0 if c.dtype == c.scale_dtype else 24.0
    addresses = lookups / 2 if c.num_bits == 2 and not c.row_tables else lookups
    issue = (3.2 * addresses + columns + columns / 2 / c.tiles + scaling * (c.group_size > 0)) / 3
    memory = (32 * c.num_bits + 32 * c.tokens / c.unit_tiles / 4) / rates.dram
    parts = (tensor, shared, issue, memory)
    clocks = 0.75 * max(parts) + 0.25 * sum(parts)
    hidden = c.warps_n * c.warps_k > 8 or c.chunks > c.warps_k
    steps = padded_k(k) // CHUNK_K // c.chunks
    step_clocks = clocks * 4 * c.chunks * c.unit_tiles + _STEP_CLOCKS * (0.5 if hidden else 1)
    if c.ahead:
        step_clocks *= _ahead_factor(c)
    units = -(-n // (TILE_N * c.unit_tiles)) * -(-m // c.tokens)
    blocks = gpu.num_sms * c.min_blocks
    if not plan.parts or units % blocks == 0:
        return _LAUNCH_US + -(-units // blocks) * steps * step_clocks / rates.ghz / 1e3
    pieces = min(units * steps, blocks)
    us = _LAUNCH_US + _SUM_US + units * steps / pieces * step_clocks / rates.ghz / 1e3
    if units > 8 * blocks:
        us *= 1.15  # pieces are at other K and tokens, so less of what they read is shared
    # Two parts to a piece are written, and read again, at half of what the L2 gives.
    return us + 2 * c.tokens * c.unit_tiles * TILE_N * 4 / 16 / rates.ghz / 1e3


def _ahead_factor(c: MmaConfig) -> float:
    """What looking ahead makes of a step: 22 problems, H200 by FLUTE_BATCH=mma, 2026-11-22."""
    if c.tokens >= 48:
        return 0.96
    return 0.975 if c.warps_k == 1 or c.chunks == 4 else 1.04


def candidates(problem: Problem, gpu: Gpu) -> list[MmaPlan]:
    """Return the plans worth timing for a problem, the likeliest first; all satisfy `supports`.

    Args:
        problem: of any number of tokens.
        gpu: where it will run.
    """
    m, n, k = problem[-3:]
    plans = dict.fromkeys(plan for plan in _plans(problem, gpu) if not supports(plan, m, n, k, gpu))
    m = ranked_tokens(m)
    return sorted(plans, key=lambda plan: predicted_us(plan, m, n, k, gpu))  # stable


def ranked_tokens(m: int) -> int:
    """Return the tokens by whose cost plans are ordered: the next of those compiled ahead.

    So no number of tokens needs a kernel that `flute.prepare` has not compiled.
    """
    step = 8 if m <= 512 else 128
    return -(-m // step) * step


_SHAPES = {
    16: ((8, 2, 2, 2), (4, 4, 2, 4), (8, 1, 2, 2), (4, 2, 2, 2), (2, 4, 2, 4)),
    32: ((8, 2, 2, 2), (4, 4, 2, 4), (8, 1, 2, 2), (4, 2, 2, 2)),
    48: ((8, 1, 2, 1), (4, 2, 2, 2)),
    64: ((4, 2, 4, 2), (8, 1, 2, 1), (4, 2, 2, 2)),
    96: ((8, 1, 2, 1), (4, 2, 2, 2)),
    128: ((8, 1, 2, 1), (4, 2, 2, 2)),
}
"""Tokens of a tile -> warps_n, warps_k, tiles, chunks."""


def _plans(problem: Problem, gpu: Gpu) -> Iterator[MmaPlan]:
    num_bits, group_size, dtype, scale_dtype, row_tables, m, _, _ = problem
    base = MmaConfig(num_bits, group_size, dtype, scale_dtype, row_tables)
    short = 0 < group_size < 64
    for tokens in _token_tiles(m):
        for warps_n, warps_k, tiles, chunks in _SHAPES[tokens]:
            shape = replace(
                base,
                tokens=tokens,
                warps_n=warps_n,
                warps_k=warps_k,
                tiles=tiles,
                chunks=chunks,
                # Why: 16 warps have 128 registers each, too few for sums of 32 tokens twice.
                scale_sums=tokens <= (16 if warps_n * warps_k > 8 else 32),
            )
            for stages in (4, 3, 2):  # as many as fit
                config = replace(shape, stages=stages)
                if config.smem_bytes <= gpu.smem_bytes:
                    # Why: 16 warps have 128 registers each, 8 warps 255.
                    narrow = tokens > 16 and warps_n * warps_k > 8
                    wide = tiles > 2 and (row_tables or short or dtype != scale_dtype)
                    may = stages > 2 and not narrow and not wide
                    for ahead in (False, True) if may else (False,):
                        yield MmaPlan(replace(config, ahead=ahead))
                        yield MmaPlan(replace(config, ahead=ahead), parts=False)
                    break


def _token_tiles(m: int) -> tuple[int, ...]:
    """Sizes of a token tile worth a try."""
    least = next((t for t in TOKENS if t >= m), TOKENS[-1])
    return tuple(dict.fromkeys((least, *(t for t in (64, 96, 128) if m > 64))))
