"""Describe one batch kernel (flute/kernels/batch.cuh) and say which problems it can serve.

Owns the kernel's compile-time constants and the one statement of its constraints (`supports`).
Knows nothing of torch, compilation or launching.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from flute.config import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    DTYPE_IDX,
    Gpu,
)
from flute.kernel_order import CHUNK_K, TILE_N, padded_k

BLOCK_N = 64
"""Rows of a wgmma: 4 tiles."""
_TABLE_BYTES = {2: 65536, 3: 16384, 4: 65536}
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
    panel: int = 4  # chunks of 64 k per stage
    batch: int = 2  # steps of 16 k that are multiplied at once
    buffers: int = 4  # batches whose fragments are in registers
    sum_buffers: int = 2  # with scale_sums: groups whose sums are in registers
    x_panel: int = 4  # chunks of x per stage
    stages: int = 2  # panels of weights in flight, per warp
    x_stages: int = 2  # stages of x in flight
    cluster: int = 1  # blocks that split K
    scale_sums: bool = True  # scales multiply sums, in fp32; else weights, which are rounded

    def source(self) -> str:
        """Return the CUDA C++ text whose only instantiation is this kernel."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("dtype", "scale_dtype"):
                value = DTYPE_IDX[value]
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"  static constexpr {kind} {field.name} = {str(value).lower()};")
        body = "\n".join(lines)
        return f'#include "batch.cuh"\nstruct Config {{\n{body}\n{self._wgmma()}}};\n'

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
        """Dynamic shared memory of a block, in bytes; the same sum as batch.cuh's."""
        warps = 4 * self.warpgroups
        x = self.x_stages * self.x_panel * self.tokens * 128
        table = warps * (128 << self.num_bits) if self.row_tables else _TABLE_BYTES[self.num_bits]
        slab = self.tokens if self.cluster > 1 or self.tokens < 32 else 32
        partials = self.warpgroups * slab * (BLOCK_N + 4) * 4
        barriers = warps * self.stages + 2 * self.x_stages + 2 * self.warpgroups
        return x + table + warps * self.stages * self.slot_bytes + partials + 8 * barriers

    @property
    def num_threads(self) -> int:
        """Threads of a block: the consumers and the producer's warpgroup."""
        return (self.warpgroups + 1) * 128


def supports(config: BatchConfig, n: int, k: int, gpu: Gpu) -> str:
    """Return "" if a kernel can serve a problem on a GPU, else the rule it breaks.

    The only such statement; any number of tokens will do.

    Args:
        config: the kernel.
        n: output features.
        k: input features.
        gpu: where it will run.
    """
    c = config
    if gpu.arch != "sm_90a":
        return f"wgmma needs sm_90a, not {gpu.arch}"
    if k % 32 or (c.group_size and k % c.group_size):
        return f"K={k} must be a multiple of 32 and of group_size={c.group_size}"
    if c.group_size >= k:
        return f"group_size={c.group_size} is the whole row of K={k}: use kernel_group_size()"
    if padded_k(k) // CHUNK_K // c.panel < c.cluster:
        return f"K={k} has fewer panels of {c.panel * CHUNK_K} than cluster={c.cluster} blocks"
    if c.smem_bytes > gpu.smem_bytes:
        return f"{c.smem_bytes} bytes of shared memory exceed {gpu.smem_bytes}"
    return ""
