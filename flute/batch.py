"""Describe the batch kernels (flute/kernels/batch.cuh), say what they can serve, choose one.

Owns their compile-time constants, the one statement of their constraints (`supports`) and a model
of their cost, which orders the candidates. Knows nothing of torch, compilation or launching.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flute.config import CHUNK_BYTES, DTYPE_BYTES, Gpu, Problem, constants_of, group_rule
from flute.kernel_order import CHUNK_K, TILE_N, padded_k

ENVIRONMENT = "FLUTE_BATCH"
"""Set to "mma", no batch kernel is used, so that the mma kernels can be tested on sm_90a."""
BLOCK_N = 64
"""Rows of a wgmma: 4 tiles."""
TOKENS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sizes of a token tile that are compiled."""
_TABLE_BYTES = {2: 65536, 3: 30720, 4: 65536}
_WGMMA_TYPES = {"float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class BatchConfig:
    """Compile-time shape of a batch kernel; the fields become constants of a generated struct."""

    num_bits: int = 4
    group_size: int = 128  # 0: the whole row
    dtype: str = "float16"
    scale_dtype: str = "float16"
    row_tables: bool = False
    tokens: int = 16  # of a token tile: n of wgmma
    warpgroups: int = 4  # consumers; each takes 64 rows
    panel: int = 4  # chunks of 64 k per stage of weights
    batch: int = 2  # steps of 16 k that are multiplied at once
    buffers: int = 4  # batches whose fragments are in registers
    sum_buffers: int = 2  # with scale_sums: groups whose sums are in registers
    x_panel: int = 4  # chunks of x per stage
    stages: int = 3  # panels of weights in flight, per warp
    x_stages: int = 3  # stages of x in flight
    cluster: int = 1  # blocks that split K
    scale_sums: bool = True  # scales multiply sums, in fp32; else weights, which are rounded
    split_k: bool = False  # warpgroups split K by panels; else each takes 64 rows of its own
    units: int = 1  # with split_k: 64-row blocks that are summed at a time
    register_steps: int = 0  # of the 8 steps of two chunks, so many are looked up in registers

    def source(self) -> str:
        """Return the CUDA C++ text whose only instantiation is this kernel."""
        smem = f"  static constexpr int smem_bytes = {self.smem_bytes};\n"  # checked there
        members = constants_of(self) + smem + self._wgmma()
        define = "#define FLUTE_RACECHECK\n" if os.environ.get("FLUTE_RACECHECK") else ""
        return f'{define}#include "batch.cuh"\nstruct Config {{\n{members}}};\n'

    def _wgmma(self) -> str:
        """Return the function for wgmma.mma_async of this many tokens: d += a * b."""
        count, kind = self.tokens // 2, _WGMMA_TYPES[self.dtype]
        sums = ", ".join(f"%{i}" for i in range(count))
        a = ", ".join(f"%{count + i}" for i in range(4))
        outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
        return (
            f"  static __device__ __forceinline__ void wgmma(float (&d)[{count}], const "
            "flute::u32 (&a)[4], flute::u64 b, int accumulate) {\n"
            f'    asm volatile("{{\\n\\t.reg .pred p;\\n\\tsetp.ne.b32 p, %{count + 5}, 0;\\n\\t"\n'
            f'        "wgmma.mma_async.sync.aligned.m64n{self.tokens}k16.f32.{kind}.{kind} '
            f'{{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0;\\n\\t}}"\n'
            f"        : {outputs}\n"
            '        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));\n  }\n'
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of one ring slot: PANEL chunks and their scales."""
        units = 0 if self.group_size == 0 else max(1, self.panel * CHUNK_K // self.group_size)
        weights = self.panel * CHUNK_BYTES[self.num_bits]
        return weights + units * TILE_N * DTYPE_BYTES[self.scale_dtype]

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes; the same sum as batch_traits.cuh's."""
        warps = 4 * self.warpgroups
        shares, groups = (self.warpgroups, 1) if self.split_k else (1, self.warpgroups)
        x = shares * self.x_stages * self.x_panel * self.tokens * 128
        tables = 4 * self.units if self.split_k else warps
        table = tables * (128 << self.num_bits) if self.row_tables else _TABLE_BYTES[self.num_bits]
        if self.tokens % 32 == 0 and not self.split_k:
            slab = 32
        else:
            slab = 16 if self.tokens > 32 or self.tokens % 16 == 0 else self.tokens
        partials = self.warpgroups * slab * (BLOCK_N + 4) * 4
        barriers = warps * self.stages + 2 * shares * self.x_stages + 2 * groups
        return x + table + warps * self.stages * self.slot_bytes + partials + 8 * barriers

    @property
    def num_threads(self) -> int:
        """Threads of a block: the consumers and the producer's warpgroup."""
        return (self.warpgroups + 1) * 128


@dataclass(frozen=True)
class BatchPlan:
    """A batch kernel; how it is launched follows from the problem and the GPU."""

    config: BatchConfig


def supports(plan: BatchPlan, m: int, n: int, k: int, gpu: Gpu) -> str:
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
    if gpu.arch != "sm_90a":
        return f"wgmma needs sm_90a, not {gpu.arch}"
    if os.environ.get(ENVIRONMENT) == "mma":
        return f"{ENVIRONMENT}=mma"
    if m < 1:
        return "no tokens"
    if c.tokens not in TOKENS:
        return f"tokens={c.tokens} must be one of {TOKENS}"
    if c.warpgroups not in _BUSY:
        return f"warpgroups={c.warpgroups} must be one of {tuple(_BUSY)}"
    if broken := group_rule(c.group_size, k):
        return broken
    if padded_k(k) // CHUNK_K // c.panel < c.cluster:
        return f"K={k} has fewer panels of {c.panel * CHUNK_K} than cluster={c.cluster} blocks"
    if not 0 <= c.register_steps <= 8 or (c.num_bits == 2 and c.register_steps % 2):
        return f"register_steps={c.register_steps} must be 0 to 8, and even at 2 bits"
    if c.register_steps and c.row_tables:
        return "register_steps need one table"
    if c.split_k and c.x_stages <= c.panel // c.x_panel:
        return f"x_stages={c.x_stages} hold one panel of x, and none is on its way"
    if c.stages < 2 or c.x_stages < 2:
        return "a stage is filled while another is used"
    if c.smem_bytes > gpu.smem_bytes:
        return f"{c.smem_bytes} bytes of shared memory exceed {gpu.smem_bytes}"
    return ""


def num_clusters(config: BatchConfig, m: int, n: int, num_sms: int) -> int:
    """Return how many clusters to launch.

    Args:
        config: the kernel.
        m: tokens.
        n: output features.
        num_sms: multiprocessors.
    """
    units = -(-n // BLOCK_N) * -(-m // config.tokens)
    return max(1, min(units, _most_clusters(config.cluster, num_sms)))


def _most_clusters(cluster: int, num_sms: int) -> int:
    """Clusters that run at once.

    Why fewer than num_sms / cluster: a cluster lies in one GPC, whose 16 or 18 multiprocessors
    4 does not divide. Measured on an H200: 66, 30, 15. One too many would run alone at the end.
    """
    share = {1: 1.0, 2: 1.0, 4: 120 / 132, 8: 120 / 132}.get(cluster, 0.75)
    return int(num_sms * share) // cluster


# Model of a kernel's time (H200, fp16, group 128; such that the best of what `flute tune` timed on
# 33 shapes comes first, see `benchmarks/results/rule_h200.json`): microseconds that 1,000 k of 64
# rows take with all warpgroups busy, by tokens; and what 1, 2, ... busy ones take of that.
_UNIT_US = {8: 1.13, 16: 1.206, 24: 1.316, 32: 1.28, 48: 1.81, 64: 1.911} | {
    96: 2.394,
    128: 2.895,
    192: 4.166,
    256: 5.499,
}
_SPLIT_K_US = {8: 1.2, 16: 1.267, 24: 1.38, 32: 1.548, 48: 2.017, 64: 2.266}  # all always busy
_BUSY = {4: (1.674, 2.404, 3.55, 3.784), 3: (1.468, 2.241, 4.021), 2: (1.38, 2.17)}
_BUSY_WIDE = (1.617, 2.438, 3.744, 4.307)  # from 96 tokens on
_CLUSTER_US = {1: (0.0, 0.0), 2: (2.006, 0.041), 4: (2.809, 0.082), 8: (17.146, 0.027)}
"""A pass of a cluster, and more per token."""


def predicted_us(plan: BatchPlan, m: int, n: int, k: int, gpu: Gpu) -> float:
    """Return roughly how long a plan takes, to order candidates by.

    Args:
        plan: a kernel.
        m: tokens.
        n: output features.
        k: input features.
        gpu: where it runs.
    """
    c = plan.config
    tiles, blocks = -(-m // c.tokens), -(-n // BLOCK_N)
    units = -(-blocks * tiles // _most_clusters(c.cluster, gpu.num_sms))
    if c.split_k:
        panels = -(-padded_k(k) // CHUNK_K // c.panel // c.cluster)
        rounds = -(-panels // c.warpgroups) * c.warpgroups * c.panel * CHUNK_K
        passes = -(-units // c.units)
        exchange = 0.586 + 0.126 * c.tokens if c.cluster > 1 else 0.0
        more_x = 0.01 * max(0, m - c.tokens)
        each = exchange + rounds / 1000 * _SPLIT_K_US[c.tokens]
        return 1.5 + 0.48 * passes + more_x + units * each
    busy = _BUSY_WIDE if c.tokens >= 96 and c.warpgroups == 4 else _BUSY[c.warpgroups]
    full, rest = divmod(units, -(-units // c.warpgroups))
    passes = -(-units // c.warpgroups)
    share = rest * busy[full] if rest else 0.0
    share += (passes - rest) * busy[full - 1]
    exchange = _CLUSTER_US[c.cluster][0] + _CLUSTER_US[c.cluster][1] * c.tokens
    return 1.196 + exchange * passes + share * k / c.cluster / 1000 * _UNIT_US[c.tokens]


def candidates(problem: Problem, gpu: Gpu) -> list[BatchPlan]:
    """Return the plans worth timing for a problem, the likeliest first; all satisfy `supports`.

    Args:
        problem: of any number of tokens.
        gpu: where it will run.
    """
    m, n, k = problem[-3:]
    plans = dict.fromkeys(plan for plan in _plans(problem, gpu) if not supports(plan, m, n, k, gpu))
    return sorted(plans, key=lambda plan: predicted_us(plan, m, n, k, gpu))  # stable


def _plans(problem: Problem, gpu: Gpu) -> Iterator[BatchPlan]:
    num_bits, group_size, dtype, scale_dtype, row_tables, m, _, _ = problem
    base = BatchConfig(num_bits, group_size, dtype, scale_dtype, row_tables)
    short = 0 < group_size < 64
    if short:  # half as many scales are in registers
        base = replace(base, panel=2, x_panel=2)
    if group_size == 0:
        base = replace(base, sum_buffers=1)
    if row_tables:  # their lookups need more registers
        base = replace(base, buffers=2, sum_buffers=1)
    for cluster in (1, 2, 4, 8):
        for tokens in _token_tiles(m):
            shape = replace(base, tokens=tokens, cluster=cluster, scale_sums=tokens <= 32)
            steps = 0 if row_tables else _register_steps(num_bits, tokens)
            if tokens > 128:
                shapes = [replace(shape, warpgroups=2, x_panel=1)]
            elif tokens > 64:
                # Why: with 4 warpgroups, 128 tokens leave no registers for a cluster's sums.
                warpgroups = 3 if tokens == 128 and (cluster > 1 or short) else 4
                shapes = [replace(shape, warpgroups=warpgroups, buffers=2, x_panel=1)]
            elif tokens > 32:
                shapes = [replace(shape, x_panel=2)]
            elif short:
                shapes = [shape]
            else:
                plain = replace(shape, buffers=2, sum_buffers=1)
                shapes = [shape, replace(plain, batch=4), plain]
                if tokens > 16:  # 57344 x 8192, 2 bits, 32 tokens: 80.3 instead of 85.0 us
                    shapes = [shapes[1], shape, plain]
            if tokens <= 64 and cluster <= 2:
                yield from _split_k_plans(shape, gpu.smem_bytes)
            for fitted in shapes:
                for stages in (3, 2):  # as many as fit
                    config = replace(fitted, stages=stages)
                    if config.smem_bytes <= gpu.smem_bytes:
                        yield BatchPlan(replace(config, register_steps=steps))
                        yield BatchPlan(config)
                        break


def _register_steps(num_bits: int, tokens: int) -> int:
    """Steps of 8 to look up in registers, where warpgroups take rows of their own.

    57344 x 8192, us without and with (H200, fp16, group 128): 2 bits, 64 tokens 108.8 and 104.7,
    128 tokens 192 and 183; 3 bits, 128 tokens 204 and 189; 4 bits, 128 tokens 206 and 200. Where
    they split K there is no gain.
    """
    if num_bits == 4:
        return 2 if tokens >= 96 else 0
    return 4 if tokens == 32 or tokens >= 96 else 2


def _split_k_plans(base: BatchConfig, smem_bytes: int) -> Iterator[BatchPlan]:
    """Plans whose warpgroups split K, for one size of token tile and cluster."""
    tokens, lean = base.tokens, replace(base, buffers=2, sum_buffers=1)
    if tokens > 32 or base.row_tables:
        kinds = [lean]
    elif base.panel == 2:  # groups of 32
        kinds = [lean, replace(base, sum_buffers=1)]
    else:
        kinds = [replace(lean, batch=4), replace(base, sum_buffers=1 if tokens > 16 else 2)]
    for units in (1, 2) if base.cluster == 1 else (1,):
        for panel in (2,) if tokens > 32 or base.panel == 2 else (4, 2):
            for x_panel, stages, x_stages in (
                (panel, 3, 3),
                (panel, 3, 2),
                (panel, 2, 2),
                (panel // 2, 3, 3),
                (panel // 2, 2, 3),
            ):
                fitted = [
                    replace(
                        kind,
                        split_k=True,
                        units=units,
                        panel=panel,
                        x_panel=x_panel,
                        stages=stages,
                        x_stages=x_stages,
                    )
                    for kind in kinds
                ]
                if fitted[0].smem_bytes <= smem_bytes:
                    yield from map(BatchPlan, fitted)
                    break
            else:
                continue
            break


def _token_tiles(m: int) -> tuple[int, ...]:
    """Sizes of a token tile worth a try."""
    least = next((t for t in TOKENS if t >= m), 256)
    if m <= 64:
        return (least,)
    if m <= 128:
        return (least, 64)
    return (least, *(t for t in (256, 192, 128) if t != least))
