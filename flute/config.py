"""Describe one decode kernel and say which problems it can serve.

Owns the kernel's compile-time constants and the one statement of its constraints (`supports`).
Knows nothing of torch, compilation or launching; `flute.candidates` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from flute.kernel_order import CHUNK_K, TILE_N, padded_k

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHUNK_BYTES = {2: 256, 3: 384, 4: 512}
TABLE_BYTES = {2: 32768, 3: 30720, 4: 32768}
WIDE_TABLE_BYTES = 65536
ROW_TABLE_BYTES = {2: 13312, 3: 30720, 4: 65536}  # per tile
X_SOURCES = {"shared": 0, "global": 1, "registers": 2, "streamed": 3}
DTYPE_IDX = {"float16": 0, "bfloat16": 1, "float32": 2}
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class KernelConfig:
    """Compile-time shape of a decode kernel; the fields become constants of a generated struct."""

    num_bits: int = 4
    group_size: int = 128  # 0: the whole row
    dtype: str = "float16"
    scale_dtype: str = "float16"
    row_tables: bool = False
    row_buffers: int = 1  # with row_tables: 2 builds the next tile block's tables beside these
    block_tokens: int = 8  # M padded to 8, 16, 24 or 32
    num_warps: int = 8  # split K within a block
    panel: int = 4  # chunks of 64 k per ring slot
    tiles: int = 4  # tiles of 16 rows that share a panel of x
    stages: int = 3  # ring slots per warp
    cluster: int = 1  # blocks that split K
    part: int = 4  # chunks of a slot whose words are in registers at once
    register_steps: int = 0  # of the 8 steps of two chunks, so many are looked up in registers
    wide_table: bool = False  # 64 KB, fewer instructions for a lookup
    min_blocks: int = (
        2  # blocks per SM that registers must allow; 2 lets the next kernel start early
    )
    bulk: bool = True  # Hopper bulk copies; False: cp.async
    x_source: str = "shared"  # "global", "registers" or "streamed": see XSource in traits.cuh
    phased: bool = False  # more than one phase
    x_rounds: int = 1  # with x_source "registers": rounds of panels that cover K of a block

    def source(self) -> str:
        """Return the CUDA C++ text whose only instantiation is this kernel."""
        return f'#include "decode.cuh"\nstruct Config {{\n{constants_of(self)}}};\n'

    @property
    def slot_bytes(self) -> int:
        """Bytes of one ring slot: PANEL chunks and their scales."""
        units = 0 if self.group_size == 0 else max(1, self.panel * CHUNK_K // self.group_size)
        return (
            self.panel * CHUNK_BYTES[self.num_bits] + units * TILE_N * DTYPE_BYTES[self.scale_dtype]
        )

    @property
    def row_table_bytes(self) -> int:
        """Bytes that a tile's tables take with one table per row."""
        raw = TILE_N * (2 << self.num_bits) if self.row_buffers == 2 else 0
        return self.row_buffers * (ROW_TABLE_BYTES[self.num_bits] + raw)

    def x_stride(self, k: int) -> int:
        """Bytes between two tokens of x in shared memory: the largest share of K in a cluster."""
        panels = padded_k(k) // CHUNK_K // self.panel
        return -(-panels // self.cluster) * self.panel * CHUNK_K * 2 + 16

    def smem_bytes(self, m: int, k: int) -> int:
        """Dynamic shared memory of a block, in bytes; the same sum as decode.cuh's."""
        table = (
            self.tiles * self.row_table_bytes
            if self.row_tables
            else 0
            if self.register_steps == 8
            else WIDE_TABLE_BYTES
            if self.wide_table
            else TABLE_BYTES[self.num_bits]
        )
        ring = self.num_warps * self.stages * self.slot_bytes
        panels = -(-padded_k(k) // (CHUNK_K * self.panel) // self.cluster)
        num_barriers = (self.num_warps * self.stages if self.bulk else 0) + self.num_warps * -(
            -panels // self.num_warps
        )
        sums = self._partials(m)
        if self.x_source == "shared":
            sums += m * self.x_stride(k)
        elif self.x_source == "streamed":
            sums += self._x_chunk(m)
        elif self.x_source == "registers":  # before the sums, in their place
            sums = max(sums, self._x_chunk(m) * self.x_stage(m))
        return table + ring + -(-num_barriers // 2) * 16 + sums

    def x_stage(self, m: int) -> int:
        """Chunks of x that are staged at once on their way to registers."""
        if self.cluster > 1:  # sums that other ranks still read lie there
            return 1
        limit = max(self._partials(m) * 17 // 16, 20480)
        return next((s for s in (8, 4, 2) if s <= self.panel and self._x_chunk(m) * s <= limit), 1)

    def _x_chunk(self, m: int) -> int:
        return self.num_warps * min(m, 8) * 144

    def _partials(self, m: int) -> int:
        return 2 * (self.num_warps + (self.cluster > 1)) * min(m, 8) * (self.tiles * 16 + 4) * 4

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.num_warps * 32


def constants_of(config: DataclassInstance) -> str:
    """Return a kernel's shape as members of a struct, a line each.

    Args:
        config: dataclass of numbers, flags and names of dtypes or routes of x.
    """
    names = DTYPE_IDX | X_SOURCES
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        value = names.get(value, value) if isinstance(value, str) else value
        kind = "bool" if isinstance(value, bool) else "int"
        lines.append(f"  static constexpr {kind} {field.name} = {str(value).lower()};\n")
    return "".join(lines)


def kernel_group_size(group_size: int, k: int) -> int:
    """Return the group size as kernels mean it: 0 when a group is the whole row."""
    return 0 if group_size <= 0 or group_size >= k else group_size


def group_rule(group_size: int, k: int) -> str:
    """Return "" if kernels take groups of a size along K, else the rule that is broken.

    Args:
        group_size: as kernels mean it, see `kernel_group_size`.
        k: input features.
    """
    if k % 32 or (group_size and k % group_size):
        return f"K={k} must be a multiple of 32 and of group_size={group_size}"
    if group_size >= k:
        return f"group_size={group_size} is the whole row of K={k}: use kernel_group_size()"
    return ""


class Problem(NamedTuple):
    """One product: what of it decides which kernel serves it.

    Args:
        num_bits: 2, 3 or 4.
        group_size: as kernels mean it, see `kernel_group_size`.
        dtype: of x, bias and out: "float16" or "bfloat16".
        scale_dtype: "float16", "bfloat16" or "float32".
        row_tables: one table per row.
        m: tokens.
        n: output features.
        k: input features.
    """

    num_bits: int
    group_size: int
    dtype: str
    scale_dtype: str
    row_tables: bool
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Gpu:
    """What of a GPU decides which kernels run on it.

    Args:
        arch: compilation target.
        num_sms: multiprocessors.
        smem_bytes: shared memory that a block may have.
        name: the driver's, by which tuned plans are found; without it none are.
    """

    arch: str = "sm_90a"
    num_sms: int = 132
    smem_bytes: int = 232448
    name: str = ""

    @property
    def has_bulk_copies(self) -> bool:
        """Whether bulk copies, clusters and dependent launch exist (sm_90 and later)."""
        return int("".join(c for c in self.arch if c.isdigit())) >= 90


@dataclass(frozen=True)
class Plan:
    """A kernel and how to launch it: phases of K, blocks per SM."""

    config: KernelConfig
    phases: int = 1
    blocks_per_sm: int = 1


def supports(plan: Plan, m: int, n: int, k: int, gpu: Gpu) -> str:
    """Return "" if a plan can serve a problem on a GPU, else the rule it breaks.

    The only such statement.

    Args:
        plan: a kernel and how to launch it.
        m: tokens.
        n: output features.
        k: input features.
        gpu: where it will run.
    """
    c = plan.config
    chunks = padded_k(k) // CHUNK_K
    panels = -(-chunks // c.panel // c.cluster)
    if c.x_source not in X_SOURCES:
        return f"x_source={c.x_source!r} must be one of {', '.join(X_SOURCES)}"
    if not 1 <= m <= c.block_tokens:
        return f"M={m} must be 1 to block_tokens={c.block_tokens}"
    if broken := group_rule(c.group_size, k):
        return broken
    if chunks % c.panel:
        return f"K={k}, padded to {chunks * CHUNK_K}, must be a multiple of panel={c.panel} * 64"
    if (c.bulk and not gpu.has_bulk_copies) or (c.cluster > 1 and not c.bulk):
        return f"bulk copies and clusters need sm_90, not {gpu.arch}"
    if c.x_source == "registers" and -(-panels // plan.phases) > c.num_warps * c.x_rounds:
        return (
            f"{panels} panels in {plan.phases} phases exceed {c.num_warps} warps * "
            f"{c.x_rounds} rounds"
        )
    if c.x_source != "registers" and plan.phases != 1:
        return "phases need x in registers"
    if c.phased != (plan.phases > 1):
        return f"phased={c.phased} does not fit {plan.phases} phases"
    if (c.register_steps or c.wide_table) and c.row_tables:
        return "register_steps and wide_table need one table"
    if not 0 <= c.register_steps <= 8 or (c.num_bits == 2 and c.register_steps % 2):
        return f"register_steps={c.register_steps} must be 0 to 8, and even at 2 bits"
    if c.smem_bytes(m, k) > gpu.smem_bytes:
        return f"{c.smem_bytes(m, k)} bytes of shared memory exceed {gpu.smem_bytes}"
    return ""


def workspace_bytes(plan: Plan, m: int, n: int) -> int:
    """Bytes of scratch that a launch needs: fp32 sums between phases."""
    return 0 if plan.phases == 1 else 4 * m * n
