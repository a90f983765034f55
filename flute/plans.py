"""The dispatcher: every way to multiply, and the one to use where nothing was tuned.

    tokens     1 .. 8           9 .. about 2048            more
    sm_90      decode kernel    batch kernel (wgmma)       batch kernel, about 2048 at a time;
                                                           8192 and more of short rows: dense
    others     decode kernel    mma kernel                 dense: dequantise slices, torch's matmul

A short product of up to 16 tokens is decoded too: there the other kernels' start counts. On sm_90
a tiny one of 256 tokens and more is dequantised.
`flute.tuning` looks up what was measured before it asks here. Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from flute import batch, candidates, mma
from flute.batch import BatchPlan
from flute.config import Gpu, Plan, Problem
from flute.mma import MmaPlan

DECODE_M = 16
"""Tokens of one launch of the decode kernel, where it is used for more than that."""
MAX_SPLIT_M = 96
"""Up to so many tokens, launches of 16 are worth a try while tuning: on 57344 x 8192 one takes 107
us, dequantising 746 us at M = 64 (4 bits, H200)."""
SLAB_M, _SLAB_BYTES = 2048, 32 << 20
"""Tokens of one launch of the batch kernel, where more come: so many, or as many as the L2 holds
beside the weight's slices (50 MB on an H200). All at once, blocks are at different tokens, and x
comes from memory: 57344 x 8192, 4 bits, 2,048 tokens .97 of cuBLAS's speed, 4,096 .95, 8,192 .89,
16,384 .83 (H200, 2026-11-22)."""
MAX_MMA_M = 2048
"""The same for the mma kernel, of GPUs that were not measured."""
_MANY, _MANY_K = 8192, 4096
"""From so many tokens on, products of so short rows are dequantised: 28672 x 4096, 8,192 tokens .92
of cuBLAS's speed instead of .91, 16,384 tokens .95 instead of .90. Not of longer ones: 57344 x 8192
.93 and .94 instead of .95 and .94, 8192 x 28672 .94 and .92 instead of 1.04 and 1.02 (4 bits, H200,
2026-11-22)."""
_TINY = 5e6
"""Weights of a product of which 256 tokens and more are faster dequantised and multiplied by torch
(1024 x 4096, H200)."""
_SHORT, _SHORT_MMA = 16e6, 24e6
"""Weights of a product whose 9 to 16 tokens are faster decoded, than by the batch kernel (4096 x
4096, 16 tokens: 7.9 us against 7.4) and by the mma kernel (8.4 against 9.9; 4 bits, H200,
2026-11-22)."""


@dataclass(frozen=True)
class DensePlan:
    """Dequantise a slice of the weight, multiply it with torch, next slice.

    Args:
        slice_bytes: most bytes of dequantised weight at a time.
    """

    slice_bytes: int = 64 << 20


@dataclass(frozen=True)
class SplitPlan:
    """Launches of so many tokens each, the last of the rest; each has a plan of its own.

    Args:
        tokens: of one launch.
    """

    tokens: int = DECODE_M


KernelPlan = Plan | BatchPlan | MmaPlan
AnyPlan = KernelPlan | DensePlan | SplitPlan


def plans_of(problem: Problem, gpu: Gpu) -> list[AnyPlan]:
    """Return the plans worth timing for a problem, the one to use untimed first.

    Args:
        problem: what is multiplied.
        gpu: where.
    """
    m = problem.m
    decoded: list[AnyPlan] = []
    if m <= 32:
        decoded += candidates.candidates(problem, gpu)
    batched: list[AnyPlan] = [*batch.candidates(problem, gpu)]
    rest: list[AnyPlan] = []
    short = _SHORT if batched else _SHORT_MMA
    if not batched:
        rest += [SplitPlan()] if DECODE_M < m <= MAX_SPLIT_M else []
        rest.append(DensePlan())
        batched += mma.candidates(problem, gpu) if m > 8 else []
    if m <= 8 or (m <= DECODE_M and problem.n * problem.k <= short):
        return [*decoded, *batched, *rest]
    if m < 256:
        return [*batched, *decoded, *rest]
    slices: list[AnyPlan] = [DensePlan(), DensePlan(32 << 20), DensePlan(16 << 20)]
    if problem.n * problem.k <= _TINY or (m > MAX_MMA_M and gpu.arch != "sm_90a"):
        return [*slices, *batched]
    slab = slab_tokens(m, problem.k)
    slabs: list[AnyPlan] = [SplitPlan(slab)] if slab < m else []
    if m >= _MANY and problem.k <= _MANY_K:
        return [*slices, *slabs, *batched]
    return [*slabs, *batched, *slices]


def slab_tokens(m: int, k: int) -> int:
    """Return the tokens of each of the equal launches that many tokens take on sm_90.

    Args:
        m: tokens.
        k: input features.
    """
    most = max(SLAB_M, _SLAB_BYTES // (2 * k))
    slabs = -(-m // (most + most // 4))  # a few more do no harm
    return m if slabs == 1 else -(-m // slabs // 256) * 256


def default_plan(problem: Problem, gpu: Gpu) -> AnyPlan:
    """Return the plan to use where nothing was tuned."""
    return plans_of(problem, gpu)[0]
